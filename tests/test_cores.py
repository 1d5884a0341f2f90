"""How many cores a process may use: its affinity mask, and the quota of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from overspill.cores import count_cores, usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 16),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "5000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 16),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 2),
        ({"proc/self/cgroup": "0::/not/here", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, 16),
        (
            {
                "proc/self/cgroup": "3:memory:/m\n2:cpu,cpuacct:/c",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "50000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            16,
        ),
    ],
    ids=["no groups", "no limit", "four", "rounded up", "less than one", "more than there are", "of a group above", "in a container",
         "unreadable", "version 1", "version 1, no limit"],
)  # fmt: skip
def test_the_quota_of_any_group_above_bounds_the_cores(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert count_cores(16, write(tmp_path, files)) == cores


def test_cores_are_never_more_than_the_affinity_mask_has() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
