"""A tiny model folder with a tokenizer, a data file, and the command line as a person would call it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped folder must not wait for a network

import tokenizers
import transformers
from typer.testing import CliRunner, Result

from overspill.cli import app

NUM_WORDS = 60


@pytest.fixture(autouse=True, scope="session")
def short_looks() -> Iterator[None]:
    """Every run measures its lanes for a second; here one sample a figure does. `tests/runtime/test_trace.py` has them whole."""
    from overspill.probe.sampling import Sampling
    from overspill.runtime import rates

    before = rates.SAMPLING, rates.UPDATES
    rates.SAMPLING = rates.UPDATES = Sampling(least_s=0.02)
    yield
    rates.SAMPLING, rates.UPDATES = before


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama, and a tokenizer of one token a word that pads with its end-of-sequence token."""
    folder = tmp_path_factory.mktemp("model")
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(NUM_WORDS))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Forty samples in which a word is followed by the next one."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": " ".join(f"w{i + k}" for k in range(2, 5 + i % 3))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(model_folder: Path, data_file: Path, tmp_path: Path) -> Callable[..., Result]:
    """Calls `overspill finetune MODEL DATA --out OUT --device cpu` with more flags; `model` and `data` may be replaced."""

    def call(*flags: object, model: object = model_folder, data: object = data_file) -> Result:
        arguments = ["finetune", str(model), str(data), "--out", str(tmp_path / "out"), "--device", "cpu", *map(str, flags)]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})

    return call
