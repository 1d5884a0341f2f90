"""The update rules: AdamW, SGD and Lion as lists of singly rounded fp32 operations, and what their scalars are made of.

With the master weights p, the gradient g as the backward gave it, the moments m and v (state fields as `spec.state_formats`
names them), and the scalars of the step, one step of one element begins, for every optimizer, with

     1. g      = fp32(g)                                widening; exact
     2. g      = g * gradient_scale                     exact when the scale is 1

**AdamW** (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019), m = `exp_avg`, v = `exp_avg_sq`:

     3. q      = p * decay                             10. v      = a + b
     4. d      = g - m                                 11. denom  = sqrt(v)
     5. d      = d * one_minus_beta1                   12. denom  = denom * bias_correction2_factor
     6. m      = m + d                                 13. denom  = denom + eps
     7. a      = v * beta2                             14. u      = step_size * m
     8. b      = g * one_minus_beta2                   15. u      = u / denom
     9. b      = b * g                                 16. p      = q - u

**SGD** (torch.optim.SGD, dampening 0; weight decay is coupled: it goes through the momentum), m = `momentum_buffer`:

     3. a      = p * weight_decay
     4. g      = g + a
     5. b      = m * momentum          with momentum only
     6. m      = b + g                 with momentum only; without Nesterov, g = m from here on
     7. c      = m * momentum          with Nesterov only
     8. g      = g + c                 with Nesterov only
     9. u      = step_size * g
    10. p      = p - u

**Lion** (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023), m = `exp_avg`:

     3. a      = m * beta1                              7. q      = p * decay
     4. b      = g * one_minus_beta1                    8. p      = q - u
     5. c      = a + b                                  9. a      = m * beta2
     6. u      = step_size if c > 0,                   10. b      = g * one_minus_beta2
                 -step_size if c < 0, else c           11. m      = a + b

Last, p, m and v are stored as the state format says (`spec.state_formats`): in format `fp32` without loss, beside a
parameter that is p rounded to its dtype (bf16: nearest, ties away from zero, with the remainder kept; fp16: nearest, ties
to even).

Rules:

1. Each line is one IEEE fp32 operation, rounded once to nearest even. No fused multiply-add, no approximate division, root
   or reciprocal, denormals kept. So the plain torch form (`optim.reference`, any device) and the native core
   (`optim.native`, any instruction set, any number of threads) give the same bits.
2. Where p, m, v or the parameter becomes NaN, the one quiet NaN is stored (0x7fc00000; fp16 0x7e00): which NaN an operation
   makes is not the same on all processors, and some NaNs would turn into -0 in the high half of a split master.
3. Zero stays zero: p = g = m = v = 0 gives 0 again, in every format. Padding between tensors relies on it.
4. Scalars are computed in double from the hyperparameters and rounded once to fp32.

Against `torch.optim.AdamW` in fp32 (foreach=False, fused=False), which contracts some of these operations, divides where
line 12 multiplies, and takes its roots from a library: one step from the same state differs by at most 1 ulp of the
parameter, or, where the parameter is smaller than 8 * lr, 1 ulp of 8 * lr (tested over 1,000 steps). An Adam update is about
lr in size, so a parameter that small is made of a few updates and carries their rounding. For beta1 < 0.5 torch writes lines
4-6 the other way round, and the bound has not been tested. `torch.optim.SGD` is held to 2 ulp of the larger of the
parameter and lr * (|g| + |m|) (it contracts lines 3-4, 5-6 and 9-10).

Around the rule, in the order of a step: `LearningRate.at(step)` -> (global norm -> `clip_coefficient`) -> `gradient_scale`
-> `Optimizer.scalars` -> the update of every tensor; `LossScale.after_step` closes the step.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import struct
from typing import Literal, get_args

OptimizerKind = Literal["adamw", "sgd", "sgd_momentum", "sgd_nesterov", "lion"]
"""The rule that is applied: which operations, and which moments are kept."""


FP32_MAX = (2 - 2**-23) * 2.0**127
"""The largest finite fp32 number."""


def round_fp32(value: float) -> float:
    """The fp32 nearest to `value` (ties to even), as a float; beyond fp32's range an infinity."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateScalars:
    """The scalars of one step for one learning rate and one weight decay. Every value is exactly an fp32 number.

    Those that a rule does not name are 0 and have no effect on it.
    """

    kind: OptimizerKind
    gradient_scale: float
    """1 / loss scale times the clip coefficient; 1 without either."""
    decay: float = 0.0
    """1 - lr * weight_decay; 1 for a tensor without weight decay."""
    beta1: float = 0.0
    one_minus_beta1: float = 0.0
    beta2: float = 0.0
    one_minus_beta2: float = 0.0
    step_size: float
    """AdamW: lr / (1 - beta1**step); else lr."""
    bias_correction2_factor: float = 0.0
    """1 / sqrt(1 - beta2**step)."""
    eps: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Hyperparameters of AdamW; the defaults are torch's, but the learning rate has none."""

    lr: float
    """Base learning rate, when no schedule gives another."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled, times the learning rate. Has no effect on tensors whose spec says decay=False."""
    name: str = dataclasses.field(default="adamw", init=False)

    def __post_init__(self) -> None:
        _validate_common(self)
        _validate_betas(self.betas)
        _validate_number("eps", self.eps)
        if not round_fp32(self.eps) > 0:
            raise ValueError(f"eps must be positive in fp32 (rule 3: padding divides by it), got {self.eps}")
        if math.isinf(round_fp32(self.lr / (1 - self.betas[0]))):
            raise ValueError(
                f"lr must be at most {FP32_MAX * (1 - self.betas[0]):.3g} with beta1 = {self.betas[0]}, since the first step divides it by "
                f"1 - beta1 in fp32, got {self.lr}; lower it"
            )

    @property
    def kind(self) -> OptimizerKind:
        return "adamw"

    def scalars(
        self, *, step: int, lr: float | None = None, weight_decay: float | None = None, gradient_scale: float = 1.0
    ) -> UpdateScalars:
        """The scalars of optimizer step `step` (counted from 1).

        Args:
            lr: this step's learning rate; None takes `self.lr`.
            weight_decay: this tensor's weight decay (0 for norms and biases); None takes `self.weight_decay`.
            gradient_scale: what every gradient is multiplied with first, see `gradient_scale()`.

        Raises:
            ValueError: step < 1, or a value that is negative or not finite.
        """
        lr, weight_decay = _validate_step(self, step, lr, weight_decay, gradient_scale)
        beta1, beta2 = self.betas
        return UpdateScalars(
            kind=self.kind,
            gradient_scale=round_fp32(gradient_scale),
            decay=round_fp32(1 - lr * weight_decay),
            one_minus_beta1=round_fp32(1 - beta1),
            beta2=round_fp32(beta2),
            one_minus_beta2=round_fp32(1 - beta2),
            step_size=round_fp32(lr / (1 - beta1**step)),
            bias_correction2_factor=round_fp32(1 / math.sqrt(1 - beta2**step)),
            eps=round_fp32(self.eps),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD:
    """Hyperparameters of SGD, as torch's; with momentum 0 it keeps no state beside the master weights."""

    lr: float
    """Base learning rate, when no schedule gives another."""
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    """Coupled: added to the gradient. Has no effect on tensors whose spec says decay=False."""
    name: str = dataclasses.field(default="sgd", init=False)

    def __post_init__(self) -> None:
        _validate_common(self)
        _validate_number("momentum", self.momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum, which is 0; set momentum (0.9 is usual) or leave nesterov out")

    @property
    def kind(self) -> OptimizerKind:
        if self.momentum == 0:
            return "sgd"
        return "sgd_nesterov" if self.nesterov else "sgd_momentum"

    def scalars(
        self, *, step: int, lr: float | None = None, weight_decay: float | None = None, gradient_scale: float = 1.0
    ) -> UpdateScalars:
        """The scalars of optimizer step `step`; as `AdamW.scalars`."""
        lr, weight_decay = _validate_step(self, step, lr, weight_decay, gradient_scale)
        return UpdateScalars(
            kind=self.kind,
            gradient_scale=round_fp32(gradient_scale),
            step_size=round_fp32(lr),
            momentum=round_fp32(self.momentum),
            weight_decay=round_fp32(weight_decay),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion:
    """Hyperparameters of Lion; the betas are its paper's. A third to a tenth of AdamW's learning rate is usual."""

    lr: float
    """Base learning rate, when no schedule gives another: every step moves a weight by this much."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of the direction, and of the moment that is kept."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate. Has no effect on tensors whose spec says decay=False."""
    name: str = dataclasses.field(default="lion", init=False)

    def __post_init__(self) -> None:
        _validate_common(self)
        _validate_betas(self.betas)

    @property
    def kind(self) -> OptimizerKind:
        return "lion"

    def scalars(
        self, *, step: int, lr: float | None = None, weight_decay: float | None = None, gradient_scale: float = 1.0
    ) -> UpdateScalars:
        """The scalars of optimizer step `step`; as `AdamW.scalars`."""
        lr, weight_decay = _validate_step(self, step, lr, weight_decay, gradient_scale)
        beta1, beta2 = self.betas
        return UpdateScalars(
            kind=self.kind,
            gradient_scale=round_fp32(gradient_scale),
            decay=round_fp32(1 - lr * weight_decay),
            beta1=round_fp32(beta1),
            one_minus_beta1=round_fp32(1 - beta1),
            beta2=round_fp32(beta2),
            one_minus_beta2=round_fp32(1 - beta2),
            step_size=round_fp32(lr),
        )


Optimizer = AdamW | SGD | Lion
"""What a session trains with."""


def _validate_common(optimizer: Optimizer) -> None:
    _validate_number("lr", optimizer.lr)
    _validate_number("weight_decay", optimizer.weight_decay)
    if math.isinf(round_fp32(optimizer.lr * optimizer.weight_decay)):
        raise ValueError(
            f"lr * weight_decay must be at most {FP32_MAX:.3g}, the largest fp32 number, got {optimizer.lr} * {optimizer.weight_decay}; "
            "lower them"
        )


def _validate_number(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number of at least 0 that fp32 can hold (rule 4)."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= round_fp32(float(value)) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, and at most {FP32_MAX:.3g}, the largest fp32 number, got {value}")


def _validate_betas(betas: tuple[float, float]) -> None:
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, beta1 and beta2, got {len(betas)}: {betas}")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not isinstance(beta, numbers.Real):
            raise ValueError(f"{name} must be a number, got {beta!r}")
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {beta}")
        if round_fp32(1 - beta) == 0:
            raise ValueError(f"{name} = {beta} leaves 1 - {name} = 0 in fp32, so the state would never change; lower it")


def _validate_step(
    optimizer: Optimizer, step: int, lr: float | None, weight_decay: float | None, gradient_scale: float
) -> tuple[float, float]:
    """This step's learning rate and weight decay, checked."""
    lr = optimizer.lr if lr is None else lr
    weight_decay = optimizer.weight_decay if weight_decay is None else weight_decay
    if step < 1:
        raise ValueError(f"optimizer steps are counted from 1, got step {step}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("gradient_scale", gradient_scale)):
        _validate_number(f"{name} of step {step}", value)
    return lr, weight_decay


LearningRateKind = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A learning-rate schedule over steps 1 .. total_steps, computed in double.

    Rules: it rises linearly over the warm-up (step s of W has s / W of the base, so step W has all of it and no step has
    zero), then falls from the base towards `final_fraction` of it, which step total_steps + 1 would reach: the last step
    still learns. Later steps keep that final value. Without warm-up it equals transformers' linear and cosine schedules.
    """

    kind: LearningRateKind
    base: float
    """The peak."""
    warmup_steps: int = 0
    total_steps: int
    """Optimizer steps of the run, warm-up included. No effect on kind `constant`."""
    final_fraction: float = 0.0
    """Of the base, in 0-1. No effect on kind `constant`."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(LearningRateKind):
            raise ValueError(f"learning-rate schedule {self.kind!r} is unknown; choose one of {', '.join(get_args(LearningRateKind))}")
        _validate_number("the base learning rate", self.base)
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"warmup_steps must be between 0 and total_steps = {self.total_steps}, got {self.warmup_steps}; shorten it")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be between 0 and 1, got {self.final_fraction}")

    def at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 1."""
        if step < 1:
            raise ValueError(f"optimizer steps are counted from 1, got step {step}")
        if step <= self.warmup_steps:
            return self.base * step / self.warmup_steps
        if self.kind == "constant":
            return self.base
        peak_step = max(self.warmup_steps, 1)
        progress = min(1.0, (step - peak_step) / (self.total_steps - peak_step + 1))
        remaining = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.base * (self.final_fraction + (1 - self.final_fraction) * remaining)


def clip_coefficient(norm: float, clip: float) -> float:
    """What gradients of global L2 norm `norm` are multiplied with so that the norm is at most about `clip`.

    min(1, clip / (norm + 1e-6)) in double, rounded once to fp32; the 1e-6 is `torch.nn.utils.clip_grad_norm_`'s.

    Args:
        norm: of the whole step's gradients, after unscaling.
        clip: the bound; positive, infinity never clips.

    Raises:
        ValueError: the norm is not finite or negative (check the gradients first), or the bound is not positive.
    """
    if not clip > 0:
        raise ValueError(f"the gradient-norm bound must be positive, got {clip}; leave it out to switch clipping off")
    if not (math.isfinite(norm) and norm >= 0):
        raise ValueError(f"a gradient norm of {norm} cannot be clipped; gradients must be known finite before")
    return round_fp32(min(1.0, clip / (norm + 1e-6)))


def gradient_scale(*, loss_scale: float = 1.0, clip: float = 1.0) -> float:
    """Unscaling and clipping as the one factor that the rule multiplies gradients with: fp32(clip coefficient / loss scale)."""
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"the loss scale must be finite and positive, got {loss_scale}")
    return round_fp32(clip / loss_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling for fp16 gradients: what the loss is multiplied with before the backward.

    Doubled after `growth_interval` good steps in a row, halved after a step with a non-finite gradient (which updates
    nothing). Powers of two throughout, so scaling and unscaling are exact. The numbers are those of torch's GradScaler;
    `maximum` is ours (chosen, not tuned), so that a run of zero gradients cannot grow the scale out of fp32.
    """

    value: float = 65536.0
    num_good_steps: int = 0
    """Since the last change of the value."""
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    minimum: float = 1.0
    maximum: float = 2.0**32

    def __post_init__(self) -> None:
        if not (0 < self.minimum <= self.value <= self.maximum < math.inf):
            raise ValueError(f"a loss scale of {self.value} is not between its minimum {self.minimum} and maximum {self.maximum}")
        if self.growth_interval < 1 or self.growth_factor < 1 or not 0 < self.backoff_factor < 1:
            raise ValueError(
                f"loss scaling needs growth_interval >= 1, growth_factor >= 1 and 0 < backoff_factor < 1, "
                f"got {self.growth_interval}, {self.growth_factor}, {self.backoff_factor}"
            )
        for name, value in (("value", self.value), ("growth_factor", self.growth_factor), ("backoff_factor", self.backoff_factor)):
            if math.frexp(value)[0] != 0.5:
                raise ValueError(f"loss scaling's {name} must be a power of two so that unscaling is exact, got {value}")

    def after_step(self, found_non_finite: bool) -> LossScale:
        """The loss scale of the next step; with `found_non_finite` this step's update must be skipped."""
        if found_non_finite:
            return dataclasses.replace(self, value=max(self.value * self.backoff_factor, self.minimum), num_good_steps=0)
        if self.num_good_steps + 1 < self.growth_interval:
            return dataclasses.replace(self, num_good_steps=self.num_good_steps + 1)
        return dataclasses.replace(self, value=min(self.value * self.growth_factor, self.maximum), num_good_steps=0)
