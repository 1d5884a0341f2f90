"""Writing a program: which copies exist while it is written, what each op waits for, and how copies go up and down the tiers.

`Program` knows nothing of units or steps; `scheduling/build.py` says what happens in which order.

Chunks pass through host memory in a pipeline (`Program.pipeline`): while one is on its last hop, others are already on their
first, so no lane waits for one chunk to go all the way, and the number of buffers is bounded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from overspill.spec.plan import Plan
from overspill.spec.schedule import (
    Evict,
    Fetch,
    Free,
    Lane,
    Op,
    Piece,
    Role,
    ScheduledOp,
    effects,
    initial_copies,
    link_lane,
)
from overspill.spec.tensors import Tier

LADDER = (Tier.SSD, Tier.HOST, Tier.DEVICE)
PASSING_CHUNKS = 4
"""Chunks on their way through host memory at one time. Chosen, not tuned: a parameter chunk of 5 MB takes a drive of 7 GB/s 0.7 ms."""
_FREE_LANE = {Tier.DEVICE: Lane.COMPUTE, Tier.HOST: Lane.HOST_UPDATE, Tier.SSD: Lane.SSD_WRITE}
Emission = Callable[[], None]
"""Emits some ops when it is called."""


@dataclasses.dataclass
class _Copy:
    """One copy of a piece while the program is written."""

    num_bytes: int
    writer: int | None
    readers: list[int]


class Program:
    """Ops in the making."""

    def __init__(self, plan: Plan, *, starts_pending: bool) -> None:
        self.plan = plan
        homes = initial_copies(plan, pending=starts_pending)
        self.homes = frozenset(homes)
        self.copies = {key: _Copy(num_bytes=size, writer=None, readers=[]) for key, size in homes.items()}
        self.ops: list[ScheduledOp] = []

    def emit(self, op: Op, lane: Lane, *, after: Sequence[int] = ()) -> None:
        """Append `op`, waiting for the ops that made what it reads and that used what it overwrites or drops, and for those of `after`."""
        index = len(self.ops)
        effect = effects(op, self.plan)
        waits = set(after)
        for key in effect.reads:
            copy = self.copies[key]
            if copy.writer is not None:
                waits.add(copy.writer)
            copy.readers.append(index)
        for key in (*effect.changes, *effect.drops, *((piece, tier) for piece, tier, _ in effect.creates)):
            old = self.copies.get(key)
            if old is not None:
                waits.update(old.readers)
                if old.writer is not None:
                    waits.add(old.writer)
        for key in effect.changes:
            self.copies[key].writer = index
            self.copies[key].readers = []
        for key in effect.drops:
            del self.copies[key]
        for piece, tier, size in effect.creates:
            self.copies[piece, tier] = _Copy(num_bytes=size, writer=index, readers=[])
        waits.discard(index)
        self.ops.append(ScheduledOp(op=op, lane=lane, waits=tuple(sorted(waits))))

    def free(self, piece: Piece, tier: Tier) -> None:
        copy = self.copies[piece, tier]
        self.emit(Free(piece=piece, tier=tier, num_bytes=copy.num_bytes), _FREE_LANE[tier])

    def release(self, piece: Piece, tiers: Sequence[Tier] = LADDER) -> None:
        """Free the copies of `piece` on `tiers`, where there are any."""
        for tier in tiers:
            if (piece, tier) in self.copies:
                self.free(piece, tier)

    # -- up ----------------------------------------------------------------------------------------------------------

    def nearest(self, piece: Piece, target: Tier) -> Tier:
        """The highest tier, up to `target`, that has a copy."""
        return next(tier for tier in reversed(LADDER[: LADDER.index(target) + 1]) if (piece, tier) in self.copies)

    def bring(self, pieces: Sequence[Piece], target: Tier, *, keep: bool = False) -> None:
        """Make sure that copies are at `target`.

        What was there before stays, but for a parameter's copy that is no home: that has served. So do copies on the way.

        Args:
            keep: copies on the way stay.
        """
        climbs = [self._climb(piece, target, keep=keep) for piece in pieces]
        self.pipeline([climb for climb in climbs if climb], PASSING_CHUNKS)

    def _climb(self, piece: Piece, target: Tier, *, keep: bool) -> list[Emission]:
        start, end = LADDER.index(self.nearest(piece, target)), LADDER.index(target)
        return [functools.partial(self._climb_hop, piece, at, is_first=at == start, keep=keep) for at in range(start, end)]

    def _climb_hop(self, piece: Piece, position: int, *, is_first: bool, keep: bool) -> None:
        source, target = LADDER[position], LADDER[position + 1]
        size = self.copies[piece, source].num_bytes
        self.emit(Fetch(piece=piece, source=source, target=target, num_bytes=size), link_lane(source, target))
        has_served = not is_first or (piece.role is Role.PARAMETER and (piece, source) not in self.homes)
        if has_served and not keep:
            self.free(piece, source)

    def carry(self, piece: Piece, source: Tier, target: Tier) -> None:
        """Copy one piece from `source`, whose copy stays, to `target`, up or down; a copy that is there is replaced."""
        start, end = LADDER.index(source), LADDER.index(target)
        if start > end:
            self.lower([piece], source, target)
        for position in range(start, end):
            self._climb_hop(piece, position, is_first=position == start, keep=position == start)

    # -- down --------------------------------------------------------------------------------------------------------

    def lower(self, pieces: Sequence[Piece], source: Tier, target: Tier) -> None:
        """Bring copies down from `source` to `target`; the ones at `source` stay, those in between are freed."""
        start, end = LADDER.index(source), LADDER.index(target)
        assert start > end, (source, target)
        chains = [
            [functools.partial(self._descend_hop, piece, at, is_first=at == start) for at in range(start, end, -1)] for piece in pieces
        ]
        self.pipeline(chains, PASSING_CHUNKS)

    def _descend_hop(self, piece: Piece, position: int, *, is_first: bool) -> None:
        source, target = LADDER[position], LADDER[position - 1]
        size = self.copies[piece, source].num_bytes
        self.emit(Evict(piece=piece, source=source, target=target, num_bytes=size), link_lane(source, target))
        if not is_first:
            self.free(piece, source)

    def pipeline(self, chains: Sequence[Sequence[Emission]], depth: int) -> None:
        """Emit chains of steps, each chain in order: all but its last step up to `depth` chains ahead of the last step's turn."""
        for chain in chains[: depth - 1]:
            for step in chain[:-1]:
                step()
        for index, chain in enumerate(chains):
            for step in chains[index + depth - 1][:-1] if index + depth - 1 < len(chains) else ():
                step()
            chain[-1]()
