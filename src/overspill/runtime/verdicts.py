"""May this gradient be applied? What an update is told about the step before it changes anything.

A verdict is a few numbers that are finite or not: each loss of the step, and the sum of squares of each tensor's gradient, which is
finite exactly when the gradient is. They are copied to the host in the compute lane's order, before the gradient's own copy starts, so
an update on the host that has its gradient has its verdict, and nobody waits for the device to get one. An update on the device is given
the same numbers there (`gates`) and does nothing unless all are finite; the host looks at their copies when the step is over.

Where updates wait for the next step (clip, loss scaling) the question is asked once, of the whole step's norm: `judge_norm`.

Cost: where there is CUDA, one copy a bundle and one small kernel and a copy a step for the losses, into pinned memory that is reused in
every step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from overspill.errors import NonFiniteError
from overspill.runtime.compute import StepContext, describe_loss
from overspill.spec.plan import Plan
from overspill.spec.update_rule import LossScale, clip_coefficient, gradient_scale


class VerdictMemory:
    """Where the verdicts of a step land on the host; one for a session, as a step has landed before the next one finishes a gradient.

    A place is written again in the next step by the same stream, and read only behind that copy's event.
    """

    def __init__(self, plan: Plan) -> None:
        self._lengths = {name: len(bundle.slots) for name, bundle in plan.bundles.items()}
        self._sums: dict[str, torch.Tensor] = {}
        self._losses: torch.Tensor | None = None

    def of_bundle(self, bundle: str) -> torch.Tensor:
        """Place for the sums of squares of a bundle; float64, pinned."""
        if not self._sums:
            whole = torch.empty(sum(self._lengths.values()), dtype=torch.float64, pin_memory=True)
            self._sums = dict(zip(self._lengths, whole.split(list(self._lengths.values())), strict=True))
        return self._sums[bundle]

    def of_losses(self, number: int) -> torch.Tensor:
        """Place for all losses of a step; float64, pinned."""
        if self._losses is None or self._losses.numel() < number:
            self._losses = torch.empty(number, dtype=torch.float64, pin_memory=True)
        return self._losses[:number]


class Verdicts:
    """The verdicts of one step with immediate updates."""

    def __init__(self, plan: Plan, context: StepContext, memory: VerdictMemory) -> None:
        self.plan, self.context = plan, context
        self._memory = memory
        self._sums: dict[str, torch.Tensor] = {}
        """Bundle -> float64 [tensors], on the CPU."""
        self._landed: dict[str, torch.cuda.Event] = {}
        """Bundle -> behind the copies of its sums and of the losses known by then."""
        self._num_losses: dict[str, int] = {}
        """Bundle -> how many of `_started` it has to look at."""
        self._started: list[tuple[int, torch.Tensor]] = []
        """Each loss whose copy has been started, in that order: micro-batch, and the number where it lands."""
        self._values: list[torch.Tensor] = []
        """The losses of `_started` where they were computed, float64."""
        self._sums_there: dict[str, torch.Tensor] = {}
        self._passed: set[str] = set()
        """Bundles that `check` has found good; their other chunks need no second look."""

    def start(self, bundle: str, sums_of_squares: torch.Tensor, losses: Sequence[torch.Tensor | None]) -> None:
        """On the compute lane: start copying what decides on a bundle whose gradient is complete.

        Args:
            sums_of_squares: float64 [tensors of the bundle].
            losses: one a micro-batch, scalars; None where it is not known yet. One that was given once stays what it is.
        """
        self._start_losses(losses, sums_of_squares.device)
        self._sums_there[bundle] = sums_of_squares
        if sums_of_squares.device.type == "cuda":
            target = self._memory.of_bundle(bundle)
            target.copy_(sums_of_squares, non_blocking=True)
            sums_of_squares = target
            self._landed[bundle] = torch.cuda.Event()
            self._landed[bundle].record()
        self._sums[bundle], self._num_losses[bundle] = sums_of_squares, len(self._started)

    def _start_losses(self, losses: Sequence[torch.Tensor | None], device: torch.device) -> None:
        """Those that have become known: nearly always all at once, when the tail's bundle is the first."""
        started = {index for index, _ in self._started}
        new = {index: loss for index, loss in enumerate(losses) if loss is not None and index not in started}
        if not new:
            return
        values = torch.stack([loss.detach().reshape(()).to(device) for loss in new.values()]).double()
        self._values.append(values)
        if device.type == "cuda":
            target = self._memory.of_losses(len(losses))[len(started) : len(started) + len(new)]
            target.copy_(values, non_blocking=True)
            values = target
        self._started.extend(zip(new, values.unbind(), strict=True))

    def gates(self, bundle: str) -> torch.Tensor | None:
        """On the compute lane: what must be finite for the bundle to be updated, float64 [losses and tensors], where it was computed."""
        if bundle not in self._sums_there:
            return None
        return torch.cat([self._sums_there[bundle], *self._values])

    def check(self, bundle: str, updated: Sequence[str]) -> None:
        """On a lane that updates on the host, when the gradient is there: the verdict then is on the host, too.

        Args:
            updated: bundles that this step has updated already, for the message.

        Raises:
            NonFiniteError: a loss or this bundle's gradient is not finite; nothing of the bundle was changed.
        """
        refusal = self.find_refusal(bundle, updated)
        if refusal is not None:
            raise refusal

    def find_refusal(self, bundle: str, updated: Sequence[str]) -> NonFiniteError | None:
        """What `check` raises; waits for the verdict if it has not landed yet."""
        if bundle not in self._sums or bundle in self._passed:
            return None
        if bundle in self._landed:
            self._landed[bundle].synchronize()
        for index, loss in self._started[: self._num_losses[bundle]]:
            if not math.isfinite(loss.item()):
                return describe_loss(loss, index, self.context.step)
        sums = dict(zip(self._names(bundle), self._sums[bundle].tolist(), strict=True))
        name = next((name for name, value in sums.items() if not math.isfinite(value)), None)
        if name is None:
            self._passed.add(bundle)
            return None
        return NonFiniteError(
            f"gradient of {name} is not finite in step {self.context.step}; already updated in this step: "
            f"{', '.join(dict.fromkeys(updated)) or 'none'}. "
            "Set --clip (updates then wait until all gradients are known finite), or lower --lr"
        )

    def _names(self, bundle: str) -> list[str]:
        return [slot.tensor.name for slot in self.plan.bundles[bundle].slots]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormVerdict:
    """What becomes of a step's gradients, which wait for the next step."""

    factor: float | None
    """What they are multiplied with when they are applied; None: they are dropped."""
    loss_scale: LossScale | None
    """Of the next step."""
    refusal: NonFiniteError | None = None
    """They are dropped, and there is no better loss scale to go on with."""


def judge_norm(norm: float, step: int, *, clip: float | None, loss_scale: LossScale | None) -> NormVerdict:
    """Decide on all of a step's gradients.

    Args:
        norm: their global norm, unscaled.
        loss_scale: with which they were made; None: without one.
    """
    scale = loss_scale.value if loss_scale is not None else 1.0
    following = loss_scale.after_step(not math.isfinite(norm)) if loss_scale is not None else None
    if math.isfinite(norm):
        coefficient = clip_coefficient(norm, clip) if clip is not None else 1.0
        return NormVerdict(factor=gradient_scale(loss_scale=scale, clip=coefficient), loss_scale=following)
    refusal = None
    if following is None:
        refusal = NonFiniteError(
            f"the gradient norm of step {step} is {norm}; no weight was changed by this step; lower --lr or add --warmup-steps"
        )
    elif scale <= following.minimum:
        refusal = NonFiniteError(
            f"gradients of step {step} are not finite even at the smallest loss scale, {scale}; no weight was changed by this step; "
            "lower --lr, or compute in --dtype bfloat16 or float32"
        )
    return NormVerdict(factor=None, loss_scale=following, refusal=refusal)
