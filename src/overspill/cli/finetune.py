"""`overspill finetune MODEL DATA --out DIR`: the flags, and nothing but the flags (`training_run` does the work)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from overspill.cli.config_file import use_config_file
from overspill.cli.failures import failures_as_exit_codes
from overspill.spec.lifetime import DEFAULT_MIN_YEARS
from overspill.spec.retention import DEFAULT_ACTIVATIONS

TierChoice = Literal["auto", "device", "host", "ssd"]
ActivationChoice = Literal["auto", "recompute", "keep", "host", "ssd"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["auto", "bfloat16", "float32", "float16"]
StateFormat = Literal["fp32", "bf16", "int8"]
OptimizerName = Literal["adamw", "sgd", "lion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What the user asked for; each field is the flag of that name, sizes still as text."""

    model: str
    data: str
    out: Path
    steps: int | None = None
    epochs: int | None = None
    seq_len: int = 1024
    micro_batch: int = 1
    accumulate: int = 1
    lr: float = 2e-5
    warmup_steps: int = 0
    lr_schedule: Schedule = "linear"
    optimizer: OptimizerName = "adamw"
    beta1: float | None = None
    beta2: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.01
    clip: float | None = None
    dtype: Dtype = "auto"
    seed: int = 0
    parameters: TierChoice = "auto"
    states: TierChoice = "auto"
    boundaries: TierChoice = "auto"
    activations: ActivationChoice = DEFAULT_ACTIVATIONS
    state_format: StateFormat = "fp32"
    device: str = "auto"
    device_states: str | None = None
    deferred_updates: int | None = None
    device_budget: str | None = None
    host_budget: str | None = None
    pinned_budget: str | None = None
    ssd_budget: str | None = None
    ssd_dir: list[Path] | None = None
    """Several: striped over all of them."""
    ssd_overwrite: list[Path] | None = None
    ssd_tbw: str | None = None
    ssd_years: float = DEFAULT_MIN_YEARS
    held_out: float = 0.0
    truncate: bool = False
    packing: bool = False
    blocks: bool = False
    eval_every: int | None = None
    split: str | None = None
    data_config: str | None = None
    fields: str | None = None
    stream: bool = False
    shuffle_buffer: int | None = None
    checkpoint_every: int | None = None
    keep: int = 1
    resume: bool = False
    discard_checkpoints: bool = False
    compile: bool = False
    cuda_graphs: bool = True
    serial: bool = False
    trace: Path | None = None
    trace_step: int | None = None
    machine: Path | None = None
    dry_run: bool = False


_DATA, _TRAINING, _PLACEMENT, _CHECKPOINTS, _TIMING = "Data", "Training", "Placement", "Checkpoints", "Timing"


def parse_place(text: str) -> Path:
    """A path that was really given: `--out "$UNSET"` must not mean the folder that the command runs in."""
    if not text:
        raise typer.BadParameter("an empty name, ''; name a folder, or leave the flag out")
    return Path(text)


