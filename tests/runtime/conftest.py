"""A look at gradients before they are consumed, and a trace of each model that sessions predict from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from overspill.runtime import predictions
from overspill.runtime.gradients import Gradients
from overspill.runtime.visit import TORCH_DTYPES, tensor_views
from overspill.spec.schedule import Compress, Role
from overspill.spec.workload import WorkloadSpec


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


@pytest.fixture(autouse=True, scope="session")
def traced_once() -> Iterator[None]:
    """What the same configuration costs at the same sizes is traced for the first session that predicts from it, and not for each: a third
    of a second, and `tests/workload` holds traces to what runs."""
    describe, known = predictions.describe_workload, dict[tuple[object, ...], WorkloadSpec]()

    def described(config: PreTrainedConfig, **sizes: Any) -> WorkloadSpec:
        key = (type(config), config.to_json_string(use_diff=False), *sorted(sizes.items()))
        if key not in known:
            known[key] = describe(config, **sizes)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "describe_workload", described)
        yield
