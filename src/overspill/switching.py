"""How soon Python hands the interpreter to a thread that asks for it.

A thread that runs Python code keeps the interpreter for `sys.getswitchinterval()`, 5 ms, from every other one. A lane's thread wants it for
some 50 us before and after each native call: beside a thread that ran Python without a pause, calls of 0.1 ms took 1.4 ms in the mean and
5.8 ms one time in ten (two busy cores; 0.4 and 0.5 ms with `SWITCH_S`). The setting is the process's, so it is held as long as anybody here
needs it, and then put back.
"""

from __future__ import annotations

import sys
import threading

SWITCH_S = 1e-4
"""Chosen: short beside a chunk's update or copy, long beside a switch (some 10 us)."""


class PromptSwitches:
    """One who needs them; while any does, threads wait at most `SWITCH_S`, or less where the process had less."""

    _lock = threading.Lock()
    _num_held = 0
    _before = 0.0
    _ours: float | None = None
    """What was set; None: the process had less."""

    def __init__(self) -> None:
        self._is_held = False

    def hold(self) -> None:
        """From now on; again, nothing."""
        with PromptSwitches._lock:
            if self._is_held:
                return
            self._is_held = True
            PromptSwitches._num_held += 1
            if PromptSwitches._num_held == 1:
                PromptSwitches._before = sys.getswitchinterval()
                PromptSwitches._ours = None
                if PromptSwitches._before > SWITCH_S:
                    sys.setswitchinterval(SWITCH_S)
                    PromptSwitches._ours = sys.getswitchinterval()

    def release(self) -> None:
        """No longer; the last one puts back what was before, unless somebody else has set another value since. Again, nothing."""
        with PromptSwitches._lock:
            if not self._is_held:
                return
            self._is_held = False
            PromptSwitches._num_held -= 1
            if PromptSwitches._num_held == 0 and sys.getswitchinterval() == PromptSwitches._ours:
                sys.setswitchinterval(PromptSwitches._before)
