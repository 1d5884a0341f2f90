"""How fast a machine's lanes are, as measured, and the least time that a step's work takes at those rates.

Two directions of one link share something (a bus, a drive's controller), so each link has four numbers: what a direction reaches alone,
and what both reach while both are under way. All pairs of rates that a link can hold are then taken to lie under the two lines between
these three points: (up, 0), (up with down, down with up), (0, down). A link whose directions do not disturb each other, and a
drive whose reads and writes share one rate, are both exact in that picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkRates:
    """One link. Up is towards the device: h2d, ssd_read; down: d2h, ssd_write."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    up_duplex_bytes_per_s: float
    """While the other direction is under way."""
    down_duplex_bytes_per_s: float

    def work_s(self, up_bytes: float, down_bytes: float) -> float:
        """Least seconds for bytes of both directions, however they are mixed over that time; at most one after the other."""
        up_s, down_s = up_bytes / self.up_bytes_per_s, down_bytes / self.down_bytes_per_s
        up_share = max(0.0, 1 - self.up_duplex_bytes_per_s / self.up_bytes_per_s)
        down_share = max(0.0, 1 - self.down_duplex_bytes_per_s / self.down_bytes_per_s)
        both_s = max(
            up_s + down_bytes * up_share / self.down_duplex_bytes_per_s,
            down_s + up_bytes * down_share / self.up_duplex_bytes_per_s,
        )
        return min(both_s, up_s + down_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneRates:
    """The lanes of one session but `compute`, whose work is not known apart from the time it takes."""

    link: LinkRates | None
    """Host and device, in portions of a chunk; None: not measured."""
    ssd: LinkRates | None
    """Of all places together, in portions of a chunk; None: nothing rests there, or not measured."""
    update_parameters_per_s: float | None
    """On the host, in the plan's state format; None: nothing is updated there, or not measured."""
    update_samples_per_s: tuple[float, ...] = ()
    """What that is the median of, in the order in which they were made."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of one step: no order of the same work on the same lanes is quicker. Made by `planning.floor`."""

    work_s: Mapping[str, float]
    """Seconds that each lane's work takes at its rate; both directions of a link have the same, that of both together."""
    chain_s: float
    """Compute, with what it must wait for before and what cannot begin before it is done."""
    unmeasured: tuple[str, ...] = ()
    """Lanes that had work but have no rate: the floor leaves them out, so it is too low."""

    @property
    def floor_s(self) -> float:
        return max(self.chain_s, *self.work_s.values())

    @property
    def bound_by(self) -> str:
        """The lane that the floor comes from, or `chain`."""
        name = max(self.work_s, key=lambda lane: self.work_s[lane])
        return name if self.work_s[name] >= self.chain_s else "chain"
