"""A look at gradients before they are consumed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from overspill.runtime.gradients import Gradients
from overspill.runtime.visit import TORCH_DTYPES, tensor_views
from overspill.spec.schedule import Compress, Role


@pytest.fixture
def seen_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, torch.Tensor]]:
    """Every finished gradient of the current step, by tensor name."""
    seen: dict[str, torch.Tensor] = {}
    compress = Gradients.compress

    def watched(self: Gradients, op: Compress) -> None:
        compress(self, op)
        bundle = self.plan.bundles[op.bundle]
        region = self.residency.region(bundle.name, Role.GRADIENT)
        seen.update({name: view.clone() for name, view in tensor_views(bundle, region, TORCH_DTYPES[bundle.dtype]).items()})

    monkeypatch.setattr(Gradients, "compress", watched)
    yield seen
