"""A link on which the host is for ever ahead of the device, for testing the rules of `links.py` without a GPU.

Two queues, one a direction. A copy happens as late as its stream allows: when compute or a thread waits for it, for one behind it, or for
one that waits for it; or, by a coin, at once. Until then `is_done` is no, its target holds garbage, and its buffers are not kept alive:

* a source that is gone when the copy happens was freed before compute waited for the copy, so it may have been written over: garbage;
* a target that is gone, and was not given up with `let_go`, was freed while a copy filled it: `violations`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from overspill.activations.links import End

GARBAGE = 0xA5


class WeakBytes:
    """Bytes of a storage that is not kept alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._weak = StorageWeakRef(tensor.untyped_storage())
        self._start, self._size = tensor.storage_offset(), tensor.numel()

    def get(self) -> torch.Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)
        return None if storage is None else torch.empty(0, dtype=torch.uint8).set_(storage, self._start, (self._size,), (1,))


class LateEnd:
    def __init__(self, link: LateLink, queue: list[LateEnd], target: Any, source: Any, after: Sequence[End]) -> None:
        self.link, self.queue, self.target, self.source, self.after = link, queue, target, source, after
        self.num_bytes = target.numel() if isinstance(target, torch.Tensor) else source.numel()
        self.is_done = self.is_let_go = False

    def wait(self) -> None:
        self.link.run_until(self)

    def span_s(self) -> float | None:
        return 1e-6 * self.num_bytes


class LateLink:
    """Meets the protocol `Link`."""

    def __init__(self, seed: int, early: float) -> None:
        self._coin, self._early = random.Random(seed), early
        self._lock = threading.RLock()
        self._out: list[LateEnd] = []
        self._in: list[LateEnd] = []
        self._now = 0
        self.violations: list[str] = []
        self.num_late = 0

    def start_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[End], *, is_timed: bool) -> End:
        target.fill_(GARBAGE) if not any(not end.is_done for end in after) else None
        return self._start(LateEnd(self, self._out, target, WeakBytes(source), after))

    def start_in(self, target: torch.Tensor, source: torch.Tensor, mark: Any, after: Sequence[End], *, is_timed: bool) -> End:
        target.fill_(GARBAGE)
        return self._start(LateEnd(self, self._in, WeakBytes(target), source, after))

    def mark(self) -> int:
        self._now += 1
        return self._now

    time_mark = mark

    def has_passed(self, mark: int) -> bool:
        return True

    def seconds(self, begin: int, end: int) -> float:
        return (end - begin) * 1e-3

    def hold(self, end: End) -> None:
        end.wait()

    def touch(self, tensor: torch.Tensor, mark: int) -> None:
        pass

    def let_go(self, end: End) -> None:
        assert isinstance(end, LateEnd)
        end.is_let_go = True

    def close(self) -> None:
        for queue in (self._out, self._in):
            if queue:
                queue[-1].wait()

    def run_until(self, end: LateEnd) -> None:
        """What a stream does until `end`, and with it what that waits for."""
        with self._lock:
            while not end.is_done:
                first = end.queue[0]
                for other in first.after:
                    other.wait()
                if not first.is_done:
                    self._copy(first)
                    end.queue.remove(first)

    def _start(self, end: LateEnd) -> LateEnd:
        with self._lock:
            end.queue.append(end)
            if self._coin.random() < self._early:
                self.run_until(end)
            else:
                self.num_late += 1
        return end

    def _copy(self, end: LateEnd) -> None:
        target = end.target.get() if isinstance(end.target, WeakBytes) else end.target
        source = end.source.get() if isinstance(end.source, WeakBytes) else end.source
        if target is None:
            if not end.is_let_go:
                self.violations.append(f"{end.num_bytes} B were freed while a copy filled them")
        elif source is None:
            target.fill_(GARBAGE)
        else:
            target.copy_(source)
        end.is_done, end.target, end.source = True, None, None
