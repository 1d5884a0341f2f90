"""A raw block device, or a partition, under an `SsdStore`, in place of a file.

No file system lies between: nothing else is written to the drive, and nothing can be in the way. Whatever was on it is lost.

```
0        4 KiB                1 MiB                                                    end
| header | unused             | state, from the start ...      ... scratch, to the end |
```

Rules:

1. A device that somebody uses is refused, whatever the user says: mounted (or one of its partitions), swap, held by another device (RAID,
   LVM, encryption). It is opened with `O_EXCL`, so the kernel too refuses what is not seen here, and locked against other runs.
2. A device with content is refused unless the user names it a second time (`overwrite`): a known signature, or any byte that is not
   zero in its first MiB. So is one that holds the checkpoints of another run.
3. Its own header marks a device of ours: magic, size, the id of the set it belongs to, and whether its content is kept. A header of a run
   that kept nothing is no content.
4. What was used and is not kept is discarded when it is opened and when it is closed (zeroed at the end where the drive cannot discard).
   A new extent is zeroed before it is used, since a discarded range may read as anything.
5. Closing in the child of a fork closes the child's descriptor and no more: content and lock are the parent's.

Limits: Linux; the rights to open the device. After `kill -9` scratch stays on the device until the next run. One run a device; its
state and its scratch share it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from overspill.errors import BudgetError, StorageError
from overspill.tiers.calls import OS_CALLS, FileCalls
from overspill.tiers.device_probe import Prober, find_signature
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.units import MIB, align_up, format_bytes

PROBER = Prober()
"""Who is asked about devices; tests put another one here."""

BASE_BYTES = MIB
MAGIC = b"OVERSPILL-BLOCK\x01"
_HEADER_BYTES = 4096
_PREFIX = struct.Struct("<16sII")
"""Magic, length of the JSON, its CRC-32."""


def is_block_device(place: str | os.PathLike[str]) -> bool:
    return PROBER.is_block_device(Path(place))


def device_room_bytes(place: str | os.PathLike[str]) -> int:
    """What a device can hold; 0 if it cannot be opened, which opening it for use will explain."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return max(0, PROBER.size_bytes(fd) - BASE_BYTES)
    finally:
        os.close(fd)


def build_header(fields: dict[str, Any]) -> bytes:
    """The first page of a device."""
    text = json.dumps(fields, sort_keys=True).encode()
    assert _PREFIX.size + len(text) <= _HEADER_BYTES, len(text)
    return (_PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text).ljust(_HEADER_BYTES, b"\0")


def parse_header(page: bytes) -> dict[str, Any] | None:
    """The fields of a header; None if it is none, or damaged."""
    magic, length, checksum = _PREFIX.unpack_from(page)
    text = page[_PREFIX.size : _PREFIX.size + length]
    if magic != MAGIC or zlib.crc32(text) != checksum:
        return None
    fields = json.loads(text)
    return fields if isinstance(fields, dict) else None


