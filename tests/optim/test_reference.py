"""The plain update is AdamW: claims about `optim.reference`, judged by torch.optim.AdamW and by numpy."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from overspill.optim import reference, update_reference
from overspill.spec.update_rule import AdamW, round_fp32

HALVES = [torch.bfloat16, torch.float16, torch.float32]


def torch_adamw(parameter: torch.Tensor, rule: AdamW) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    theirs = torch.nn.Parameter(parameter.clone())
    return theirs, torch.optim.AdamW(
        [theirs], lr=rule.lr, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay, foreach=False, fused=False
    )


def ulps(ours: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor, smallest: float) -> float:
    """The largest difference in units of the last place of the largest of the values before and after, and `smallest`."""
    size = torch.maximum(torch.maximum(ours.abs(), theirs.abs()), before.abs()).clamp(min=smallest)
    one_ulp = torch.nextafter(size, torch.full_like(size, math.inf)) - size
    return ((ours - theirs).abs().double() / one_ulp.double()).max().item()


@pytest.mark.parametrize(
    "rule", [AdamW(lr=1e-3), AdamW(lr=2e-5, betas=(0.9, 0.95), weight_decay=0.1), AdamW(lr=1e-2, eps=1e-6, weight_decay=0)]
)
def test_each_of_1000_steps_is_within_one_ulp_of_torch_from_the_same_state(build_segment, rule):
    segment = build_segment(torch.float32, torch.float32, 1000)
    for state in segment.states.values():
        state.zero_()
    theirs, optimizer = torch_adamw(segment.parameter, rule)
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 1001):
        gradient = torch.randn(1000, generator=generator) * 10.0 ** (-(step % 7))
        before = segment.parameter.clone()
        theirs.grad = gradient.clone()
        optimizer.step()
        update_reference(rule.scalars(step=step), parameter=segment.parameter, gradient=gradient, states=segment.states)
        assert ulps(segment.parameter, theirs.detach(), before, 8 * rule.lr) <= 1
        for name, state in segment.states.items():  # resynchronise
            torch.testing.assert_close(state, optimizer.state[theirs][name], rtol=1e-6, atol=1e-7)
            state.copy_(optimizer.state[theirs][name])
        segment.parameter.copy_(theirs.detach())


def test_five_free_running_steps_stay_within_1e_6_of_torch(build_segment):
    rule = AdamW(lr=1e-3)
    segment = build_segment(torch.float32, torch.float32, 5000)
    for state in segment.states.values():
        state.zero_()
    theirs, optimizer = torch_adamw(segment.parameter, rule)
    for step in range(1, 6):
        gradient = torch.randn(5000, generator=torch.Generator().manual_seed(step))
        theirs.grad = gradient.clone()
        optimizer.step()
        update_reference(rule.scalars(step=step), parameter=segment.parameter, gradient=gradient, states=segment.states)
    assert ((segment.parameter - theirs).norm() / theirs.norm()).item() < 1e-6


def test_reference_follows_the_rule_line_by_line(build_segment):
    def fp32(value: float) -> float:
        return struct.unpack("<f", struct.pack("<f", value))[0]

    rule = AdamW(lr=3e-4, weight_decay=0.1)
    s = rule.scalars(step=4, gradient_scale=round_fp32(0.37))
    segment = build_segment(torch.float32, torch.float32, 300)
    before = segment.clone()
    update_reference(s, **segment.arguments)
    for i in range(300):
        p, g, m, v = (t[i].item() for t in (before.parameter, before.gradient, before.states["exp_avg"], before.states["exp_avg_sq"]))
        g, p = fp32(g * s.gradient_scale), fp32(p * s.decay)
        m = fp32(m + fp32(fp32(g - m) * s.one_minus_beta1))
        v = fp32(fp32(v * s.beta2) + fp32(fp32(g * s.one_minus_beta2) * g))
        denom = fp32(fp32(fp32(math.sqrt(v)) * s.bias_correction2_factor) + s.eps)
        p = fp32(p - fp32(fp32(s.step_size * m) / denom))
        assert (segment.parameter[i].item(), segment.states["exp_avg"][i].item(), segment.states["exp_avg_sq"][i].item()) == (p, m, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_follow_the_fp32_trajectory(build_segment, dtype):
    rule = AdamW(lr=1e-3)
    half = build_segment(dtype, torch.float32, 500)
    full = build_segment(torch.float32, torch.float32, 500)
    for step in range(1, 6):
        scalars = rule.scalars(step=step)
        gradient = torch.randn(500, generator=torch.Generator().manual_seed(step))
        for segment in (half, full):
            update_reference(scalars, parameter=segment.parameter, gradient=gradient, states=segment.states)
        assert torch.equal(half.master, full.parameter)
    assert torch.equal(half.states["exp_avg_sq"], full.states["exp_avg_sq"])
    torch.testing.assert_close(half.parameter.float(), full.parameter, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("parameter_dtype", HALVES)
@pytest.mark.parametrize("gradient_dtype", HALVES)
def test_zero_stays_zero(build_segment, parameter_dtype, gradient_dtype):
    segment = build_segment(parameter_dtype, gradient_dtype, 64)
    for tensor in (segment.parameter, segment.gradient, *segment.states.values()):
        tensor.zero_()
    for step in (1, 2, 10_000_000):
        update_reference(AdamW(lr=0.1, weight_decay=0.1).scalars(step=step), **segment.arguments)
    for tensor in (segment.parameter, *segment.states.values()):
        assert tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).count_nonzero() == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_is_stored_as_the_one_quiet_nan(build_segment, dtype):
    segment = build_segment(dtype, torch.float32, 4)
    segment.gradient[1] = math.inf  # inf / inf
    segment.gradient[2] = -math.nan
    update_reference(AdamW(lr=1e-3).scalars(step=1), **segment.arguments)
    assert segment.master.view(torch.int32)[1:3].tolist() == [0x7FC00000] * 2
    assert segment.parameter.isnan().tolist() == [False, True, True, False]


def test_result_does_not_depend_on_the_slice(build_segment, monkeypatch):
    whole, sliced = (build_segment(torch.bfloat16, torch.bfloat16, 1000) for _ in range(2))
    scalars = AdamW(lr=1e-3).scalars(step=3)
    update_reference(scalars, **whole.arguments)
    monkeypatch.setattr(reference, "SLICE_ELEMENTS", 77)
    update_reference(scalars, **sliced.arguments)
    whole.assert_same_bits(sliced)


@pytest.mark.gpu
@pytest.mark.parametrize("parameter_dtype", HALVES)
@pytest.mark.parametrize("gradient_dtype", HALVES)
def test_cuda_gives_the_bits_of_the_cpu(build_segment, parameter_dtype, gradient_dtype):
    segment = build_segment(parameter_dtype, gradient_dtype, 200_000, extreme=True)
    on_device = segment.to("cuda")
    for step in (1, 2, 3):
        scalars = AdamW(lr=1e-3, weight_decay=0.1).scalars(step=step, gradient_scale=round_fp32(0.7))
        update_reference(scalars, **segment.arguments)
        update_reference(scalars, **on_device.arguments)
        segment.assert_same_bits(on_device.to("cpu"))


@pytest.mark.gpu
def test_cuda_gives_the_sum_of_squares_of_the_cpu():
    from overspill.optim import sum_of_squares

    values = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))
    assert sum_of_squares(values.cuda()).item() == sum_of_squares(values).item()


def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(build_segment):
    scalars = AdamW(lr=1e-3).scalars(step=1)
    segment = build_segment(torch.bfloat16, torch.bfloat16, 8)
    before = segment.clone()
    changes = [
        ({"gradient": segment.gradient[:7]}, "gradient has 7 elements on cpu, the parameter 8"),
        ({"gradient": segment.gradient.double()}, "gradient of torch.float64 has no update"),
        ({"gradient": segment.gradient.reshape(2, 4)}, "gradient must be 1-D"),
        (
            {"states": {"exp_avg": segment.states["exp_avg"]}},
            "under adamw in format fp32 needs the states remainder, exp_avg, exp_avg_sq, got exp_avg",
        ),
        ({"states": segment.states | {"exp_avg": segment.states["exp_avg"].double()}}, "exp_avg must be float32"),
    ]
    for change, words in changes:
        with pytest.raises(ValueError, match=words):
            update_reference(scalars, **(segment.arguments | change))
    segment.assert_same_bits(before)
