"""Copies between the device and host memory, started by autograd's hooks and waited for by the device.

Words:

* **end**: of a copy that was started. It can be asked (`is_done`), waited for by a thread (`wait`) and waited for by compute (`hold`).
* **compute**: on CUDA the stream that is current where a hook runs; on the CPU the thread itself.

Rules:

1. A copy out of the device begins when compute has reached the point at which it was started, for only then its source is written; a copy
   in begins after the given mark, for new device memory may be memory that compute still uses.
2. Host memory that other work still touches is given with that work (`after`), and the copy waits for it.
3. Both buffers are the copy's until its end. Who lets go of device memory earlier lets compute wait first (`hold`): torch's allocator gives
   freed memory to what compute does next, in compute's order.
4. No thread waits for a CUDA device in here, and compute does not wait for the host.
5. A fetch that nobody used is given up with `let_go`: the stream that owns the memory waits for the copy into it.
6. Compute may have several streams. Memory that one of them owns and another one uses is told to torch's allocator (`record_stream`).

`CudaLink` has a stream for each direction. `ThreadLink` is the same on the CPU, with a thread for each direction: all above it is the same
code, and what a slow link does can be tried anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

Mark = Any
"""A point in compute's time: a CUDA event, or seconds."""


THREAD_PREFIX = "overspill-saved"
"""Of the names of all threads in this package."""


class End(Protocol):
    """The end of one copy. Also what a slot pool calls `Pending`."""

    num_bytes: int

    @property
    def is_done(self) -> bool: ...
    def wait(self) -> None:
        """Block this thread until it is there; raise what the copy failed with."""
        ...

    def span_s(self) -> float | None:
        """Seconds that it took, of one that is done and was timed."""
        ...


class Link(Protocol):
    """Both directions between one device and host memory."""

    def start_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[End], *, is_timed: bool) -> End:
        """Start copying device bytes to host bytes (uint8 both, of one length); see rules 1 to 3."""
        ...

    def start_in(self, target: torch.Tensor, source: torch.Tensor, mark: Mark, after: Sequence[End], *, is_timed: bool) -> End:
        """Start copying host bytes to device bytes, not before compute has reached `mark`. May be called from any thread."""
        ...

    def mark(self) -> Mark:
        """Where compute is."""
        ...

    def time_mark(self) -> Mark:
        """The same, to measure with `seconds`."""
        ...

    def has_passed(self, mark: Mark) -> bool: ...
    def seconds(self, begin: Mark, end: Mark) -> float: ...
    def hold(self, end: End) -> None:
        """Let what compute does from here on wait for a copy."""
        ...

    def touch(self, tensor: torch.Tensor, mark: Mark) -> None:
        """Compute is about to use device memory that was made where `mark` is (rule 6)."""
        ...

    def let_go(self, end: End) -> None:
        """The device memory that a copy in fills is about to be freed unused (rule 5); from any thread."""
        ...

    def close(self) -> None: ...


class _StreamMark:
    """A point in a stream of compute."""

    __slots__ = ("event", "stream")

    def __init__(self, stream: torch.cuda.Stream, *, is_timed: bool = False) -> None:
        self.stream, self.event = stream, torch.cuda.Event(enable_timing=is_timed)
        self.event.record(stream)


class _StreamEnd:
    """An event behind a copy in a stream."""

    __slots__ = ("_begin", "event", "num_bytes", "owner", "stream")

    def __init__(
        self,
        stream: torch.cuda.Stream,
        owner: torch.cuda.Stream,
        event: torch.cuda.Event,
        begin: torch.cuda.Event | None,
        num_bytes: int,
    ) -> None:
        self.stream, self.owner, self.event, self._begin, self.num_bytes = stream, owner, event, begin, num_bytes

    @property
    def is_done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def span_s(self) -> float | None:
        return self._begin.elapsed_time(self.event) / 1e3 if self._begin is not None else None


