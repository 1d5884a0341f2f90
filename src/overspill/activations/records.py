"""A record: bytes of one storage that autograd saved, wherever they are now."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from overspill.activations.amounts import Target
from overspill.activations.arena import Range
from overspill.activations.drive import DriveCopy
from overspill.activations.forms import Form
from overspill.activations.identity import VersionWatch, words_of
from overspill.activations.links import End, Mark


class Where(enum.Enum):
    """The states of a record, with the memory that it has in each."""

    KEPT = "kept"
    """The model's device memory, or its form of fewer bytes. Nothing else, ever."""
    LEAVING = "leaving"
    """The model's device memory (or its encoded form), and a host range that a copy fills."""
    AWAY = "away"
    """A host range, or a range of the SSD's file (and, until that is written, a host range); no device memory."""
    COMING = "coming"
    """What it has when AWAY, and device memory that a copy fills."""
    BACK = "back"
    """What it has when AWAY, and device memory with its content."""
    DEAD = "dead"
    """Nothing."""


class Record:
    """One record. Its `TensorCache` decides, its `Mover` moves; both change it under the cache's lock.

    What most records have in common is the class's: a record is made in forward, which on a slow host is what the device waits for.
    """

    target = Target.KEEP
    num_users = 0
    """Saved tensors that are views of it."""
    payload: torch.Tensor | None = None
    """Its stored bytes on the device (uint8), or those that a copy fills."""
    coming: torch.Tensor | None = None
    """What becomes the payload when a thread of the SSD has read it."""
    decoded: torch.Tensor | None = None
    """Its own bytes on the device, if `payload` has another form."""
    timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """What is around making these, to measure it."""
    host: Range | None = None
    ssd: DriveCopy | None = None
    leaving: End | None = None
    """Of the copy out; for good."""
    arriving: End | None = None
    """Of the last copy in."""
    is_held = False
    """Whether compute waits for that copy."""
    mark: Mark = None
    """Where compute was when the memory of a fetch was made."""
    is_only_here = True
    """Whether the device has the one copy: it is kept, or its way out has not ended or was cancelled."""
    is_forwarded = False
    is_watched = False
    """Whether a timeline has its times."""
    is_wanted = False
    """Whether backward has asked for it."""
    is_ahead = False
    """Whether it was fetched before it was wanted, and has not been wanted yet."""
    weak: StorageWeakRef | None = None
    """Of its storage; None if it holds that itself (`is_whole`)."""

    def __init__(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, span: tuple[int, int], form: Form | None,
        *, index: int, micro_batch: int, position: int, is_whole: bool = False,
    ) -> None:  # fmt: skip
        self.index = index
        """Which one of its micro-batch, in the order of forward."""
        self.micro_batch = micro_batch
        self.position = position
        """How many records of the round were moved before it."""
        self.cdata = storage._cdata
        self.is_whole = is_whole
        """Whether it stays as it is, for good: its watch holds the storage, and it needs no payload."""
        if not is_whole:
            self.weak = StorageWeakRef(storage)
        self.start, self.stop = span
        self.dtype, self._shape, self.form, self.watch = tensor.dtype, tensor.shape, form, VersionWatch(tensor, holds=is_whole)
        self.num_bytes = self.stored_bytes = self.stop - self.start

    @property
    def name(self) -> str:
        """For errors."""
        return f"saved tensor {self.index} of its micro-batch ({words_of(self.dtype, self._shape)})"

    @property
    def where(self) -> Where:
        if self.num_users == 0:
            return Where.DEAD
        if self.target is Target.KEEP:
            return Where.KEPT
        if self.payload is None:
            return Where.COMING if self.coming is not None else Where.AWAY
        if self.is_only_here:
            return Where.LEAVING
        return Where.BACK if self.is_held else Where.COMING

    @property
    def is_narrowed(self) -> bool:
        """Whether its form has fewer bytes and every value."""
        return self.form is not None and self.form.is_exact

    def covers(self, start: int, stop: int, dtype: torch.dtype) -> bool:
        """Whether a span of the storage can be given from this record."""
        return self.start <= start and stop <= self.stop and (self.form is None or dtype == self.dtype or self._is_complex_of(dtype))

    def _is_complex_of(self, dtype: torch.dtype) -> bool:
        """Whether a view in this dtype has the same values, two by two, and the form keeps them."""
        return self.is_narrowed and dtype.is_complex and dtype.to_real() == self.dtype
