"""Updates on the host that take longer than they do: a thread stands in for the core's, which make what was started in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from overspill.runtime.updating import UpdateContext, Updater
from overspill.spec.schedule import Role, Update

_CORE = ThreadPoolExecutor(1, thread_name_prefix="slow-core")


class SlowUpdate:
    """Meets `tiers.Transfer`, as the core's own does."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.began_s = self.ended_s = 0.0
        self._ended = threading.Event()
        self._error: BaseException | None = None
        _CORE.submit(self._run, work)

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[], object]) -> None:
        self.began_s = time.perf_counter()
        try:
            work()
        except BaseException as error:
            self._error = error
        self.ended_s = time.perf_counter()
        self._ended.set()


def delay_updates(monkeypatch: pytest.MonkeyPatch, delay_of: Callable[[Update], float]) -> None:
    """Each update on the host takes so many seconds more."""

    def start(self: Updater, op: Update, context: UpdateContext, copies: Mapping[Role, torch.Tensor]) -> SlowUpdate:
        def work() -> None:
            time.sleep(delay_of(op))
            self.run(op, context, copies)

        return SlowUpdate(work)

    monkeypatch.setattr(Updater, "start", start)
