"""Ctrl-C and SIGTERM while training: the first one finishes the step, the second one stops at once.

A step that waits for space on a full drive cannot be finished: there the first signal ends the waiting, and the step with it.

Rules:

1. A handler only sets a flag and says so; the training loop looks at the flag between steps.
2. After a stop at once, the last checkpoint is whole: a step never writes where a checkpoint's bytes are.
3. The handlers that were there before are back when the block is left.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from overspill.tiers.calls import SpacePolicy

SIGNALS = (signal.SIGINT, signal.SIGTERM)


SPACE_POLL_S = 1.0
"""Between two looks at a full drive, and so the longest that a pause outlasts a signal. Chosen, not tuned."""


class StopRequest:
    """A context manager; `is_requested` after the first signal."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._previous: dict[int, Any] = {}
        self.is_requested = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt("stopped at once; the last checkpoint, if there is one, is whole")
        self.is_requested = True
        self._say(
            f"{signal.Signals(number).name}: stopping when this step is done, or now if it is paused for space; once more stops at once"
        )


class PauseUntilStopped:
    """Waits for space until a stop is requested; from then on a write that meets a full drive fails."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self.was_ended = False
        """A write failed because of the stop, and not because of the drive alone."""
        self.policy = SpacePolicy(poll_s=SPACE_POLL_S, gives_up=self._gives_up)

    def _gives_up(self) -> bool:
        self.was_ended = self.was_ended or self._stop.is_requested
        return self._stop.is_requested
