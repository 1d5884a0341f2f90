"""`overspill inspect`: tables for people, a file for programs, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_config
from typer.testing import CliRunner

from overspill import WorkloadSpec, describe_workload
from overspill.cli import app


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    config = tiny_config("mixtral")
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def inspect(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_folder_with_nothing_but_a_config_is_described(config_folder: Path, tmp_path: Path) -> None:
    code, output = inspect(config_folder, "--seq-len", 12, "--micro-batch", 2, "--saved", "--json", tmp_path / "spec.json")
    assert code == 0, output
    for text in ("MixtralForCausalLM", "2 x 12 tokens in bfloat16", "model.layers.0", "mlp.experts", "are assumed to get 12 tokens each"):
        assert text in output, text
    assert WorkloadSpec.from_json((tmp_path / "spec.json").read_text()) == describe_workload(config_folder, seq_len=12, micro_batch=2)


def test_times_stand_beside_what_was_counted(config_folder: Path) -> None:
    code, output = inspect(config_folder, "--seq-len", 12, "--device", "cpu", "--dtype", "float32", "--time")
    assert code == 0 and "backward" in output and " ms" in output, output


def test_a_folder_without_a_config_is_one_line(tmp_path: Path) -> None:
    code, output = inspect(tmp_path)
    assert code == 2 and "has no config.json" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("null", "is no config transformers"),
        ('{"model_type": "llama", "quantization_config": "yes"}', "is no config transformers"),
        ('{"model_type": "llama", "hidden_size": "big"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 0}', "cannot build the llama model"),
        ('{"model_type": "t5"}', "model_type 't5' is of no causal language model"),
    ],
)
def test_a_config_that_transformers_trips_over_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    code, output = inspect(tmp_path)
    assert code == 2 and "error: " in output and reason in output.replace("\n", " ") and "Traceback" not in output, output
