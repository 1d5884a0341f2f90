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
from overspill.activations.identity import VersionWatch
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
    """One record. Its `TensorCache` decides, its `Mover` moves; both change it under the cache's lock."""

    def __init__(
        self,
        *,
        index: int,
        micro_batch: int,
        position: int,
        storage: torch.UntypedStorage,
        start: int,
        stop: int,
        dtype: torch.dtype,
        form: Form | None,
        watch: VersionWatch,
        name: str,
    ) -> None:
        self.index = index
        """Which one of its micro-batch, in the order of forward."""
        self.micro_batch = micro_batch
        self.position = position
        """How many records of the round were moved before it."""
        self.cdata, self.weak = storage._cdata, StorageWeakRef(storage)
        self.start, self.stop, self.dtype, self.form, self.watch, self.name = start, stop, dtype, form, watch, name
        self.num_bytes = stop - start
        self.stored_bytes = self.num_bytes
        self.target = Target.KEEP
        self.num_users = 0
        """Saved tensors that are views of it."""
        self.payload: torch.Tensor | None = None
        """Its stored bytes on the device (uint8), or those that a copy fills."""
        self.coming: torch.Tensor | None = None
        """What becomes the payload when a thread of the SSD has read it."""
        self.decoded: torch.Tensor | None = None
        """Its own bytes on the device, if `payload` has another form."""
        self.timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """What is around making these, to measure it."""
        self.host: Range | None = None
        self.ssd: DriveCopy | None = None
        self.leaving: End | None = None
        """Of the copy out; for good."""
        self.arriving: End | None = None
        """Of the last copy in."""
        self.is_held = False
        """Whether compute waits for that copy."""
        self.mark: Mark = None
        """Where compute was when the memory of a fetch was made."""
        self.is_only_here = True
        """Whether the device has the one copy: it is kept, or its way out has not ended or was cancelled."""
        self.is_forwarded = False
        self.is_watched = False
        """Whether a timeline has its times."""
        self.is_wanted = False
        """Whether backward has asked for it."""
        self.is_ahead = False
        """Whether it was fetched before it was wanted, and has not been wanted yet."""

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
