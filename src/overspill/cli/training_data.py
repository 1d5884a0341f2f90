"""From a run's options to its data: found, read or streamed, split, packed, and fed in steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from overspill.cli.finetune import FinetuneOptions
from overspill.errors import DataError
from overspill.huggingface.data import (
    MicroBatch,
    ResidentRows,
    StepFeed,
    build_micro_batches,
    read_samples,
    split_held_out,
    steps_per_epoch,
)
from overspill.huggingface.data_position import Setting
from overspill.huggingface.packing import Row, pack_samples, validate_packable
from overspill.huggingface.rows import DataSource, find_source, parse_fields
from overspill.huggingface.streaming import StreamedRows
from overspill.huggingface.tokenization import Sample
from overspill.huggingface.weights import open_checkpoint
from overspill.units import format_bytes

SHUFFLE_BUFFER = 10_000
"""Rows of `--shuffle-buffer` unless given: tens of MiB of ordinary text. Chosen, not tuned."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """What a run trains on and is evaluated on."""

    feed: StepFeed
    """Steps without end, and the position in them."""
    held_out: list[Sample]
    micro_batch: int
    """Samples of one forward in evaluation."""
    pad_token_id: int
    seq_len: int
    """Most positions of a row: the longest there is, or with a stream the longest allowed."""
    steps_per_epoch: int | None
    """None: a stream, whose length is not known."""
    description: str
    """For people."""
    notes: tuple[str, ...] = ()
    """What a person should know about the data."""

    def held_out_batches(self) -> list[MicroBatch]:
        """The held-out samples, one a row; their mean loss does not depend on how they are put together."""
        return list(build_micro_batches(self.held_out, micro_batch=self.micro_batch, pad_token_id=self.pad_token_id, seed=None))


def open_data(options: FinetuneOptions, folder: Path, tokenizer: Any) -> TrainingData:
    """The data of these options.

    Args:
        folder: of the model, to know whether rows may be packed.

    Raises:
        DataError: flags that cannot apply to this data, or data that cannot be used.
        UnsupportedModelError: `--packing` for an architecture for which it would not be exact.
    """
    validate_data_options(options)
    if options.packing:
        validate_packable(open_checkpoint(folder).config, seq_len=options.seq_len)
    source = find_source(
        options.data, split=options.split, config=options.data_config, stream=options.stream, fields=parse_fields(options.fields)
    )
    if source.is_running_text and options.truncate:
        raise DataError(f"--truncate cuts samples, and {source.name} is running text, of which nothing is left out; leave it out")
    return _stream(options, source, tokenizer) if options.stream else _read(options, source, tokenizer)


def validate_data_options(options: FinetuneOptions) -> None:
    """Refuse flags of the data that contradict each other.

    Raises:
        ValueError: with the flags and the cure.
    """
    if options.eval_every is not None and not options.held_out:
        raise ValueError(f"--eval-every {options.eval_every} has nothing to evaluate on; set samples aside with --held-out")
    if options.blocks and options.truncate:
        raise ValueError("--blocks leaves no text out and --truncate cuts it off; give one")
    if not options.stream:
        if options.shuffle_buffer is not None:
            raise ValueError("--shuffle-buffer is for --stream; without it the whole data set is shuffled")
        return
    if options.steps is None:
        raise ValueError("--stream does not know how long an epoch is; say how long to train with --steps")
    if options.held_out != int(options.held_out):
        raise ValueError(f"--held-out {options.held_out:g} is a share of a number that a stream does not know; give a count")


def _read(options: FinetuneOptions, source: DataSource, tokenizer: Any) -> TrainingData:
    samples = read_samples(source, tokenizer, seq_len=options.seq_len, truncate=options.truncate, blocks=options.blocks)
    training, held_out = split_held_out(samples, options.held_out, seed=options.seed)
    rows: list[Row] = [(sample,) for sample in training]
    lengths = [len(sample.input_ids) for sample in samples]
    targets = sum(sample.num_targets for sample in training)
    description = f"{len(training)} samples ({targets} targets) to train, {len(held_out)} held out"
    if options.packing:
        rows = pack_samples(training, seq_len=options.seq_len, seed=options.seed)
        lengths = [sum(len(sample.input_ids) for sample in row) for row in rows] + [len(sample.input_ids) for sample in held_out]
        full = sum(len(sample.input_ids) for sample in training) / (len(rows) * options.seq_len)
        description += f", packed into {len(rows)} rows of {options.seq_len} ({full:.1%} full)"
    settings: dict[str, Setting] = {"held-out": options.held_out}
    if options.packing:
        settings["seq-len"] = options.seq_len  # without packs, what it does shows in the samples' fingerprint
    return TrainingData(
        feed=_feed(options, ResidentRows(rows, seed=options.seed), tokenizer, settings),
        held_out=held_out,
        micro_batch=options.micro_batch,
        pad_token_id=_pad_token(tokenizer),
        seq_len=max(lengths),
        steps_per_epoch=steps_per_epoch(len(rows), micro_batch=options.micro_batch, accumulate=options.accumulate),
        description=description,
        notes=source.notes,
    )


def _stream(options: FinetuneOptions, source: DataSource, tokenizer: Any) -> TrainingData:
    buffer_rows = options.shuffle_buffer or SHUFFLE_BUFFER
    rows = StreamedRows(
        source,
        tokenizer,
        seq_len=options.seq_len,
        truncate=options.truncate,
        blocks=options.blocks,
        packing=options.packing,
        held_out=int(options.held_out),
        buffer_rows=buffer_rows,
        seed=options.seed,
    )
    settings: dict[str, Setting] = {
        "stream": True,
        "shuffle-buffer": buffer_rows,
        "held-out": int(options.held_out),
        "seq-len": options.seq_len,
        "truncate": options.truncate,
        "blocks": options.blocks,
    }
    size = f" ({format_bytes(sum(path.stat().st_size for path in source.files))})" if source.files else ""
    return TrainingData(
        feed=_feed(options, rows, tokenizer, settings),
        held_out=rows.held_out,
        micro_batch=options.micro_batch,
        pad_token_id=_pad_token(tokenizer),
        seq_len=options.seq_len,
        steps_per_epoch=None,
        description=f"{source.name}{size} streamed, shuffled within {buffer_rows} rows, the first {len(rows.held_out)} held out",
        notes=source.notes,
    )


def _feed(options: FinetuneOptions, rows: ResidentRows | StreamedRows, tokenizer: Any, settings: dict[str, Setting]) -> StepFeed:
    return StepFeed(
        rows,
        micro_batch=options.micro_batch,
        accumulate=options.accumulate,
        pad_token_id=_pad_token(tokenizer),
        seed=options.seed,
        packed=options.packing,
        settings=settings,
    )


def _pad_token(tokenizer: Any) -> int:
    """The token that fills up rows; which one does not matter, since padding is known by position."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
