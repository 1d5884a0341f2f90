"""Records: what moves as one, kept with checksums and, where a checkpoint needs it, with its older versions.

Words:

* **record**: the bytes of one chunk of one role of a bundle (or of a gradient, or of hidden states in scratch).
* **slot**: an extent of the store that can hold one version of a record. A record has a fixed number of slots: one
  without checkpoints, and one more than the number of checkpoints that are kept.
* **pinned**: a slot whose version belongs to a checkpoint.
* **generation**: the slots of all records that one checkpoint pins.

Rules:

1. A write replaces a whole record. It goes into the current slot if that is not pinned, else into one that is not: so what
   a checkpoint needs is never overwritten, and a step that dies half-way has damaged nothing that the last one holds.
2. With `keep` checkpoints and `keep + 1` slots there is always a slot to write to; nothing is ever searched or compacted.
3. Every write notes the checksums of its blocks, every read is held against them before its bytes are used. A difference is
   a `StorageError` that names record, file, block and both checksums. Both are the store's work: its threads sum blocks as they move.
4. Parts of records are read and written only while loading and exporting; a part that is read is verified by whole blocks,
   a part that is written reads the blocks it changes in part.
5. A record's checksums are known when its write has ended. Whoever reads it, writes it again or asks for its version before that waits.
   After a write that failed, they raise its failure: a checkpoint cannot name what was not written. A write that was cancelled before
   it began has changed nothing, not even the version.

Costs: `num_slots` times the space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Mapping

import torch

from overspill.errors import StorageError
from overspill.tiers.checksums import BLOCK_BYTES, zero_checksums
from overspill.tiers.closing import Closing
from overspill.tiers.protocol import CheckedTransfer, Store, Transfer
from overspill.tiers.transfer import DamagedBlock
from overspill.units import align_up

Generation = Mapping[str, int]
"""Record -> the slot that is pinned."""


@dataclasses.dataclass
class _Record:
    num_bytes: int
    """Room; a write may be shorter."""
    slots: list[str]
    """Names of the extents."""
    current: int
    content_bytes: int
    checksums: tuple[int, ...]
    num_pins: list[int]
    is_written: bool = False
    write: _RecordWrite | None = None
    """The last write, until it has ended well (rule 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordVersion:
    """The current version of a record."""

    num_bytes: int
    slots: tuple[str, ...]
    slot: int
    checksums: tuple[int, ...]


class RecordStore(Closing):
    """Records in a store; thread-safe as far as its store is.

    Args:
        store: owned from now on, closed with this.
        num_slots: versions that fit beside each other.
    """

    def __init__(self, store: Store, *, num_slots: int = 1) -> None:
        assert num_slots >= 1, num_slots
        self.store = store
        self.num_slots = num_slots
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()

    # -- names -------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._records)

    def has(self, name: str) -> bool:
        return name in self._records

    def create(self, name: str, num_bytes: int) -> None:
        """A record of zeros; nothing of it is left if that fails, or is interrupted.

        Raises:
            BudgetError: the store has no room for its slots.
        """
        assert name not in self._records, f"{name} is there already"
        slots = [f"{name}#{index}" for index in range(self.num_slots)]
        try:
            for slot in slots:
                self.store.allocate(slot, num_bytes)
            self._records[name] = _Record(
                num_bytes=num_bytes,
                slots=slots,
                current=0,
                content_bytes=num_bytes,
                checksums=zero_checksums(num_bytes),
                num_pins=[0] * self.num_slots,
            )
        except BaseException:
            for slot in slots:
                with contextlib.suppress(ValueError):  # it was not reached
                    self.store.free(slot)
            raise

    def restore(self, name: str, version: RecordVersion) -> None:
        """A record whose slots are in the store already, with the content of an earlier run; missing slots are added."""
        slots = list(version.slots)
        while len(slots) < self.num_slots:
            index = next(index for index in range(len(slots) + 1) if f"{name}#{index}" not in slots)
            slots.append(f"{name}#{index}")
            self.store.allocate(slots[-1], version.num_bytes)
        self._records[name] = _Record(
            num_bytes=version.num_bytes,
            slots=slots,
            current=version.slot,
            content_bytes=version.num_bytes,
            checksums=version.checksums,
            num_pins=[0] * len(slots),
            is_written=True,
        )

    def version(self, name: str) -> RecordVersion:
        record = self._settled(name)
        return RecordVersion(num_bytes=record.num_bytes, slots=tuple(record.slots), slot=record.current, checksums=record.checksums)

    def is_written(self, name: str) -> bool:
        """Whether the record ever got content."""
        return self._records[name].is_written

    # -- generations -------------------------------------------------------------------------------------------------

    def current(self) -> dict[str, int]:
        """The slot of every record now: the generation that a checkpoint made now would pin."""
        return {name: record.current for name, record in self._records.items()}

    def pin(self, generation: Generation) -> None:
        """Let no write touch these slots until `unpin`."""
        with self._lock:
            for name, slot in generation.items():
                self._records[name].num_pins[slot] += 1

    def unpin(self, generation: Generation) -> None:
        """The checkpoint is gone: its slots are free unless they are current, or another checkpoint's."""
        with self._lock:
            for name, slot in generation.items():
                assert self._records[name].num_pins[slot] > 0, f"{name} slot {slot} is unpinned twice"
                self._records[name].num_pins[slot] -= 1

    # -- whole records -----------------------------------------------------------------------------------------------

    def start_write(self, name: str, buffer: torch.Tensor) -> Transfer:
        """Start replacing a record (rule 1); `buffer`, uint8 [n] with n at most its size, is lent until `wait()`."""
        record = self._replaceable(name)
        assert buffer.numel() <= record.num_bytes, (name, buffer.numel(), record.num_bytes)
        with self._lock:
            before = (record.current, record.content_bytes, record.is_written)
            if record.num_pins[record.current]:
                record.current = next(slot for slot, pins in enumerate(record.num_pins) if not pins)
            record.content_bytes, record.is_written = buffer.numel(), True
            slot = record.slots[record.current]
            try:
                inner = self.store.start_write(slot, 0, buffer, with_checksums=True)
            except BaseException:
                record.current, record.content_bytes, record.is_written = before
                raise
            record.write = _RecordWrite(record, before, inner)
        return record.write

    def start_read(self, name: str, buffer: torch.Tensor) -> Transfer:
        """Start reading a whole record into `buffer`, which is lent until `wait()`, and verified by then."""
        record = self._settled(name)
        assert buffer.numel() == record.content_bytes, (name, buffer.numel(), record.content_bytes)
        return self._read(name, record.slots[record.current], 0, buffer, record.checksums)

    # -- parts of records (rule 4) -----------------------------------------------------------------------------------

    def read_part(self, name: str, offset: int, num_bytes: int) -> torch.Tensor:
        """Bytes [offset, offset + num_bytes) of a record, verified."""
        record = self._settled(name)
        first = offset // BLOCK_BYTES * BLOCK_BYTES
        last = min(align_up(offset + num_bytes, BLOCK_BYTES), record.content_bytes)
        buffer = torch.empty(last - first, dtype=torch.uint8)
        checksums = record.checksums[first // BLOCK_BYTES : -(-last // BLOCK_BYTES)]
        self._read(name, record.slots[record.current], first, buffer, checksums).wait()
        return buffer[offset - first : offset - first + num_bytes]

    def write_part(self, name: str, offset: int, data: torch.Tensor) -> None:
        """Change bytes [offset, offset + n) of a record, and wait."""
        record = self._settled(name)
        assert record.content_bytes == record.num_bytes and offset + data.numel() <= record.num_bytes, name
        is_pinned = record.num_pins[record.current] > 0
        first = 0 if is_pinned else offset // BLOCK_BYTES * BLOCK_BYTES
        last = record.num_bytes if is_pinned else min(align_up(offset + data.numel(), BLOCK_BYTES), record.num_bytes)
        if (first, last) == (offset, offset + data.numel()):
            content = data.contiguous()
        else:
            content = self.read_part(name, first, last - first)
            content[offset - first : offset - first + data.numel()] = data
        if is_pinned:
            self.start_write(name, content).wait()
            return
        record.is_written = True
        written = self.store.start_write(record.slots[record.current], first, content, with_checksums=True)
        written.wait()
        checksums = list(record.checksums)
        checksums[first // BLOCK_BYTES : -(-last // BLOCK_BYTES)] = written.checksums
        record.checksums = tuple(checksums)

    def verify(self, names: Iterable[str]) -> list[str]:
        """Read records and say what is wrong with each damaged one."""
        problems = []
        for name in names:
            buffer = torch.empty(self._records[name].content_bytes, dtype=torch.uint8)
            try:
                self.start_read(name, buffer).wait()
            except StorageError as error:
                problems.append(str(error))
        return problems

    def interrupt(self) -> None:
        """See `Store.interrupt`."""
        self.store.interrupt()

    def proceed(self) -> None:
        """See `Store.proceed`."""
        self.store.proceed()

    def close(self) -> None:
        self.store.close()

    def _settled(self, name: str) -> _Record:
        """The record, its last write ended (rule 5)."""
        record = self._records[name]
        write = record.write
        if write is not None:
            write.settle()
        return record

    def _replaceable(self, name: str) -> _Record:
        """The record, its last write ended; one that failed may be tried again by who knows about it."""
        record = self._records[name]
        write = record.write
        if write is not None and not write.is_seen_failure:
            write.settle()
        return record

    def _read(self, name: str, slot: str, offset: int, buffer: torch.Tensor, checksums: tuple[int, ...]) -> _RecordRead:
        return _RecordRead(self, name, slot, offset, buffer.numel(), self.store.start_read(slot, offset, buffer, expected=checksums))

    def _damage(self, name: str, slot: str, offset: int, damage: DamagedBlock, num_bytes: int) -> StorageError:
        start = offset + damage.block * BLOCK_BYTES
        place = getattr(self.store, "place", None)
        where = place(slot, start) if place is not None else "a store in memory"
        return StorageError(
            f"{name} is damaged: bytes [{start}, {min(start + BLOCK_BYTES, offset + num_bytes)}) at {where} have CRC-32C "
            f"{damage.found:08x}, {damage.expected:08x} was written; the drive or a cable is failing: resume from the last checkpoint on "
            "another drive"
        )


class _OfRecord:
    """What a record's read and its write tell of the store's transfer under them."""

    __slots__ = ("_inner",)

    def __init__(self, inner: CheckedTransfer) -> None:
        self._inner = inner

    @property
    def is_done(self) -> bool:
        return self._inner.is_done

    @property
    def ended_s(self) -> float:
        return getattr(self._inner, "ended_s", 0.0)


class _RecordRead(_OfRecord):
    """A read whose damage is told in the record's words. Meets the protocol `Transfer`."""

    __slots__ = ("_error", "_name", "_num_bytes", "_offset", "_records", "_slot")

    def __init__(self, records: RecordStore, name: str, slot: str, offset: int, num_bytes: int, inner: CheckedTransfer) -> None:
        super().__init__(inner)
        self._records, self._name, self._slot, self._offset, self._num_bytes = records, name, slot, offset, num_bytes
        self._error: StorageError | None = None

    def wait(self) -> None:
        """Block until the bytes are there and verified."""
        try:
            self._inner.wait()
        except DamagedBlock as damage:
            if self._error is None:
                self._error = self._records._damage(self._name, self._slot, self._offset, damage, self._num_bytes)
            raise self._error from damage


class _RecordWrite(_OfRecord):
    """A write that tells its record the checksums when it has ended. Meets the protocol `Transfer`.

    Args:
        before: the record's slot, length and whether it was written, for a write that is cancelled.
    """

    __slots__ = ("_before", "_lock", "_record", "_state", "is_seen_failure")

    def __init__(self, record: _Record, before: tuple[int, int, bool], inner: CheckedTransfer) -> None:
        super().__init__(inner)
        self._record, self._before = record, before
        self._lock = threading.Lock()
        self._state = "started"  # then written or cancelled
        self.is_seen_failure = False
        """Whether `wait()` has raised."""

    def wait(self) -> None:
        """Block until the record is in the store."""
        try:
            self.settle()
        except StorageError:
            self.is_seen_failure = True
            raise
        if self._state == "cancelled":
            self._inner.wait()  # which says so

    def cancel(self) -> bool:
        """Whether the write was taken back before it began: the record is as it was. A store that cannot says no."""
        with self._lock:
            cancel = getattr(self._inner, "cancel", None)
            if self._state != "started" or cancel is None or not cancel():
                return False
            self._state = "cancelled"
            self._record.current, self._record.content_bytes, self._record.is_written = self._before
            self._record.write = None
        with contextlib.suppress(StorageError):
            self._inner.wait()  # seen by us: closing the store need not speak of it
        return True

    def settle(self) -> None:
        """Wait; the first to know that it ended well tells the record."""
        with self._lock:
            if self._state == "cancelled":
                return
        self._inner.wait()
        with self._lock:
            if self._state == "started":
                self._state = "written"
                self._record.checksums = self._inner.checksums
                if self._record.write is self:
                    self._record.write = None


__all__ = ["Generation", "RecordStore", "RecordVersion"]
