"""Stripes: one address space dealt out over several files, so that several drives work on every chunk, without RAID.

Stripe number i of the store is in file i modulo the number of files. A contiguous range of addresses is therefore one contiguous
range in each file, which flushing, zeroing and reserving use. The native engine has the same rule (csrc/include/overspill/io.hpp);
a test holds them together.
"""

from __future__ import annotations

import dataclasses

from overspill.units import MIB

STRIPE_BYTES = 4 * MIB
"""A 32 MiB chunk then keeps up to eight drives busy with requests of 1 MiB and more. Chosen, not tuned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripeLayout:
    """How addresses are dealt out."""

    num_files: int = 1
    stripe_bytes: int = STRIPE_BYTES
    """No effect with one file."""

    def file_bytes(self, capacity_bytes: int) -> int:
        """What each file must hold so that all together hold `capacity_bytes`."""
        if self.num_files == 1:
            return capacity_bytes
        rows = -(-capacity_bytes // (self.stripe_bytes * self.num_files))
        return rows * self.stripe_bytes

    def file_ranges(self, address: int, num_bytes: int) -> list[tuple[int, int, int]]:
        """(file, offset, bytes) of a range of addresses; files that it does not touch are left out."""
        if self.num_files == 1:
            return [(0, address, num_bytes)] if num_bytes else []
        ranges: dict[int, list[int]] = {}
        end = address + num_bytes
        while address < end:
            stripe, inside = divmod(address, self.stripe_bytes)
            row, file = divmod(stripe, self.num_files)
            step = min(self.stripe_bytes - inside, end - address)
            offset = row * self.stripe_bytes + inside
            start_and_size = ranges.setdefault(file, [offset, 0])
            assert start_and_size[0] + start_and_size[1] == offset, (address, file)
            start_and_size[1] += step
            address += step
        return [(file, start, size) for file, (start, size) in sorted(ranges.items())]
