"""From a plan to the program of one optimizer step.

Order. A *group* of micro-batches goes through a unit before any goes to the next unit, forward and backward: parameters
cross a link once a pass, not once a micro-batch, and gradients leave once. The tail computes its loss and gradients in one
visit. A unit's graph is rebuilt from its boundary in the backward, or kept since its forward (`Plan.activations`): what it stores is
then a piece that the forward makes and the backward consumes (`scheduling/retaining.py`).

Updates. `IMMEDIATE`: a bundle is updated as soon as its gradient is complete. `PENDING`: its gradient waits at its home,
and the *next* step's forward updates the bundle just before it first reads it, so a step's program is pending updates +
forward + backward, and a `flush` program runs what is pending before anybody else reads the weights.

Several groups. A partial gradient is fetched before the next group's backward of its unit, added to, and evicted again, so
the order of additions, and with it every bit, is that of one group.

Overlap. Buffers change hands in the program's order, so what shall overlap must hold its buffers side by side in it:

1. The parameters of the next visit are fetched while the present one computes (`Plan.prefetch_units`), and so is the next
   micro-batch's hidden state where these rest elsewhere. Activations come one visit earlier still. What the present visit waits for goes
   first, and between several micro-batches the parameters are divided, so that no hidden state waits behind all of them. The first
   hidden state of the next visit is there before the last one of the present visit computes.
2. A gradient's device buffer is freed after the next visit has computed, so that it leaves under that visit's compute.
3. Chunks are read, updated and written back in a pipeline of `UPDATED_CHUNKS`; see also `scheduling/program.py`.
4. What an update needs is not read twice: the host copy of a parameter that its backward has fetched stays for its update, and
   the one that a pending update has made stays for the visit that waits for it.
5. An update on the device waits on the host for its gradient's verdict, so it is emitted after the next visit's compute: the device
   has work meanwhile.
6. A hidden state that the device has made and that leaves it is freed after the next compute, under which it leaves. Its memory is the
   allocator's, which hands it on in the order of compute, and the host is far ahead: freed when the host sees the copy done, a dozen
   would pile up; freed at once, compute would wait.
7. A pending update of what rests in host memory borrows no buffer, so one bundle a visit is updated from the first visit on, past those
   that the device updates: the host has work while these compute, and need not begin when a visit is about to wait for it.

Without prefetching (`prefetch_units` 0: there is no room for it) rules 1, 2 and 4 to 7 do not apply.

This file decides the order and nothing else; it is pure (plan in, schedule out) and imports no torch. Source of the
order: GreedySnake's vertical schedule (arXiv 2512.17570), design 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from overspill.scheduling.program import LADDER, Emission
from overspill.scheduling.retaining import RetainingProgram
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import (
    Compress,
    Compute,
    Lane,
    Phase,
    Piece,
    Role,
    Schedule,
    Update,
    bundle_pieces,
    home_tier,
    parameter_pieces,
)
from overspill.spec.tensors import Bundle, Tier, Unit

UPDATED_CHUNKS = 4
"""Of states on the SSD: one is read, one updated, one written back, and one is spare, so that a slow one delays nobody. Chosen."""


def build_train_step(plan: Plan, micro_batch_tokens: Sequence[int], *, starts_pending: bool) -> Schedule:
    """One optimizer step over micro-batches of the given token counts (samples x padded length)."""
    builder = _Builder(plan, micro_batch_tokens, starts_pending=starts_pending)
    visits = []
    for group in builder.groups:
        visits += [_Visit(unit=unit, phase=Phase.FORWARD, group=group, keep=True) for unit in plan.units[:-1]]
        visits += [_Visit(unit=unit, phase=Phase.BACKWARD, group=group) for unit in reversed(plan.units)]
    builder.go_through(visits)
    return builder.finish("train", ends_pending=plan.timing is UpdateTiming.PENDING)


def full_step(plan: Plan) -> Schedule:
    """The program of a step of the plan's batch at its longest, with pending updates if the plan has them."""
    return build_train_step(plan, plan.longest_step, starts_pending=plan.timing is UpdateTiming.PENDING)


def largest_steps(plan: Plan) -> tuple[Schedule, ...]:
    """Programs of which one holds as much of every tier as any step of the plan: the whole batch, and one group alone, whose gradients are
    finished beside all of its hidden states; the whole batch's last group may be smaller."""
    sizes = {len(plan.longest_step), min(plan.group_size, len(plan.longest_step))}
    starts = {False, plan.timing is UpdateTiming.PENDING}
    return tuple(build_train_step(plan, plan.longest_step[:size], starts_pending=start) for size in sizes for start in starts)


