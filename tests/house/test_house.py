"""The house keeps its promises: cheap import, public names, examples and benchmarks that run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loaded_python import run_loaded
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_loaded(*arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_importing_overspill_imports_no_torch() -> None:
    done = run("-c", "import sys, overspill; overspill.AdamW, overspill.PlanRequest; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_every_public_name_is_there() -> None:
    import overspill

    for name in overspill.__all__:
        assert getattr(overspill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        overspill.Sesion  # noqa: B018


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*"abcdefghijklmnopqrstuvwxyz", "<pad>", "<eos>", "<unk>", " "]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_one_gpu_example_runs_small(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "abc" * (i % 3 + 1), "completion": "xyz"}) + "\n" for i in range(40)))
    done = run_benchmark(
        "examples/finetune_one_gpu.py", str(model_folder), str(data), str(tmp_path / "out"), str(tmp_path / "ssd"), "--steps", "2",
        "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held-out loss after" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_spine_benchmark_runs_small(tmp_path: Path) -> None:
    done = run_benchmark(
        "benchmarks/spine/train_llama.py", "--shape", "tiny", "--parameters", "ssd", "--states", "ssd", "--ssd-dir", str(tmp_path / "ssd"),
        "--samples", "1", "--seq-len", "32", "--steps", "2", "--dtype", "float32", "--out", str(tmp_path / "result.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["last_step"]["lane_bytes"]["ssd_write"] > 0


def test_the_pinned_benchmark_runs_small_and_stays_within_1_percent(tmp_path: Path) -> None:
    out = tmp_path / "pinned.json"
    done = run_benchmark("benchmarks/pinned/run.py", "--least", "4MiB", "--most", "16MiB", "--count", "5", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["ratio"]["overspill"]["max"] <= 1.01


def test_the_io_benchmark_runs_small(tmp_path: Path) -> None:
    done = run_benchmark(
        "benchmarks/io/run.py", str(tmp_path / "ssd"), "--size-gib", "0.0625", "--chunks-mib", "1", "8", "--in-flight-mib", "16",
        "--threads", "2", "--out", str(tmp_path / "result.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["results"]["threads"]["8 MiB"]["read"]["gb_per_s"] > 0 and result["results"]["plain"]["write"]["gb_per_s"] > 0
    assert list((tmp_path / "ssd").iterdir()) == []


def test_the_tree_names_no_machine_of_ours() -> None:
    """Code and documents are for everybody: no absolute paths of a developer's machine."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    forbidden = "/" + "work/"
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".sh", ".cpp", ".hpp", ".txt", ".json"}:
            assert forbidden not in path.read_text(encoding="utf-8"), name
