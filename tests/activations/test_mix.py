"""What is recomputed for a throughput: on paper, beside a paced link, and to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paced_link import SHAPES, PacedNet, charge_rebuilds
from small_nets import assert_nothing_left, assert_same_gradients, build, offload, run_step, settings_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from overspill.activations import windows
from overspill.activations.amounts import Adaptive, Room, Target
from overspill.activations.flight import Call, Profile
from overspill.activations.mix import THRIFT, Mix, choose_mix, latest, rebuild_all, spread, what_is_left
from overspill.activations.timeline import _own_times
from overspill.activations.windows import decide
from overspill.errors import UnsupportedModelError
from overspill.spec.activations import ActivationRates
from overspill.units import GIB, MIB

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "activations"))

from bounds import Mix as Optimum  # noqa: E402
from bounds import Terms, best_mix  # noqa: E402
from nets import recompute  # noqa: E402

MB = 1_000_000
BLOCK_S, STORED, CHEAP, COSTLY = 0.010, 20 * MB, 10 * MB, 11 * MB


def blocks(count: int, *, calls: bool = True, again: frozenset[int] = frozenset()) -> Profile:
    """Blocks that store 20 MB, and may rebuild 10 MB in 0.1 ms and 11 MB in 0.5 ms; or all of it in 10 ms. Backward takes twice forward."""
    sizes = [STORED, CHEAP, COSTLY]
    packed = [number * BLOCK_S + share * BLOCK_S for number in range(count) for share in (0.1, 0.5, 0.9)]
    forward_s = count * BLOCK_S
    unseen = [place for number in again for place in range(3 * number, 3 * number + 3)]
    device = tuple(MB if place in unseen and place % 3 == 0 else 0 if place in unseen else sizes[place % 3] for place in range(3 * count))
    return Profile(
        device_bytes=device, stored_bytes=device, packed_s=tuple(packed), forward_s=forward_s,
        needed_s=tuple(forward_s + 2 * (forward_s - at_s) for at_s in packed),
        moved_bytes=tuple(0 if place in unseen else (0, 2, 9)[place % 3] for place in range(3 * count)),
        rebuild_s=tuple(math.inf if place in unseen else (math.inf, 0.0001, 0.0005)[place % 3] for place in range(3 * count)),
        calls=tuple(
            Call(first=3 * number, stop=3 * number + 3, input_bytes=(MB,), again_s=BLOCK_S, is_again=number in again)
            for number in range(count if calls else 0)
        ),
    )  # fmt: skip


def all_stays(profile: Profile) -> int:
    return sum(profile.device_bytes)


def nothing_stays(profile: Profile) -> int:
    return 0


def lost_s(profile: Profile, mix: Mix) -> float:
    rebuilt = sum(seconds for seconds, is_rebuilt in zip(profile.rebuild_s, mix.rebuilt, strict=True) if is_rebuilt)
    return rebuilt + sum(call.again_s for call, is_again in zip(profile.calls, mix.again, strict=True) if is_again)


# -- on paper ----------------------------------------------------------------------------------------------------------


def test_what_gives_most_bytes_a_second_is_rebuilt_first_and_a_share_of_what_comes_next() -> None:
    profile = blocks(10, calls=False)
    allowed_s = THRIFT * (1 / 0.99 - 1) * profile.step_s
    mix = choose_mix(profile, 0.99, all_stays)
    rebuilt = [place for place, is_rebuilt in enumerate(mix.rebuilt) if is_rebuilt]
    assert [place for place in rebuilt if place % 3 == 1] == list(range(1, 30, 3)), "all of the cheapest"
    others = [place // 3 for place in rebuilt if place % 3 == 2]
    assert others == spread(int((allowed_s - 0.001) / 0.0005), 10) and 0 < len(others) < 10, "as many of the next as there is time for"
    assert lost_s(profile, mix) <= allowed_s


def test_modules_are_run_again_with_the_time_that_cheap_things_leave_over() -> None:
    profile = blocks(10)
    few, many = (choose_mix(profile, throughput, all_stays) for throughput in (0.97, 0.85))
    assert sum(few.again) == 0 and all(few.rebuilt[1::3]) and 0 < sum(many.again) < 10
    inside = [any(many.rebuilt[3 * number : 3 * number + 3]) for number in range(10)]
    assert not any(is_inside and is_again for is_inside, is_again in zip(inside, many.again, strict=True)), "nothing is recomputed twice"
    assert not many.again[-1] and all_stays(what_is_left(profile, many)) < all_stays(what_is_left(profile, few))
    assert all(choose_mix(profile, 0.2, all_stays).again), "the last one too, with all others"


def test_nothing_is_recomputed_for_nothing() -> None:
    profile = blocks(8)
    for mix in (choose_mix(profile, 0.9, nothing_stays), choose_mix(profile, 1.0, all_stays)):
        assert not any(mix.rebuilt) and not any(mix.again)


def test_what_is_run_again_was_chosen_once_and_its_measured_time_is_taken_from_the_rest() -> None:
    profile = blocks(10, again=frozenset({2, 5}))
    mix = choose_mix(profile, 0.95, all_stays)
    assert [number for number, is_again in enumerate(mix.again) if is_again] == [2, 5]
    assert not any(mix.rebuilt), "those two take more than there is"
    assert any(choose_mix(profile, 0.9, all_stays).rebuilt) and rebuild_all(profile).again == mix.again
    assert what_is_left(profile, mix).device_bytes == profile.device_bytes


def test_backward_comes_later_by_what_it_recomputes_before() -> None:
    profile = blocks(2)
    mix = Mix(rebuilt=(False, True, False, False, False, True), again=(True, False))
    rest = what_is_left(profile, dataclasses.replace(mix, rebuilt=(False,) * 5 + (True,)))
    assert rest.device_bytes == (MB, 0, 0, STORED, CHEAP, 0) == rest.stored_bytes
    assert rest.needed_s[4] == pytest.approx(profile.needed_s[4] + 0.0005) and rest.needed_s[5] == profile.needed_s[5]
    first = profile.needed_s[2]
    assert rest.needed_s[0] == pytest.approx(first + 0.0005), "the input of what is run again is wanted where that begins"


def test_a_kind_costs_its_mean_and_what_was_never_rebuilt_is_not() -> None:
    profile = blocks(4, calls=False)
    seconds = tuple(math.inf if place % 3 == 2 or place == 4 else profile.rebuild_s[place] * place for place in range(12))
    mix = choose_mix(dataclasses.replace(profile, rebuild_s=seconds), 0.9, all_stays)
    assert [place for place, is_rebuilt in enumerate(mix.rebuilt) if is_rebuilt] == [1, 4, 7, 10]
    assert sum(rebuild_all(profile).rebuilt) == 8 and not any(rebuild_all(dataclasses.replace(profile, moved_bytes=())).rebuilt)


def test_a_few_of_many_are_spread_or_the_latest_and_never_the_last_but_with_all() -> None:
    for total in range(1, 20):
        for pick in (spread, latest):
            assert pick(0, total) == [] and pick(total, total) == list(range(total))
            for count in range(1, total):
                found = pick(count, total)
                assert len(set(found)) == count and found == sorted(found) and total - 1 not in found


def test_pauses_inside_of_others_count_once() -> None:
    outer, own_s = _own_times([(5.0, 6.0, "c"), (1.0, 4.0, "a"), (2.0, 2.5, "b"), (3.0, 3.5, "b"), (5.0, 5.5, "d")])
    assert outer == [(1.0, 4.0), (5.0, 6.0)] and own_s == {"a": 2.0, "b": 1.0, "c": 0.5, "d": 0.5}
    assert _own_times([]) == ([], {})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_choice_takes_more_time_than_is_allowed_and_more_time_leaves_no_more(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    profile = blocks(count, calls=data.draw(st.booleans()))
    drawn = st.sampled_from([0.0001, 0.0003, 0.001])
    rebuild_s = tuple(data.draw(drawn) if moved else math.inf for moved in profile.moved_bytes)
    calls = tuple(dataclasses.replace(call, again_s=data.draw(st.floats(0.001, 0.02))) for call in profile.calls)
    profile = dataclasses.replace(profile, rebuild_s=rebuild_s, calls=calls)
    rates = ActivationRates(d2h_bytes_per_s=data.draw(st.floats(1e7, 1e10)))
    room = Room(host_bytes=10**12, ssd_bytes=0, staging_bytes=0, window_bytes=40 * MB, keep_bytes=None)
    for throughput in (0.99, 0.95, 0.8):
        found = decide(Adaptive(), profile, rates, room, may_choose=True, throughput=throughput)
        assert (
            sum(call.again_s for call, is_again in zip(calls, found.mix.again, strict=True) if is_again)
            <= (1 / throughput - 1) * profile.step_s
        )
        assert all((target is Target.REBUILD) == is_rebuilt for target, is_rebuilt in zip(found.targets, found.mix.rebuilt, strict=True))
        rest = what_is_left(profile, found.mix)
        assert all(later >= at_s for later, at_s in zip(rest.needed_s, profile.needed_s, strict=True) if later < math.inf) or any(
            found.mix.again
        )
        assert all_stays(rest) <= all_stays(profile)


# -- beside a paced link -----------------------------------------------------------------------------------------------


def paced_optimum(net: PacedNet, throughput: float, step: Callable[..., tuple[float, Any]]) -> tuple[Optimum, float]:
    """The linear program of the benchmark, with terms that are measured as it does, and A."""
    keep_s, _ = net.step()
    begun_s = net.link.now_s
    net.net(net.inputs)
    forward_s = net.link.now_s - begun_s
    undo = recompute(net.net, range(len(net.net.blocks)))  # type: ignore[arg-type]
    full_s, _ = net.step()
    undo()
    cheap_s, cheap = step(amount="nothing", recompute="cheap")
    everything = cheap.packed_bytes + cheap.rebuilt_bytes
    terms = Terms(
        all_bytes=everything, inputs_bytes=len(net.net.blocks) * net.small.tokens() * net.small.hidden * 2,  # type: ignore[arg-type]
        cheap_bytes=cheap.rebuilt_bytes, forward_s=forward_s, step_s=keep_s, full_s=full_s - keep_s, cheap_s=cheap_s - keep_s,
        d2h_bytes_per_s=net.bytes_per_s, h2d_bytes_per_s=net.bytes_per_s,
    )  # fmt: skip
    return best_mix(terms, throughput_fraction=throughput), everything


@pytest.mark.parametrize(
    ("name", "throughput", "patterns"),
    [
        ("llama-1.10B-16384", 0.97, ["model.layers.*"]),
        ("llama-1.10B-16384", 0.90, ["model.layers.*.self_attn", "model.layers.*.mlp"]),
        ("llama-1.10B-2048", 0.90, ["model.layers.*"]),
        ("t5-8192x4", 0.97, ["blocks.*.attention", "blocks.*.cross"]),
        ("t5-8192x4", 0.95, ["blocks.*.attention", "blocks.*.cross"]),
        ("gpt-8192x4", 0.90, []),
    ],
)
def test_a_throughput_is_kept_and_nine_tenths_of_the_optimum_are_gone(
    name: str, throughput: float, patterns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the clock of an H100 that is assumed; `docs/log.md` has all shapes."""
    net = PacedNet(SHAPES[name])
    monkeypatch.setattr("overspill.activations.opened.open_link", net.open_link)
    for constant, num_bytes in (("LEAST_WINDOW_BYTES", 128 * MIB), ("MOST_WINDOW_BYTES", GIB)):
        monkeypatch.setattr(windows, constant, int(num_bytes / net.scale))
    charge_rebuilds(net, monkeypatch)
    keep_s, expected = net.step()

    def step(*, num_rounds: int = 3, **more: Any) -> tuple[float, Any]:
        given = {"amount": "adaptive", "host_budget": "1GiB", "min_bytes": int(MIB / net.scale), "window": None, **more}
        with offload(net.net, **given) as active:
            for _ in range(num_rounds):
                seconds, found = net.step()
                assert all(map(torch.equal, found, expected))
        report = active.report()
        if "throughput" in more:
            look = report.looks[-1]
            lost_s = look.waited_s + look.rebuilt_s + look.again_s
            assert look.rebuilt_s > 0 and lost_s == pytest.approx(seconds - keep_s, rel=0.1, abs=0.003 * keep_s), "where the time went"
        return seconds, report.rounds[-1]

    optimum, everything = paced_optimum(net, throughput, step)
    seconds, last = step(num_rounds=7, recompute=["cheap", *patterns], throughput=throughput)
    assert keep_s / seconds >= throughput
    assert 1 - last.kept_bytes / everything >= 0.9 * optimum.gone_fraction
    is_cheap_enough = (name, throughput) in (("llama-1.10B-16384", 0.97), ("t5-8192x4", 0.97), ("gpt-8192x4", 0.90))
    assert last.is_planned and (last.num_run_again == 0) == is_cheap_enough


