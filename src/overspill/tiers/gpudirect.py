"""Files that a GPU's memory is written to and read from with no copy in host memory: NVIDIA's GPUDirect Storage, through kvikio.

The drive's controller reads and writes the GPU's memory itself; the kernel module nvidia-fs gives it the addresses, libcufile starts the
transfers, kvikio is how Python calls that. The files are those of `striped_file.py`, with all of its rules: checked, preallocated, locked,
and without a name. kvikio opens them again through `/proc/self/fd`, which has a name for what has none.

Rules:

1. kvikio is imported when somebody asks for it (`open_kvikio`), and what is missing is said then, before training. Without nvidia-fs
   kvikio would copy through host memory of its own, which `ssd.py` does better: that is refused. It is looked for before a file is
   opened, for in the mode that takes no other way kvikio 26.10 hangs without it.
2. Transfers are made in the order of a CUDA stream of the caller's (`Queue`), the thread waiting for each. kvikio's plain calls would first
   wait for all that the default stream has been given, on which compute usually is. libcufile knows the order of streams only where it
   finds its configuration file, so a missing one is refused too.
3. Addresses and lengths are whole pages: all else would pass through libcufile's buffers.
4. A transfer that ends without an error moved every byte; short ones are gone on with. What kvikio raises becomes a `StorageError`.

Limits: never run on a machine with nvidia-fs, for want of one; tried against a stand-in (tests/activations/stand_in_kvikio.py), and the
opening of a file without a name by kvikio 26.10 itself. Device memory is not registered with libcufile, which then copies through
buffers of its own on the GPU. libcufile falls back to host memory by itself, unseen from here, for a file system that it does not know
(`allow_compat_mode` in its configuration; `gdscheck -p` tells). No block devices. Drives that reach the GPU without nvidia-fs (PCI
peer-to-peer of new kernels) are not recognised, and so refused.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from overspill.errors import StorageError
from overspill.tiers.block_device import is_block_device
from overspill.tiers.closing import Closing
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.tiers.striped_file import Place, StripedFile
from overspill.tiers.transfer import build_storage_error

PAGE_BYTES = EXTENT_ALIGNMENT_BYTES
"""Of a GPU as well, says kvikio's documentation."""

DEVICE_TYPES: tuple[str, ...] = ("cuda",)
"""Tests with a stand-in for kvikio add the CPU."""
NEEDS_NVIDIA_FS = True
"""Tests of kvikio itself on a GPU without nvidia-fs take this back; data then passes through kvikio's host memory."""
CONFIGURATION_VARIABLE, CONFIGURATION_PATH = "CUFILE_ENV_PATH_JSON", "/etc/cufile.json"
"""Where libcufile looks for its configuration file, and kvikio with it."""


