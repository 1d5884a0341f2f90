"""Adding up a unit's gradient contributions and turning them into the gradient that leaves the device.

Rules:

1. The first contribution of a tensor is copied, later ones are added, in the order of micro-batches: plain accumulation.
2. With more than one contribution the sum is fp32 and is cast once, in `compress`.
3. A tied weight's contributions are added up apart for the tail and for the embedding, then once (tail + embedding).
4. A tensor that no micro-batch used has a zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from overspill.optim import sums_of_squares
from overspill.runtime.residency import Residency, Work
from overspill.runtime.visit import TORCH_DTYPES, tensor_views
from overspill.spec.plan import Plan
from overspill.spec.schedule import Compress, Role
from overspill.spec.tensors import Tier


class Gradients:
    """The gradients of one step.

    Args:
        wait: lets the compute lane wait for work that still uses a buffer.
    """

    def __init__(self, plan: Plan, residency: Residency, wait: Callable[[Work], None]) -> None:
        self.plan, self.residency = plan, residency
        self._wait = wait
        self._begun: set[tuple[str, str]] = set()
        self.num_added = 0
        """Contributions so far; an op that has added any cannot be run again."""
        self._views: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        """(bundle, reader) -> tensor -> its view of the partial gradient's region."""
        self._views_of: dict[tuple[str, str], torch.Tensor] = {}
        """The regions that the views are of."""
        self.sums_of_squares: dict[str, torch.Tensor] = {}
        """Bundle -> float64 [its tensors], of finished gradients."""
        self._landed: list[float] = []

    def add(self, bundle: str, reader: str, name: str, gradient: torch.Tensor) -> None:
        """Add one contribution of unit `reader` to tensor `name` (rules 1, 2)."""
        target = self._partial_view(bundle, reader, name)
        self.num_added += 1
        if (name, reader) in self._begun:
            target.add_(gradient)
        else:
            self._begun.add((name, reader))
            target.copy_(gradient)

    def land_sums(self) -> list[float]:
        """`sums_of_squares` on the host, one a tensor, when all gradients are finished. The first time it waits for compute."""
        if not self._landed and self.sums_of_squares:
            self._landed = torch.cat(list(self.sums_of_squares.values())).tolist()
        return self._landed

    def targets(self, reader: str, bundle_of: Mapping[str, str], names: Sequence[str]) -> dict[str, tuple[torch.Tensor, bool]]:
        """Tensor -> its partial gradient, and whether that has a contribution already; for who adds by himself (rule 1) and says so by
        `note`."""
        return {name: (self._partial_view(bundle_of[name], reader, name), (name, reader) in self._begun) for name in names}

    def note(self, reader: str, names: Sequence[str]) -> None:
        """A contribution of `reader` to each of the named `targets` was added."""
        self.num_added += len(names)
        self._begun.update((name, reader) for name in names)

    def _partial_view(self, bundle: str, reader: str, name: str) -> torch.Tensor:
        region = self.residency.region(bundle, Role.PARTIAL_GRADIENT, reader)
        if self._views_of.get((bundle, reader)) is not region:
            self._views_of[bundle, reader] = region
            typed = self._typed(bundle, region)
            slots = self.plan.bundles[bundle].slots
            self._views[bundle, reader] = {slot.tensor.name: typed[slot.offset : slot.end].view(slot.tensor.shape) for slot in slots}
        return self._views[bundle, reader][name]

    def _typed(self, bundle: str, region: torch.Tensor) -> torch.Tensor:
        """A partial region's elements: fp32, or the bundle's dtype if that is what its size says."""
        layout = self.plan.bundles[bundle]
        dtype = TORCH_DTYPES[layout.dtype]
        return region.view(dtype if region.numel() == layout.parameter_bytes else torch.float32)

    def compress(self, op: Compress) -> None:
        """Partial gradients -> gradient (rules 2, 3), and each tensor's sum of squares."""
        layout = self.plan.bundles[op.bundle]
        for key in [key for key in self._views if key[0] == op.bundle]:
            del self._views[key], self._views_of[key]
        readers = list(dict.fromkeys(piece.reader for piece, _ in op.partials))
        if op.is_in_place:
            pairs = [(partial, gradient) for (partial, _), (gradient, _) in zip(op.partials, op.produced, strict=True)]
            self.residency.turn_into_gradient(op.bundle, readers[0], pairs)
        else:
            total = self._typed(op.bundle, self.residency.region(op.bundle, Role.PARTIAL_GRADIENT, readers[0]))
            for reader in readers[1:]:
                total.add_(self._typed(op.bundle, self.residency.region(op.bundle, Role.PARTIAL_GRADIENT, reader)))
            for piece, size in op.produced:
                self._wait(self.residency.create(piece, Tier.DEVICE, size))
            self.residency.region(op.bundle, Role.GRADIENT).view(TORCH_DTYPES[layout.dtype]).copy_(total)
            reading = self.residency.device_work()  # the sum may not have been read yet when another lane gets its slot
            for piece, _ in op.partials:
                self.residency.drop(piece, Tier.DEVICE, reading)
        gradient = self.residency.region(op.bundle, Role.GRADIENT)
        self.sums_of_squares[op.bundle] = sums_of_squares(list(tensor_views(layout, gradient, TORCH_DTYPES[layout.dtype]).values()))