class CudaLink:
    """The link of one CUDA device. Meets the protocol `Link`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def start_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[End], *, is_timed: bool) -> End:
        mark = self.mark()
        if mark.stream != torch.cuda.default_stream(self._device):
            source.record_stream(self._out)  # who knows on which stream it was made
        return self._start(self._out, target, source, mark, after, is_timed)

    def start_in(self, target: torch.Tensor, source: torch.Tensor, mark: Mark, after: Sequence[End], *, is_timed: bool) -> End:
        return self._start(self._in, target, source, mark, after, is_timed)

    def mark(self) -> Mark:
        return _StreamMark(torch.cuda.current_stream(self._device))

    def time_mark(self) -> Mark:
        return _StreamMark(torch.cuda.current_stream(self._device), is_timed=True)

    def has_passed(self, mark: Mark) -> bool:
        return bool(mark.event.query())

    def seconds(self, begin: Mark, end: Mark) -> float:
        return begin.event.elapsed_time(end.event) / 1e3

    def hold(self, end: End) -> None:
        assert isinstance(end, _StreamEnd)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(end.event)
        if end.owner != stream:  # rule 3: what is freed goes back to where it was made
            end.owner.wait_event(end.event)

    def touch(self, tensor: torch.Tensor, mark: Mark) -> None:
        stream = torch.cuda.current_stream(self._device)
        if stream != mark.stream:
            tensor.record_stream(stream)

    def let_go(self, end: End) -> None:
        assert isinstance(end, _StreamEnd)
        end.owner.wait_event(end.event)

    def close(self) -> None:
        """Wait for the copies; the streams belong to torch."""
        self._out.synchronize()
        self._in.synchronize()

    def _start(
        self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor, mark: Mark, after: Sequence[End], is_timed: bool
    ) -> End:
        stream.wait_event(mark.event)
        for end in after:
            if isinstance(end, _StreamEnd):
                if end.stream != stream:
                    stream.wait_event(end.event)
            else:
                end.wait()  # the drive's work, which no stream can wait for; only on the SSD's threads
        begin = None
        end_event = torch.cuda.Event(enable_timing=is_timed, blocking=True)  # the SSD's threads wait for it, and shall not spin
        with torch.cuda.stream(stream):
            if is_timed:
                begin = torch.cuda.Event(enable_timing=True)
                begin.record(stream)
            target.copy_(source, non_blocking=True)
            end_event.record(stream)
        return _StreamEnd(stream, mark.stream, end_event, begin, target.numel())


class ThreadEnd:
    """A copy on a thread."""

    __slots__ = ("_future", "_took_s", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._took_s: float | None = None
        self._future: Future[None] | None = None

    @property
    def is_done(self) -> bool:
        return self._future is not None and self._future.done()

    def wait(self) -> None:
        assert self._future is not None
        self._future.result()

    def span_s(self) -> float | None:
        return self._took_s

    def run(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[End]) -> None:
        """On the thread."""
        for end in after:
            end.wait()
        begin_s = time.perf_counter()
        target.copy_(source)
        self._took_s = time.perf_counter() - begin_s


class ThreadLink:
    """A link of the CPU with itself. Meets the protocol `Link`."""

    def __init__(self) -> None:
        self._out, self._in = (ThreadPoolExecutor(1, f"{THREAD_PREFIX}-{way}") for way in ("out", "in"))

    def start_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[End], *, is_timed: bool) -> End:
        return self._start(self._out, target, source, after)

    def start_in(self, target: torch.Tensor, source: torch.Tensor, mark: Mark, after: Sequence[End], *, is_timed: bool) -> End:
        return self._start(self._in, target, source, after)

    def mark(self) -> Mark:
        return time.perf_counter()

    def time_mark(self) -> Mark:
        return time.perf_counter()

    def has_passed(self, mark: Mark) -> bool:
        return True

    def seconds(self, begin: Mark, end: Mark) -> float:
        return end - begin

    def hold(self, end: End) -> None:
        end.wait()

    def touch(self, tensor: torch.Tensor, mark: Mark) -> None:
        """Nothing: there is one stream."""

    def let_go(self, end: End) -> None:
        """Nothing: the thread holds the memory until it has filled it."""

    def close(self) -> None:
        self._out.shutdown(wait=True)
        self._in.shutdown(wait=True)

    def _start(self, thread: ThreadPoolExecutor, target: torch.Tensor, source: torch.Tensor, after: Sequence[End]) -> End:
        end = ThreadEnd(target.numel())
        end._future = thread.submit(self.copy, end, target, source, tuple(after))
        return end

    def copy(self, end: ThreadEnd, target: torch.Tensor, source: torch.Tensor, after: Sequence[End]) -> None:
        """One copy, on its thread; tests make it slow here."""
        end.run(target, source, after)


def open_link(device: torch.device) -> Link:
    """The link of a device."""
    return CudaLink(device) if device.type == "cuda" else ThreadLink()
