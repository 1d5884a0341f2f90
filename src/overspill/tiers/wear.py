"""What was written to a drive: a counter beside the data, and the drive's own SMART log.

The counter is `overspill.written.json` in the SSD directory: bytes written there by overspill over the directory's life, and in the places
striped with it. It outlives the data file, because wear does. Where all places are raw devices it lies beside the checkpoints.

Rules:

1. It is one block of `_COUNTER_BYTES`, replaced by one write in place, under an exclusive `flock`: two runs that share a directory (only
   scratch may) both count, and a crash leaves the old block or the new one. What a killed run had not yet saved is lost: it saves
   every `SAVE_INTERVAL_S` without flushing, and flushes at checkpoints and at the end.
2. A counter that cannot be read is started again, and says so (`is_complete`); one that cannot be written warns once. Neither stops a run.
3. SMART is read where the kernel lets this process (`/dev/nvme*`, usually root only): one `NVME_IOCTL_ADMIN_CMD`, log page 02h. Nothing
   is ever written to the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from overspill.spec.lifetime import DriveHealth
from overspill.tiers.extent_file import nearest_existing

COUNTER_NAME = "overspill.written.json"
SAVE_INTERVAL_S = 300.0
"""Chosen: a killed run forgets at most five minutes."""
_COUNTER_BYTES = 512
"""A sector, which a drive writes whole or not at all."""

SMART_LOG_BYTES = 512
DATA_UNIT_BYTES = 512 * 1000
"""NVMe base specification, SMART log: data units are thousands of 512 bytes."""
_NVME_IOCTL_ADMIN_CMD = 0xC0484E41
"""_IOWR('N', 0x41, struct nvme_admin_cmd), from linux/nvme_ioctl.h."""
_GET_LOG_PAGE = 0x02
_SMART_LOG = 0x02
_ALL_NAMESPACES = 0xFFFFFFFF


class WriteCounter:
    """Counts what one session writes in a directory, on top of all that earlier ones did.

    Args:
        directory: None: there is none to remember it in (raw devices alone), so only this session is counted.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.path = None if directory is None else Path(directory) / COUNTER_NAME
        self.is_complete = True
        """False if an earlier count was lost (rule 2)."""
        self._before = self._read_first()
        self._session_bytes = 0
        self._saved_bytes = 0
        self._saved_s = time.monotonic()
        self._has_failed = False
        self._maker_pid = os.getpid()

    @property
    def written_bytes(self) -> int:
        """Over the directory's life."""
        return self._before + self._session_bytes

    def note(self, session_bytes: int) -> None:
        """Take the session's total so far; saved now and then, not flushed (rule 1)."""
        self._session_bytes = session_bytes
        if time.monotonic() - self._saved_s >= SAVE_INTERVAL_S:
            self.save(is_durable=False)

    def save(self, *, is_durable: bool = True) -> None:
        """Add what is new to the file."""
        self._saved_s = time.monotonic()
        new = self._session_bytes - self._saved_bytes
        is_forked = os.getpid() != self._maker_pid  # a child would count the parent's bytes again
        if self.path is None or not new or self._has_failed or is_forked:
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                total = (_parse_counter(os.pread(fd, _COUNTER_BYTES, 0)) or 0) + new
                text = json.dumps({"written_bytes": total, "is_complete": self.is_complete})
                os.pwrite(fd, text.ljust(_COUNTER_BYTES - 1).encode() + b"\n", 0)
                if is_durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self._has_failed = True
            warnings.warn(
                f"cannot note in {self.path} what was written to the drive: {error.strerror} (errno {error.errno}); training goes on, but "
                "the drive's wear is underestimated from here on",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._saved_bytes = self._session_bytes

    def _read_first(self) -> int:
        if self.path is None:
            return 0
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        except OSError:
            content = b""
        count = _parse_counter(content)
        self.is_complete = count is not None and b'"is_complete": false' not in content
        return count or 0


def _parse_counter(content: bytes) -> int | None:
    """The count; None if this is none."""
    try:
        count = json.loads(content)["written_bytes"]
    except (ValueError, KeyError, TypeError):
        return None
    return count if type(count) is int and count >= 0 else None


class _AdminCommand(ctypes.Structure):
    """struct nvme_admin_cmd of linux/nvme_ioctl.h."""

    _fields_ = [
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    ]


assert ctypes.sizeof(_AdminCommand) == 0x48  # the size that the ioctl's number carries


def parse_smart_log(page: bytes) -> DriveHealth:
    """Log page 02h, 512 bytes, little-endian.

    Raises:
        ValueError: the page has another length.
    """
    if len(page) != SMART_LOG_BYTES:
        raise ValueError(f"a SMART log page has {SMART_LOG_BYTES} B, got {len(page)} B")
    return DriveHealth(
        has_warning=page[0] != 0,
        spare_percentage=page[3],
        spare_threshold_percentage=page[4],
        percentage_used=page[5],
        written_bytes=int.from_bytes(page[48:64], "little") * DATA_UNIT_BYTES,
    )


def device_number_of(place: str | os.PathLike[str]) -> int:
    """Of the block device that `place` is, or that the file system under it is on, also where the place is yet to be made."""
    found = os.stat(nearest_existing(Path(place)))
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev


def drive_shares(places: Sequence[str], *, find: Callable[[str], str] | None = None) -> tuple[tuple[str, float], ...]:
    """(place, share) of each drive under striped places, the first of its places for each: what it takes of all that is written.

    Args:
        find: the drive of a place; tests give their own.
    """
    find = find or (lambda place: find_drive(device_number_of(place)))
    drives: dict[str, list[str]] = {}
    for place in places:
        drives.setdefault(find(place), []).append(place)
    return tuple((on[0], len(on) / len(places)) for on in drives.values())


def find_drive(device_number: int, *, sysfs: Path = Path("/sys")) -> str:
    """A name of the drive that a block device is on, the same for all partitions of one: the NVMe controller, else the whole disk."""
    entry = sysfs / "dev/block" / f"{os.major(device_number)}:{os.minor(device_number)}"
    with contextlib.suppress(OSError):
        path = entry.resolve(strict=True)
        return find_controller(device_number, sysfs=sysfs) or (path.parent if (path / "partition").exists() else path).name
    return entry.name


def find_controller(device_number: int, *, sysfs: Path = Path("/sys")) -> str | None:
    """The NVMe controller, such as `nvme0`, that the file system on block device `device_number` rests on; None if it is no NVMe.

    Looks through partitions and through device mapper (encryption, LVM), where that has one device below.
    """
    entry = sysfs / "dev/block" / f"{os.major(device_number)}:{os.minor(device_number)}"
    for _ in range(8):  # layers of device mapper; more is no real machine
        try:
            path = entry.resolve(strict=True)
        except OSError:
            return None
        for part in reversed(path.parts):
            match = re.fullmatch(r"(nvme\d+)(c\d+)?(n\d+)?(p\d+)?", part)
            if match:
                return match[1]
        below = sorted((path / "slaves").iterdir()) if (path / "slaves").is_dir() else []
        if len(below) != 1:
            return None
        entry = below[0]
    return None


def read_drive_health(directory: str | os.PathLike[str]) -> DriveHealth | None:
    """What the drive under a directory, or of a block device, says of itself; None where that cannot be read (no NVMe, no permission, a
    virtual drive)."""
    controller = find_controller(device_number_of(directory))
    if controller is None:
        return None
    page = ctypes.create_string_buffer(SMART_LOG_BYTES)
    command = _AdminCommand(
        opcode=_GET_LOG_PAGE,
        nsid=_ALL_NAMESPACES,
        addr=ctypes.addressof(page),
        data_len=SMART_LOG_BYTES,
        cdw10=(SMART_LOG_BYTES // 4 - 1) << 16 | _SMART_LOG,
    )
    try:
        fd = os.open(f"/dev/{controller}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = fcntl.ioctl(fd, _NVME_IOCTL_ADMIN_CMD, command)
    except OSError:
        return None
    finally:
        os.close(fd)
    return parse_smart_log(page.raw) if status == 0 else None
