"""`overspill inspect MODEL`: what a micro-batch costs each class of units, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from overspill.cli.failures import failures_as_exit_codes


def inspect(
    model: Annotated[str, typer.Argument(help="Model folder (config.json is enough), or a hub name.", show_default=False)],
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 1024,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples of one forward and backward.")] = 1,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="What the model computes in.")] = "bfloat16",
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Whose kernels; it need not be here.")] = "cuda",
    masked: Annotated[bool, typer.Option("--masked", help="Samples are padded or packed, so that attention reads a mask.")] = False,
    saved: Annotated[bool, typer.Option("--saved", help="Also every tensor that autograd keeps of each class of blocks.")] = False,
    time: Annotated[
        bool, typer.Option("--time", help="Also measure one block of each class, in about 5 s. The device must be here.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the whole description to this file.", show_default=False)] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Show FLOPs, bytes and saved tensors of MODEL's units for one micro-batch. No weights are read.

    Exit codes: 0 done, 2 wrong input, 3 a file failed.
    """
    console = Console()
    with failures_as_exit_codes(Console(stderr=True), debug=debug):
        from overspill.huggingface.workload import describe_workload
        from overspill.report.workload import describe_workload_notes, saved_table, workload_table

        spec = describe_workload(model, seq_len=seq_len, micro_batch=micro_batch, dtype=dtype, device=device, is_masked=masked)
        times = None
        if time:
            from overspill.runtime.template_timing import time_templates

            times = time_templates(model, device=device, seq_len=seq_len, micro_batch=micro_batch, dtype=dtype, spec=spec)
        console.print(workload_table(spec, times))
        for item in spec.classes[1:-1] if saved else ():
            console.print(saved_table(item))
        for note in describe_workload_notes(spec, times):
            console.print(f"note: {note}", soft_wrap=True, highlight=False)
        if json is not None:
            json.write_text(spec.to_json() + "\n")
