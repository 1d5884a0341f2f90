"""A store in memory that is as slow, and fails as often, as you say: for tests, examples and trying a schedule without an SSD.

It keeps the rules of `protocol.py`, and makes breaking them visible: bytes are copied at the end of a transfer's delay, so a
read buffer that is used before `wait()` shows old bytes, and a write buffer that is changed too early writes the change.

Rules:

1. Reads run one after another in the order they were started, and so do writes; the two queues do not slow each other.
2. A transfer takes `delay_s` plus its bytes over `bytes_per_s`, then copies at once.
3. A failing transfer takes its time, moves nothing, and raises at `wait()` what `SsdStore` would raise.

    store = FakeStore(1 << 20, delay_s=0.01, failures=Failure(operation="read", call_index=2, errno=errno.EIO))
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from overspill.tiers.checksums import block_checksums
from overspill.tiers.closing import Closing
from overspill.tiers.extents import Extent, ExtentTable
from overspill.tiers.faults import FaultInjector
from overspill.tiers.transfer import DamagedBlock, ThreadTransfer, TransferBook, build_storage_error, validate_buffer

Operation = Literal["read", "write"]

FailureRule = Callable[[Operation, int, str], int | None]
"""(operation, call index, extent name) -> the errno that this transfer fails with, or None; called at the start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """One transfer that fails."""

    operation: Operation
    call_index: int
    """Which one: reads and writes are counted apart, from 0, in the order they were started."""
    errno: int
    """A constant of the module `errno`, such as `errno.EIO`."""


class FakeStore(Closing):
    """Extents in host memory. Meets the protocol `Store`.

    Args:
        capacity_bytes: room for all extents, each rounded to 4096 bytes; only what is allocated takes memory.
        delay_s: time that every transfer takes besides its bytes' time.
        bytes_per_s: bandwidth of each direction; None: no limit.
        failures: the transfers that fail: one, several, or a rule.
        calls: every transfer goes through its `copy`, which may fail, tear or flip what moves (`tiers/faults.py`).
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
        failures: Failure | Sequence[Failure] | FailureRule = (),
        calls: FaultInjector | None = None,
    ) -> None:
        if delay_s < 0 or (bytes_per_s is not None and bytes_per_s <= 0):
            raise ValueError(f"a store cannot be faster than at once: delay_s={delay_s}, bytes_per_s={bytes_per_s}")
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._calls = calls
        self._find_failure = failures if callable(failures) else _rule_of([failures] if isinstance(failures, Failure) else failures)
        self._table = ExtentTable(capacity_bytes)
        self._content: dict[str, torch.Tensor] = {}
        self._queues = {operation: ThreadPoolExecutor(1, f"overspill-fake-{operation}") for operation in ("read", "write")}
        self._num_calls = {"read": 0, "write": 0}
        self._num_moved_bytes = {"read": 0, "write": 0}
        self._book = TransferBook()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def capacity_bytes(self) -> int:
        return self._table.capacity_bytes

    @property
    def allocated_bytes(self) -> int:
        with self._lock:
            return self._table.allocated_bytes

    @property
    def read_bytes(self) -> int:
        return self._num_moved_bytes["read"]

    @property
    def written_bytes(self) -> int:
        return self._num_moved_bytes["write"]

    def allocate(self, name: str, num_bytes: int) -> None:
        """Make an extent of zeros."""
        self._assert_open(name)
        with self._lock:
            self._table.allocate(name, num_bytes)
            self._content[name] = torch.zeros(num_bytes, dtype=torch.uint8)

    def free(self, name: str) -> None:
        """Give an extent back; no transfer of it may be in flight."""
        self._assert_open(name)
        assert not self._book.num_in_flight(name), f"{name} is freed with {self._book.num_in_flight(name)} transfers in flight"
        with self._lock:
            self._table.free(name)
            self._content.pop(name, None)  # missing if making it was interrupted

    def num_bytes(self, name: str) -> int:
        with self._lock:
            return self._table.find(name).num_bytes

    def start_read(self, name: str, offset: int, buffer: torch.Tensor, *, expected: Sequence[int] | None = None) -> ThreadTransfer:
        """Start reading bytes [offset, offset + len(buffer)) of an extent; `buffer` is lent until `wait()`."""
        return self._start("read", name, offset, buffer, None if expected is None else tuple(expected), expected is not None)

    def start_write(self, name: str, offset: int, buffer: torch.Tensor, *, with_checksums: bool = False) -> ThreadTransfer:
        """Start writing bytes [offset, offset + len(buffer)) of an extent; `buffer` is lent until `wait()`."""
        return self._start("write", name, offset, buffer, None, with_checksums)

    def interrupt(self) -> None:
        """Nothing here waits for a person."""

    def proceed(self) -> None:
        """Nothing was given up."""

    def close(self) -> None:
        """Wait for the transfers in flight, stop the threads, raise a failure that nobody waited for."""
        if self._is_closed:
            return
        self._is_closed = True
        for queue in self._queues.values():
            queue.shutdown(wait=True)
        self._content.clear()
        self._book.raise_unseen()

    def _start(
        self, operation: Operation, name: str, offset: int, buffer: torch.Tensor, expected: tuple[int, ...] | None, with_checksums: bool
    ) -> ThreadTransfer:
        self._assert_open(name)
        validate_buffer(name, buffer)
        buffer = buffer.detach()
        with self._lock:
            extent = self._table.find(name)
            extent.validate_range(offset, buffer.numel())
            content = self._content[name][offset : offset + buffer.numel()]
            call_index = self._num_calls[operation]
            self._num_calls[operation] += 1
            self._num_moved_bytes[operation] += buffer.numel()
        error_number = self._find_failure(operation, call_index, name)
        target, source = (buffer, content) if operation == "read" else (content, buffer)

        def move() -> tuple[int, ...]:
            self._move(operation, extent, offset, target, source, error_number)
            checksums = block_checksums(buffer) if with_checksums else ()
            wrong = next((block for block, want in enumerate(expected or ()) if checksums[block] != want), None)
            if expected is not None and wrong is not None:
                raise DamagedBlock(name, wrong, expected[wrong], checksums[wrong])
            return checksums

        return ThreadTransfer(self._book, name, move, self._queues[operation])

    def _move(
        self, operation: str, extent: Extent, offset: int, target: torch.Tensor, source: torch.Tensor, error_number: int | None
    ) -> None:
        duration_s = self._delay_s + (source.numel() / self._bytes_per_s if self._bytes_per_s else 0.0)
        if duration_s:
            time.sleep(duration_s)
        cause: OSError | None = None
        if error_number is None:
            try:
                if self._calls is None:
                    target.copy_(source)
                else:
                    self._calls.copy(operation, target, source)
                return
            except OSError as error:
                cause, error_number = error, error.errno or 0
        raise build_storage_error(
            operation=operation,
            name=extent.name,
            path="a FakeStore",
            offset=extent.offset + offset,
            wanted_bytes=source.numel(),
            done_bytes=0,
            error_number=error_number,
        ) from cause or OSError(error_number, os.strerror(error_number))

    def _assert_open(self, name: str) -> None:
        assert not self._is_closed, f"{name} is used in a FakeStore that is closed"


def _rule_of(failures: Sequence[Failure]) -> FailureRule:
    known = {(failure.operation, failure.call_index): failure.errno for failure in failures}
    return lambda operation, call_index, name: known.get((operation, call_index))
