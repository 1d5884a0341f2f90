"""Scalars, schedules, clipping and loss scaling: claims about `spec.update_rule`."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from overspill.spec.update_rule import SGD, AdamW, LearningRate, Lion, LossScale, clip_coefficient, gradient_scale, round_fp32


def test_every_scalar_is_an_fp32_number_rounded_once():
    scalars = AdamW(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1).scalars(step=7, gradient_scale=1 / 3)
    assert scalars.decay == float(np.float32(1 - 3e-4 * 0.1))
    assert scalars.step_size == float(np.float32(3e-4 / (1 - 0.9**7)))
    assert scalars.bias_correction2_factor == float(np.float32(1 / math.sqrt(1 - 0.95**7)))
    assert scalars.one_minus_beta1 == float(np.float32(1 - 0.9)) != float(np.float32(1) - np.float32(0.9))
    assert scalars.gradient_scale == float(np.float32(1 / 3))


def test_step_may_override_the_learning_rate_and_the_decay():
    rule = AdamW(lr=1e-3)
    assert rule.scalars(step=1, weight_decay=0.0).decay == 1.0
    assert rule.scalars(step=1, lr=2e-3) == AdamW(lr=2e-3).scalars(step=1)


def test_round_fp32_rounds_to_even_and_overflows_to_infinity():
    assert round_fp32(1 + 2**-24) == 1.0 and round_fp32(1 + 3 * 2**-24) == 1 + 2**-22
    assert round_fp32(1e39) == math.inf and round_fp32(-1e39) == -math.inf


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1e-3}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": 1e-3, "betas": (1.0, 0.999)}, "beta1 must be"),
        ({"lr": 1e-3, "betas": (0.9, -0.1)}, "beta2 must be"),
        ({"lr": 1e-3, "eps": 0.0}, "eps must be positive"),
        ({"lr": 1e-3, "eps": 1e-60}, "eps must be positive in fp32"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be"),
    ],
)
def test_wrong_hyperparameters_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdamW(**arguments)


NO_FP32 = [1e39, math.inf, -math.inf, math.nan, -1e-3, "1e-3"]


@pytest.mark.parametrize("value", NO_FP32)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(AdamW, "eps"), (SGD, "momentum"), *((kind, name) for kind in (AdamW, SGD, Lion) for name in ("lr", "weight_decay"))],
)
def test_a_hyperparameter_that_fp32_cannot_hold_is_refused_when_it_is_given(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {re.escape(repr(value) if isinstance(value, str) else str(value))}"):
        kind(**{"lr": 1e-3, name: value})
    with pytest.raises(ValueError, match="the base learning rate must be"):
        LearningRate(kind="constant", base=value, total_steps=1)


@pytest.mark.parametrize("kind", [AdamW, Lion])
@pytest.mark.parametrize("betas", [(0.9, value) for value in NO_FP32] + [(value, 0.9) for value in NO_FP32] + [(0.9,), (0.9, 0.9, 0.9)])
def test_betas_that_are_none_are_refused(kind, betas):
    with pytest.raises(ValueError, match="beta[12] must be|betas must be two numbers"):
        kind(lr=1e-3, betas=betas)


def test_what_only_the_first_step_or_the_product_makes_too_large_for_fp32_is_refused_at_once():
    with pytest.raises(ValueError, match=r"lr must be at most 3\.4e\+37 with beta1 = 0\.9.*got 1e\+38"):
        AdamW(lr=1e38)
    assert math.isfinite(AdamW(lr=3e37, weight_decay=0.0).scalars(step=1).step_size)
    for kind in (AdamW, SGD, Lion):
        with pytest.raises(ValueError, match=r"lr \* weight_decay must be at most 3\.4e\+38.*got 1e\+30 \* 1e\+30"):
            kind(lr=1e30, weight_decay=1e30)


def test_wrong_steps_and_scales_are_refused():
    with pytest.raises(ValueError, match="counted from 1, got step 0"):
        AdamW(lr=1e-3).scalars(step=0)
    with pytest.raises(ValueError, match="gradient_scale of step 1"):
        AdamW(lr=1e-3).scalars(step=1, gradient_scale=math.inf)


@pytest.mark.parametrize(("kind", "builder"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)])
def test_schedule_without_warmup_equals_transformers(kind, builder):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = builder(optimizer, num_warmup_steps=0, num_training_steps=10)
    ours = LearningRate(kind=kind, base=0.5, total_steps=10)
    for step in range(1, 11):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_base_and_no_step_has_a_zero_rate(kind):
    schedule = LearningRate(kind=kind, base=1.0, warmup_steps=4, total_steps=20)
    rates = [schedule.at(step) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(rate > 0 for rate in rates)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_final_fraction_is_what_remains_after_the_last_step():
    schedule = LearningRate(kind="cosine", base=2.0, total_steps=8, final_fraction=0.1)
    assert schedule.at(9) == schedule.at(1000) == pytest.approx(0.2)
    assert schedule.at(8) > 0.2


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="'step' is unknown; choose one of constant, linear, cosine"):
        LearningRate(kind="step", base=1.0, total_steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and total_steps = 3, got 4"):
        LearningRate(kind="linear", base=1.0, warmup_steps=4, total_steps=3)
    with pytest.raises(ValueError, match="counted from 1"):
        LearningRate(kind="linear", base=1.0, total_steps=3).at(0)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 1.5, 1e30])
def test_clipping_scales_as_torch_does(norm):
    gradient = torch.nn.Parameter(torch.zeros(1))
    gradient.grad = torch.tensor([norm])
    torch.nn.utils.clip_grad_norm_([gradient], 1.0)
    assert norm * clip_coefficient(norm, 1.0) == pytest.approx(gradient.grad.item(), rel=1e-6)


def test_clipping_refuses_a_norm_that_is_not_finite():
    for norm in (math.nan, math.inf):
        with pytest.raises(ValueError, match="cannot be clipped"):
            clip_coefficient(norm, 1.0)
    with pytest.raises(ValueError, match="must be positive"):
        clip_coefficient(1.0, 0.0)


def test_unscaling_by_the_loss_scale_is_exact():
    assert gradient_scale(loss_scale=65536.0, clip=0.75) == 0.75 / 65536
    assert gradient_scale() == 1.0


def test_loss_scale_doubles_after_its_interval_and_halves_at_once():
    scale = LossScale(growth_interval=3)
    for _ in range(2):
        scale = scale.after_step(False)
    assert (scale.value, scale.num_good_steps) == (65536, 2)
    assert scale.after_step(False) == LossScale(value=131072, growth_interval=3)
    assert scale.after_step(True) == LossScale(value=32768, growth_interval=3)


def test_loss_scale_stays_between_its_bounds():
    assert LossScale(value=1.0).after_step(True).value == 1.0
    assert LossScale(value=2.0**32, growth_interval=1).after_step(False).value == 2.0**32
    with pytest.raises(ValueError, match="power of two"):
        LossScale(value=3.0)
