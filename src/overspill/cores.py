"""How many cores this process may use.

Two things bound it: the affinity mask (`taskset`, a cpuset), which says on which cores threads may run, and the CPU quota of its control
groups (`docker run --cpus 4`, a pod's limit), which says for how much time a period all of them together may. The mask of a container with
a quota names every core of the machine. As many threads as that would use the quota up early in each period, and then all of them stand
still until the next, the thread that feeds the GPU too.

Where the quota is: version 2 of control groups in `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`, in the process's own
group and in each group above it. In a container the path in `/proc/self/cgroup` may not exist; the limit that holds is then at the root.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


@functools.cache
def usable_cores() -> int:
    """Cores whose time this process may use, at least 1. Found once: a quota that is changed under a running process is not noticed."""
    return count_cores(len(os.sched_getaffinity(0)), ROOT)


def count_cores(num_allowed: int, root: Path) -> int:
    """The smaller of the cores in the affinity mask and the smallest quota, rounded up; at least 1.

    Args:
        root: of `/proc` and `/sys`; tests give their own.
    """
    return max(1, min([num_allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each limited control group of this process has."""
    for top, folder in _groups(root):
        while True:
            quota = _read_quota(folder)
            if quota is not None:
                yield quota
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Where a hierarchy with CPU quotas begins, and this process's folder in it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root / "sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, "cpu"))]  # one is a link to the other
        else:
            continue
        for top in tops:
            yield top, top / path.lstrip("/")


def _read_quota(folder: Path) -> float | None:
    """None: no limit here."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such file; or "max"
        return None
