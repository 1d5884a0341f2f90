"""What an `Update` op does: the optimizer's arithmetic on one chunk, in place, tensor by tensor (weight decay differs)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overspill.optim import update
from overspill.runtime.visit import TORCH_DTYPES
from overspill.spec.plan import Plan
from overspill.spec.schedule import Role, Update
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.update_rule import AdamW, AdamWScalars


class UpdateContext:
    """The scalars with which the updates of one optimizer step run, whenever they run."""

    def __init__(self, optimizer: AdamW, *, step: int, lr: float, gradient_scale: float) -> None:
        self.step = step
        self._scalars = {
            decay: optimizer.scalars(step=step, lr=lr, weight_decay=None if decay else 0.0, gradient_scale=gradient_scale)
            for decay in (True, False)
        }

    def scalars(self, *, decay: bool) -> AdamWScalars:
        return self._scalars[decay]


class Updater:
    """Executes `Update` ops."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, op: Update, context: UpdateContext, copies: Mapping[Role, torch.Tensor]) -> None:
        """Update one chunk.

        Args:
            copies: parameter, gradient and state record of the chunk, uint8, where the update runs; parameter and state are
                overwritten.
        """
        bundle = self.plan.bundles[op.bundle]
        chunk = bundle.chunks[op.chunk]
        dtype = TORCH_DTYPES[bundle.dtype]

        state_format = resolve_state_format(self.plan.state_format, bundle.dtype)
        parameter, gradient = copies[Role.PARAMETER].view(dtype), copies[Role.GRADIENT].view(dtype)
        record = copies[Role.STATE]
        ranges = state_format.field_ranges(chunk.num_elements)
        fields = {field.name: record[slice(*ranges[field.name])].view(TORCH_DTYPES[field.dtype]) for field in state_format.fields}
        for segment in bundle.segments(chunk):
            part = slice(segment.start - chunk.start, segment.end - chunk.start)
            update(
                context.scalars(decay=segment.tensor.decay),
                parameter=parameter[part],
                gradient=gradient[part],
                states={name: field[part] for name, field in fields.items()},
            )
