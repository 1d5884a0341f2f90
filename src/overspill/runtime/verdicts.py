"""May this gradient be applied? What an update on the host is told about the step before it changes anything.

A verdict is a few flags that the device computes when a bundle's gradient is complete: is each loss of the step finite, is each
tensor's gradient. They are copied to the host in the compute lane's order, before the gradient's own copy starts, so an update
that has its gradient has its verdict, and nobody waits for the device to get one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from overspill.errors import NonFiniteError
from overspill.runtime.compute import StepContext, describe_loss
from overspill.spec.plan import Plan


class Verdicts:
    """The verdicts of one step with immediate updates."""

    def __init__(self, plan: Plan, context: StepContext) -> None:
        self.plan, self.context = plan, context
        self._flags: dict[str, torch.Tensor] = {}
        """Bundle -> bool [losses + tensors of the bundle], on the CPU (pinned where there is CUDA)."""
        self._num_losses: dict[str, int] = {}
        self._losses: Sequence[torch.Tensor | None] = ()

    def start(self, bundle: str, sums_of_squares: Mapping[str, torch.Tensor], losses: Sequence[torch.Tensor | None]) -> None:
        """On the compute lane: the flags of a bundle whose gradient is complete."""
        known = [loss.double().reshape(()) for loss in losses if loss is not None]
        sums = [sums_of_squares[slot.tensor.name] for slot in self.plan.bundles[bundle].slots]
        flags = torch.isfinite(torch.stack([*(loss.to(sums[0].device) for loss in known), *sums]))
        if flags.device.type == "cuda":
            target = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            target.copy_(flags, non_blocking=True)
            flags = target
        self._flags[bundle], self._num_losses[bundle], self._losses = flags, len(known), losses

    def check(self, bundle: str, updated: Sequence[str]) -> None:
        """On the lane that updates, when the gradient is there.

        Args:
            updated: bundles that this step has updated already, for the message.

        Raises:
            NonFiniteError: a loss or this bundle's gradient is not finite; nothing of the bundle was changed.
        """
        flags = self._flags.get(bundle)
        if flags is None or bool(flags.all()):
            return
        num_losses = self._num_losses[bundle]
        for index in range(num_losses):
            if not bool(flags[index]):
                raise describe_loss(self._losses[index], index, self.context.step)
        names = [slot.tensor.name for slot in self.plan.bundles[bundle].slots]
        name = next(name for name, flag in zip(names, flags[num_losses:].tolist(), strict=True) if not flag)
        raise NonFiniteError(
            f"gradient of {name} is not finite in step {self.context.step}; already updated in this step: "
            f"{', '.join(dict.fromkeys(updated)) or 'none'}. "
            "Set --clip (updates then wait until all gradients are known finite), or lower --lr"
        )
