"""How many cores this process may use.

Two things bound it: the affinity mask (`taskset`, a cpuset), which says on which cores threads may run, and the CPU quota of its control
groups (`docker run --cpus 4`, a pod's limit), which says for how much time a period all of them together may. The mask of a container with
a quota names every core of the machine. As many threads as that would use the quota up early in each period, and then all of them stand
still until the next, the thread that feeds the GPU too.

Where the quota is: version 2 of control groups in `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`, of any group that
bounds the process (`control_groups.py`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

from overspill.control_groups import group_folders

ROOT = Path("/")
CORES_SPARED = 2
"""For the thread that dispatches and autograd's, while the host updates beside a GPU. The update is bound by memory and hardly misses them;
with them a dispatching thread that was put aside left an H100 idle for up to 20 ms (16 cores)."""
LEAST_CORES = 8
"""With fewer, all update."""


@functools.cache
def usable_cores() -> int:
    """Cores whose time this process may use, at least 1. Found once: a quota that is changed under a running process is not noticed."""
    return count_cores(len(os.sched_getaffinity(0)), ROOT)


def update_threads(*, is_beside_gpu: bool) -> int:
    """Most threads of an update on the host, in a session and where its rate is measured; 0: one a core."""
    cores = usable_cores()
    return cores - CORES_SPARED if is_beside_gpu and cores >= LEAST_CORES else 0


def count_cores(num_allowed: int, root: Path) -> int:
    """The smaller of the cores in the affinity mask and the smallest quota, rounded up; at least 1.

    Args:
        root: of `/proc` and `/sys`; tests give their own.
    """
    return max(1, min([num_allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each limited control group of this process has."""
    for folder, is_version_2 in group_folders("cpu", root):
        try:
            if is_version_2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
            if int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):  # no such file; or "max"
            continue
