"""Host memory of exact size straight from the kernel: mapped, advised, placed, and touched by several threads.

```
mapping   |..lead..|== 2 MiB ==|== 2 MiB ==|== tail ==|..slack..|     .: address space that nobody touches: costs no memory
                   ^ the block: page-aligned; from 2 MiB on it starts on 2 MiB
```

Rules:

1. A block takes its bytes rounded up to one page, and becomes resident only where it is touched.
2. From 2 MiB on, whole aligned 2 MiB parts may be huge pages (`MADV_HUGEPAGE`: fewer page faults and TLB misses). The tail may not
   (`MADV_NOHUGEPAGE`), nor may a small block: one touched byte would make 2 MiB resident. So resident memory is never more than asked.
3. Every tensor on a block holds its mapping: addresses stay valid until the last view is gone. Just before they are unmapped
   `before_unmapping` runs, which is where pinned memory is unpinned.
4. With more than one NUMA node a block may prefer one (`prefer_node`). Preferred, not bound: a full node must cost speed, not the run.

Costs: address space of up to 2 MiB a block. First touch is what takes time; see `populate`.
Limits: Linux. Kernels before 5.14 lack `MADV_POPULATE_WRITE`; there pages are touched by writing their zeros.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from overspill.cores import usable_cores
from overspill.units import GIB, MIB, align_up

HUGE_PAGE_BYTES = 2 * MIB
"""Of x86-64 and of arm64 with 4 KiB pages."""
POPULATE_BYTES = 64 * MIB
"""Less is touched by one thread. Chosen, not tuned: about 15 ms of page faults."""
MOST_POPULATE_THREADS = 16
"""Chosen, not tuned."""

RESIDENCY_BYTES = 4 * GIB
"""That are asked for at a time: a byte a page, 1 MiB."""

_MADV_POPULATE_WRITE = 23
"""From asm-generic/mman-common.h, since Linux 5.14; Python's mmap does not name it."""
_MPOL_PREFERRED = 1
"""From linux/mempolicy.h."""
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, which the C library does not wrap."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class _Mapping(mmap.mmap):
    """Runs `before_unmapping` when nothing refers to it any more. `__del__`, since a weak reference would be told too late."""

    before_unmapping: Callable[[], None] | None = None
    maker_pid = 0

    def __del__(self) -> None:
        # At exit CUDA may be gone, and a forked child owns no registration of its parent.
        if self.before_unmapping is not None and not sys.is_finalizing() and os.getpid() == self.maker_pid:
            self.before_unmapping()


