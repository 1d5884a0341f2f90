"""`overspill checkpoint verify DIR` and `overspill checkpoint export DIR OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from overspill.cli.failures import failures_as_exit_codes

checkpoint = typer.Typer(name="checkpoint", help="Look at checkpoints, or take the model out of one.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(help="The run's --ssd-dir, or checkpoints/ in its --out.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


@checkpoint.command()
def verify(directory: Directory, debug: Debug = False) -> None:
    """Read every byte of every checkpoint in DIRECTORY and hold it against its checksums.

    Exit codes: 0 all are whole, 3 one is damaged or cannot be read.
    """
    with failures_as_exit_codes(Console(stderr=True), debug=debug):
        from overspill.checkpoint.export import verify_checkpoints
        from overspill.errors import StorageError

        console, damaged = Console(), []
        for what, problems in verify_checkpoints(directory):
            console.print(f"{what}: {'damaged' if problems else 'whole'}", soft_wrap=True, highlight=False)
            for problem in problems:
                console.print(f"  {problem}", soft_wrap=True, highlight=False)
            damaged += [what] if problems else []
        if damaged:
            raise StorageError(f"{len(damaged)} of the checkpoints in {directory} are damaged")


@checkpoint.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Argument(help="Model folder to write.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="The model that was trained, for tokenizer and generation settings.", show_default=False)
    ] = None,
    generation: Annotated[int | None, typer.Option(min=1, help="Which checkpoint; the newest.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Write the weights of a checkpoint as a model folder that `from_pretrained` loads.

    Exit codes: 0 done, 2 wrong input, 3 the checkpoint is damaged or a file failed.
    """
    with failures_as_exit_codes(Console(stderr=True), debug=debug):
        from overspill.checkpoint.export import export_checkpoint
        from overspill.huggingface.model_folder import find_model_folder

        folder = find_model_folder(model) if model is not None else None
        path, manifest = export_checkpoint(directory, out, model=folder, generation=generation)
        Console().print(f"saved the model of step {manifest.step} in {path}", soft_wrap=True, highlight=False)
