"""How much leaves follows from bytes, times and rates: pure functions, on paper."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overspill.activations.amounts import (
    Adaptive,
    Everything,
    Nothing,
    Profile,
    Room,
    SsdTrain,
    Target,
    decide_targets,
    most_without_slowdown,
)
from overspill.spec.activations import ActivationRates

MB = 1_000_000


def steady(count: int, *, size: int = MB, each_s: float = 0.001) -> Profile:
    """Equal records, one each `each_s`; backward takes twice as long."""
    forward_s = count * each_s
    packed = tuple((index + 1) * each_s for index in range(count))
    return Profile(
        device_bytes=(size,) * count,
        stored_bytes=(size,) * count,
        packed_s=packed,
        needed_s=tuple(forward_s + 2 * (forward_s - at_s) for at_s in packed),
        forward_s=forward_s,
    )


def room(**changes: object) -> Room:
    values = {"host_bytes": 10**12, "ssd_bytes": 0, "staging_bytes": 0, "window_bytes": 4 * MB, "keep_bytes": None}
    return Room(**{**values, **changes})  # type: ignore[arg-type]


def rates(gb_per_s: float, **more: float) -> ActivationRates:
    return ActivationRates(d2h_bytes_per_s=gb_per_s * 1e9, h2d_bytes_per_s=gb_per_s * 1e9, **more)


@pytest.mark.parametrize("gb_per_s", [0.1, 0.25, 0.5, 0.8])
def test_the_share_that_leaves_comes_near_the_bound_and_never_exceeds_it(gb_per_s: float) -> None:
    """1 MB a millisecond is 1 GB/s: a link of half of that takes half."""
    profile = steady(200)
    leaves = Adaptive().leaves(profile, rates(gb_per_s), room())
    bound = most_without_slowdown(device_bytes=200 * MB, forward_s=profile.forward_s, d2h_bytes_per_s=gb_per_s * 1e9)
    assert bound == gb_per_s
    assert bound - 0.04 <= sum(leaves) / 200 <= bound


def test_what_leaves_is_spread_over_forward_and_the_last_records_stay() -> None:
    leaves = Adaptive().leaves(steady(100), rates(0.5), room(window_bytes=2 * MB))
    assert not any(leaves[-2:])
    for start in range(0, 90, 10):
        assert 4 <= sum(leaves[start : start + 10]) <= 7, "half of each tenth, for the window holds no more"
    backlog = Adaptive().leaves(steady(100), rates(0.5), room(window_bytes=100 * MB))
    assert all(backlog[:40]), "with a window for all, the first are taken one after the other"


def test_a_fast_link_takes_all_but_what_is_wanted_at_once() -> None:
    leaves = Adaptive().leaves(steady(50), rates(20.0), room())
    assert all(leaves[:49]) and not leaves[49]


def test_a_slow_way_back_takes_less() -> None:
    profile = steady(100)
    slow = ActivationRates(d2h_bytes_per_s=0.8e9, h2d_bytes_per_s=0.2e9)
    few = sum(Adaptive().leaves(profile, slow, room()))
    assert few < sum(Adaptive().leaves(profile, rates(0.8), room()))
    assert few * MB / 0.2e9 <= 2 * profile.forward_s


def test_nothing_measured_means_everything_leaves() -> None:
    assert all(Adaptive().leaves(steady(10), ActivationRates(), room()))
    assert all(SsdTrain().leaves(steady(10), ActivationRates(), room()))
    assert all(Everything().leaves(steady(10), rates(1), room())) and not any(Nothing().leaves(steady(10), rates(1), room()))


def test_ssdtrains_rule_cuts_where_volume_over_window_exceeds_the_write_rate() -> None:
    """At record n: (n + 2) MB within 3F − 2(n + 1) ms, and F = 100 ms."""
    leaves = SsdTrain().leaves(steady(100), rates(50, ssd_write_bytes_per_s=0.5e9), room(ssd_bytes=10**12, staging_bytes=64 * MB))
    cut = next(n for n in range(100) if (n + 2) / (300 - 2 * (n + 1)) > 0.5)
    assert leaves == [n < cut for n in range(100)] and 0 < cut < 100
    without_ssd = SsdTrain().leaves(steady(100), rates(0.5), room())
    assert without_ssd == leaves, "the link's rate is the write rate where there is no SSD"


def test_the_earliest_go_to_the_ssd_when_host_memory_has_no_room_for_all() -> None:
    there = room(host_bytes=60 * MB, ssd_bytes=10**9, staging_bytes=16 * MB)
    targets = decide_targets(Everything(), steady(100), rates(50, ssd_write_bytes_per_s=5e9), there)
    assert targets == (Target.SSD,) * 40 + (Target.HOST,) * 60


def test_a_slow_drive_gets_what_it_can_write_and_the_rest_stays() -> None:
    there = room(host_bytes=20 * MB, ssd_bytes=10**9, staging_bytes=2 * MB)
    targets = decide_targets(Everything(), steady(100), rates(50, ssd_write_bytes_per_s=0.25e9), there)
    assert targets.count(Target.HOST) == 20 and 18 <= targets.count(Target.SSD) <= 30
    assert targets.count(Target.KEEP) == 100 - targets.count(Target.HOST) - targets.count(Target.SSD)


def test_what_must_leave_does_whatever_it_costs() -> None:
    there = room(keep_bytes=30 * MB)
    targets = decide_targets(Adaptive(), steady(100), rates(0.1), there)
    assert targets.count(Target.KEEP) == 30
    assert decide_targets(Nothing(), steady(100), rates(0.1), there).count(Target.KEEP) == 30
    assert decide_targets(Adaptive(), steady(100), rates(0.1), room()).count(Target.KEEP) >= 90


def test_the_bound_has_the_design_pages_figures() -> None:
    """GPT layers: 34 bytes a token and hidden unit, 24·h² FLOPs a token, at 500 TFLOPS over 55 GB/s."""
    shares = [
        most_without_slowdown(device_bytes=34 * h, forward_s=24 * h * h / 500e12, d2h_bytes_per_s=55e9) for h in (2048, 8192, 12288, 65536)
    ]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert most_without_slowdown(device_bytes=0, forward_s=1, d2h_bytes_per_s=1) == 1.0


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_decision_keeps_the_budgets_and_the_times(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    sizes = tuple(data.draw(st.lists(st.integers(1, 8 * MB), min_size=count, max_size=count)))
    gaps = data.draw(st.lists(st.floats(0, 0.01), min_size=count, max_size=count))
    packed, at_s = [], 0.0
    for gap in gaps:
        at_s += gap
        packed.append(at_s)
    forward_s = at_s + data.draw(st.floats(0, 0.01))
    needed = [forward_s + 2 * (forward_s - at_s) if data.draw(st.booleans()) else math.inf for at_s in packed]
    profile = Profile(device_bytes=sizes, stored_bytes=sizes, packed_s=tuple(packed), needed_s=tuple(needed), forward_s=forward_s)
    link = ActivationRates(
        d2h_bytes_per_s=data.draw(st.floats(1e6, 1e11)), h2d_bytes_per_s=data.draw(st.none() | st.floats(1e6, 1e11)),
        ssd_write_bytes_per_s=data.draw(st.none() | st.floats(1e6, 1e10)),
    )  # fmt: skip
    there = room(
        host_bytes=data.draw(st.integers(0, 100 * MB)), ssd_bytes=data.draw(st.sampled_from([0, 50 * MB])), staging_bytes=16 * MB,
        window_bytes=data.draw(st.integers(1, 50 * MB)), keep_bytes=data.draw(st.none() | st.integers(0, 100 * MB)),
    )  # fmt: skip
    for amount in (Adaptive(), SsdTrain(), Everything(), Nothing()):
        targets = decide_targets(amount, profile, link, there)
        assert len(targets) == count
        assert sum(size for size, target in zip(sizes, targets, strict=True) if target is Target.HOST) <= there.host_bytes
        assert sum(size for size, target in zip(sizes, targets, strict=True) if target is Target.SSD) <= there.ssd_bytes + max(sizes)
    assert link.d2h_bytes_per_s is not None
    moved = sum(size for size, leaves in zip(sizes, Adaptive().leaves(profile, link, there), strict=True) if leaves)
    assert moved <= link.d2h_bytes_per_s * forward_s * 1.000001