class MappedBlock:
    """Zero-filled memory at [address, address + num_bytes); make it with `map_anonymous`."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = align_up(num_bytes, mmap.PAGESIZE)
        is_huge = self.num_bytes >= HUGE_PAGE_BYTES
        room = self.num_bytes + (HUGE_PAGE_BYTES - mmap.PAGESIZE if is_huge else 0)
        self._mapping = _Mapping(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.maker_pid = os.getpid()
        base = torch.frombuffer(self._mapping, dtype=torch.uint8, count=1).data_ptr()
        self._start = align_up(base, HUGE_PAGE_BYTES) - base if is_huge else 0
        self.address = base + self._start
        whole = self.num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        self._advise(mmap.MADV_NOHUGEPAGE, self._start + whole, room - self._start - whole)
        if whole:
            self._advise(mmap.MADV_HUGEPAGE, self._start, whole)

    def _advise(self, advice: int, start: int, num_bytes: int) -> None:
        """Advice that the kernel does not know (no huge pages) is no loss."""
        if num_bytes:
            with contextlib.suppress(OSError):
                self._mapping.madvise(advice, start, num_bytes)

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """The first `num_bytes` as uint8 [num_bytes]; it keeps the memory (rule 3)."""
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=num_bytes, offset=self._start)

    def before_unmapping(self, action: Callable[[], None]) -> None:
        """What to do when the last view is gone; `action` must not refer to this block, or it would live for ever."""
        self._mapping.before_unmapping = action

    def resident_bytes(self) -> int:
        """Of its pages, those that are in memory now."""
        found, pages = 0, (ctypes.c_ubyte * (RESIDENCY_BYTES // mmap.PAGESIZE))()
        for start in range(0, self.num_bytes, RESIDENCY_BYTES):
            size = min(RESIDENCY_BYTES, self.num_bytes - start)
            if _libc.mincore(self.address + start, size, pages) != 0:
                return self.num_bytes  # a kernel that does not say
            found += bytes(memoryview(pages)[: size // mmap.PAGESIZE]).count(1)
        return found * mmap.PAGESIZE

    def drop_pages(self) -> None:
        """Give the pages back to the system now; views read zeros from here on."""
        self._mapping.madvise(mmap.MADV_DONTNEED, self._start, self.num_bytes)

    def keep_from_children(self, is_kept: bool = True) -> None:
        """Whether a forked child goes without this range. Else a fork copies page-locked memory at once, all of it."""
        self._advise(mmap.MADV_DONTFORK if is_kept else mmap.MADV_DOFORK, self._start, self.num_bytes)


def map_anonymous(num_bytes: int) -> MappedBlock:
    """Zero-filled, page-aligned memory of `num_bytes` rounded up to a page, from the system and from no allocator.

    Private, so that dropping its pages returns them; the pages become resident when they are first touched.

    Raises:
        OSError, ValueError, OverflowError: the system refuses.
    """
    return MappedBlock(num_bytes)


def populate(address: int, num_bytes: int, *, num_threads: int | None = None) -> None:
    """Make [address, address + num_bytes) resident without changing it; page-aligned, not in use by others.

    The kernel zeroes every page at its first touch, at a few GB/s a core: with several threads a big range is ready as many times
    sooner as there is memory bandwidth for.

    Args:
        num_threads: None: one a core, at most `MOST_POPULATE_THREADS`; one below `POPULATE_BYTES`.
    """
    if num_threads is None:
        num_threads = min(MOST_POPULATE_THREADS, usable_cores()) if num_bytes >= POPULATE_BYTES else 1
    share = align_up(-(-num_bytes // num_threads), HUGE_PAGE_BYTES)
    parts = [(address + start, min(share, num_bytes - start)) for start in range(0, num_bytes, share)]
    if len(parts) == 1:
        _populate_part(*parts[0])
        return
    with ThreadPoolExecutor(len(parts), thread_name_prefix="overspill-touch") as pool:
        for done in [pool.submit(_populate_part, *part) for part in parts]:
            done.result()


def _populate_part(address: int, num_bytes: int) -> None:
    if _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE) == 0:
        return
    for page in range(address, address + num_bytes, mmap.PAGESIZE):  # an old kernel: write what is there
        byte = ctypes.c_uint8.from_address(page)
        byte.value = byte.value


def prefer_node(address: int, num_bytes: int, node: int) -> bool:
    """Ask for pages of one NUMA node for a range that has not been touched; whether the kernel agreed (rule 4).

    A container may forbid it (Docker's default profile does); then pages come from the node of the thread that touches them.
    """
    number = _SYS_MBIND.get(os.uname().machine)
    if number is None:
        return False
    words = node // 64 + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // 64] = 1 << node % 64
    return _libc.syscall(number, ctypes.c_void_p(address), ctypes.c_ulong(num_bytes), _MPOL_PREFERRED, mask, words * 64 + 1, 0) == 0


def nearest_node(pci_address: str, *, sysfs: Path = Path("/sys")) -> int | None:
    """The NUMA node of a PCI device, such as `0000:3b:00.0`; None with one node, or if the machine does not say.

    Args:
        sysfs: where the kernel's tree is; tests give their own.
    """
    try:
        nodes = [entry for entry in (sysfs / "devices/system/node").iterdir() if entry.name[4:].isdigit() and entry.name.startswith("node")]
        node = int((sysfs / "bus/pci/devices" / pci_address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if len(nodes) > 1 and node >= 0 else None


def node_of_device(device: torch.device) -> int | None:
    """The NUMA node that a CUDA device hangs on; None for other devices, with one node, or if unknown."""
    if device.type != "cuda":
        return None
    facts: Any = torch.cuda.get_device_properties(device)
    try:
        return nearest_node(f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0")
    except AttributeError:  # a torch that does not say where its devices are
        return None
