"""What a run says of its steps before the first one: what of its lanes could not be measured, and how long a step is predicted to take.

Where a machine file holds, one block of every class and the tail are timed first (`Session.time_templates`), once a run, also one that goes
on from a checkpoint. Predictions are finer by it, and which blocks are replayed as CUDA graphs is settled before the first step. Not timed:

* on a CPU, where a block's timing takes as long as a step's share of it, and nothing is launched apart;
* with `--compile`: templates are blocks as they are written, and compiled ones launch less and take less time;
* with `--serial`: every op is waited for there, so neither what a block takes nor what bounds it is what templates say.

A timing that fails ends no run: predictions are coarser, which one line says.
"""

from __future__ import annotations

from rich.console import Console

from overspill.cli.finetune import FinetuneOptions
from overspill.runtime.session import Session
from overspill.runtime.template_timing import LIMIT_S
from overspill.units import format_seconds


def show_forecast(session: Session, options: FinetuneOptions, console: Console) -> None:
    """Measure and time what predictions rest on, and print how long a step should take if a machine file holds.

    Raises:
        StorageError: the drive failed while its rates were measured.
    """
    for sentence in session.rates.notes:  # measured here, so that every step has its floor
        console.print(f"· {sentence}", highlight=False)
    if is_worth_timing(session, options):
        _time_blocks(session, console)
    if session.hardware.is_measured:
        expected = session.predict_plan()
        console.print(f"· predicted: {format_seconds(expected.step_s)} a step; {expected.source}", highlight=False)


def is_worth_timing(session: Session, options: FinetuneOptions) -> bool:
    """Whether blocks of this run will take what templates take, and launching them is worth timing (see above)."""
    return session.hardware.is_measured and session.device.type == "cuda" and not options.compile and not options.serial


def _time_blocks(session: Session, console: Console) -> None:
    console.print(f"· timing one block of each class and the tail, in about {LIMIT_S:.0f} s", highlight=False)
    try:
        times = session.time_templates(limit_s=LIMIT_S)
        failure = "" if times is not None else "the model cannot be described without its weights"
    except Exception as error:  # a finer prediction is worth no run
        failure = f"{type(error).__name__}: {error}"
    if failure:
        console.print(f"blocks could not be timed, so predictions are coarser: {failure}", style="yellow", soft_wrap=True, highlight=False)
