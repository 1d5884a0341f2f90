"""What stays, in rounds that repeat: known by the number of the pack, and not looked into again.

Most of what a Llama saves stays where it is, and to find that out anew takes the host 8 to 20 us a tensor: which storage it is, whether a
record has it already, where that goes. In a loop all rounds with the same decisions save the same, so in the first of them it is noted
which packs, counted from a micro-batch's first record, were of a record that stays as it is, and in the others such a pack is an alias and
a place, no record.

Rules:

1. A tensor that is kept may always be kept, whatever it is: a round that only looks like the one before has the right gradients. What
   could be wrong is where later tensors go. So a pack is compared with what was there (dtype and dimensions, and whether something of its
   storage had been saved in its micro-batch; sizes may be others), and at the first difference the rest of the round is looked into as if
   nothing were known, but for storages of which something has been kept again already: these count once. What is shared by several
   micro-batches counts in each. Weights are left to those who know them.
2. Nobody watches such a round, and it has the decisions of the one that was noted: targets, recipes and modules that are run again.
3. What backward wants is told to the way back all the same (`SavedKept.unpack`), which goes by it.
4. It counts as a record does: for the round's end, its place, its bytes.

The cache locks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from overspill.activations.identity import ParameterStorages, aligned_start, byte_span
from overspill.activations.rounds import Rounds
from overspill.activations.saved import SavedAlone, SavedView


class Buried(NamedTuple):
    """Something that was kept again has died."""

    num_bytes: int
    """Of its record, for the first of it, else 0."""
    micro_batch: int
    storage: int
    """Its `_cdata`."""


class Wanting(Protocol):
    """The cache, as a kept tensor sees it."""

    def want(self, place: int, micro_batch: int) -> None:
        """Backward wants what was kept at a place."""
        ...

    def bury(self, what: Buried) -> None: ...


class SavedKept(SavedAlone):
    """A saved tensor that stays, of a place that others know."""

    __slots__ = ("_cache", "_micro_batch", "_place", "buried")

    def __init__(self, cache: Wanting, tensor: torch.Tensor, place: int, micro_batch: int) -> None:
        self.buried: Buried | None = None
        """What its death takes back; None: it has not been counted."""
        super().__init__(tensor, None)
        self._cache, self._place, self._micro_batch = cache, place, micro_batch

    def unpack(self) -> torch.Tensor:
        self._cache.want(self._place, self._micro_batch)
        return super().unpack()

    def __del__(self) -> None:
        if self.buried is not None:
            self._cache.bury(self.buried)


MOST_OTHERS = 4
"""Rounds in a row that are not as noted, after which it is noted anew. Chosen: lengths and branches may alternate."""


class Kept(NamedTuple):
    """A pack that kept a tensor."""

    place: int
    is_new: bool
    """Whether it was the first of its record."""
    is_shared: bool
    """Whether something of its storage had been saved before, in its micro-batch."""
    spans_storage: bool
    """Whether the record has all of its storage."""
    dtype: torch.dtype
    num_dims: int


class Repeating:
    """The packs of one cache.

    Args:
        min_bytes: smaller saved tensors are left alone.
    """

    def __init__(self, rounds: Rounds, parameters: ParameterStorages, device: torch.device, min_bytes: int) -> None:
        self._rounds, self._parameters, self._device, self._min_bytes = rounds, parameters, device, min_bytes
        self._known: dict[int, Kept] = {}
        self._choices: object = None
        """The decisions with which that was noted."""
        self.is_on = False
        """Whether packs are counted: this round is noted, or repeats one that was."""
        self._is_noting = self._is_first = False
        """The second: in the round's first micro-batch."""
        self._num_others = 0
        """Rounds in a row that were not as noted."""
        self._number: int | None = None
        """Of the next pack; None: the micro-batch has no record yet."""
        self._here: dict[tuple[int, int], tuple[int, int]] = {}
        """Micro-batches and storages of which something that was kept again lives: the first one's place, and how many."""

    def begin_round(self) -> None:
        """No record is alive, and the first is being made."""
        choices = self._rounds.choices if self._rounds.timeline is None else None
        self._number, self.is_on, self._is_first = None, choices is not None, True
        self._is_noting = choices is not None and (choices != self._choices or self._num_others >= MOST_OTHERS)
        if self._is_noting:
            self._known, self._choices, self._num_others = {}, choices, 0

    def begin_micro_batch(self) -> None:
        """What is packed from here on is counted anew."""
        self._number, self._is_first = None, False
        if self._is_noting:  # one says all
            self.is_on = False

    def end_round(self) -> None:
        """No record is alive any more."""
        if self.is_on:
            self._num_others = 0
        self.is_on = False

    def stop(self) -> None:
        """The round is not as noted."""
        self.is_on = False
        self._num_others += 1

    def place_of(self, micro_batch: int, storage: int) -> int | None:
        """Of what was kept again of a storage, by its `_cdata`, and lives."""
        entry = self._here.get((micro_batch, storage))
        return entry[0] if entry is not None else None

    def note_kept(self, place: int, counts: Buried) -> None:
        """Something was kept again."""
        first, count = self._here.get(counts[1:], (place, 0))
        self._here[counts[1:]] = first, count + 1

    def forget(self, counts: Buried) -> None:
        """Something that was kept again has died."""
        place, count = self._here.pop(counts[1:])
        if count > 1:
            self._here[counts[1:]] = place, count - 1

    def next_pack(self, tensor: torch.Tensor, micro_batch: int) -> tuple[Kept, Buried] | None:
        """Count a pack; what it is, and what counts for it, if it keeps the tensor and need not be looked into."""
        if self._number is None:
            return None
        number, self._number = self._number, self._number + 1
        kept = self._known.get(number)
        if kept is None or self._is_noting:
            return None
        if type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.dtype == kept.dtype and tensor.dim() == kept.num_dims:
            num_bytes = tensor.nbytes
            if num_bytes >= self._min_bytes and num_bytes and not tensor.is_nested and tensor.device == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._parameters:
                    record_bytes = 0
                    if kept.is_new:
                        start, stop = (0, storage.nbytes()) if kept.spans_storage else byte_span(tensor)
                        record_bytes = stop - aligned_start(start)
                    return kept, Buried(record_bytes, micro_batch, storage._cdata)
        self.stop()
        return None

    def note(self, tensor: torch.Tensor, saved: object, *, is_new: bool, is_shared: bool) -> None:
        """Something was looked into and is no parameter; what pack returns for it, whether its record is new, and whether something of its
        storage had been saved before."""
        if self._number is None and is_new and isinstance(saved, SavedView):
            self._number = 1  # of the next one: this is the first record's
        elif self._is_first and self._number is not None and isinstance(saved, SavedView) and saved.record.is_whole:
            record = saved.record
            spans_storage = record.num_bytes == tensor.untyped_storage().nbytes()
            self._known[self._number - 1] = Kept(record.index, is_new, is_shared, spans_storage, tensor.dtype, tensor.dim())


__all__ = ["Buried", "Kept", "Repeating", "SavedKept"]
