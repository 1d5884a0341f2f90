"""From a plan to the program of one optimizer step.

Order. A *group* of micro-batches goes through a unit before any goes to the next unit, forward and backward: parameters
cross a link once a pass, not once a micro-batch, and gradients leave once. The tail computes its loss and gradients in one
visit. A unit's graph is rebuilt from its boundary in the backward, or kept since its forward (`Plan.activations`): what it stores is
then a piece that the forward makes and the backward consumes (`scheduling/retaining.py`).

Gradients and updates are put between the visits by rules of their own (`scheduling/updating.py`).

Overlap. Buffers change hands in the program's order, so what shall overlap must hold its buffers side by side in it:

1. The parameters of the next visit are fetched while the present one computes (`Plan.prefetch_units`), and so is the next
   micro-batch's hidden state where these rest elsewhere. Activations come one visit earlier still. What the present visit waits for goes
   first, and between several micro-batches the parameters are divided, so that no hidden state waits behind all of them. The first
   hidden state of the next visit is there before the last one of the present visit computes.
2. A hidden state that the device has made and that leaves it is freed after the next compute, under which it leaves. Its memory is the
   allocator's, which hands it on in the order of compute, and the host is far ahead: freed when the host sees the copy done, a dozen
   would pile up; freed at once, compute would wait.

Without prefetching (`prefetch_units` 0: there is no room for it) neither applies.

This file decides the order and nothing else; it is pure (plan in, schedule out) and imports no torch. Source of the
order: GreedySnake's vertical schedule (arXiv 2512.17570), design 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from overspill.scheduling.program import LADDER
from overspill.scheduling.updating import UpdatingProgram
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import Compute, Phase, Piece, Role, Schedule, parameter_pieces
from overspill.spec.tensors import Tier, Unit


def build_train_step(plan: Plan, micro_batch_tokens: Sequence[int], *, starts_pending: bool) -> Schedule:
    """One optimizer step over micro-batches of the given token counts (samples x padded length)."""
    builder = _Builder(plan, micro_batch_tokens, starts_pending=starts_pending)
    visits = []
    for group in builder.groups:
        visits += [_Visit(unit=unit, phase=Phase.FORWARD, group=group, keep=True) for unit in plan.units[:-1]]
        visits += [_Visit(unit=unit, phase=Phase.BACKWARD, group=group) for unit in reversed(plan.units)]
    builder.go_through(visits)
    builder.update_deferred()
    return builder.finish("train", ends_pending=plan.timing is UpdateTiming.PENDING)


def full_step(plan: Plan) -> Schedule:
    """The program of a step of the plan's batch at its longest, with pending updates if the plan has them."""
    return build_train_step(plan, plan.longest_step, starts_pending=plan.timing is UpdateTiming.PENDING)


