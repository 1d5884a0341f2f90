"""The norm is defined by values and positions alone: claims about `optim.gradient_checks` and `all_finite`."""

from __future__ import annotations

import math

import pytest
import torch

from overspill.optim import all_finite, count_non_finite, global_norm, gradient_checks, sum_of_squares

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 1000])
def test_sum_of_squares_is_the_float64_sum(dtype, length):
    values = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    exact = math.fsum(value * value for value in values.tolist())
    assert sum_of_squares(values).item() == pytest.approx(exact, rel=1e-14)


def test_sum_of_squares_is_the_halving_tree_of_its_definition(monkeypatch):
    monkeypatch.setattr(gradient_checks, "SLICE_ELEMENTS", 8)
    values = torch.randn(21, generator=torch.Generator().manual_seed(0))

    def tree(numbers: list[float]) -> float:
        size = 1
        while size < len(numbers):
            size *= 2
        numbers = numbers + [0.0] * (size - len(numbers))
        while len(numbers) > 1:
            numbers = [a + b for a, b in zip(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], strict=True)]
        return numbers[0]

    squares = [value * value for value in values.double().tolist()]
    assert sum_of_squares(values).item() == tree([tree(squares[:8]), tree(squares[8:16]), tree(squares[16:])])


def test_sum_of_squares_leaves_its_argument_alone_and_takes_any_shape():
    values = torch.arange(12.0).reshape(3, 4).t()
    before = values.clone()
    assert sum_of_squares(values).item() == sum(i * i for i in range(12))
    assert torch.equal(values, before)
    assert sum_of_squares(torch.zeros(0)).item() == 0


def test_sum_of_squares_of_the_largest_values_is_finite_and_of_infinities_is_not():
    assert math.isfinite(sum_of_squares(torch.full((100,), torch.finfo(torch.float32).max)).item())
    assert not math.isfinite(global_norm([1.0, sum_of_squares(torch.tensor([1.0, math.inf]))]))
    assert not math.isfinite(global_norm([sum_of_squares(torch.tensor([math.nan]))]))


def test_global_norm_does_not_depend_on_the_order_of_tensors():
    sums = [1e16, 1.0, 3e-8, 1.0, 2.5e15, 1e-3]
    assert len({global_norm(sums), global_norm(sums[::-1]), global_norm(sorted(sums))}) == 1
    assert global_norm([]) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_found_wherever_it_is(dtype, bad):
    for length in (1, 17, 33000, 70001):
        values = torch.full((length,), torch.finfo(dtype).max, dtype=dtype)
        assert all_finite(values) and gradient_checks.all_finite_reference(values) and count_non_finite(values) == 0
        for position in (0, length // 2, length - 1):
            values[position] = bad
            assert not all_finite(values)
            assert not gradient_checks.all_finite_reference(values)
            assert count_non_finite(values) == 1
            values[position] = 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_finite_is_right_for_every_16_bit_pattern(dtype):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    expected = torch.isfinite(patterns)
    finite = patterns[expected]
    assert all_finite(finite) and all_finite(finite[1:]) and all_finite(finite.repeat(3)[5:-3])
    for value in patterns[~expected].view(torch.int16).unique().view(dtype)[::7]:
        padded = torch.cat([finite[:37], value.view(1), finite[37:74]])
        assert not all_finite(padded) and not all_finite(padded[37:38])


def test_all_finite_is_right_for_every_fp32_exponent_and_payload():
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.randint(0, 2**23, (256, 20), generator=generator)
    mantissa[:, 0], mantissa[:, 1], mantissa[:, 2] = 0, 1, 2**23 - 1  # zero and denormals, infinities, signalling and quiet NaNs
    for sign in (0, 1):
        bits = (torch.arange(256).view(-1, 1) << 23) + mantissa - sign * 2**31
        values = bits.to(torch.int32).view(torch.float32)
        assert all_finite(values[:255])
        for value in values[255]:
            assert not all_finite(value.view(1)) and not all_finite(torch.cat([values[7], value.view(1), values[9]])[3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_lengths_and_misaligned_tails_are_seen_and_nothing_beyond_is(dtype):
    whole = torch.zeros(2100, dtype=dtype)
    for start, length in ((1, 1), (3, 31), (1, 33), (7, 1003), (2, 2097)):
        whole[:start], whole[start : start + length], whole[start + length :] = math.nan, 1.0, math.inf
        part = whole[start : start + length]
        assert all_finite(part, num_threads=1) and all_finite(part)
        for position in {0, length // 2, length - 1}:
            part[position] = math.inf
            assert not all_finite(part)
            part[position] = 1.0


def test_all_finite_looks_through_views_that_are_not_contiguous():
    values = torch.ones(64, 3)
    values[5, 1] = math.nan
    assert all_finite(values[:, 0]) and all_finite(values.t()[2]) and not all_finite(values[:, 1]) and not all_finite(values.t())


def test_all_finite_is_public():
    import overspill

    assert overspill.all_finite is all_finite


def test_an_empty_tensor_is_finite():
    assert all_finite(torch.zeros(0))
