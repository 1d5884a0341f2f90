"""Claims about --optimizer, --state-format and what belongs to them, and about the benchmark that compares formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from overspill.checkpoint import read_latest
from overspill.cli.failures import ExitCode
from overspill.spec.update_rule import SGD, AdamW, Lion

Run = Callable[..., Result]
SHORT = ("--steps", 2, "--micro-batch", 4, "--checkpoint-every", 2)


@pytest.mark.parametrize(
    ("flags", "optimizer", "state_format"),
    [
        ((), AdamW(lr=2e-5, weight_decay=0.01), "fp32"),
        (("--beta2", 0.95, "--state-format", "int8"), AdamW(lr=2e-5, betas=(0.9, 0.95), weight_decay=0.01), "int8"),
        (
            ("--optimizer", "sgd", "--momentum", 0.9, "--nesterov", "--weight-decay", 0, "--state-format", "bf16"),
            SGD(lr=2e-5, momentum=0.9, nesterov=True),
            "bf16",
        ),
        (("--optimizer", "lion", "--beta1", 0.95), Lion(lr=2e-5, betas=(0.95, 0.99), weight_decay=0.01), "fp32"),
    ],
)
def test_the_flags_are_the_optimizer_and_the_format_of_the_run(
    run: Run, tmp_path: Path, flags: tuple, optimizer: object, state_format: str
) -> None:
    done = run(*SHORT, *flags)
    assert done.exit_code == 0, done.output
    manifest = read_latest(tmp_path / "out" / "checkpoints")
    assert manifest.optimizer == optimizer
    assert (manifest.plan.optimizer, manifest.plan.state_format) == (manifest.optimizer.kind, state_format)


def test_a_run_goes_on_with_its_own_optimizer_only(run: Run) -> None:
    assert run("--steps", 2, "--checkpoint-every", 1, "--optimizer", "lion").exit_code == 0
    refused = run("--steps", 2, "--checkpoint-every", 1, "--optimizer", "sgd", "--resume")
    assert refused.exit_code == ExitCode.WRONG_INPUT and "lion" in refused.output and "sgd" in refused.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--momentum", 0.9), "--momentum has no effect on --optimizer adamw; leave it out, or use sgd"),
        (("--optimizer", "lion", "--nesterov"), "--nesterov has no effect on --optimizer lion"),
        (("--optimizer", "sgd", "--beta1", 0.9), "--beta1 has no effect on --optimizer sgd"),
        (("--optimizer", "sgd", "--nesterov"), "nesterov needs a momentum"),
        (("--beta2", 1.5), "beta2 must be at least 0 and below 1, got 1.5"),
        (("--state-format", "int8", "--dtype", "float16"), "no layout for parameters of float16"),
    ],
)
def test_flags_that_cannot_apply_are_refused(run: Run, flags: tuple, words: str) -> None:
    refused = run("--steps", 1, *flags)
    assert refused.exit_code == ExitCode.WRONG_INPUT
    assert words in " ".join(refused.output.split())