def test_what_every_layer_wants_does_not_bring_the_first_records_back_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama's rotary tables are packed first. Before, 1.3 % of the step were waits."""
    net = PacedNet(SHAPES["llama-1.10B-16384"])
    monkeypatch.setattr("overspill.activations.opened.open_link", net.open_link)
    monkeypatch.setattr(windows, "LEAST_WINDOW_BYTES", int(128 * MIB / net.scale))
    keep_s, _ = net.step()
    with offload(net.net, amount="adaptive", host_budget="1GiB", min_bytes=int(MIB / net.scale), window=None):
        for _ in range(7):
            seconds, _ = net.step()
    assert keep_s / seconds >= 0.999


# -- to the bit --------------------------------------------------------------------------------------------------------

PARTS = {
    "gpt2": ["transformer.h.*.mlp", "transformer.h.*.attn"],
    "llama": ["model.layers.*"],
    "bert": ["*.layer.*.attention"],
    "t5": ["*.DenseReluDense"],
}


@pytest.mark.parametrize("throughput", [0.2, 0.9])
@pytest.mark.parametrize("tier", ["host", "ssd"])
@pytest.mark.parametrize("name", PARTS)
def test_whatever_is_chosen_gradients_are_those_of_plain_pytorch_bitwise(name: str, tier: str, throughput: float, tmp_path: Path) -> None:
    model, step = build(name)
    model.config.use_cache = False
    expected = [run_step(model, step, seed=seed) for seed in range(7)]
    given = {**settings_of(tier, tmp_path), "amount": "adaptive"}
    with offload(model, recompute=["cheap", *PARTS[name]], throughput=throughput, **given) as active:
        for seed in range(7):
            loss, gradients = run_step(model, step, seed=seed)
            assert loss == expected[seed][0]
            assert_same_gradients(gradients, expected[seed][1])
    assert active.report().rounds[-1].is_planned
    assert_nothing_left(active)


