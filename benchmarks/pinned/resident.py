"""Which pages are in memory: those of one range, and those of everything else in the process, by what it is.

Two ways to count, because neither says all:

* **own pages**: the present pages of a range, from the kernel's page map. Exact, and nobody else's business can move it.
* **the process**: Rss of every mapping in `/proc/self/smaps`, summed by name. It moves by a page or two by itself, so what a range
  does not explain is told by name: `[heap]` (malloc), `anonymous` (mappings without a name: thread stacks, and what drivers map for
  their own records), libraries (code that runs for the first time).

Rule: reading must not be seen in what is read. The text goes into memory that was touched beforehand and is parsed only when both
readings are over.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from pathlib import Path

TEXT_BYTES = 8 << 20
"""Room for one text of smaps: some 8,000 mappings. A CUDA process has hundreds."""


def own_bytes(address: int, num_bytes: int) -> int:
    """Bytes of the pages of [address, address + num_bytes) that are in memory; the address is page-aligned."""
    pages = -(-num_bytes // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(address // mmap.PAGESIZE * 8)
        entries = file.read(pages * 8)
    if len(entries) != pages * 8:
        raise OSError(f"the page map ended after {len(entries)} of {pages * 8} B for {num_bytes} B at {address:#x}")
    return sum(entry >> 7 for entry in entries[7::8]) * mmap.PAGESIZE  # bit 63: present


class Reading:
    """One look at the whole process; made beforehand, taken with `take`, read afterwards."""

    def __init__(self) -> None:
        self._text = bytearray(os.urandom(1) * TEXT_BYTES)  # touched now
        self._view = memoryview(self._text)
        self._length = 0

    def take(self) -> None:
        file = os.open("/proc/self/smaps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._length = 0
            while count := os.readv(file, [self._view[self._length :]]):
                self._length += count
        finally:
            os.close(file)
        if self._length == TEXT_BYTES:
            raise OSError(f"/proc/self/smaps has more than the {TEXT_BYTES} B that are kept for it; raise TEXT_BYTES")

    def by_name(self) -> Counter[str]:
        """Resident bytes of each kind of mapping."""
        found: Counter[str] = Counter()
        name = ""
        for line in self._text[: self._length].decode().splitlines():
            head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)", line)
            if head:
                name = Path(head[1]).name or "anonymous"
            elif line.startswith("Rss:"):
                found[name] += int(line.split()[1]) * 1024
        return found


def grown_elsewhere(before: Reading, after: Reading, own: int) -> dict[str, int]:
    """By how much each kind of mapping grew (or shrank), without the `own` bytes of an anonymous range."""
    grown = after.by_name()
    grown.subtract(before.by_name())
    grown["anonymous"] -= own
    return {name: num_bytes for name, num_bytes in sorted(grown.items()) if num_bytes}
