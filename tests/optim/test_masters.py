"""Split masters lose nothing: claims about `optim.masters`."""

from __future__ import annotations

import pytest
import torch

from overspill.optim import merge_master, split_master


def master_of(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def assert_round_trip_is_exact(master: torch.Tensor) -> None:
    high, remainder = split_master(master)
    assert torch.equal(merge_master(high, remainder).view(torch.int32), master.view(torch.int32))


def test_every_high_half_round_trips_with_structured_low_halves():
    high = torch.arange(-(2**15), 2**15, dtype=torch.int64) << 16
    for low in (0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x5555, 0xAAAA):
        assert_round_trip_is_exact(master_of(high | low))


def test_random_patterns_round_trip():
    generator = torch.Generator().manual_seed(1)
    assert_round_trip_is_exact(master_of(torch.randint(-(2**31), 2**31, (2**22,), generator=generator)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_patterns_round_trip():
    for start in range(-(2**31), 2**31, 2**24):
        assert_round_trip_is_exact(master_of(torch.arange(start, start + 2**24)))


def test_every_pair_of_halves_merges_to_the_sum_modulo_two_to_the_32():
    high = torch.arange(-(2**15), 2**15, dtype=torch.int64)
    for low in (-(2**15), -1, 0, 1, 2**15 - 1):
        merged = merge_master(high.to(torch.int16).view(torch.bfloat16), torch.full_like(high, low).to(torch.int16)).view(torch.int32)
        expected = ((high << 16) + low) & 0xFFFFFFFF
        assert torch.equal(merged.to(torch.int64) & 0xFFFFFFFF, expected)


def test_parameter_is_the_nearest_bf16_with_ties_away_from_zero():
    master = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    high, _ = split_master(master)
    is_tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~is_tie], master.to(torch.bfloat16)[~is_tie])
    ties = torch.tensor([0x3F808000, 0x3F818000]).to(torch.int32).view(torch.float32)
    assert split_master(ties)[0].view(torch.int16).tolist() == [0x3F81, 0x3F82]
    assert split_master(-ties)[0].float().tolist() == (-split_master(ties)[0].float()).tolist()


def test_largest_fp32_has_an_infinite_parameter_but_a_finite_master():
    largest = torch.tensor([torch.finfo(torch.float32).max])
    high, remainder = split_master(largest)
    assert high.isinf().all() and merge_master(high, remainder).isfinite().all()


def test_quiet_nan_keeps_a_nan_parameter():
    high, _ = split_master(torch.tensor([float("nan")]))
    assert high.isnan().all()


def test_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32, got torch.float64"):
        split_master(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="one shape"):
        merge_master(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16))