@pytest.fixture
def everything_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever may be recomputed is, whatever it takes."""

    def choose(profile: Profile, *given: Any) -> Mix:
        return dataclasses.replace(rebuild_all(profile), again=(True,) * len(profile.calls))

    monkeypatch.setattr(windows, "choose_mix", choose)
    yield


class Stack(nn.Module):
    """Three blocks, the middle one inside of somebody else's checkpoint if asked."""

    def __init__(self, *, is_nested: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16)) for _ in range(3))
        self.is_nested = is_nested

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            is_nested = self.is_nested and number == 1
            hidden = hidden + (checkpoint(block, hidden, use_reentrant=False) if is_nested else block(hidden))
        return hidden.square().sum()


@pytest.mark.parametrize("is_nested", [False, True])
def test_modules_are_run_again_after_the_measured_round_but_not_inside_of_others_hooks(is_nested: bool, everything_again: None) -> None:
    torch.manual_seed(0)
    model, inputs = Stack(is_nested=is_nested), torch.randn(8, 16)
    expected = [run_step(model, lambda: model(inputs), seed=seed) for seed in range(6)]
    with offload(model, amount="adaptive", recompute=["cheap", "blocks.*"], throughput=0.9) as active:
        for seed in range(6):
            loss, gradients = run_step(model, lambda: model(inputs), seed=seed)
            assert loss == expected[seed][0]
            assert_same_gradients(gradients, expected[seed][1])
        report = active.report()
    again = [item.num_run_again for item in report.rounds]
    assert again[:2] == [0, 0] and again[-1] == (2 if is_nested else 3) and report.num_segment_rebuilds == sum(again)
    assert report.rounds[-1].packed_bytes < report.rounds[1].packed_bytes
    assert_nothing_left(active)


class Counting(nn.Linear):
    """Changes a buffer whenever it runs."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return super().forward(hidden)


def test_a_module_that_could_not_be_run_again_is_refused_at_its_first_call() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Counting())
    with (
        offload(model, amount="adaptive", recompute=["1"], throughput=0.9),
        pytest.raises(UnsupportedModelError, match="changes the buffer 'num_calls'"),
    ):
        model(torch.ones(4, 16))


def test_micro_batches_in_flight_kept_graphs_and_exceptions_go_with_a_throughput(everything_again: None) -> None:
    torch.manual_seed(0)
    model, inputs = Stack(), torch.randn(8, 16)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(inputs * scale) for scale in (1.0, 2.0, 3.0)]
        losses[0].backward(retain_graph=True)
        for loss in losses:
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = step()
    with offload(model, amount="adaptive", recompute=["cheap", "blocks.*"], throughput=0.9) as active:
        for number in range(7):
            if number == 4:
                with contextlib.suppress(RuntimeError):
                    model(torch.randn(8, 15))
            assert all(map(torch.equal, step(), expected))
        assert active.report().rounds[-1].num_run_again == 9
    assert_nothing_left(active)
