"""From a plan to the program of one optimizer step.

Order. A *group* of micro-batches goes through a unit before any goes to the next unit, forward and backward: parameters
cross a link once a pass, not once a micro-batch, and gradients leave once. The tail computes its loss and gradients in one
visit. A unit's graph is rebuilt from its boundary in the backward.

Updates. `IMMEDIATE`: a bundle is updated as soon as its gradient is complete. `PENDING`: its gradient waits at its home,
and the *next* step's forward updates the bundle just before it first reads it, so a step's program is pending updates +
forward + backward, and a `flush` program runs what is pending before anybody else reads the weights.

Several groups. A partial gradient is fetched before the next group's backward of its unit, added to, and evicted again, so
the order of additions, and with it every bit, is that of one group.

This file decides the order and nothing else; it is pure (plan in, schedule out) and imports no torch. Source of the
order: GreedySnake's vertical schedule (arXiv 2512.17570), design 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import (
    Compress,
    Compute,
    Evict,
    Fetch,
    Free,
    Lane,
    Op,
    Phase,
    Piece,
    Role,
    Schedule,
    ScheduledOp,
    Update,
    bundle_pieces,
    effects,
    initial_copies,
    link_lane,
    parameter_pieces,
)
from overspill.spec.tensors import Bundle, Tier, Unit

LADDER = (Tier.SSD, Tier.HOST, Tier.DEVICE)
_FREE_LANE = {Tier.DEVICE: Lane.COMPUTE, Tier.HOST: Lane.HOST_UPDATE, Tier.SSD: Lane.SSD_WRITE}


def build_train_step(plan: Plan, micro_batch_tokens: Sequence[int], *, starts_pending: bool) -> Schedule:
    """One optimizer step over micro-batches of the given token counts (samples x padded length)."""
    builder = _Builder(plan, micro_batch_tokens, starts_pending=starts_pending)
    for group in builder.groups:
        for unit in plan.units[:-1]:
            builder.forward(unit, group, keep=True)
        for unit in reversed(plan.units):
            builder.backward(unit, group)
    ends_pending = plan.timing is UpdateTiming.PENDING
    return builder.finish("train", ends_pending=ends_pending)


def build_evaluation(plan: Plan, micro_batch_tokens: Sequence[int]) -> Schedule:
    """The loss of micro-batches, nothing kept; weights must have been flushed."""
    builder = _Builder(plan, micro_batch_tokens, starts_pending=False, group_size=plan.evaluation_group_size)
    for group in builder.groups:
        for unit in plan.units:
            builder.forward(unit, group, keep=False)
    return builder.finish("evaluate", ends_pending=False)


def build_flush(plan: Plan) -> Schedule:
    """The pending updates alone, in forward order."""
    builder = _Builder(plan, (), starts_pending=True)
    for unit in plan.units:
        builder.pending_updates(unit)
    return builder.finish("flush", ends_pending=False)


@dataclasses.dataclass
class _Copy:
    """One copy of a piece while the program is written."""

    num_bytes: int
    writer: int | None
    readers: list[int]


class _Builder:
    def __init__(self, plan: Plan, micro_batch_tokens: Sequence[int], *, starts_pending: bool, group_size: int | None = None) -> None:
        self.plan = plan
        self.tokens = tuple(micro_batch_tokens)
        size = plan.group_size if group_size is None else group_size
        self.groups = tuple(tuple(range(start, min(start + size, len(self.tokens)))) for start in range(0, len(self.tokens), size))
        self.starts_pending = starts_pending
        self.names = [unit.name for unit in plan.units]
        self.pending = {name for name, bundle in plan.bundles.items() if bundle.trainable} if starts_pending else set()
        homes = initial_copies(plan, pending=starts_pending)
        self.copies = {key: _Copy(num_bytes=size, writer=None, readers=[]) for key, size in homes.items()}
        self.ops: list[ScheduledOp] = []

    # -- ops ---------------------------------------------------------------------------------------------------------

    def emit(self, op: Op, lane: Lane) -> None:
        """Append `op`, waiting for the ops that made what it reads and that used what it overwrites or drops."""
        index = len(self.ops)
        effect = effects(op, self.plan)
        waits: set[int] = set()
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

    def move(self, piece: Piece, source: Tier, target: Tier) -> None:
        """Hop by hop from `source` to `target`; copies in between are freed, the one at `source` stays."""
        start, end = LADDER.index(source), LADDER.index(target)
        step = 1 if end > start else -1
        size = self.copies[piece, source].num_bytes
        for position in range(start, end, step):
            here, there = LADDER[position], LADDER[position + step]
            hop = Fetch if step > 0 else Evict
            self.emit(hop(piece=piece, source=here, target=there, num_bytes=size), link_lane(here, there))
            if here is not source:
                self.free(piece, here)

    def free(self, piece: Piece, tier: Tier) -> None:
        copy = self.copies[piece, tier]
        self.emit(Free(piece=piece, tier=tier, num_bytes=copy.num_bytes), _FREE_LANE[tier])

    def bring(self, piece: Piece, home: Tier, target: Tier) -> None:
        """Make sure that a copy is at `target`."""
        if (piece, target) not in self.copies:
            self.move(piece, home, target)

    # -- units -------------------------------------------------------------------------------------------------------

    def fetch_parameters(self, unit: Unit) -> None:
        for bundle in unit.bundles:
            for piece, _ in parameter_pieces(self.plan, bundle):
                self.bring(piece, self.plan.placements[bundle].parameters, Tier.DEVICE)

    def free_parameters(self, unit: Unit) -> None:
        for bundle in unit.bundles:
            if self.plan.placements[bundle].parameters is not Tier.DEVICE:
                for piece, _ in parameter_pieces(self.plan, bundle):
                    self.free(piece, Tier.DEVICE)

    def boundary(self, unit: str, micro_batch: int, role: Role = Role.BOUNDARY) -> Piece:
        return Piece(role=role, owner=unit, index=micro_batch)

    def boundary_bytes(self, unit: str, micro_batch: int) -> int:
        return self.plan.boundary_bytes(unit, self.tokens[micro_batch])

    def flops(self, unit: Unit, micro_batch: int, phase: Phase) -> float:
        """2 per parameter and token forward; 3 times that for recomputation and both gradients. The embedding looks up."""
        if unit.name == self.names[0]:
            return 0.0
        parameters = sum(self.plan.bundles[bundle].num_parameters for bundle in unit.bundles)
        passes = 1 if phase is Phase.FORWARD else 4
        if unit.name == self.names[-1] and phase is Phase.BACKWARD:
            passes = 3
        return 2.0 * parameters * self.tokens[micro_batch] * passes

    def forward(self, unit: Unit, group: Sequence[int], *, keep: bool) -> None:
        """One visit: all micro-batches of the group, without a graph. `keep`: boundaries stay for the backward."""
        self.pending_updates(unit)
        self.fetch_parameters(unit)
        position = self.names.index(unit.name)
        home = self.plan.boundaries
        moves = home is not Tier.DEVICE
        for micro_batch in group:
            produced: tuple[tuple[Piece, int], ...] = ()
            if position < len(self.names) - 1:
                above = self.names[position + 1]
                produced = ((self.boundary(above, micro_batch), self.boundary_bytes(above, micro_batch)),)
            if position > 0:
                self.bring(self.boundary(unit.name, micro_batch), home, Tier.DEVICE)
            self.emit(
                Compute(
                    unit=unit.name,
                    micro_batch=micro_batch,
                    phase=Phase.FORWARD,
                    produced=produced,
                    flops=self.flops(unit, micro_batch, Phase.FORWARD),
                ),
                Lane.COMPUTE,
            )
            if position > 0:
                self.release(self.boundary(unit.name, micro_batch), tiers=(Tier.DEVICE,) if keep and moves else () if keep else LADDER)
            if produced and moves and (keep or len(group) > 1):
                self.move(produced[0][0], Tier.DEVICE, home)
                if len(group) > 1:
                    self.free(produced[0][0], Tier.DEVICE)
        self.free_parameters(unit)

    def release(self, piece: Piece, tiers: Sequence[Tier] = LADDER) -> None:
        """Free the copies of `piece` on `tiers`, where there are any."""
        for tier in tiers:
            if (piece, tier) in self.copies:
                self.free(piece, tier)

    def backward(self, unit: Unit, group: Sequence[int]) -> None:
        """One visit: rebuild each micro-batch's graph from its boundary, take gradients; updates where they are complete."""
        self.pending_updates(unit)
        self.fetch_parameters(unit)
        self.fetch_partials(unit)
        position = self.names.index(unit.name)
        home = self.plan.boundaries
        for micro_batch in group:
            inputs = []
            if position > 0:
                inputs.append(self.boundary(unit.name, micro_batch))
            if position < len(self.names) - 1:
                inputs.append(self.boundary(self.names[position + 1], micro_batch, Role.BOUNDARY_GRADIENT))
            for piece in inputs:
                self.bring(piece, home, Tier.DEVICE)
            produced = list(self.new_partials(unit))
            if position > 0:
                below = self.boundary(unit.name, micro_batch, Role.BOUNDARY_GRADIENT)
                produced.append((below, self.boundary_bytes(unit.name, micro_batch)))
            self.emit(
                Compute(
                    unit=unit.name,
                    micro_batch=micro_batch,
                    phase=Phase.BACKWARD,
                    produced=tuple(produced),
                    flops=self.flops(unit, micro_batch, Phase.BACKWARD),
                ),
                Lane.COMPUTE,
            )
            for piece in inputs:
                self.release(piece)
            if position > 0 and home is not Tier.DEVICE and len(group) > 1:
                self.move(produced[-1][0], Tier.DEVICE, home)
                self.free(produced[-1][0], Tier.DEVICE)
        self.free_parameters(unit)
        if group == self.groups[-1]:
            self.finish_gradients(unit)
        else:
            self.evict_partials(unit)

    # -- gradients and updates ---------------------------------------------------------------------------------------

    def trainable(self, unit: Unit) -> list[Bundle]:
        return [self.plan.bundles[bundle] for bundle in unit.bundles if self.plan.bundles[bundle].trainable]

    def partials(self, bundle: Bundle, unit: str) -> tuple[tuple[Piece, int], ...]:
        """Fp32 where there is more than one contribution: several micro-batches, or the tail's chunks of rows."""
        several = len(self.tokens) > 1 or unit == self.names[-1]
        bytes_per_element = 4 if several else bundle.element_bytes
        return bundle_pieces(self.plan, bundle.name, Role.PARTIAL_GRADIENT, bytes_per_element, reader=unit)

    def new_partials(self, unit: Unit) -> tuple[tuple[Piece, int], ...]:
        """Partial gradients of `unit` that do not exist yet: its next backward makes them."""
        pieces = [item for bundle in self.trainable(unit) for item in self.partials(bundle, unit.name)]
        return tuple((piece, size) for piece, size in pieces if (piece, Tier.DEVICE) not in self.copies)

    def fetch_partials(self, unit: Unit) -> None:
        for bundle in self.trainable(unit):
            home = self.plan.placements[bundle.name].gradients
            for piece, _ in self.partials(bundle, unit.name):
                if home is not Tier.DEVICE and (piece, home) in self.copies:
                    self.move(piece, home, Tier.DEVICE)
                    self.free(piece, home)

    def evict_partials(self, unit: Unit) -> None:
        for bundle in self.trainable(unit):
            home = self.plan.placements[bundle.name].gradients
            if home is not Tier.DEVICE:
                for piece, _ in self.partials(bundle, unit.name):
                    self.move(piece, Tier.DEVICE, home)
                    self.free(piece, Tier.DEVICE)

    def finish_gradients(self, unit: Unit) -> None:
        """Compress each bundle whose last contribution was this unit's, then update it or let its gradient wait."""
        for bundle in self.trainable(unit):
            readers = [other.name for other in reversed(self.plan.units) if bundle.name in other.bundles]
            if readers[-1] != unit.name:
                self.rest_partials(bundle, unit.name)
                continue
            for reader in readers:
                for piece, _ in self.partials(bundle, reader):
                    self.unrest(piece, bundle)
            partials = tuple(item for reader in readers for item in self.partials(bundle, reader))
            produced = bundle_pieces(self.plan, bundle.name, Role.GRADIENT, bundle.element_bytes)
            self.emit(Compress(bundle=bundle.name, partials=partials, produced=produced), Lane.COMPUTE)
            home = self.plan.placements[bundle.name].gradients
            for piece, _ in produced:
                if self.plan.timing is UpdateTiming.IMMEDIATE:
                    self.update(bundle, piece, Tier.DEVICE)
                elif home is not Tier.DEVICE:
                    self.move(piece, Tier.DEVICE, home)
                    self.free(piece, Tier.DEVICE)

    def rest_partials(self, bundle: Bundle, reader: str) -> None:
        """A tied weight's share from the tail leaves the device until the embedding's share is there."""
        home = self.plan.placements[bundle.name].gradients
        if home is not Tier.DEVICE:
            for piece, _ in self.partials(bundle, reader):
                self.move(piece, Tier.DEVICE, home)
                self.free(piece, Tier.DEVICE)

    def unrest(self, piece: Piece, bundle: Bundle) -> None:
        if (piece, Tier.DEVICE) not in self.copies:
            home = self.plan.placements[bundle.name].gradients
            self.move(piece, home, Tier.DEVICE)
            self.free(piece, home)

    def update(self, bundle: Bundle, gradient: Piece, gradient_tier: Tier) -> None:
        """Bring gradient, parameter and state of one chunk to where they are updated, update, and write back what changed."""
        placement = self.plan.placements[bundle.name]
        where = placement.update_tier
        if gradient_tier is not where:
            self.move(gradient, gradient_tier, where)
            self.free(gradient, gradient_tier)
        homes = {Role.PARAMETER: placement.parameters}
        if self.plan.has_state(bundle.name):
            homes[Role.STATE] = placement.states
        pieces = {role: Piece(role=role, owner=bundle.name, index=gradient.index) for role in homes}
        for role, home in homes.items():
            self.bring(pieces[role], home, where)
        size = self.copies[gradient, where].num_bytes
        num_elements = bundle.chunks[gradient.index].num_elements
        lane = Lane.COMPUTE if where is Tier.DEVICE else Lane.HOST_UPDATE
        self.emit(Update(bundle=bundle.name, chunk=gradient.index, tier=where, num_elements=num_elements, num_bytes=size), lane)
        for role, home in homes.items():
            if home is not where:
                self.move(pieces[role], where, home)
                self.free(pieces[role], where)

    def pending_updates(self, unit: Unit) -> None:
        for bundle in self.trainable(unit):
            if bundle.name in self.pending:
                self.pending.remove(bundle.name)
                home = self.plan.placements[bundle.name].gradients
                for piece, _ in bundle_pieces(self.plan, bundle.name, Role.GRADIENT, bundle.element_bytes):
                    self.update(bundle, piece, home)

    def finish(self, name: str, *, ends_pending: bool) -> Schedule:
        assert not self.pending, f"bundles never updated: {sorted(self.pending)}"
        return Schedule(
            name=name,
            ops=tuple(self.ops),
            num_micro_batches=len(self.tokens),
            groups=self.groups,
            starts_pending=self.starts_pending,
            ends_pending=ends_pending,
        )