class Queue(Protocol):
    """A CUDA stream, and the thread that works it."""

    @property
    def raw_stream(self) -> int:
        """As CUDA numbers it."""
        ...

    def settle(self) -> None:
        """Block this thread, without spinning, until all is done that the stream was given."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kvikio:
    """The parts of kvikio that are used."""

    module: Any
    defaults: Any

    def open(self, path: str) -> Any:
        """A handle for reading and writing; no other mode than the direct one is taken for it, unless tests allow that."""
        mode = self.module.CompatMode.OFF if NEEDS_NVIDIA_FS else self.module.CompatMode.AUTO
        with self.defaults.set({"compat_mode": mode}):  # of the process, so for no longer than the opening
            return self.module.CuFile(path, "r+")


def open_kvikio(device: torch.device, places: Sequence[Place]) -> Kvikio:
    """kvikio, if it can move bytes between `device` and drives (rule 1).

    Raises:
        ValueError: it cannot; what is missing, and what to do.
    """
    cure = "or leave gpudirect out: the SSD is then reached through pinned host memory"
    if device.type not in DEVICE_TYPES:
        raise ValueError(f"gpudirect=True moves the memory of CUDA devices, and the model is on {device}: move it to one, {cure}")
    raw = next((place for place in places if is_block_device(place)), None)
    if raw is not None:
        raise ValueError(f"gpudirect=True with {raw}, a block device: it was never tried. Give a directory on a file system, {cure}")
    try:
        module, defaults, driver = map(importlib.import_module, ("kvikio", "kvikio.defaults", "kvikio.cufile_driver"))
    except ModuleNotFoundError as error:
        name = f"no module named {error.name}"
        raise ValueError(f"gpudirect=True needs kvikio, and there is {name}: pip install 'overspill[gds]', {cure}") from error
    except Exception as error:  # it loads libcufile, and has errors of its own for all that may be missing
        raise ValueError(
            f"gpudirect=True needs kvikio, which cannot be imported ({type(error).__name__}: {error}); mend it, {cure}"
        ) from error
    if NEEDS_NVIDIA_FS:
        if not driver.get("is_gds_available"):
            raise ValueError(
                "gpudirect=True needs GPUDirect Storage, and kvikio finds no nvidia-fs kernel module (`lsmod | grep nvidia_fs`): it would "
                f"copy through host memory by itself. Install nvidia-gds (`gdscheck -p` tells what is missing), {cure}"
            )
        if not Path(os.environ.get(CONFIGURATION_VARIABLE, CONFIGURATION_PATH)).exists():
            raise ValueError(
                f"gpudirect=True needs libcufile's configuration, and there is neither {CONFIGURATION_PATH} nor a file named by "
                f"{CONFIGURATION_VARIABLE}: without it every transfer would wait for all of compute. Write one (`{{}}` will do), {cure}"
            )
    return Kvikio(module=module, defaults=defaults)


class DirectFile(Closing):
    """Scratch files in one or several directories, in one address space. Thread-safe; each thread has a queue of its own.

    Args:
        capacity_bytes: of all together; a multiple of a page, reserved at once.

    Raises:
        ValueError, BudgetError, StorageError: a place cannot be used, see `StripedFile`; or not in this way.
    """

    def __init__(self, kvikio: Kvikio, places: Sequence[Place], *, capacity_bytes: int) -> None:
        self._file = StripedFile(places, capacity_bytes, unlink=True)
        self._handles: list[Any] = []
        self._maker_pid = os.getpid()
        weakref.finalize(self, _shut, self._maker_pid, self._handles, self._file)
        try:
            for item in self._file.files:
                try:
                    self._handles.append(kvikio.open(f"/proc/self/fd/{item.fd}"))
                except Exception as error:
                    raise StorageError(
                        f"{item.path.parent} cannot be reached from the GPU: {_words(error)}; `gdscheck -p` tells which file systems "
                        "can. Give another ssd_dir, such as on a local NVMe drive with ext4 or xfs, or leave gpudirect out"
                    ) from error.with_traceback(None)
        except BaseException:
            self.close()
            raise
        self._lock = threading.Lock()
        self.read_bytes = self.written_bytes = 0

    @property
    def path(self) -> str:
        """The files, for messages; their names no longer exist."""
        return self._file.path

    def write(self, name: str, address: int, buffer: torch.Tensor, queue: Queue) -> None:
        """Write a buffer of whole pages, behind what the queue has been given; blocks until it is on the drive.

        Args:
            name: for messages.

        Raises:
            StorageError: it failed.
        """
        self._move(True, name, address, buffer, queue)
        with self._lock:
            self.written_bytes += buffer.numel()

    def read(self, name: str, address: int, buffer: torch.Tensor, queue: Queue) -> None:
        """Read into a buffer of whole pages, as `write`."""
        self._move(False, name, address, buffer, queue)
        with self._lock:
            self.read_bytes += buffer.numel()

    def close(self) -> None:
        """Remove the files; closing again does nothing. In the child of a fork only its descriptors are closed."""
        _shut(self._maker_pid, self._handles, self._file)

    def _move(self, is_write: bool, name: str, address: int, buffer: torch.Tensor, queue: Queue) -> None:
        assert buffer.dtype == torch.uint8 and buffer.is_contiguous(), (buffer.dtype, buffer.stride())
        assert address % PAGE_BYTES == buffer.numel() % PAGE_BYTES == 0, f"{name}: {buffer.numel()} B at {address} are not whole pages"
        for index, offset, start, size in self._pieces(address, buffer.numel()):
            handle, done = self._handles[index], 0
            begin = handle.raw_write_async if is_write else handle.raw_read_async
            while done < size:
                failure: BaseException | None = None
                try:
                    future = begin(buffer[start + done : start + size], queue.raw_stream, size - done, offset + done, 0)
                    queue.settle()
                    moved = int(future.check_bytes_done())
                except Exception as error:
                    failure, moved = error.with_traceback(None), 0  # whose frames have the buffer
                if moved < PAGE_BYTES:
                    raise self._error("write" if is_write else "read", name, index, offset, size, done, failure) from failure
                done += moved // PAGE_BYTES * PAGE_BYTES

    def _pieces(self, address: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """(file, offset there, offset in the buffer, bytes) of what lies in one piece."""
        layout, files, start = self._file.layout, self._file.files, 0
        while start < num_bytes:
            rest = layout.stripe_bytes - (address + start) % layout.stripe_bytes if layout.num_files > 1 else num_bytes
            ((index, offset, size),) = layout.file_ranges(address + start, min(rest, num_bytes - start))
            yield index, files[index].base_bytes + offset, start, size
            start += size

    def _error(
        self, operation: str, name: str, index: int, offset: int, wanted: int, done: int, failure: BaseException | None
    ) -> StorageError:
        path, number = str(self._file.files[index].path), _errno_of(failure) if failure is not None else None
        if failure is None or number is not None:
            return build_storage_error(
                operation=operation, name=name, path=path, offset=offset, wanted_bytes=wanted, done_bytes=done, error_number=number
            )
        verb = "got" if operation == "read" else "wrote"
        return StorageError(
            f"{operation} of {name} failed: wanted {wanted} B at offset {offset} of {path}, {verb} {done} B ({_words(failure)})"
        )


def _errno_of(failure: BaseException) -> int | None:
    """kvikio tells the number of what the system refused only in words, at the end of its own."""
    if isinstance(failure, OSError):
        return failure.errno
    return next((number for number in errno.errorcode if str(failure).endswith(f": {os.strerror(number)}")), None)


def _words(failure: BaseException) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def _shut(maker_pid: int, handles: list[Any], file: StripedFile) -> None:
    taken, handles[:] = handles[:], []
    if os.getpid() == maker_pid:
        for handle in taken:
            handle.close()
    file.close()