def largest_steps(plan: Plan) -> tuple[Schedule, ...]:
    """Programs of which one holds as much of every tier as any step of the plan: the whole batch; one group alone and after another one,
    whose gradients are finished beside all of its hidden states (the whole batch's last group may be smaller); and two micro-batches, or
    one, whose hidden states all stay on the device, since the next visit computes them at once."""
    longest, group = len(plan.longest_step), plan.group_size
    sizes = {longest, *(min(size, longest) for size in (group, 2 * group if longest % group else group, 2, 1))}
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
        builder.update_pending(unit, for_visit=False)
    return builder.finish("flush", ends_pending=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Visit:
    """One unit on all micro-batches of a group."""

    unit: Unit
    phase: Phase
    group: tuple[int, ...]
    keep: bool = False
    """Forward: boundaries stay for the backward."""


class _Builder(UpdatingProgram):
    """Goes through visits in their order."""

    def __init__(self, plan: Plan, micro_batch_tokens: Sequence[int], *, starts_pending: bool, group_size: int | None = None) -> None:
        super().__init__(plan, num_micro_batches=len(micro_batch_tokens), starts_pending=starts_pending)
        self.tokens = tuple(micro_batch_tokens)
        size = plan.group_size if group_size is None else group_size
        self.groups = tuple(tuple(range(start, min(start + size, len(self.tokens)))) for start in range(0, len(self.tokens), size))
        self.starts_pending = starts_pending
        self.names = [unit.name for unit in plan.units]
        self.coming: list[tuple[Piece, bool]] = []
        """Rule 1: parameters of the next visit that are not fetched yet; whether copies on the way stay."""
        self.following: _Visit | None = None
        """The next visit, where there is room to prefetch for it."""
        self.moving: list[Piece] = []
        """Rule 2: hidden states on their way out since the last compute."""

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
                self.update_pending(visits[index + 2].unit, for_visit=True)
            if prefetches:
                self.update_ahead()
            if visit.phase is Phase.FORWARD:
                self.forward(visit)
            else:
                self.backward(visit)
            self.free_parameters(visit.unit, following)
            self.emit_late()
            if visit.phase is Phase.BACKWARD:
                if visit.group == self.groups[-1]:
                    self.finish_gradients(visit.unit)
                else:
                    self.evict_partials(visit.unit)
            if not prefetches:
                self.emit_late()
        self.emit_late()
        self.free_moved()

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

    def free_parameters(self, unit: Unit, following: _Visit | None) -> None:
        """After a visit; what the following one reads too, and has been prepared for it, stays."""
        for bundle in unit.bundles:
            is_read_again = following is not None and bundle in following.unit.bundles
            if self.plan.placements[bundle].parameters is not Tier.DEVICE and not is_read_again:
                for piece, _ in parameter_pieces(self.plan, bundle):
                    self.free(piece, Tier.DEVICE)

    # -- what a visit finds there (rule 1) ---------------------------------------------------------------------------

    def prepare(self, visit: _Visit, *, divides: bool = False) -> None:
        """What the visit's first compute reads.

        Args:
            divides: parameters in host memory come between the computes before (`bring_share`), and not here.
        """
        self.update_pending(visit.unit, for_visit=True)
        for bundle in visit.unit.bundles:
            pieces, keep = [piece for piece, _ in parameter_pieces(self.plan, bundle)], self.is_updated_after(visit, bundle)
            if divides and self.plan.placements[bundle].parameters is Tier.HOST:
                self.coming += [(piece, keep) for piece in pieces]
            else:
                self.bring(pieces, Tier.DEVICE, keep=keep)
        if visit.phase is Phase.BACKWARD and not (divides and self.plan.boundaries is Tier.HOST):  # from the SSD it takes longer
            self.bring_first(visit)

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

    def bring_first(self, visit: _Visit) -> None:
        """What the visit's first compute reads of hidden states, as far as it is there."""
        for piece in self.inputs(visit, visit.group[0]):
            if any((piece, tier) in self.copies for tier in LADDER):  # else the visit before makes it
                self.bring_input(piece)

    def bring_early(self, visit: _Visit) -> None:
        """The activations that the visit after the next consumes first: the link may need longer for them than a visit computes."""
        stored = self.activations(visit.unit.name, visit.group[0])
        if visit.phase is Phase.BACKWARD and stored is not None and any((stored, tier) in self.copies for tier in LADDER):
            self.bring_input(stored)

    def is_updated_after(self, visit: _Visit, bundle: str) -> bool:
        """Whether an update on the host follows the visit, for which host copies of the parameters stay (`updating`, rule 3)."""
        is_last = visit.phase is Phase.BACKWARD and visit.group == self.groups[-1]
        return self.plan.prefetch_units > 0 and is_last and self.is_updated_by_host_after(visit.unit, bundle)

    # -- one compute -------------------------------------------------------------------------------------------------

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

    def flops(self, unit: Unit, micro_batch: int, phase: Phase) -> float:
        """2 per parameter and token forward; 3 times that for recomputation and both gradients, twice for these. The embedding looks up."""
        if unit.name == self.names[0]:
            return 0.0
        parameters = sum(self.plan.bundles[bundle].num_parameters for bundle in unit.bundles)
        passes = 1 if phase is Phase.FORWARD else 2 if unit.name in self.plan.activations else 3
        if unit.name == self.names[-1] and phase is Phase.BACKWARD:
            passes = 3
        return 2.0 * parameters * self.tokens[micro_batch] * passes

    # -- hidden states -----------------------------------------------------------------------------------------------

    def boundary(self, unit: str, micro_batch: int, role: Role = Role.BOUNDARY) -> Piece:
        return Piece(role=role, owner=unit, index=micro_batch)

    def boundary_bytes(self, unit: str, micro_batch: int) -> int:
        return self.plan.boundary_bytes(unit, self.tokens[micro_batch])

    def move_out(self, piece: Piece) -> None:
        """Let a hidden state that was just made leave for its tier (rule 2)."""
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
