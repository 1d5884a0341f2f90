"""The benchmark of state formats: where masters start, runs side by side that go on where they were, and its verdicts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from loaded_python import run_loaded
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "benchmarks" / "formats"
sys.path.insert(0, str(FOLDER))

import starts  # noqa: E402
import verdicts  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama with fp32 weights, some on the bf16 grid, and a tokenizer of one token a word."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0} | {f"w{n}": n + 1 for n in range(39)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("start", starts.STARTS)
def test_every_start_rounds_to_the_same_bf16(start: str) -> None:
    master = torch.cat([torch.randn(100_000), 2.0 ** torch.arange(-126, 127), torch.tensor([0.0, -0.0, 1e-40, 3.4e38])])
    moved = starts.move_to_start("a", master, start, seed=0)
    assert torch.equal(moved.bfloat16(), master.bfloat16())
    on_grid = (moved == moved.bfloat16().float()).float().mean().item()
    assert {"file": on_grid < 0.02, "grid": on_grid == 1, "off-grid": on_grid < 0.02}[start]
    assert torch.equal(moved, starts.move_to_start("a", master, start, seed=0))


def test_offsets_are_uniform_in_the_cell_and_differ_from_tensor_to_tensor() -> None:
    master = torch.full((100_000,), 1.5)
    moved = starts.move_to_start("a", master, "off-grid", seed=0)
    places = (moved - 1.5) * 128  # in bf16 steps
    assert abs(places.mean()) < 0.005 and abs(places.std() - 12**-0.5) < 0.005 and places.abs().max() <= 0.5
    assert not torch.equal(moved, starts.move_to_start("b", master, "off-grid", seed=0))
    assert not torch.equal(moved, starts.move_to_start("a", master, "off-grid", seed=1))
    with pytest.raises(ValueError, match="one of file, grid, off-grid, got 'middle'"):
        starts.move_to_start("a", master, "middle", seed=0)


def test_a_model_folder_is_copied_with_its_weights_moved(model: Path, tmp_path: Path) -> None:
    assert starts.write_start(model, tmp_path / "x", "file") == model
    folder = starts.write_start(model, tmp_path / "grid", "grid")
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: tensor.bfloat16().float().tolist() for name, tensor in before.items()} == {n: t.tolist() for n, t in after.items()}
    assert {path.name for path in model.iterdir()} == {path.name for path in folder.iterdir()}


@pytest.fixture
def spread(model: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs the supervisor and its runs in processes of their own; what all have printed."""
    words = [[f"w{(7 * row + 3 * place) % 39}" for place in range(6)] for row in range(40)]
    rows = [{"prompt": " ".join(text[:3]), "completion": " ".join(text[3:])} for text in words]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*more: str, fails: str | None = None) -> str:
        arguments = [
            "--steps",
            "3",
            "--eval-every",
            "2",
            "--batch",
            "4",
            "--seq-len",
            "8",
            "--held-out",
            "8",
            "--jobs",
            "2",
            "--threads",
            "1",
        ]
        places = [FOLDER / "finetune_spread.py", model, tmp_path / "data.jsonl", "--out", tmp_path / "o.jsonl"]
        chosen = ["--formats", "fp32,bf16", "--seeds", "0", "--starts", "off-grid", *more]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = run_loaded(*places, *arguments, *chosen, env=environment)
        assert (done.returncode == 0) == (fails is None), done.stderr
        assert fails is None or re.search(fails, done.stderr), done.stderr
        return done.stdout

    return call


def test_runs_side_by_side_go_on_where_they_were(spread: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    assert "0 of 2 runs are complete" in spread("--deadline-s", "0") and not out.exists()
    assert "2 of 2 runs are complete" in spread()
    text = out.read_text()
    curves = {curve["key"]: curve for curve in map(json.loads, text.splitlines())}
    assert set(curves) == {"bfloat16:fp32:off-grid:0", "bfloat16:bf16:file:0"}
    for curve in curves.values():
        assert curve["is_complete"] and curve["steps"] == [0, 2, 3] and len(curve["training_losses"]) == 3
    first, second = curves.values()
    assert first["losses"][0] == second["losses"][0] and first["losses"][-1] != second["losses"][-1]  # one nearest bf16
    assert "2 of 2 runs are complete" in spread() and out.read_text() == text
    spread("--lr", "1e-3", fails=r"'lr': \(2e-05, 0.001\)")
    spread("--seeds", "1", "--formats", "fp32", "--device", "nowhere", fails="failed: bfloat16:fp32:off-grid:1")


def curve(state_format: str, seed: int, final: float, *, start: str = "file", is_complete: bool = True) -> dict[str, Any]:
    shared = {"dtype": "bfloat16", "state_format": state_format, "start": start, "seed": seed, "is_complete": is_complete}
    return {**shared, "losses": [3.0, final], "training_losses": [final + 0.5] * 60}


def test_a_format_is_judged_against_the_spread_of_fp32_from_each_start() -> None:
    lines = [curve("fp32", seed, 2.0 + 0.01 * seed) for seed in range(3)]
    lines += [curve("fp32", seed, 2.1 + 0.01 * seed, start="grid") for seed in range(3)]
    lines += [curve("bf16", seed, 2.001 + 0.01 * seed) for seed in range(3)]
    found = {verdict["fp32_start"]: verdict for verdict in verdicts.judge(lines)}
    assert found["file"]["is_inside"] and not found["grid"]["is_inside"]
    assert found["grid"]["paired_difference"] == pytest.approx(-0.099) and found["grid"]["paired_standard_error"] < 1e-9
    assert found["grid"]["early_difference"] == pytest.approx(-0.099)
    assert "OUTSIDE" in verdicts.describe(found["grid"]) and " inside " in verdicts.describe(found["file"])


def test_runs_that_were_cut_short_count_early_and_are_not_judged() -> None:
    lines = [curve("fp32", seed, 2.0, is_complete=seed < 2) for seed in range(3)] + [curve("int8", 0, 1.5, is_complete=False)]
    (verdict,) = verdicts.judge(lines)
    assert verdict["is_inside"] is None and verdict["early_difference"] == pytest.approx(-0.5)
    assert "not judged (0 runs, fp32 2 of at least 3)" in verdicts.describe(verdict)
