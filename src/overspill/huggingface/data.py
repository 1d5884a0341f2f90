"""Training data as optimizer steps see it: samples in memory or streamed, held-out split, order, micro-batches, position.

    rows (`rows`) -> samples (`tokenization`) -> held-out split -> order by seed -> packs (`packing`) or padding -> steps

Rule 1. Order depends on (seed, epoch) alone, and the held-out split on seed alone; both are made anew from these, never kept.
Rule 2. Padding is known by position. Many tokenizers pad with the end-of-sequence token, so a mask by token id would
        remove every real end of sequence from the loss.
Rule 3. A step never crosses an epoch; the last step of an epoch may be smaller.
Rule 4. A position is taken between steps, and only data and settings that give the same rows can be gone on with
        (`data_position`). Going on makes the same order again and passes over what was given: no number changes.

Cost: 8 bytes a token, all samples in memory. `streaming` holds a buffer instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch

from overspill import rng
from overspill.errors import DataError
from overspill.huggingface.data_position import DataPosition, Setting
from overspill.huggingface.packing import Row, build_packed_batch
from overspill.huggingface.rows import DataSource, find_source
from overspill.huggingface.tokenization import IGNORE, Sample, cut_blocks, fit_sample, tokenize_rows
from overspill.units import align_up

HELD_OUT_EPOCH = -1
"""In place of an epoch where the held-out split is drawn: no epoch of training has this number."""

Item = TypeVar("Item")

MicroBatch = dict[str, torch.Tensor]
"""`input_ids` and `labels`, and `attention_mask` (padded) or `position_ids` (packed): int64 (micro-batch, positions), on the CPU."""


def read_samples(
    data: str | Path | DataSource, tokenizer: Any, *, seq_len: int, truncate: bool = False, blocks: bool = False
) -> list[Sample]:
    """Read and tokenize a whole data set.

    Args:
        data: a file, folder or hub name (`rows`), or what `find_source` found.
        tokenizer: of transformers; it needs an end-of-sequence token, and for `messages` a chat template.
        seq_len: most tokens of a sample.
        truncate: cut longer samples at the end; otherwise they are refused.
        blocks: cut `text` rows into blocks of `seq_len`, as running text always is.

    Raises:
        DataError: the data is missing, empty, or has a row that cannot be used; the message names the line.
    """
    source = data if isinstance(data, DataSource) else find_source(data)
    if blocks or source.is_running_text:
        samples = list(cut_blocks(source, tokenizer, seq_len=seq_len))
    else:
        samples = list(tokenize_rows(source.rows(), tokenizer))
    if not samples:
        what = (
            "text of two tokens"
            if blocks or source.is_running_text
            else "one JSON object a line, such as " + ('{"prompt": "…", "completion": "…"}')
        )
        raise DataError(f"{source.name} holds no sample; write {what}")
    too_long = [sample for sample in samples if len(sample.input_ids) > seq_len]
    if too_long and not truncate:
        longest = max(too_long, key=lambda sample: len(sample.input_ids))
        raise DataError(
            f"{len(too_long)} of {len(samples)} samples of {source.name} have more than {seq_len} tokens, the longest "
            f"{len(longest.input_ids)} ({longest.where}); raise --seq-len, or cut them with --truncate"
        )
    return [fit_sample(sample, seq_len=seq_len, truncate=truncate) for sample in samples]


def split_held_out(samples: Sequence[Sample], held_out: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Set samples aside for evaluation: (training, held out).

    Args:
        held_out: a count (an integer, 0 for none), or a share between 0 and 1, of which at least one sample is taken.

    Raises:
        DataError: it is negative or leaves nothing to train on.
    """
    count = math.ceil(held_out * len(samples)) if 0 < held_out < 1 else int(held_out)
    if held_out < 0 or (held_out >= 1 and held_out != count) or count >= len(samples):
        raise DataError(
            f"--held-out {held_out:g} of {len(samples)} samples leaves none to train on, or is no count; give at most {len(samples) - 1}"
        )
    order = np.random.default_rng(rng.shuffle_seed(seed, HELD_OUT_EPOCH)).permutation(len(samples))
    chosen = set(order[:count].tolist())
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


