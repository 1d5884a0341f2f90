"""The control groups that bound this process: its own, and each group above it.

The kernel keeps a group's limits as files in the group's folder. Version 2 has one tree under `/sys/fs/cgroup`. Version 1 has one for each
set of controllers, under `/sys/fs/cgroup/` and the set's or the controller's name (one is a link to the other). In a container the path in
`/proc/self/cgroup` may not exist; the limit that holds is then at the tree's top, which is always among the folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def group_folders(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 2) of each group in which `controller` may be limited, from the innermost to the top.

    Args:
        controller: `cpu`, `memory`.
        root: of `/proc` and `/sys`; tests give their own.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for tree in dict.fromkeys((controllers, controller)) if controllers else ("",):
            top = root / "sys/fs/cgroup" / tree
            folder = top / path.lstrip("/")
            yield folder, not controllers
            while folder != top and top in folder.parents:
                folder = folder.parent
                yield folder, not controllers
