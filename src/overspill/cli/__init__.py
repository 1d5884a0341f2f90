"""The command line: one file a verb, flags in, exit codes out (`failures`)."""

from __future__ import annotations

import typer

from overspill.cli.checkpoint import checkpoint
from overspill.cli.finetune import finetune
from overspill.cli.inspect import inspect
from overspill.cli.probe import probe

app = typer.Typer(
    name="overspill",
    help="Train language models that overspill the GPU, and even the RAM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(finetune)
app.command()(probe)
app.command()(inspect)
app.add_typer(checkpoint)


@app.callback()
def _verbs() -> None:
    """Train language models that overspill the GPU, and even the RAM."""
    # A callback keeps `finetune` a verb while it is the only one.


def main() -> None:
    """The entry point of the `overspill` command."""
    app()
