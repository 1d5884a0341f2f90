"""The file under an `SsdStore`: checked, created, locked, preallocated, opened for direct I/O, and removed.

* **direct I/O** (`O_DIRECT`): the drive reads and writes the caller's memory itself. The kernel keeps no second copy in RAM
  (which training has filled already), and no core copies bytes. Addresses, offsets and lengths are multiples of 4096.
* **preallocated** (`posix_fallocate`): the file system has promised the blocks, so a full disk shows here and not in mid-run.

Rules:

1. Everything that can be wrong with the directory is found here, before training, and named with what to change.
2. One run owns a file: it holds an exclusive `flock`, which the kernel drops with the process, however that ends. Who holds
   it says so in `overspill.lock` beside the file, so that a second run can be told. A file that a killed run left behind is
   not locked, whatever that note says; its content is discarded unless it is opened as `existing`.
3. Closing in the child of a fork closes the child's descriptor and no more: name, note and lock are the parent's.
4. The directory is made with mode 0700 and the file with 0600: weights and data belong to their user. Links are not followed.

Limits: Linux only. A file system that refuses direct I/O is used through the page cache after one warning. A tmpfs is used
after one warning. The first write to a preallocated block costs the file system a little more than later ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

from overspill.errors import BudgetError, StorageError
from overspill.tiers.calls import OS_CALLS, FileCalls
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.tiers.run_lock import RunNote, read_holder
from overspill.units import MIB, format_bytes

FILE_NAME = "overspill.extents"
_SCRATCH_PREFIX = "overspill.scratch-"
_FALLOC_FL_ZERO_RANGE = 0x10
"""From linux/falloc.h: turn a range into preallocated blocks that read as zeros, without writing it."""


class ExtentFile:
    """An open, locked file of `capacity_bytes`, all zeros unless it is `existing`.

    Args:
        directory: made if it is missing (its parent is not).
        capacity_bytes: size of the file, a multiple of 4096; of an existing file the least size, which it grows to.
        unlink: the file never has a name (`O_TMPFILE`); where the file system does not know that, it gets a random one that is removed at
            once. The blocks are free again when the process ends, even when it is killed.
        existing: open the file that is there and keep its content.
        read_only: change nothing in the directory; the lock is shared with others that only read.
        before_discarding: called when the lock is held and nothing is changed yet; may refuse by raising.

    Raises:
        ValueError: the directory cannot be meant: its parent is missing, or it is no directory.
        BudgetError: the file system has less room than `capacity_bytes`.
        StorageError: the directory is not writable, the file is in use, or the file system fails.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        capacity_bytes: int,
        *,
        unlink: bool,
        existing: bool = False,
        read_only: bool = False,
        before_discarding: Callable[[], None] | None = None,
        calls: FileCalls = OS_CALLS,
    ) -> None:
        assert existing or not read_only
        assert capacity_bytes % EXTENT_ALIGNMENT_BYTES == 0, capacity_bytes
        self._maker_pid = os.getpid()
        folder = Path(directory)
        _make_directory(folder)
        if is_in_memory(folder):
            warnings.warn(
                f"the SSD directory {folder} is in RAM ({filesystem_of(folder)}): its {format_bytes(capacity_bytes)} take host memory "
                "that no budget counts; give an --ssd-dir on a drive",
                RuntimeWarning,
                stacklevel=3,
            )
        self.path = folder / (f"{_SCRATCH_PREFIX}{secrets.token_hex(8)}" if unlink else FILE_NAME)
        if existing and not self.path.is_file():
            raise StorageError(f"{self.path} is missing: there is nothing to go on with in {folder}")
        self.base_bytes = 0
        """Offset in the file of the first byte that can be used."""
        self.is_fresh_zero = True
        unnamed = _open_unnamed(folder) if unlink else None
        self.fd = _open_locked(self.path, read_only=read_only) if unnamed is None else unnamed
        self.calls = calls
        self._is_named = unnamed is None
        self._note: RunNote | None = None
        self.keeps_content = existing or (not unlink and before_discarding is not None and os.fstat(self.fd).st_size > 0)
        """Whether closing leaves the file where it is; also what a refusal finds there."""
        try:
            if unlink:
                self._remove_name()
            elif not read_only:
                self._note = RunNote(folder)
            if before_discarding is not None:
                before_discarding()
            self.keeps_content = existing
            if existing:
                capacity_bytes = max(capacity_bytes, os.fstat(self.fd).st_size)
            if not read_only:
                _preallocate(self.fd, self.path, capacity_bytes, keep=existing)
            self.capacity_bytes = capacity_bytes
            self.is_direct = _enable_direct(self.fd, folder)
            """Whether transfers bypass the page cache and must be aligned."""
        except BaseException:
            self.close()
            raise

    def zero(self, offset: int, num_bytes: int) -> None:
        """Make a range of whole pages read as zeros; by the file system where it can, else by writing.

        Raises:
            OSError: it failed.
        """
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if fallocate(self.fd, _FALLOC_FL_ZERO_RANGE, offset, num_bytes) == 0:
            return
        error_number = ctypes.get_errno()
        if error_number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error_number, os.strerror(error_number))
        zeros = memoryview(mmap.mmap(-1, min(num_bytes, MIB)))
        done = 0
        while done < num_bytes:
            moved = os.pwritev(self.fd, [zeros[: num_bytes - done]], offset + done)
            if moved < EXTENT_ALIGNMENT_BYTES:
                raise OSError(errno.EIO, f"zeroing stopped after {done + moved} of {num_bytes} B")
            done += moved // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES

    def flush(self) -> None:
        """Make what was written durable.

        Raises:
            OSError: it failed; what is on the drive is unknown.
        """
        self.calls.fsync(self.fd)

    def close(self) -> None:
        """Remove (unless it is kept) and close the file; closing again does nothing. In the child of a fork rule 3 holds."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        try:
            if os.getpid() == self._maker_pid:  # both before the lock goes with the descriptor
                if not self.keeps_content:
                    self._remove_name()
                if self._note is not None:
                    self._note.remove()
        finally:
            os.close(fd)

    def _remove_name(self) -> None:
        if self._is_named:
            self._is_named = False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def _make_directory(folder: Path) -> None:
    try:
        if not folder.exists():
            if not folder.parent.is_dir():
                raise ValueError(
                    f"the SSD directory {folder} cannot be made: {folder.parent} is no directory; create it or give another --ssd-dir"
                )
            folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file and not a directory; give another --ssd-dir")
    except OSError as error:
        raise StorageError(f"the SSD directory {folder} cannot be used ({_reason(error)}); give another --ssd-dir") from error


def nearest_existing(place: Path) -> Path:
    """`place`, or the folder above it in which it, and what is between, would be made."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def is_in_memory(folder: Path) -> bool:
    """Whether an existing folder is on a file system that is host memory itself."""
    return filesystem_of(folder) in ("tmpfs", "ramfs")