def build_evaluation(plan: Plan, micro_batch_tokens: Sequence[int]) -> Schedule:
    """The loss of micro-batches, nothing kept; weights must have been flushed."""
    builder = _Builder(plan, micro_batch_tokens, starts_pending=False, group_size=plan.evaluation_group_size)
    builder.go_through([_Visit(unit=unit, phase=Phase.FORWARD, group=group) for group in builder.groups for unit in plan.units])
    return builder.finish("evaluate", ends_pending=False)


def build_flush(plan: Plan) -> Schedule:
    """The pending updates alone, in forward order."""
    builder = _Builder(plan, (), starts_pending=True)
    for unit in plan.units:
        builder.pending_updates(unit, for_visit=False)
    return builder.finish("flush", ends_pending=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Visit:
    """One unit on all micro-batches of a group."""

    unit: Unit
    phase: Phase
    group: tuple[int, ...]
    keep: bool = False
    """Forward: boundaries stay for the backward."""


class _Builder(RetainingProgram):
    def __init__(self, plan: Plan, micro_batch_tokens: Sequence[int], *, starts_pending: bool, group_size: int | None = None) -> None:
        super().__init__(plan, starts_pending=starts_pending)
        self.tokens = tuple(micro_batch_tokens)
        size = plan.group_size if group_size is None else group_size
        self.groups = tuple(tuple(range(start, min(start + size, len(self.tokens)))) for start in range(0, len(self.tokens), size))
        self.starts_pending = starts_pending
        self.names = [unit.name for unit in plan.units]
        self.pending = {name for name, bundle in plan.bundles.items() if bundle.trainable} if starts_pending else set()
        self.late_frees: list[tuple[Piece, Tier]] = []
        """Rule 2: freed after the next visit."""
        self.late_updates: list[tuple[Bundle, Sequence[Piece]]] = []
        """Rule 5: of states on the device, after the next visit."""
        self.coming: list[tuple[Piece, bool]] = []
        """Rule 1: parameters of the next visit that are not fetched yet; whether copies on the way stay."""
        self.following: _Visit | None = None
        """The next visit, where there is room to prefetch for it."""
        self.moving: list[Piece] = []
        """Rule 6: hidden states on their way out since the last compute."""

    # -- visits ------------------------------------------------------------------------------------------------------

    def go_through(self, visits: Sequence[_Visit]) -> None:
        """All visits, each prepared while the one before it computes (rule 1)."""
        prefetches = self.plan.prefetch_units > 0
        for index, visit in enumerate(visits):
            following = visits[index + 1] if prefetches and index + 1 < len(visits) else None
            if index == 0 or not prefetches:
                self.prepare(visit)
            self.following = following
            if prefetches:
                self.bring_inputs(visit, 0)
            if following is not None:
                self.prepare(following, divides=len(visit.group) > 1)
            if prefetches and index + 2 < len(visits):
                self.bring_early(visits[index + 2])
                self.pending_updates(visits[index + 2].unit, for_visit=True)
            if prefetches:
                self.update_ahead()
            if visit.phase is Phase.FORWARD:
                self.forward(visit)
            else:
                self.backward(visit)
            self.free_parameters(visit.unit, following)
            self.update_late()
            self.free_late()
            if visit.phase is Phase.BACKWARD:
                if visit.group == self.groups[-1]:
                    self.finish_gradients(visit.unit)
                else:
                    self.evict_partials(visit.unit)
            if not prefetches:
                self.update_late()
                self.free_late()
        self.update_late()
        self.free_late()
        self.free_moved()

    def prepare(self, visit: _Visit, *, divides: bool = False) -> None:
        """What the visit's first compute reads.

        Args:
            divides: parameters in host memory come between the computes before (`bring_share`), and not here.
        """
        self.pending_updates(visit.unit, for_visit=True)
        for bundle in visit.unit.bundles:
            pieces, keep = [piece for piece, _ in parameter_pieces(self.plan, bundle)], self.is_updated_after(visit, bundle)
            if divides and self.plan.placements[bundle].parameters is Tier.HOST:
                self.coming += [(piece, keep) for piece in pieces]
            else:
                self.bring(pieces, Tier.DEVICE, keep=keep)
        if visit.phase is Phase.BACKWARD and not (divides and self.plan.boundaries is Tier.HOST):  # from the SSD it takes longer
            self.bring_first(visit)

    def bring_first(self, visit: _Visit) -> None:
        """What the visit's first compute reads of hidden states, as far as it is there."""
        for piece in self.inputs(visit, visit.group[0]):
            if any((piece, tier) in self.copies for tier in LADDER):  # else the visit before makes it
                self.bring_input(piece)

    def bring_share(self, num_computes: int) -> None:
        """For the next visit: of the parameters that are still to come this compute's share, and what it computes first with the last.

        Args:
            num_computes: left in the present visit.
        """
        share = -(-len(self.coming) // num_computes)
        for piece, keep in self.coming[:share]:
            self.bring([piece], Tier.DEVICE, keep=keep)
        del self.coming[:share]
        if num_computes == 1 and self.following is not None:
            self.bring_first(self.following)

    def bring_early(self, visit: _Visit) -> None:
        """The activations that the visit after the next consumes first: the link may need longer for them than a visit computes."""
        stored = self.activations(visit.unit.name, visit.group[0])
        if visit.phase is Phase.BACKWARD and stored is not None and any((stored, tier) in self.copies for tier in LADDER):
            self.bring_input(stored)

    def is_updated_after(self, visit: _Visit, bundle: str) -> bool:
        """Whether an update on the host follows the visit, so that host copies of the parameters stay for it (rule 4)."""
        if not self.plan.prefetch_units or self.plan.timing is not UpdateTiming.IMMEDIATE:
            return False
        if not self.plan.bundles[bundle].trainable or self.plan.placements[bundle].update_tier is not Tier.HOST:
            return False
        return visit.phase is Phase.BACKWARD and visit.group == self.groups[-1] and self.last_reader(bundle) == visit.unit.name

    def last_reader(self, bundle: str) -> str:
        """The unit whose backward completes the bundle's gradient."""
        return next(unit.name for unit in self.plan.units if bundle in unit.bundles)

    def free_parameters(self, unit: Unit, following: _Visit | None) -> None:
        """After a visit; what the following one reads too, and has been prepared for it, stays."""
        for bundle in unit.bundles:
            is_read_again = following is not None and bundle in following.unit.bundles
            if self.plan.placements[bundle].parameters is not Tier.DEVICE and not is_read_again:
                for piece, _ in parameter_pieces(self.plan, bundle):
                    self.free(piece, Tier.DEVICE)

    def free_late(self) -> None:
        for piece, tier in self.late_frees:
            self.free(piece, tier)
        self.late_frees = []

    def move_out(self, piece: Piece) -> None:
        """Let a hidden state that was just made leave for its tier (rule 6)."""
        self.lower([piece], Tier.DEVICE, self.plan.boundaries)
        self.moving.append(piece)
        if not self.plan.prefetch_units:
            self.free_moved()

    def free_moved(self) -> None:
        for piece in self.moving:
            self.free_made(piece)
        self.moving = []

    def bring_input(self, piece: Piece) -> None:
        """To the device, for a compute; what is on its way out is there still, and stays."""
        if piece in self.moving:
            self.moving.remove(piece)
        super().bring_input(piece)

    def update_late(self) -> None:
        for bundle, pieces in self.late_updates:
            self.update(bundle, pieces, for_visit=False)
        self.late_updates = []

    def boundary(self, unit: str, micro_batch: int, role: Role = Role.BOUNDARY) -> Piece:
        return Piece(role=role, owner=unit, index=micro_batch)

    def boundary_bytes(self, unit: str, micro_batch: int) -> int:
        return self.plan.boundary_bytes(unit, self.tokens[micro_batch])

    def flops(self, unit: Unit, micro_batch: int, phase: Phase) -> float:
        """2 per parameter and token forward; 3 times that for recomputation and both gradients, twice for these. The embedding looks up."""
        if unit.name == self.names[0]:
            return 0.0
        parameters = sum(self.plan.bundles[bundle].num_parameters for bundle in unit.bundles)
        passes = 1 if phase is Phase.FORWARD else 2 if unit.name in self.plan.activations else 3
        if unit.name == self.names[-1] and phase is Phase.BACKWARD:
            passes = 3
        return 2.0 * parameters * self.tokens[micro_batch] * passes

    def inputs(self, visit: _Visit, micro_batch: int) -> list[Piece]:
        """The hidden state that a compute of the visit reads and, in the backward, the gradient of its output and what its graph stored."""
        position = self.names.index(visit.unit.name)
        pieces = [self.boundary(visit.unit.name, micro_batch)] if position > 0 else []
        if visit.phase is Phase.BACKWARD and position < len(self.names) - 1:
            pieces.append(self.boundary(self.names[position + 1], micro_batch, Role.BOUNDARY_GRADIENT))
            stored = self.activations(visit.unit.name, micro_batch)
            pieces += [stored] if stored is not None else []
        return pieces

    def bring_inputs(self, visit: _Visit, number: int) -> None:
        """For the visit's micro-batch `number` and, if there is room to, for the one after it (rule 1)."""
        for micro_batch in visit.group[number : number + 1 + min(self.plan.prefetch_units, 1)]:
            for piece in self.inputs(visit, micro_batch):
                self.bring_input(piece)

    def compute(self, visit: _Visit, micro_batch: int, produced: tuple[tuple[Piece, int], ...]) -> None:
        unit, phase = visit.unit, visit.phase
        stored = self.activations(unit.name, micro_batch)
        if stored is not None and visit.keep:
            produced += ((stored, self.plan.activation_bytes(unit.name, self.tokens[micro_batch])),)
        consumed = (stored,) if stored is not None and phase is Phase.BACKWARD else ()
        flops = self.flops(unit, micro_batch, phase)
        self.emit_compute(Compute(unit=unit.name, micro_batch=micro_batch, phase=phase, produced=produced, flops=flops, consumed=consumed))

    def forward(self, visit: _Visit) -> None:
        """All micro-batches of the group."""
        position = self.names.index(visit.unit.name)
        moves = self.plan.boundaries is not Tier.DEVICE
        for number, micro_batch in enumerate(visit.group):
            produced: tuple[tuple[Piece, int], ...] = ()
            if position < len(self.names) - 1:
                above = self.names[position + 1]
                produced = ((self.boundary(above, micro_batch), self.boundary_bytes(above, micro_batch)),)
            self.bring_inputs(visit, number)
            self.bring_share(len(visit.group) - number)
            self.compute(visit, micro_batch, produced)
            self.free_moved()
            if position > 0:
                read = self.boundary(visit.unit.name, micro_batch)
                if moves or not visit.keep:
                    self.free_made(read)
                if not visit.keep:
                    self.release(read)
            if produced and moves and len(visit.group) > 1:
                self.move_out(produced[0][0])
            elif produced and moves and visit.keep:
                self.lower([produced[0][0]], Tier.DEVICE, self.plan.boundaries)

    def backward(self, visit: _Visit) -> None:
        """Rebuild each micro-batch's graph from its boundary, or take the one that was kept; take gradients."""
        unit = visit.unit
        self.let_leave(0)
        self.fetch_partials(unit)
        position = self.names.index(unit.name)
        moves = self.plan.boundaries is not Tier.DEVICE
        for number, micro_batch in enumerate(visit.group):
            self.bring_inputs(visit, number)
            produced = list(self.new_partials(unit))
            if position > 0:
                below = self.boundary(unit.name, micro_batch, Role.BOUNDARY_GRADIENT)
                produced.append((below, self.boundary_bytes(unit.name, micro_batch)))
            self.bring_share(len(visit.group) - number)
            self.compute(visit, micro_batch, tuple(produced))
            self.free_moved()
            for piece in self.inputs(visit, micro_batch):
                self.free_made(piece)
                self.release(piece)
            if position > 0 and moves and len(visit.group) > 1:
                self.move_out(produced[-1][0])

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
            waiting = [piece for piece, _ in self.partials(bundle, unit.name) if home is not Tier.DEVICE and (piece, home) in self.copies]
            self.bring(waiting, Tier.DEVICE)
            for piece in waiting:
                self.free(piece, home)

    def evict_partials(self, unit: Unit) -> None:
        for bundle in self.trainable(unit):
            self.rest_partials(bundle, unit.name)

    def rest_partials(self, bundle: Bundle, reader: str) -> None:
        """What one unit has added up leaves the device until the next group, or (tied) the embedding's share, is there."""
        home = self.plan.placements[bundle.name].gradients
        if home is not Tier.DEVICE:
            pieces = [piece for piece, _ in self.partials(bundle, reader)]
            self.lower(pieces, Tier.DEVICE, home)
            self.late_frees += [(piece, Tier.DEVICE) for piece in pieces]

    def finish_gradients(self, unit: Unit) -> None:
        """Compress each bundle whose last contribution was this unit's, then update it or let its gradient wait."""
        for bundle in self.trainable(unit):
            readers = [other.name for other in reversed(self.plan.units) if bundle.name in other.bundles]
            if readers[-1] != unit.name:
                self.rest_partials(bundle, unit.name)
                continue
            home = self.plan.placements[bundle.name].gradients
            partials = tuple(item for reader in readers for item in self.partials(bundle, reader))
            for piece, _ in partials:
                if (piece, Tier.DEVICE) not in self.copies:
                    self.bring([piece], Tier.DEVICE)
                    self.free(piece, home)
            produced = bundle_pieces(self.plan, bundle.name, Role.GRADIENT, bundle.element_bytes)
            self.emit(Compress(bundle=bundle.name, partials=partials, produced=produced), Lane.COMPUTE)
            pieces = [piece for piece, _ in produced]
            if self.plan.timing is UpdateTiming.IMMEDIATE and self.plan.placements[bundle.name].update_tier is Tier.DEVICE:
                self.late_updates.append((bundle, pieces))
            elif self.plan.timing is UpdateTiming.IMMEDIATE:
                self.update(bundle, pieces, for_visit=False)
            elif home is not Tier.DEVICE:
                self.lower(pieces, Tier.DEVICE, home)
                self.late_frees += [(piece, Tier.DEVICE) for piece in pieces]

    def update(self, bundle: Bundle, gradients: Sequence[Piece], *, for_visit: bool) -> None:
        """Bring gradient, parameter and state of each chunk to where they are updated, update, and write back what changed.

        Args:
            for_visit: a visit is about to fetch the parameters: their host copies stay for it (rule 4).
        """
        placement = self.plan.placements[bundle.name]
        where = placement.update_tier
        from_ssd = Tier.SSD in (placement.parameters, placement.states, placement.gradients)
        depth = 1 if where is Tier.DEVICE else UPDATED_CHUNKS if from_ssd else len(gradients)
        keep = for_visit and self.plan.prefetch_units > 0
        chains: list[list[Emission]] = []
        for gradient in gradients:
            pieces = [Piece(role=Role.PARAMETER, owner=bundle.name, index=gradient.index)]
            if self.plan.has_state(bundle.name):
                pieces.append(Piece(role=Role.STATE, owner=bundle.name, index=gradient.index))
            chains.append(
                [
                    functools.partial(self.bring_for_update, gradient, pieces, where),
                    functools.partial(self.update_chunk, bundle, gradient, pieces, where, keep=keep),
                ]
            )
        self.pipeline(chains, depth)

    def bring_for_update(self, gradient: Piece, pieces: Sequence[Piece], where: Tier) -> None:
        if where is Tier.HOST and (gradient, Tier.DEVICE) in self.copies:
            self.lower([gradient], Tier.DEVICE, Tier.HOST)
            self.late_frees.append((gradient, Tier.DEVICE))
        elif (gradient, where) not in self.copies:
            home = self.nearest(gradient, where)
            self.bring([gradient], where)
            self.free(gradient, home)
        for piece in pieces:
            if (piece, where) not in self.copies:
                self.carry(piece, self.home(piece), where)

    def home(self, piece: Piece) -> Tier:
        """Where a parameter or state rests."""
        return home_tier(self.plan, piece.owner, piece.role)

    def update_chunk(self, bundle: Bundle, gradient: Piece, pieces: Sequence[Piece], where: Tier, *, keep: bool) -> None:
        size = self.copies[gradient, where].num_bytes
        num_elements = bundle.chunks[gradient.index].num_elements
        lane = Lane.COMPUTE if where is Tier.DEVICE else Lane.HOST_UPDATE
        self.emit(Update(bundle=bundle.name, chunk=gradient.index, tier=where, num_elements=num_elements, num_bytes=size), lane)
        for piece in pieces:
            if self.home(piece) is not where:
                self.carry(piece, where, self.home(piece))
                if not (keep and piece.role is Role.PARAMETER and self.home(piece) is Tier.SSD):
                    self.free(piece, where)

    def pending_updates(self, unit: Unit, *, for_visit: bool) -> None:
        for bundle in self.trainable(unit):
            if bundle.name in self.pending:
                self.update_pending(bundle, for_visit=for_visit)

    def update_pending(self, bundle: Bundle, *, for_visit: bool) -> None:
        self.pending.remove(bundle.name)
        pieces = bundle_pieces(self.plan, bundle.name, Role.GRADIENT, bundle.element_bytes)
        self.update(bundle, [piece for piece, _ in pieces], for_visit=for_visit)

    def update_ahead(self) -> None:
        """The next bundle that the host updates, if all of it is in host memory (rule 7)."""
        for bundle in (bundle for unit in self.plan.units for bundle in self.trainable(unit) if bundle.name in self.pending):
            placement = self.plan.placements[bundle.name]
            if placement.update_tier is Tier.HOST:
                if {placement.parameters, placement.states, placement.gradients} == {Tier.HOST}:
                    self.update_pending(bundle, for_visit=True)
                return

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
