"""Gradients and updates in a program: what a backward adds up, where it waits, and when which bundle is updated.

Several groups of micro-batches. A unit's partial gradients leave when a group is through it. They are fetched before the next group's
backward of that unit, added to, and evicted again, so the order of additions, and with it every bit, is that of one group. After the
last contribution `Compress` makes them the bundle's gradient.

Updates. `IMMEDIATE`: a bundle is updated as soon as its gradient is complete; but those that the plan defers (`Plan.deferred`) when the
step's last gradient is, in forward order, so that they land under the next step's forward (rule 6). `PENDING`: its gradient waits at
its home, and the *next* step's forward updates the bundle just before it first reads it, so a step's program is pending updates +
forward + backward, and a `flush` program runs what is pending before anybody else reads the weights.

Rules:

1. A gradient's device buffer is freed after the next visit has computed, so that it leaves under that visit's compute.
2. Chunks are read, updated and written back in a pipeline of `UPDATED_CHUNKS`; see also `scheduling/program.py`.
3. What an update needs is not read twice: the host copy of a parameter that its backward has fetched stays for its update, and
   the one that a pending update has made stays for the visit that waits for it.
4. An update on the device waits on the host for its gradient's verdict, so it is emitted after the next visit's compute: the device
   has work meanwhile.
5. A pending update of what rests in host memory borrows no buffer, so one bundle a visit is updated from the first visit on, past those
   that the device updates: the host has work while these compute, and need not begin when a visit is about to wait for it.
6. In the order of their gradients the first blocks would be updated last, and the next forward, which reads them first, would wait for
   all updates: they could run under the backward alone. A deferred bundle's gradient leaves the device as ever and waits in host memory.

Without prefetching (`prefetch_units` 0: there is no room for it) rules 1 and 3 to 5 do not apply.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from overspill.scheduling.program import Emission
from overspill.scheduling.retaining import RetainingProgram
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import Compress, Lane, Piece, Role, Update, bundle_pieces, home_tier
from overspill.spec.tensors import Bundle, Tier, Unit

UPDATED_CHUNKS = 4
"""Of states on the SSD: one is read, one updated, one written back, and one is spare, so that a slow one delays nobody. Chosen."""


class UpdatingProgram(RetainingProgram):
    """A program whose backwards make gradients, and which updates bundles.

    Args:
        num_micro_batches: that contribute to each gradient.
        starts_pending: all trainable bundles wait for the update of the step before.
    """

    def __init__(self, plan: Plan, *, num_micro_batches: int, starts_pending: bool) -> None:
        super().__init__(plan, starts_pending=starts_pending)
        self.num_micro_batches = num_micro_batches
        self.pending = {name for name, bundle in plan.bundles.items() if bundle.trainable} if starts_pending else set()
        """Bundles that still wait for the update of the step before."""
        self._late_frees: list[tuple[Piece, Tier]] = []
        """Rule 1: freed after the next visit."""
        self._late_updates: list[tuple[Bundle, Sequence[Piece]]] = []
        """Rule 4: of states on the device, after the next visit."""

    # -- gradients ---------------------------------------------------------------------------------------------------

    def new_partials(self, unit: Unit) -> tuple[tuple[Piece, int], ...]:
        """Partial gradients of `unit` that do not exist yet: its next backward makes them."""
        pieces = [item for bundle in self._trainable(unit) for item in self._partials(bundle, unit.name)]
        return tuple((piece, size) for piece, size in pieces if (piece, Tier.DEVICE) not in self.copies)

    def fetch_partials(self, unit: Unit) -> None:
        """What earlier groups have added up, to the device."""
        for bundle in self._trainable(unit):
            home = self.plan.placements[bundle.name].gradients
            waiting = [piece for piece, _ in self._partials(bundle, unit.name) if home is not Tier.DEVICE and (piece, home) in self.copies]
            self.bring(waiting, Tier.DEVICE)
            for piece in waiting:
                self.free(piece, home)

    def evict_partials(self, unit: Unit) -> None:
        """After a group that is not the last one."""
        for bundle in self._trainable(unit):
            self._rest_partials(bundle, unit.name)

    def finish_gradients(self, unit: Unit) -> None:
        """Compress each bundle whose last contribution was this unit's, then update it or let its gradient wait."""
        for bundle in self._trainable(unit):
            readers = [other.name for other in reversed(self.plan.units) if bundle.name in other.bundles]
            if readers[-1] != unit.name:
                self._rest_partials(bundle, unit.name)
                continue
            home = self.plan.placements[bundle.name].gradients
            partials = tuple(item for reader in readers for item in self._partials(bundle, reader))
            for piece, _ in partials:
                if (piece, Tier.DEVICE) not in self.copies:
                    self.bring([piece], Tier.DEVICE)
                    self.free(piece, home)
            produced = bundle_pieces(self.plan, bundle.name, Role.GRADIENT, bundle.element_bytes)
            self.emit(Compress(bundle=bundle.name, partials=partials, produced=produced), Lane.COMPUTE)
            pieces = [piece for piece, _ in produced]
            if self.plan.timing is UpdateTiming.IMMEDIATE and self.plan.placements[bundle.name].update_tier is Tier.DEVICE:
                self._late_updates.append((bundle, pieces))
            elif self.plan.timing is UpdateTiming.IMMEDIATE and bundle.name not in self.plan.deferred:
                self._update(bundle, pieces, for_visit=False)
            elif home is not Tier.DEVICE:
                self.lower(pieces, Tier.DEVICE, home)
                self._late_frees += [(piece, Tier.DEVICE) for piece in pieces]

    def emit_late(self) -> None:
        """What the visit before has left for after this one (rules 1 and 4)."""
        for bundle, pieces in self._late_updates:
            self._update(bundle, pieces, for_visit=False)
        self._late_updates = []
        for piece, tier in self._late_frees:
            self.free(piece, tier)
        self._late_frees = []

    def _trainable(self, unit: Unit) -> list[Bundle]:
        return [self.plan.bundles[bundle] for bundle in unit.bundles if self.plan.bundles[bundle].trainable]

    def _partials(self, bundle: Bundle, unit: str) -> tuple[tuple[Piece, int], ...]:
        """Fp32 where there is more than one contribution: several micro-batches, or the tail's chunks of rows."""
        several = self.num_micro_batches > 1 or unit == self.plan.units[-1].name
        bytes_per_element = 4 if several else bundle.element_bytes
        return bundle_pieces(self.plan, bundle.name, Role.PARTIAL_GRADIENT, bytes_per_element, reader=unit)

    def _rest_partials(self, bundle: Bundle, reader: str) -> None:
        """What one unit has added up leaves the device until the next group, or (tied) the embedding's share, is there."""
        home = self.plan.placements[bundle.name].gradients
        if home is not Tier.DEVICE:
            pieces = [piece for piece, _ in self._partials(bundle, reader)]
            self.lower(pieces, Tier.DEVICE, home)
            self._late_frees += [(piece, Tier.DEVICE) for piece in pieces]

    # -- updates -----------------------------------------------------------------------------------------------------

    def update_pending(self, unit: Unit, *, for_visit: bool) -> None:
        """Bundles of `unit` that still wait.

        Args:
            for_visit: a visit is about to fetch the parameters: their host copies stay for it (rule 3).
        """
        for bundle in self._trainable(unit):
            if bundle.name in self.pending:
                self._update_pending(bundle, for_visit=for_visit)

    def update_deferred(self) -> None:
        """When the step's last gradient is complete (rule 6)."""
        for name in self.plan.deferred:
            self._update_waiting(self.plan.bundles[name], for_visit=False)

    def update_ahead(self) -> None:
        """The next bundle that the host updates, if all of it is in host memory (rule 5)."""
        for bundle in (bundle for unit in self.plan.units for bundle in self._trainable(unit) if bundle.name in self.pending):
            placement = self.plan.placements[bundle.name]
            if placement.update_tier is Tier.HOST:
                if {placement.parameters, placement.states, placement.gradients} == {Tier.HOST}:
                    self._update_pending(bundle, for_visit=True)
                return

    def is_updated_by_host_after(self, unit: Unit, bundle: str) -> bool:
        """Whether an update on the host follows the last backward of `unit`, which reads the bundle (rule 3)."""
        if self.plan.timing is not UpdateTiming.IMMEDIATE or not self.plan.bundles[bundle].trainable:
            return False
        completes = next(reader.name for reader in self.plan.units if bundle in reader.bundles)
        return self.plan.placements[bundle].update_tier is Tier.HOST and completes == unit.name

    def _update_pending(self, bundle: Bundle, *, for_visit: bool) -> None:
        self.pending.remove(bundle.name)
        self._update_waiting(bundle, for_visit=for_visit)

    def _update_waiting(self, bundle: Bundle, *, for_visit: bool) -> None:
        """A bundle whose gradient waits at its home."""
        pieces = bundle_pieces(self.plan, bundle.name, Role.GRADIENT, bundle.element_bytes)
        self._update(bundle, [piece for piece, _ in pieces], for_visit=for_visit)

    def _update(self, bundle: Bundle, gradients: Sequence[Piece], *, for_visit: bool) -> None:
        """Bring gradient, parameter and state of each chunk to where they are updated, update, and write back what changed (rule 2)."""
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
                    functools.partial(self._bring_for_update, gradient, pieces, where),
                    functools.partial(self._update_chunk, bundle, gradient, pieces, where, keep=keep),
                ]
            )
        self.pipeline(chains, depth)

    def _bring_for_update(self, gradient: Piece, pieces: Sequence[Piece], where: Tier) -> None:
        if where is Tier.HOST and (gradient, Tier.DEVICE) in self.copies:
            self.lower([gradient], Tier.DEVICE, Tier.HOST)
            self._late_frees.append((gradient, Tier.DEVICE))
        elif (gradient, where) not in self.copies:
            home = self.nearest(gradient, where)
            self.bring([gradient], where)
            self.free(gradient, home)
        for piece in pieces:
            if (piece, where) not in self.copies:
                self.carry(piece, self._home(piece), where)

    def _update_chunk(self, bundle: Bundle, gradient: Piece, pieces: Sequence[Piece], where: Tier, *, keep: bool) -> None:
        size = self.copies[gradient, where].num_bytes
        num_elements = bundle.chunks[gradient.index].num_elements
        lane = Lane.COMPUTE if where is Tier.DEVICE else Lane.HOST_UPDATE
        self.emit(Update(bundle=bundle.name, chunk=gradient.index, tier=where, num_elements=num_elements, num_bytes=size), lane)
        for piece in pieces:
            if self._home(piece) is not where:
                self.carry(piece, where, self._home(piece))
                if not (keep and piece.role is Role.PARAMETER and self._home(piece) is Tier.SSD):
                    self.free(piece, where)

    def _home(self, piece: Piece) -> Tier:
        """Where a parameter or state rests."""
        return home_tier(self.plan, piece.owner, piece.role)