def fingerprint_samples(samples: Iterable[Sample]) -> str:
    """Of token ids and labels, in order: another tokenizer, template, file or cut gives another one."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(len(sample.input_ids).to_bytes(4, "little"))
        digest.update(sample.input_ids.astype("<i4").tobytes())
        digest.update(sample.labels.astype("<i4").tobytes())
    return digest.hexdigest()


class RowSource(Protocol):
    """Rows of any epoch, the same ones in the same order each time it is asked."""

    @property
    def fingerprint(self) -> str: ...

    def epoch(self, number: int, *, skip: int) -> Iterator[Row]:
        """The rows of epoch `number` (from 0) without its first `skip`.

        Raises:
            DataError: it has fewer rows than `skip`.
        """
        ...


class ResidentRows:
    """Rows that are all in memory, in the order of a permutation (rule 1)."""

    def __init__(self, rows: Sequence[Row], *, seed: int | None) -> None:
        """
        Args:
            seed: None keeps the order of `rows`, as evaluation does.
        """
        self.rows = rows
        self._seed = seed
        self.fingerprint = fingerprint_samples(sample for row in rows for sample in row)

    def epoch(self, number: int, *, skip: int) -> Iterator[Row]:
        if skip > len(self.rows):
            raise DataError(f"cannot pass over {skip} rows of {len(self.rows)}; the position belongs to other data")
        for index in _order(len(self.rows), self._seed, number)[skip:]:
            yield self.rows[index]


class StepFeed:
    """The micro-batches of one optimizer step after the other, epoch after epoch, without end; an iterator (rules 3 and 4).

    `position` is where the steps given so far end. Nothing is read ahead, so after `next(feed)` and the step over it, it is what
    a checkpoint of that step has to hold.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        micro_batch: int,
        accumulate: int,
        pad_token_id: int,
        seed: int,
        packed: bool = False,
        pad_to_multiple: int = 1,
        settings: Mapping[str, Setting] | None = None,
    ) -> None:
        """
        Args:
            settings: what else decided the rows, for `DataPosition.settings`.
        """
        self._rows, self._micro_batch, self._accumulate = rows, micro_batch, accumulate
        self._padding = dict(pad_token_id=pad_token_id, pad_to_multiple=pad_to_multiple)
        self._packed = packed
        decided = {"micro-batch": micro_batch, "accumulate": accumulate, "packing": packed, **(settings or {})}
        self.position = DataPosition(seed=seed, epoch=0, index=0, fingerprint=rows.fingerprint, settings=decided)
        self._groups = self._steps(self.position)

    def seek(self, position: DataPosition) -> None:
        """Go on from `position`, of this feed or of one over the same data in another process.

        Raises:
            DataError: data, seed or settings differ; with what differs.
        """
        position.validate_same_data(self.position)
        self._groups = self._steps(position)
        self.position = position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[MicroBatch]:
        group, self.position = next(self._groups)
        return [self._build(rows) for rows in group]

    def _steps(self, start: DataPosition) -> Iterator[tuple[list[list[Row]], DataPosition]]:
        """The rows of each step by micro-batch, and where it ends."""
        position = start
        while True:
            group: list[list[Row]] = []
            index = position.index
            for rows in _batched(self._rows.epoch(position.epoch, skip=index), self._micro_batch):
                group.append(rows)
                index += len(rows)
                if len(group) == self._accumulate:
                    yield group, dataclasses.replace(position, index=index)
                    group = []
            if group:
                yield group, dataclasses.replace(position, index=index)
            if index == 0:
                raise DataError("an epoch of the data has no row to train on; lower --held-out, or add data")
            position = dataclasses.replace(position, epoch=position.epoch + 1, index=0)

    def _build(self, rows: list[Row]) -> MicroBatch:
        if self._packed:
            return build_packed_batch(rows, **self._padding)
        return pad_samples([sample for (sample,) in rows], **self._padding)


def iterate_steps(
    samples: Sequence[Sample], *, micro_batch: int, accumulate: int, pad_token_id: int, seed: int, pad_to_multiple: int = 1
) -> StepFeed:
    """The feed over `samples`, one a row."""
    rows = ResidentRows([(sample,) for sample in samples], seed=seed)
    return StepFeed(
        rows, micro_batch=micro_batch, accumulate=accumulate, pad_token_id=pad_token_id, seed=seed, pad_to_multiple=pad_to_multiple
    )


def build_micro_batches(
    samples: Sequence[Sample], *, micro_batch: int, pad_token_id: int, seed: int | None, epoch: int = 0, pad_to_multiple: int = 1
) -> Iterator[MicroBatch]:
    """Yield one epoch of micro-batches; the last may be smaller.

    Args:
        seed: of the order (rule 1); None keeps the order of `samples`, as evaluation does.
        pad_to_multiple: positions are padded to the longest sample of the micro-batch, rounded up to this.
    """
    ordered = (samples[index] for index in _order(len(samples), seed, epoch))
    for chosen in _batched(ordered, micro_batch):
        yield pad_samples(chosen, pad_token_id=pad_token_id, pad_to_multiple=pad_to_multiple)


def steps_per_epoch(num_rows: int, *, micro_batch: int, accumulate: int) -> int:
    """Optimizer steps in which a feed gives every row once."""
    return math.ceil(math.ceil(num_rows / micro_batch) / accumulate)


def pad_samples(samples: Sequence[Sample], *, pad_token_id: int, pad_to_multiple: int = 1) -> MicroBatch:
    """One micro-batch, padded on the right by position (rule 2)."""
    length = align_up(max(len(sample.input_ids) for sample in samples), pad_to_multiple)
    batch = {
        "input_ids": torch.full((len(samples), length), pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros((len(samples), length), dtype=torch.int64),
        "labels": torch.full((len(samples), length), IGNORE, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        batch["input_ids"][row, :end] = torch.from_numpy(sample.input_ids)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, :end] = torch.from_numpy(sample.labels)
    return batch


def _order(count: int, seed: int | None, epoch: int) -> Sequence[int]:
    if seed is None:
        return range(count)
    return np.random.default_rng(rng.shuffle_seed(seed, epoch)).permutation(count).tolist()


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
