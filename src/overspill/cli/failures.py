"""Exit codes, and one red line for what a person can cure.

| code | meaning                                                                   |
|------|---------------------------------------------------------------------------|
| 0    | done                                                                      |
| 1    | a defect of this program: the traceback is printed                        |
| 2    | wrong input: flags, model folder, data, budgets (`ValueError`)            |
| 3    | the world failed: a drive, a file, memory (`OverspillError`, `OSError`)   |
| 4    | a loss or gradient is not finite (`NonFiniteError`)                       |
| 130  | interrupted                                                               |

A `ValueError` counts as wrong input only where our own code raised it; from a library's depths it is a defect.
`--debug` prints the traceback of everything.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from types import TracebackType

import typer
from rich.console import Console
from rich.text import Text

from overspill.errors import NonFiniteError, OverspillError


class ExitCode(enum.IntEnum):
    """How a command ended; see the table above."""

    OK = 0
    DEFECT = 1
    WRONG_INPUT = 2
    WORLD_FAILED = 3
    NOT_FINITE = 4
    INTERRUPTED = 130


@contextlib.contextmanager
def failures_as_exit_codes(console: Console, *, debug: bool) -> Iterator[None]:
    """Turn an exception of the block into its line and exit code."""
    try:
        yield
    except KeyboardInterrupt as error:
        if debug:
            console.print_exception()
        console.print(Text(f"interrupted: {error}" if str(error) else "interrupted", style="red"), soft_wrap=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    except Exception as error:
        code = exit_code_of(error)
        if code is ExitCode.DEFECT:
            raise
        if debug:
            console.print_exception()
        console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(code) from error


def exit_code_of(error: Exception) -> ExitCode:
    """Which row of the table an exception belongs to."""
    if isinstance(error, NonFiniteError):
        return ExitCode.NOT_FINITE
    if isinstance(error, (OverspillError, OSError)):
        return ExitCode.WORLD_FAILED
    if isinstance(error, ValueError) and _raised_by_us(error.__traceback__):
        return ExitCode.WRONG_INPUT
    return ExitCode.DEFECT


def _raised_by_us(traceback: TracebackType | None) -> bool:
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.split(".")[0] == "overspill"
