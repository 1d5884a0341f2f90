"""A stand-in for kvikio over ordinary files, for testing GPUDirect Storage where there is none. It takes CPU tensors for device memory too.

It has what `tiers/gpudirect.py` uses, with the signatures of kvikio 26.10, and refuses what kvikio would take a slower way for: sizes and
offsets that are no whole pages. Transfers can take time, move less than was asked, fail in kvikio's words, or lie.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import offload

from overspill.activations import OffloadActivations
from overspill.tiers import gpudirect

PAGE = 4096


class CompatMode:
    OFF, ON, AUTO = "off", "on", "auto"


class StandIn:
    """One per test.

    Attributes:
        log: (operation, offset, bytes) of every transfer that was begun.
        before: called with (operation, number of the transfer) on its thread, before a byte moves.
        results: number of a transfer → what it says it moved, which is also what it moves.
        failures: number of a transfer → errno.
        lies: number of a transfer → `flipped` (a bit of what is read), or `forgotten` (a page that is not written).
    """

    def __init__(self) -> None:
        self.has_nvidia_fs, self.refused_paths = True, False
        self.mode = CompatMode.AUTO
        self.log: list[tuple[str, int, int]] = []
        self.before: Callable[[str, int], None] = lambda operation, number: None
        self.results: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.lies: dict[int, str] = {}
        self.num_open = 0
        self._lock = threading.Lock()

    def begin(self, operation: str, offset: int, size: int) -> int:
        with self._lock:
            self.log.append((operation, offset, size))
            return len(self.log) - 1

    def modules(self) -> dict[str, types.ModuleType]:
        kvikio, defaults, driver = map(types.ModuleType, ("kvikio", "kvikio.defaults", "kvikio.cufile_driver"))
        kvikio.CompatMode, kvikio.CuFile = CompatMode, lambda path, flags="r": CuFile(self, path, flags)  # type: ignore[attr-defined]
        defaults.set = self._set  # type: ignore[attr-defined]
        driver.get = {"is_gds_available": self.has_nvidia_fs}.__getitem__  # type: ignore[attr-defined]
        return {module.__name__: module for module in (kvikio, defaults, driver)}

    @contextlib.contextmanager
    def _set(self, settings: dict[str, Any]) -> Iterator[None]:
        before, self.mode = self.mode, settings["compat_mode"]
        try:
            yield
        finally:
            self.mode = before


class CuFile:
    def __init__(self, kvikio: StandIn, path: str, flags: str) -> None:
        assert flags == "r+", "reading and writing, and nothing is truncated"
        if kvikio.refused_paths:
            raise RuntimeError("cuFile error at: file_handle.cpp:70: GPUDirect Storage not supported on current file")
        assert kvikio.mode == CompatMode.OFF, "nothing but the direct way"
        self._kvikio, self._fd = kvikio, os.open(path, os.O_RDWR | os.O_CLOEXEC)
        kvikio.num_open += 1

    def close(self) -> None:
        os.close(self._fd)
        self._kvikio.num_open -= 1

    def raw_write_async(self, buf: torch.Tensor, raw_stream: int, size: int, file_offset: int = 0, dev_offset: int = 0) -> IOFutureStream:
        return IOFutureStream(self._kvikio, self._fd, "write", buf, raw_stream, size, file_offset, dev_offset)

    def raw_read_async(self, buf: torch.Tensor, raw_stream: int, size: int, file_offset: int = 0, dev_offset: int = 0) -> IOFutureStream:
        return IOFutureStream(self._kvikio, self._fd, "read", buf, raw_stream, size, file_offset, dev_offset)


class IOFutureStream:
    """Moves its bytes when it is asked for the result."""

    def __init__(
        self, kvikio: StandIn, fd: int, operation: str, buf: torch.Tensor, raw_stream: int, size: int, offset: int, dev_offset: int
    ) -> None:
        assert buf.dtype == torch.uint8 and buf.is_contiguous() and size == buf.numel() > 0 == dev_offset
        assert bool(raw_stream) == buf.is_cuda, "a stream of one's own: the default one is compute's"
        assert size % PAGE == offset % PAGE == 0, f"{size} B at {offset} would not go the direct way"
        self._kvikio, self._fd, self._operation, self._buf, self._offset = kvikio, fd, operation, buf, offset
        self._stream = torch.cuda.ExternalStream(raw_stream, buf.device) if buf.is_cuda else None
        self._number = kvikio.begin(operation, offset, size)

    def check_bytes_done(self) -> int:
        with torch.cuda.stream(self._stream):  # nothing, if that is None
            return self._move()

    def _move(self) -> int:
        kvikio, number = self._kvikio, self._number
        kvikio.before(self._operation, number)
        if number in kvikio.failures:
            words = os.strerror(kvikio.failures[number])
            raise RuntimeError(
                f"Unable to {self._operation} file. Linux system/library function call error at: file_handle.cpp:190: {words}"
            )
        size = min(kvikio.results.get(number, self._buf.numel()), self._buf.numel())
        lie = kvikio.lies.get(number)
        if size and self._operation == "write":
            content = self._buf[:size].cpu().numpy().tobytes()
            if lie == "forgotten":
                os.pwrite(self._fd, content[PAGE:], self._offset + PAGE)
            else:
                assert os.pwrite(self._fd, content, self._offset) == size
        elif size:
            content = bytearray(os.pread(self._fd, size, self._offset))
            assert len(content) == size
            content[-1] ^= 4 if lie == "flipped" else 0
            self._buf[:size].copy_(torch.frombuffer(content, dtype=torch.uint8))
        return size


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> StandIn:
    """What `import kvikio` gives for the rest of a test, and the CPU counts as a device that GPUDirect Storage knows."""
    stand_in = StandIn()
    show(stand_in, monkeypatch)
    configuration = folder / "cufile.json"
    configuration.write_text("{}")
    monkeypatch.setenv(gpudirect.CONFIGURATION_VARIABLE, str(configuration))
    monkeypatch.setattr(gpudirect, "DEVICE_TYPES", ("cuda", "cpu"))
    return stand_in


def show(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, as it is now."""
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def wait_a_little(seed: int, most_s: float) -> Callable[[str, int], None]:
    """For `before`: transfers that take random times."""
    generator = torch.Generator().manual_seed(seed)
    return lambda operation, number: time.sleep(float(torch.rand((), generator=generator)) * most_s)


def direct(model: torch.nn.Module, folder: Path, **settings: Any) -> OffloadActivations:
    """No host memory at all."""
    return offload(model, **{"host_budget": 0, "ssd_dir": folder / "ssd", "ssd_budget": "16MiB", "gpudirect": True, **settings})


def away(active: OffloadActivations, step: Any) -> torch.Tensor:
    """A loss whose saved tensors have all been written, and are on the device no more."""
    loss = step()
    mover = active._cache().mover
    for copy in tuple(mover._under_way):
        copy.settle()
    mover.drop_left()
    return loss


FULL, BROKEN = errno.ENOSPC, errno.EIO