def filesystem_of(folder: Path) -> str:
    """Type of the file system that holds `folder`, such as `ext4`; empty if unknown."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""


def _open_unnamed(folder: Path) -> int | None:
    """A file that no name leads to, so there is nothing to lock and nothing to leave behind; None where that is not known."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None  # also of a folder that cannot be written: opening a name says why


def _open_locked(path: Path, *, read_only: bool) -> int:
    """Open or create the file and lock it (rule 2)."""
    while True:
        try:
            mode = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
            fd = os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened for {'reading' if read_only else 'writing'} ({_reason(error)}); give another --ssd-dir"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StorageError(f"{path} is not a regular file; remove it or give another --ssd-dir")
            fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not read_only:
                os.fchmod(fd, 0o600)
            # Its owner may have removed the name between our open and our lock; then this descriptor is of a lost file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                    return fd
        except BlockingIOError as error:
            os.close(fd)
            raise StorageError(
                f"{path} is in use by another run{read_holder(path.parent)}; wait for it or give another directory"
            ) from error
        except OSError as error:
            os.close(fd)
            raise StorageError(f"{path} cannot be locked ({_reason(error)}); give another --ssd-dir") from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _preallocate(fd: int, path: Path, capacity_bytes: int, *, keep: bool) -> None:
    try:
        if not keep:
            os.ftruncate(fd, 0)
        start = os.fstat(fd).st_size
        if start >= capacity_bytes:
            return
        disk = os.fstatvfs(fd)
        free_bytes = disk.f_bavail * disk.f_frsize
        needed = capacity_bytes - start
        if free_bytes < needed:
            raise BudgetError(
                f"{path} needs {format_bytes(needed)} ({needed} B) but its file system has "
                f"{format_bytes(free_bytes)} ({free_bytes} B) free; give another --ssd-dir or lower --ssd-budget"
            )
        os.posix_fallocate(fd, start, needed)
    except OSError as error:
        raise StorageError(
            f"{format_bytes(capacity_bytes)} could not be reserved for {path} ({_reason(error)}); "
            "give another --ssd-dir or lower --ssd-budget"
        ) from error


def _enable_direct(fd: int, folder: Path) -> bool:
    """Switch the descriptor to direct I/O and try it; False, and one warning, where that is refused."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [mmap.mmap(-1, EXTENT_ALIGNMENT_BYTES)], 0)
        return True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise StorageError(f"the new file in {folder} cannot be read ({_reason(error)}); give another --ssd-dir") from error
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        warnings.warn(
            f"the file system of {folder} refuses direct I/O ({_reason(error)}): transfers go through the page cache, slower and with a "
            "copy in RAM; give an --ssd-dir on a local ext4 or xfs",
            RuntimeWarning,
            stacklevel=4,
        )
        return False


def _reason(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'errno unknown')}: {error.strerror or error}"
