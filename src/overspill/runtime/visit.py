"""A visit: one unit's parameters, as views of fetched regions, swapped into its modules for many micro-batches.

Swapping costs microseconds per tensor, so it is done once a visit and not once a micro-batch. The views are leaves: what the
backward differentiates by. They alias a region that the next unit's fetch may overwrite, so nothing that autograd saved
during a visit may outlive it: a graph is built and consumed inside one op (`Compute`), or it is kept with its leaves alone
(`runtime/retained`), which let go of their memory when the visit ends.
"""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType
from typing import Self

import torch

from overspill.activations.retaining import shed
from overspill.huggingface import StreamedModel
from overspill.runtime.residency import Residency
from overspill.spec.plan import Plan
from overspill.spec.schedule import Role
from overspill.spec.tensors import Bundle

TORCH_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int16", "int8", "uint8", "int32")}


def tensor_views(bundle: Bundle, region: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of a bundle as a view, in its own shape, of `region` (uint8, all elements in `dtype`)."""
    elements = region.view(dtype)
    return {slot.tensor.name: elements[slot.offset : slot.end].view(slot.tensor.shape) for slot in bundle.slots}


class Visit:
    """Binds a unit's parameters while it is open."""

    def __init__(self, plan: Plan, model: StreamedModel, residency: Residency, unit: str) -> None:
        self.unit = unit
        self.parameters: dict[str, torch.Tensor] = {}
        """Name -> leaf view on the device; trainable ones require grad."""
        self.bundle_of: dict[str, str] = {}
        self.bundles = next(item.bundles for item in plan.units if item.name == unit)
        """Names of the bundles it reads."""
        for name in self.bundles:
            bundle = plan.bundles[name]
            for tensor, view in tensor_views(bundle, residency.region(name, Role.PARAMETER), TORCH_DTYPES[bundle.dtype]).items():
                self.parameters[tensor] = view.detach().requires_grad_(bundle.trainable)
                self.bundle_of[tensor] = name
        self.outlives = False
        """Whether a graph that is kept has these parameters as leaves."""
        self._stack = contextlib.ExitStack()
        self._model = model

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where its parameters are, in order."""
        return tuple(tensor.data_ptr() for tensor in self.parameters.values())

    @functools.cached_property
    def trainable(self) -> list[str]:
        """Names that a backward differentiates by, in order."""
        return [name for name, tensor in self.parameters.items() if tensor.requires_grad]

    def __enter__(self) -> Self:
        self._stack.enter_context(self._model.bound(self.unit, self.parameters))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        for tensor in self.parameters.values() if self.outlives else ():
            shed(tensor)
        self.parameters = {}
