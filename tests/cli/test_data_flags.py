"""Claims about the data flags of `overspill finetune`, its `--config` file, `--eval-every` and its last lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from overspill.cli import app
from overspill.cli.failures import ExitCode

Run = Callable[..., Result]


def metrics(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def losses(tmp_path: Path) -> list[float]:
    return [row["loss"] for row in metrics(tmp_path)]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_packed_rows_train_on_every_sample_in_fewer_positions(run: Run, tmp_path: Path) -> None:
    assert run("--epochs", 1, "--micro-batch", 40, "--lr", 1e-3).exit_code == 0  # one step over all samples
    (apart,) = metrics(tmp_path)
    result = run("--epochs", 1, "--micro-batch", 40, "--lr", 1e-3, "--packing", "--seq-len", 64)
    assert result.exit_code == 0, result.output
    (packed,) = metrics(tmp_path)
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(apart["grad_norm"], rel=1e-4)
    assert packed["tokens"] == 5 * 64 and apart["tokens"] == 40 * 8
    assert "40 samples (199 targets) to train, 0 held out, packed into 5 rows of 64 (87.2% full)" in result.output
    assert "1 steps of 1 × 40 rows" in result.output


def test_packing_is_refused_before_data_is_read_where_it_would_not_be_exact(run: Run, tmp_path: Path, model_folder: Path) -> None:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=4, word_embed_proj_dim=32
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "opt" / name).write_bytes((model_folder / name).read_bytes())
    result = run("--packing", model=tmp_path / "opt", data=tmp_path / "nothing.jsonl")
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert "packing is not known to be exact for opt" in result.stderr


def test_a_stream_trains_in_bounded_rows_and_holds_out_its_first(run: Run, tmp_path: Path) -> None:
    flags = ("--steps", 12, "--stream", "--shuffle-buffer", 8, "--held-out", 4, "--micro-batch", 4, "--seq-len", 16, "--lr", 1e-2)
    result = run(*flags)
    assert result.exit_code == 0, result.output
    assert "streamed, shuffled within 8 rows, the first 4 held out" in result.output
    first = losses(tmp_path)
    assert first[-1] < first[0]
    assert run(*flags).exit_code == 0
    assert losses(tmp_path) == first


def test_running_text_is_trained_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for part in range(2):
        (tmp_path / "corpus" / f"{part}.txt").write_text("".join(f"w{(i + part) % 20}\n" for i in range(300)))
    result = run("--epochs", 1, "--seq-len", 32, "--micro-batch", 4, "--held-out", 0.2, "--lr", 1e-2, data=tmp_path / "corpus")
    assert result.exit_code == 0, result.output
    # 2 x 301 tokens in blocks of 32 that share one: 10 each, 2 x 300 targets.
    assert "16 samples" in result.output and "4 held out" in result.output and "4 steps of" in result.output


def test_eval_every_writes_held_out_losses_and_changes_no_training_loss(run: Run, tmp_path: Path) -> None:
    flags = ("--steps", 5, "--micro-batch", 4, "--lr", 1e-2, "--held-out", 8, "--clip", 1.0)
    assert run(*flags).exit_code == 0
    plain = losses(tmp_path)
    result = run(*flags, "--eval-every", 2)
    assert result.exit_code == 0, result.output
    rows = metrics(tmp_path)
    assert [row["loss"] for row in rows] == plain
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4]
    assert f"step 4/5 · loss {rows[3]['loss']:.4f} · held-out {rows[3]['held_out_loss']:.4f} ·" in result.output
    assert f"step 5/5 · loss {rows[4]['loss']:.4f} · held-out {rows[3]['held_out_loss']:.4f} at 4 ·" in result.output


def test_the_last_lines_say_what_was_reached_and_where_it_is(run: Run, tmp_path: Path) -> None:
    result = run("--steps", 2, "--held-out", 8, "--lr", 1e-2, "--micro-batch", 16)
    last = result.output[result.output.index("done: 2 steps") :].splitlines()
    first_loss, last_loss = losses(tmp_path)
    assert last[1] == f"training loss: {first_loss:.4f} at the first step, {last_loss:.4f} at the last"
    assert last[2].startswith("held-out loss after:  ")
    assert str(tmp_path / "out" / "model") in last[3] and "from_pretrained" in last[3]
    assert "metrics.jsonl" in last[4] and "run.yaml" in last[4]


# -- the config file ------------------------------------------------------------------------------------------------------


def test_a_config_file_gives_every_flag_and_the_command_line_wins(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model_folder}\ndata: {data_file}\nout: {tmp_path / 'out'}\ndevice: cpu\nsteps: 9 # wins not\n"
        "lr: 1e-2\nmicro-batch: 4\nwarmup_steps: 1\nlr-schedule: constant\npacking: true\nclip: null\nseq-len: 64\n"
    )
    result = invoke("--config", config, "--steps", 2)
    assert result.exit_code == 0, result.output
    rows = metrics(tmp_path)
    assert [row["lr"] for row in rows] == [pytest.approx(1e-2)] * 2
    assert "2 steps of 1 × 4 rows" in result.output
    first = losses(tmp_path)
    # The run wrote its own flags down, and they repeat it.
    assert invoke("--config", tmp_path / "out" / "run.yaml").exit_code == 0
    assert losses(tmp_path) == first


def test_a_flag_that_a_config_file_sets_can_be_unset_on_the_command_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("packing: true\ntruncate: true\nsteps: 1\nmicro-batch: 2\n")
    assert "× 2 rows" in run("--config", tmp_path / "run.yaml").output
    assert "× 2 samples" in run("--config", tmp_path / "run.yaml", "--no-packing").output
    result = run("--config", tmp_path / "run.yaml", "--no-packing", "--no-truncate", "--seq-len", 4)
    assert result.exit_code == ExitCode.WRONG_INPUT and "cut them with --truncate" in result.stderr


def test_every_flag_that_is_yes_or_no_has_both_forms() -> None:
    parameters = get_command(app).commands["finetune"].params  # type: ignore[attr-defined]
    flags = {parameter.opts[0]: parameter.secondary_opts for parameter in parameters if getattr(parameter, "is_flag", False)}
    names = ["nesterov", "truncate", "packing", "blocks", "stream", "resume", "discard-checkpoints", "debug"]
    names += ["compile", "cuda-graphs", "dry-run", "serial"]
    assert flags == {f"--{name}": [f"--no-{name}"] for name in names}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("micro-bach: 4\n", "unknown key 'micro-bach'; the nearest is 'micro-batch'"),
        ("held_outs: 4\n", "unknown key 'held_outs'; the nearest is 'held-out'"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("steps: 1\nsteps: 2\n", "'steps' stands there twice; leave one out"),
        ("micro-batch: 1\nmicro_batch: 2\n", "'micro-batch' stands there twice"),
        ("lr: [1, 2]\n", "'lr' is a sequence, expected one value"),
        ("- lr\n", "is a YAML sequence, expected `flag: value` lines"),
        ("lr: 'a\n", "is no YAML"),
        ("steps: many\n", "Invalid value for '--steps'"),
        ("lr-schedule: step\n", "Invalid value for '--lr-schedule'"),
        ("packing: perhaps\n", "Invalid value for '--packing'"),
    ],
)
def test_a_wrong_config_file_ends_with_2_and_names_the_key(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = run("--config", tmp_path / "run.yaml")
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_config_file_or_argument_ends_with_2(run: Run, tmp_path: Path) -> None:
    result = run("--config", tmp_path / "none.yaml")
    assert (result.exit_code, "none.yaml: No such file" in result.stderr) == (ExitCode.WRONG_INPUT, True)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    result = invoke("--config", tmp_path / "empty.yaml")
    assert result.exit_code == ExitCode.WRONG_INPUT and "missing argument 'model'" in result.stderr.lower()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-every", 2], "--eval-every 2 has nothing to evaluate on; set samples aside with --held-out"),
        (["--stream", "--epochs", 1], "--stream does not know how long an epoch is; say how long to train with --steps"),
        (["--stream", "--steps", 1, "--held-out", 0.5], "--held-out 0.5 is a share of a number that a stream does not know"),
        (["--stream", "--steps", 1, "--held-out", 40], "--held-out 40 leaves none to train on"),
        (["--shuffle-buffer", 9], "--shuffle-buffer is for --stream"),
        (["--blocks", "--truncate"], "--blocks leaves no text out and --truncate cuts it off; give one"),
        (["--blocks"], "has no 'text'; --blocks cuts running text only"),
        (["--fields", "prompts=a"], "'prompts=a' is not FIELD=COLUMN"),
        (["--fields", "text=body"], "has no column 'body' to read as 'text'"),
        (["--split", "test"], "--split test is for folders and names on the hub"),
        (["--data-config", "en"], "--data-config en is for names on the hub"),
    ],
)
def test_data_flags_that_cannot_apply_end_with_2_and_say_the_cure(run: Run, flags: list[object], message: str) -> None:
    result = run(*flags)
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert message in result.stderr


# -- the page -------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_page_lists_every_exit_code() -> None:
    table = PAGE[PAGE.index("## Exit codes") :]
    assert re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE) == [str(int(code)) for code in ExitCode]


def test_the_page_names_only_flags_that_there_are() -> None:
    parameters = get_command(app).commands["finetune"].params  # type: ignore[attr-defined]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= known
