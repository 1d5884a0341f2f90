"""What the kernel counted of a process and of all others, from one moment to another: whether it had the machine to itself.

A step that takes longer than predicted on a host whose cores were busy with something else says little of the prediction. On a virtual
machine whose host has promised its cores to others too, `stolen_s` says so, where the host tells.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from pathlib import Path

_BUSY, _STOLEN = (0, 1, 2, 5, 6), 7
"""Columns of `/proc/stat`: user, nice, system, irq, softirq; steal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Over some time; or, of `counted_so_far`, since the process or the machine began. Seconds are of all cores together."""

    wall_s: float
    own_s: float
    """This process computed, or launched."""
    busy_s: float
    """Anybody did."""
    stolen_s: float
    """The machine under a virtual one gave its cores to others."""
    put_aside: int
    """How often a thread of this process had to make room for somebody."""
    throttled_s: float
    """A control group's quota was used up."""

    def __sub__(self, before: Disturbance) -> Disturbance:
        return Disturbance(**{item.name: getattr(self, item.name) - getattr(before, item.name) for item in dataclasses.fields(self)})


def counted_so_far(root: Path = Path("/")) -> Disturbance:
    """Zeros where the kernel does not tell."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    columns = [tick_s * int(item) for item in _words(root / "proc/stat", "cpu")] or [0.0] * (_STOLEN + 1)
    throttled = _words(root / "sys/fs/cgroup/cpu.stat", "throttled_usec")
    return Disturbance(
        wall_s=time.monotonic(),
        own_s=own.ru_utime + own.ru_stime,
        busy_s=sum(columns[column] for column in _BUSY),
        stolen_s=columns[_STOLEN],
        put_aside=own.ru_nivcsw,
        throttled_s=1e-6 * int(throttled[0]) if throttled else 0.0,
    )


def _words(path: Path, key: str) -> list[str]:
    """Behind `key`, in its line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return next((words[1:] for words in map(str.split, lines) if words and words[0] == key), [])
