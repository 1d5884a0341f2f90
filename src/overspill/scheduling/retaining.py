"""Activations in a program: what a forward stores is made, leaves the device, comes back, and is consumed (`spec.retention`).

Rules:

1. Activations that leave do so under the forwards that follow. Their memory on the device is the allocator's, which hands it on in the
   order of compute. So it is freed right before a forward that would leave more than `MOST_LEAVING` on their way, and that forward waits
   for the copy: it may be given the memory.
2. When a backward begins none is on its way any more, but for those that this backward wants next: they are there still, and what has
   left of them is dropped.
3. What has come back is nowhere else.

Without prefetching (`prefetch_units` 0: there is no room for it) no forward leaves any on their way.
"""

from __future__ import annotations

from overspill.scheduling.program import Program
from overspill.spec.plan import Plan
from overspill.spec.retention import ON_DEVICE, ActivationMode
from overspill.spec.schedule import Compute, Lane, Piece, Role
from overspill.spec.tensors import Tier

MOST_LEAVING = 2
"""Pieces on their way out at one time, the one that is made included. Chosen: one leaves while the next one is made."""


class RetainingProgram(Program):
    """A program whose forwards may store activations."""

    def __init__(self, plan: Plan, *, starts_pending: bool) -> None:
        super().__init__(plan, starts_pending=starts_pending)
        self._leaving: list[Piece] = []
        """On their way out, the oldest first."""
        self._read_by: list[int] = []
        """Ops that still read memory which the next compute may be given (rule 1)."""

    def activations(self, unit: str, micro_batch: int) -> Piece | None:
        """What the graph of `unit` stores; None: it is not kept."""
        return Piece(role=Role.ACTIVATIONS, owner=unit, index=micro_batch) if unit in self.plan.activations else None

    def emit_compute(self, op: Compute) -> None:
        """Append a compute; activations that it produces leave if their mode says so."""
        stored = next((piece for piece, _ in op.produced if piece.role is Role.ACTIVATIONS), None)
        if stored is not None:
            self.let_leave(MOST_LEAVING - 1 if self.plan.prefetch_units else 0)
        after, self._read_by = self._read_by, []
        self.emit(op, Lane.COMPUTE, after=after)
        if stored is not None and (mode := self.plan.activation_mode(stored.owner)) not in ON_DEVICE:
            self.lower([stored], Tier.DEVICE, Tier.HOST if mode is ActivationMode.HOST else Tier.SSD)
            self._leaving.append(stored)

    def let_leave(self, most: int) -> None:
        """Free activations on the device until at most `most` of them are on their way out (rules 1 and 2)."""
        while len(self._leaving) > most:
            self.free_made(self._leaving.pop(0))

    def free_made(self, piece: Piece) -> None:
        """Free the copy on the device, if there is one, of what a compute has made: the next compute may be given its memory, and waits
        for whoever reads it."""
        if (piece, Tier.DEVICE) in self.copies:
            self.free(piece, Tier.DEVICE)
            self._read_by += self.ops[-1].waits

    def bring_input(self, piece: Piece) -> None:
        """To the device, for a compute."""
        self.bring([piece], Tier.DEVICE)
        if piece.role is Role.ACTIVATIONS:
            if piece in self._leaving:
                self._leaving.remove(piece)
            self.release(piece, (Tier.HOST, Tier.SSD))