class _Claim:
    """The one descriptor of a device in this process, shared by its state and its scratch."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path, self.read_only, self.maker_pid = path, read_only, os.getpid()
        self.ranges: dict[str, tuple[int, int]] = {}
        self.kept_state_bytes = 0
        """Of a checkpoint that was there, while only scratch is open."""
        users = [] if read_only else PROBER.users(path)
        if users:
            raise StorageError(f"{path} is in use: {'; '.join(users)}; it is never written to; give a device that nobody uses")
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_EXCL
        try:
            self.fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            held = "; the kernel says that somebody uses it" if error.errno == errno.EBUSY else ""
            raise StorageError(f"{path} cannot be opened ({errno.errorcode.get(error.errno or 0)}: {error.strerror}){held}") from error
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            self.size_bytes = PROBER.size_bytes(self.fd) // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES
            block = PROBER.logical_block_bytes(self.fd)
            if self.size_bytes < BASE_BYTES:
                raise StorageError(
                    f"{path} has {self.size_bytes} B, fewer than the {BASE_BYTES} B before its content; attach its medium, or give another "
                    "device"
                )
            if block > EXTENT_ALIGNMENT_BYTES:
                raise StorageError(f"{path} has blocks of {block} B, {EXTENT_ALIGNMENT_BYTES} B at most can be used")
        except BlockingIOError as error:
            os.close(self.fd)
            raise StorageError(f"{path} is in use by another run; wait for it or give another device") from error
        except BaseException:
            os.close(self.fd)
            raise

    def read(self, offset: int, num_bytes: int) -> bytes:
        first = offset // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES
        pages = mmap.mmap(-1, align_up(offset + num_bytes, EXTENT_ALIGNMENT_BYTES) - first)
        try:
            moved = os.preadv(self.fd, [pages], first)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read at offset {first}: {error.strerror}") from error
        return bytes(pages[offset - first : min(moved, offset - first + num_bytes)])

    def reserve(self, kind: str, num_bytes: int) -> tuple[int, int]:
        """State from the start, scratch at the end; BudgetError if both do not fit."""
        base = BASE_BYTES if kind == "state" else self.size_bytes - num_bytes
        taken = sum(end - start for start, end in self.ranges.values()) + (self.kept_state_bytes if kind == "scratch" else 0)
        if kind in self.ranges:
            raise StorageError(f"{self.path} has a store for {kind} already")
        if num_bytes + taken > self.size_bytes - BASE_BYTES:
            room = self.size_bytes - BASE_BYTES - taken
            raise BudgetError(
                f"{kind} needs {format_bytes(num_bytes)} ({num_bytes} B) but {self.path} has {format_bytes(room)} ({room} B) free; give a "
                "larger device, several of them, or lower --ssd-budget"
            )
        self.ranges[kind] = (base, base + num_bytes)
        return base, base + num_bytes


_CLAIMS: dict[str, _Claim] = {}


class BlockDevice:
    """A range of a block device: all of its state, or all of its scratch.

    Args:
        place: the device; links such as those in /dev/disk/by-id are followed.
        num_bytes: room that is needed.
        set_id, note: what the header shall say it belongs to.
        existing: go on with the state that is there; its header must name `set_id`.
        is_scratch: the range at the end.
        overwrite: devices whose content may be lost (rule 2).
        before_discarding: called when the device is locked and nothing is changed yet; may refuse by raising.

    Raises:
        BudgetError: the device is too small.
        StorageError: rules 1 to 3; or it cannot be opened or read.
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        num_bytes: int,
        *,
        set_id: str,
        note: str,
        existing: bool = False,
        read_only: bool = False,
        is_scratch: bool = False,
        before_discarding: Callable[[], None] | None = None,
        overwrite: Sequence[str] = (),
        calls: FileCalls = OS_CALLS,
    ) -> None:
        self.path = Path(place).resolve()
        self.is_direct = True
        self.keeps_content = existing
        self.is_fresh_zero = False
        self._calls, self._kind = calls, "scratch" if is_scratch else "state"
        claim = _CLAIMS.get(str(self.path))
        is_first = claim is None
        self._claim: _Claim | None = claim or _Claim(self.path, read_only=read_only)
        claim = self._claim
        self._fields = {
            "format": "overspill-device", "bytes": claim.size_bytes, "set_id": set_id, "is_kept": existing, "note": note, "state_bytes": 0,
        }  # fmt: skip
        try:
            if is_first or not is_scratch:
                self._look(claim, existing, {str(Path(item).resolve()) for item in overwrite}, is_scratch=is_scratch)
            if before_discarding is not None:
                before_discarding()
            self.base_bytes, end = claim.reserve(self._kind, align_up(num_bytes, EXTENT_ALIGNMENT_BYTES))
            _CLAIMS[str(self.path)] = claim
            self.fd, self.capacity_bytes = claim.fd, end - self.base_bytes
            if not existing:
                with contextlib.suppress(OSError):  # a favour to the drive; extents are zeroed before use in any case
                    PROBER.discard(self.fd, self.base_bytes, self.capacity_bytes)
            if not read_only and not is_scratch:
                self._fields["state_bytes"] = self.capacity_bytes
                try:
                    self._write_header()
                except OSError as error:
                    raise StorageError(
                        f"the header of {self.path} could not be written ({errno.errorcode.get(error.errno or 0)}: {error.strerror}); "
                        "give a device that can be written"
                    ) from error
        except BaseException:
            self.close()
            raise

    def _look(self, claim: _Claim, existing: bool, overwrite: set[str], *, is_scratch: bool) -> None:
        """Rules 2 and 3."""
        header = parse_header(claim.read(0, _HEADER_BYTES))
        named = str(self.path) in overwrite
        cure = f"to lose it, say --ssd-overwrite {self.path} besides"
        if existing:
            if header is None or header.get("set_id") != self._fields["set_id"]:
                found = "has no overspill header" if header is None else f"belongs to set {header.get('set_id')}"
                raise StorageError(f"{self.path} should belong to set {self._fields['set_id']}, but it {found}; attach the right device")
            if header.get("bytes") != claim.size_bytes:
                raise StorageError(f"{self.path} has {claim.size_bytes} B, its header was made for {header.get('bytes')} B")
            return
        if header is not None:
            if header.get("is_kept") and not named and not is_scratch:
                raise StorageError(f"{self.path} holds the checkpoints of another run (set {header.get('set_id')}); {cure}")
            if header.get("is_kept") and is_scratch:  # it leaves kept state alone: a run that goes on opens its scratch first
                claim.kept_state_bytes = int(header.get("state_bytes", claim.size_bytes))
            return
        found = find_signature(claim.read, claim.size_bytes)
        if found and not named:
            raise StorageError(f"{self.path} holds {found}, which would be overwritten; {cure}")

    def keep(self, is_kept: bool) -> None:
        """Say in the header whether the state is kept. Raises OSError."""
        if self._kind == "state" and self._fields["is_kept"] != is_kept:
            self._fields["is_kept"] = is_kept
            self._write_header()
            self.flush()
        self.keeps_content = is_kept

    def zero(self, offset: int, num_bytes: int) -> None:
        """Make a range of whole pages read as zeros. Raises OSError."""
        PROBER.zero(self.fd, self.base_bytes + offset, num_bytes)

    def flush(self) -> None:
        """Make what was written durable. Raises OSError: it failed; what is on the drive is unknown."""
        self._calls.fsync(self.fd)

    def close(self) -> None:
        """Discard what is not kept, and let the device go with its last range; closing again does nothing. In a child rule 5 holds."""
        claim, self._claim = self._claim, None
        if claim is None:
            return
        span = claim.ranges.get(self._kind)
        is_mine = span is not None and span[0] == getattr(self, "base_bytes", None)
        if is_mine:
            assert span is not None
            if not self.keeps_content and not claim.read_only and os.getpid() == claim.maker_pid:
                _forget(claim.fd, span[0], span[1] - span[0])
            del claim.ranges[self._kind]
        if not claim.ranges:
            _CLAIMS.pop(str(self.path), None)
            os.close(claim.fd)

    def _write_header(self) -> None:
        page = mmap.mmap(-1, _HEADER_BYTES)
        page[:] = build_header(self._fields)
        moved = self._calls.pwritev(self.fd, [page], 0)
        if moved != _HEADER_BYTES:
            raise OSError(errno.EIO, f"wrote {moved} of {_HEADER_BYTES} B of the header of {self.path}")


def _forget(fd: int, offset: int, num_bytes: int) -> None:
    """Rule 4, at the end. A drive that fails here has nothing more to lose."""
    with contextlib.suppress(OSError):
        try:
            PROBER.discard(fd, offset, num_bytes)
        except OSError:
            PROBER.zero(fd, offset, num_bytes)