def finetune(
    model: Annotated[str, typer.Argument(help="Model folder with safetensors, or a hub name.", show_default=False)],
    data: Annotated[
        str, typer.Argument(help="JSONL, JSON, CSV, text or Parquet; a folder of one kind; or a hub name.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(parser=parse_place, metavar="PATH", help="Folder for model/, plan.json and metrics.jsonl.", show_default=False)
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; instead of --epochs.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data; 1 if neither is given.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Most tokens of a sample.")] = 1024,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples of one forward and backward.", rich_help_panel=_TRAINING)] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches of one optimizer step.", rich_help_panel=_TRAINING)] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.", rich_help_panel=_TRAINING)] = 2e-5,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=_TRAINING)] = 0,
    lr_schedule: Annotated[Schedule, typer.Option(help="After the warm-up.", rich_help_panel=_TRAINING)] = "linear",
    optimizer: Annotated[OptimizerName, typer.Option(help="Lion wants a smaller --lr.", rich_help_panel=_TRAINING)] = "adamw",
    beta1: Annotated[float | None, typer.Option(help="Of adamw (0.9) or lion (0.9).", rich_help_panel=_TRAINING)] = None,
    beta2: Annotated[float | None, typer.Option(help="Of adamw (0.999) or lion (0.99).", rich_help_panel=_TRAINING)] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd; 0.", rich_help_panel=_TRAINING)] = None,
    nesterov: Annotated[bool, typer.Option("--nesterov/--no-nesterov", help="Of sgd with --momentum.", rich_help_panel=_TRAINING)] = False,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Not on norms and biases.", rich_help_panel=_TRAINING)] = 0.01,
    clip: Annotated[float | None, typer.Option(help="Bound on the gradient norm; updates wait.", rich_help_panel=_TRAINING)] = None,
    dtype: Annotated[Dtype, typer.Option(help="Compute; auto: float32 on a CPU, else bfloat16.", rich_help_panel=_TRAINING)] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of order, split and dropout.", rich_help_panel=_TRAINING)] = 0,
    parameters: Annotated[TierChoice, typer.Option(help="Where the parameters rest.", rich_help_panel=_PLACEMENT)] = "auto",
    states: Annotated[TierChoice, typer.Option(help="Where the optimizer states rest.", rich_help_panel=_PLACEMENT)] = "auto",
    boundaries: Annotated[TierChoice, typer.Option(help="Where hidden states between units rest.", rich_help_panel=_PLACEMENT)] = "auto",
    activations: Annotated[
        ActivationChoice, typer.Option(help="What blocks save for their backward: made again, or kept there.", rich_help_panel=_PLACEMENT)
    ] = DEFAULT_ACTIVATIONS,
    state_format: Annotated[
        StateFormat, typer.Option(help="Numbers of the optimizer states: less memory, rounded.", rich_help_panel=_PLACEMENT)
    ] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=_PLACEMENT)] = "auto",
    device_states: Annotated[
        str | None, typer.Option(help="Optimizer states on the device at most, first units first.", rich_help_panel=_PLACEMENT)
    ] = None,
    deferred_updates: Annotated[
        int | None, typer.Option(help="Blocks whose update runs under the next forward; takes host memory.", rich_help_panel=_PLACEMENT)
    ] = None,
    device_budget: Annotated[str | None, typer.Option(help="Device memory to use, such as 8GiB.", rich_help_panel=_PLACEMENT)] = None,
    host_budget: Annotated[str | None, typer.Option(help="Host memory of the whole process.", rich_help_panel=_PLACEMENT)] = None,
    pinned_budget: Annotated[
        str | None, typer.Option(help="Page-locked host memory at most; the rest is pageable.", rich_help_panel=_PLACEMENT)
    ] = None,
    ssd_budget: Annotated[str | None, typer.Option(help="Room to use in --ssd-dir.", rich_help_panel=_PLACEMENT)] = None,
    ssd_dir: Annotated[
        list[Path] | None,
        typer.Option(
            parser=parse_place,
            metavar="PATH",
            help="Folder on a local drive, or a block device, for the SSD tier; repeatable.",
            rich_help_panel=_PLACEMENT,
        ),
    ] = None,
    ssd_overwrite: Annotated[
        list[Path] | None, typer.Option(help="A block device of --ssd-dir whose content may be lost.", rich_help_panel=_PLACEMENT)
    ] = None,
    ssd_tbw: Annotated[
        str | None, typer.Option(help="Rated endurance of each drive, such as 600TB; else SMART is asked.", rich_help_panel=_PLACEMENT)
    ] = None,
    ssd_years: Annotated[
        float, typer.Option(min=0.0, help="Warn if the drive's rated life would end sooner.", rich_help_panel=_PLACEMENT)
    ] = DEFAULT_MIN_YEARS,
    held_out: Annotated[
        float, typer.Option(min=0.0, help="Samples set aside for evaluation: a count, or a share below 1.", rich_help_panel=_DATA)
    ] = 0.0,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between held-out losses.", rich_help_panel=_DATA)] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate/--no-truncate", help="Cut longer samples instead of refusing them.", rich_help_panel=_DATA)
    ] = False,
    packing: Annotated[
        bool, typer.Option("--packing/--no-packing", help="Several samples in one row, kept apart.", rich_help_panel=_DATA)
    ] = False,
    blocks: Annotated[bool, typer.Option("--blocks/--no-blocks", help="Cut texts into rows of --seq-len.", rich_help_panel=_DATA)] = False,
    split: Annotated[str | None, typer.Option(help="Of a folder or hub name; train.", rich_help_panel=_DATA)] = None,
    data_config: Annotated[str | None, typer.Option(help="Configuration of a hub name.", rich_help_panel=_DATA)] = None,
    fields: Annotated[str | None, typer.Option(help="prompt=COLUMN,completion=COLUMN …", rich_help_panel=_DATA)] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Never hold the data set in memory.", rich_help_panel=_DATA)] = False,
    shuffle_buffer: Annotated[int | None, typer.Option(min=1, help="Rows, with --stream; 10000.", rich_help_panel=_DATA)] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_CHECKPOINTS)] = None,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints kept; space is one more.", rich_help_panel=_CHECKPOINTS)] = 1,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the newest one.", rich_help_panel=_CHECKPOINTS)] = False,
    discard_checkpoints: Annotated[
        bool,
        typer.Option(
            "--discard-checkpoints/--no-discard-checkpoints", help="Delete those of an earlier run.", rich_help_panel=_CHECKPOINTS
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Let torch.compile fuse the blocks' work; other roundings.", rich_help_panel=_TIMING),
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="Launch small blocks as one; the same bits.", rich_help_panel=_TIMING)
    ] = True,
    serial: Annotated[
        bool,
        typer.Option(
            "--serial/--no-serial", help="One op after the other, nothing overlaps: the same losses, slower.", rich_help_panel=_TIMING
        ),
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="File for what ran when in one step, for ui.perfetto.dev.", rich_help_panel=_TIMING)
    ] = None,
    trace_step: Annotated[int | None, typer.Option(min=1, help="Which step; the last.", rich_help_panel=_TIMING)] = None,
    machine: Annotated[
        Path | None,
        typer.Option(
            parser=parse_place,
            metavar="FILE",
            help="Predict from this file of `overspill probe`, not from the cache's.",
            rich_help_panel=_TIMING,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run/--no-dry-run", help="Only say whether it fits, where everything goes and how long a step takes; reads no weights."
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these; the command line wins.", is_eager=True, callback=use_config_file),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug/--no-debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Fine-tune all parameters of MODEL on DATA.

    Exit codes: 0 done (dry run: it fits), 2 wrong input, 3 a drive, file or memory failed, 4 loss or gradient not finite, 130 interrupted.
    """
    flags = {name: value for name, value in locals().items() if name not in ("debug", "config")}
    with failures_as_exit_codes(Console(stderr=True), debug=debug):
        if dry_run:  # torch and transformers load here, so that --help is quick
            from overspill.cli.dry_run import run_dry as run
        else:
            from overspill.cli.training_run import run_finetune as run

        run(FinetuneOptions(**flags), Console())
