"""`--trace` and `--trace-step`: which step's trace is written, and when."""

from __future__ import annotations

from rich.console import Console

from overspill.cli.finetune import FinetuneOptions
from overspill.errors import StorageError
from overspill.runtime.session import Session
from overspill.spec.report import StepReport


def validate_trace_options(options: FinetuneOptions) -> None:
    """Refuse what could not be written.

    Raises:
        ValueError: with the flag and the cure.
    """
    if options.trace is None:
        if options.trace_step is not None:
            raise ValueError(f"--trace-step {options.trace_step} has no effect without a file for the trace; give --trace FILE too")
        return
    folder = options.trace.absolute().parent
    if not folder.is_dir() and folder != options.out.absolute():
        raise ValueError(f"--trace {options.trace}: there is no folder {folder}; make it, or name another file")


def validate_trace_step(options: FinetuneOptions, num_steps: int) -> None:
    """Refuse a step that will not be made.

    Raises:
        ValueError: with both numbers.
    """
    if (options.trace_step or 0) > num_steps:
        raise ValueError(f"--trace-step {options.trace_step} is behind the last step, {num_steps}; give one of 1 to {num_steps}")


def export_if_chosen(
    session: Session, options: FinetuneOptions, console: Console, report: StepReport, num_steps: int, *, will_stop: bool
) -> None:
    """Write the trace if this is the step of `--trace-step`, or without it the last one; a drive without room does not end a run.

    Args:
        will_stop: somebody asked the run to stop after this step.
    """
    is_last = will_stop or report.step == num_steps
    if options.trace is None or not (is_last if options.trace_step is None else report.step == options.trace_step):
        return
    try:
        text = f"trace of step {report.step}: {session.export_trace(options.trace)}; open it in ui.perfetto.dev"
    except StorageError as error:
        text = str(error)
    except Exception as error:  # the model is not saved yet, and worth more than a picture
        text = f"no trace of step {report.step}: {type(error).__name__}: {error}"
    console.print(text, soft_wrap=True, highlight=False)
