"""Streamed data: never more in memory than the shuffle buffer, the held-out samples and the packs that are being filled.

    rows, first to last -> the first `held_out` are set aside -> shuffle buffer -> tokenize -> packs or single samples

Rule 1. Order depends on (seed, epoch) alone: the buffer holds `buffer_rows` rows; each row that arrives takes the place of one drawn
        by the seed, which goes on. A row moves forward by at most the buffer's size, and backward without bound: a data set that
        is sorted stays sorted on the large scale. Shuffle such a file once before.
Rule 2. Held out are the first rows, by count: a share of an unknown number is not known.
Rule 3. Going on reads the epoch again from its start and passes over the rows that were given. Without packs they are not tokenized.

Rows wait in the buffer as text (blocks of running text as tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from overspill import rng
from overspill.errors import DataError
from overspill.huggingface.data import fingerprint_samples
from overspill.huggingface.packing import Row, pack_stream
from overspill.huggingface.rows import DataSource
from overspill.huggingface.tokenization import Sample, cut_blocks, fit_sample, tokenize_rows

Item = TypeVar("Item")

_FINGERPRINTED_SAMPLES = 64
"""Samples at the start that are tokenized for the fingerprint: they show another tokenizer or template. Chosen, not tuned."""


class StreamedRows:
    """Rows read anew in every epoch; see the module's docstring.

    Raises:
        DataError: the stream has no row beyond those held out, or one of the first cannot be used.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: Any,
        *,
        seq_len: int,
        truncate: bool,
        blocks: bool,
        packing: bool,
        held_out: int,
        buffer_rows: int,
        seed: int,
    ) -> None:
        self._source, self._tokenizer, self._seq_len, self._truncate = source, tokenizer, seq_len, truncate
        self._blocks = blocks or source.is_running_text
        self._packing, self._buffer_rows, self._seed = packing, buffer_rows, seed
        self._num_held_out = held_out
        first = list(itertools.islice(self._samples(self._items()), max(held_out + 1, _FINGERPRINTED_SAMPLES)))
        if len(first) <= held_out:
            raise DataError(f"{source.name} holds {len(first)} samples, and --held-out {held_out} leaves none to train on; lower it")
        self.held_out = first[:held_out]
        """The samples set aside (rule 2)."""
        self.fingerprint = source.fingerprint + fingerprint_samples(first[:_FINGERPRINTED_SAMPLES])

    def epoch(self, number: int, *, skip: int) -> Iterator[Row]:
        items = itertools.islice(self._items(), self._num_held_out, None)
        shuffled = shuffle_buffered(items, buffer_rows=self._buffer_rows, seed=rng.shuffle_seed(self._seed, number))
        if not self._packing:  # one item is one row: what is passed over need not be tokenized
            _pass_over(shuffled, skip)
            for sample in self._samples(shuffled):
                yield (sample,)
            return
        rows = pack_stream(self._samples(shuffled), seq_len=self._seq_len)
        _pass_over(rows, skip)
        yield from rows

    def _items(self) -> Iterator[Any]:
        """Raw rows, or samples where these are blocks."""
        return cut_blocks(self._source, self._tokenizer, seq_len=self._seq_len) if self._blocks else self._source.rows()

    def _samples(self, items: Iterator[Any]) -> Iterator[Sample]:
        if self._blocks:
            yield from items
            return
        for sample in tokenize_rows(items, self._tokenizer):
            yield fit_sample(sample, seq_len=self._seq_len, truncate=self._truncate)


def shuffle_buffered(items: Iterable[Item], *, buffer_rows: int, seed: int) -> Iterator[Item]:
    """`items` in an order drawn by `seed` within a buffer of `buffer_rows` (rule 1); 1 keeps the order."""
    draw = np.random.default_rng(seed)
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_rows:
            buffer.append(item)
            continue
        chosen = int(draw.integers(buffer_rows))
        yield buffer[chosen]
        buffer[chosen] = item
    for index in draw.permutation(len(buffer)).tolist():
        yield buffer[index]


def _pass_over(items: Iterator[Any], count: int) -> None:
    passed = sum(1 for _ in itertools.islice(items, count))
    if passed < count:
        raise DataError(f"cannot pass over {count} rows of a stream that has {passed}; the position belongs to other data")
