"""How a fine-tuning run ended: what it has seen, and what it says after its last step, or when it was stopped before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from overspill.cli.continuation import command_to_go_on, find_checkpoint
from overspill.cli.finetune import FinetuneOptions
from overspill.errors import StorageError
from overspill.report.lanes import describe_step_time, lane_table
from overspill.report.memory import host_peak_bytes
from overspill.report.prediction import comparison_table, describe_largest_miss, describe_other_replays
from overspill.report.tables import describe_pools
from overspill.runtime.session import Session
from overspill.spec.prediction import compare
from overspill.spec.report import Prediction, StepReport
from overspill.units import format_bytes, format_seconds

Predicted = tuple[StepReport, Prediction]
"""A step and what was predicted of it."""


@dataclasses.dataclass(kw_only=True)
class Course:
    """What a run has seen, for its summary."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the first and the last step, or of the only one."""
    num_tokens: int = 0
    training_s: float = 0.0
    """In steps, evaluation left out."""
    held_out: dict[int, float] = dataclasses.field(default_factory=dict)
    """Step -> loss over the held-out targets after it."""
    step: int = 0
    """Updates made; a step that was skipped (fp16 overflow) is tried again with the next batch."""
    num_skipped: int = 0

    @classmethod
    def from_checkpoint(cls, plain: dict[str, Any]) -> Course:
        """Read back what a checkpoint has; JSON's keys are text."""
        return cls(**{**plain, "held_out": {int(step): loss for step, loss in plain["held_out"].items()}})

    def add(self, report: StepReport) -> None:
        self.losses = [*self.losses[:1], report.loss]
        self.num_tokens += report.num_tokens
        self.training_s += report.step_s
        if report.skipped:
            self.num_skipped += 1
        else:
            self.step = report.step


def farewell(options: FinetuneOptions, step: int, num_steps: int, is_saved: bool) -> str:
    """How to go on after a stop that was asked for."""
    if is_saved:
        return f"stopped after step {step} of {num_steps}; its checkpoint is saved; go on with: {command_to_go_on(options)}"
    return f"stopped after step {step} of {num_steps}; nothing is saved, since no --checkpoint-every was given"


def farewell_while_paused(options: FinetuneOptions, step: int, num_steps: int) -> str:
    """The same for a stop during which nothing could be written."""
    text = f"stopped after step {step} of {num_steps}, while paused for want of space; "
    try:
        saved = find_checkpoint(options)[1].step
    except StorageError:
        return text + "there is no checkpoint to go on from"
    return text + f"the checkpoint of step {saved} is whole; make room, then go on with: {command_to_go_on(options)}"


def describe_resources(session: Session) -> tuple[str, ...]:
    """What the run took besides time: memory for slots, and life of the drive."""
    lines = [describe_pools(session.pool_reports())]
    if session.wear is not None:
        lines.append(f"SSD: {session.wear.summarize()}")
    return tuple(line for line in lines if line)


def show_last_step(console: Console, report: StepReport, predicted: Predicted | None, resources: Sequence[str]) -> tuple[str, ...]:
    """Tables of the last step and of the last prediction; the sentences to close with.

    Args:
        resources: `describe_resources`.
    """
    console.print(lane_table(report))
    if predicted is not None:
        prediction, comparison = predicted[1], compare(predicted[1], predicted[0])
        console.print(comparison_table(comparison, step=predicted[0].step))
        resources = (describe_largest_miss(comparison, prediction), describe_other_replays(prediction, predicted[0]), *resources)
    return tuple(line for line in (describe_step_time(report), *resources) if line)


def summarize(
    options: FinetuneOptions, console: Console, course: Course, num_steps: int, elapsed_s: float, resources: Sequence[str]
) -> None:
    """The last lines: what was reached, and where it is."""
    rate = course.num_tokens / course.training_s if course.training_s else 0.0
    lines = [
        f"done: {num_steps} steps, {course.num_tokens} tokens at {rate:.0f} tokens/s, {format_seconds(elapsed_s)} in all, "
        f"host peak {format_bytes(host_peak_bytes())}",
        f"training loss: {course.losses[0]:.4f} at the first step, {course.losses[-1]:.4f} at the last",
    ]
    if course.num_skipped:
        lines.append(f"{course.num_skipped} more steps were skipped, because fp16 gradients overflowed at their loss scale")
    if course.held_out:
        before, after = course.held_out[0], course.held_out[num_steps]
        lines.append(f"held-out loss after:  {after:.4f} ({after - before:+.4f})")
        best = min(course.held_out, key=course.held_out.__getitem__)
        if best != num_steps:
            lines.append(f"lowest held-out loss: {course.held_out[best]:.4f} after step {best}; what is saved is the last step's")
    lines.append(f"saved {options.out / 'model'} (with its tokenizer; AutoModelForCausalLM.from_pretrained reads it)")
    lines.append(f"also in {options.out}: metrics.jsonl (each step), plan.json, run.yaml (these flags, for --config)")
    lines.extend(resources)
    for text in lines:
        console.print(text, soft_wrap=True, highlight=False)
