"""Steps of a mode and of keep in turns: what drifts cancels out, and how many groups there are. The least peak on paper is measured."""

from __future__ import annotations

import random
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FOLDER = Path(__file__).parents[2] / "benchmarks" / "activations"
sys.path.append(str(FOLDER))

import alternation  # noqa: E402
import just_in_time  # noqa: E402
import least_peak  # noqa: E402
import net_shapes  # noqa: E402
import nets  # noqa: E402

PLAN = alternation.Plan(groups=3, limit_s=6.0, most_s=10.0, within=0.005)


def group(*seconds: float, is_keep: bool = False, num_first: int = 0) -> alternation.Group:
    return alternation.Group(is_keep=is_keep, num_first=num_first, steps=[{"step_s": value} for value in seconds])


def turns(keeps: list[float], owns: list[float]) -> list[alternation.Group]:
    groups = [group(keeps[0], is_keep=True)]
    for own, keep in zip(owns, keeps[1:], strict=True):
        groups += [group(own), group(keep, is_keep=True)]
    return groups


@given(speed=st.floats(0.5, 1.5), drift=st.floats(-0.02, 0.02), num=st.integers(2, 8))
def test_a_steady_drift_cancels_out(speed: float, drift: float, num: int) -> None:
    keeps = [1 + 2 * index * drift for index in range(num + 1)]
    owns = [(1 + (2 * index + 1) * drift) / speed for index in range(num)]
    found = alternation.ratios(turns(keeps, owns))
    assert len(found) == num and alternation.middle(found) == pytest.approx(speed)
    low, high = alternation.interval(found)
    assert low <= alternation.middle(found) * (1 + 1e-12) and alternation.middle(found) <= high * (1 + 1e-12)


def test_the_first_steps_of_a_group_and_one_that_is_held_up_do_not_count() -> None:
    found = group(9.0, 1.0, 1.2, 1.02, num_first=1)
    assert found.middle_s() == 1.02 and len(found.counted) == 3
    assert alternation.middle([1.0, 1.01, 0.99, 0.7]) == pytest.approx(0.995)
    assert alternation.interval([1.0, 0.99, 0.7]) == (0.7, 1.0)
    assert found.to_plain() == {"is_keep": False, "num_first": 1, "step_s": [9.0, 1.0, 1.2, 1.02]}


def test_there_are_more_groups_until_the_ratio_is_known_or_the_time_is_over() -> None:
    def num_groups(noise: float, *, seconds: float = 0.4, plan: alternation.Plan = PLAN) -> int:
        draw, groups, spent_s = random.Random(1), [group(1.0, is_keep=True)], 0.0
        while not plan.is_enough(groups, spent_s):
            groups += [group(1 + draw.uniform(-noise, noise)), group(1.0, is_keep=True)]
            spent_s += seconds
        return len(groups) // 2

    assert num_groups(0.001) == 3 and 3 < num_groups(0.012) < 15 and num_groups(0.2) == 15
    assert num_groups(0.2, seconds=2.5) == 3 and num_groups(0.2, seconds=4.0) == 2 == num_groups(0.2, seconds=20.0)


def test_an_interval_has_the_true_ratio_in_it_most_of_the_time() -> None:
    draw, num_inside = random.Random(0), 0
    for _ in range(200):
        found = alternation.ratios(turns([draw.gauss(1, 0.02) for _ in range(9)], [draw.gauss(1 / 0.97, 0.02) for _ in range(8)]))
        low, high = alternation.interval(found)
        num_inside += low <= 0.97 <= high
    assert 150 <= num_inside <= 196


def test_long_steps_come_alone_and_short_ones_in_groups() -> None:
    assert [alternation.group_size(seconds) for seconds in (0.01, 0.2, 0.4, 1.0)] == [(1, 3), (1, 2), (1, 1), (0, 1)]


class Allocations(TorchDispatchMode):
    """Most bytes at one time of storages that ops make, without those of some sizes."""

    def __init__(self, known: set[int], left_out: set[int]) -> None:
        super().__init__()
        self._known, self._left_out = known, left_out
        self._live: dict[int, int] = {}
        self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live and storage.data_ptr() not in self._known and storage.nbytes() not in self._left_out:
                    self._live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, storage._cdata, None)
        self.most_bytes = max(self.most_bytes, sum(self._live.values()))
        return result


@pytest.mark.parametrize(("kind", "layers"), [("gpt", 3), ("bert", 3), ("t5", 3), ("t5", 4)])
def test_the_least_peak_on_paper_is_that_of_a_backward_to_which_everything_comes_back_just_in_time(kind: str, layers: int) -> None:
    shape = net_shapes.NetShape(kind=kind, hidden=128, layers=layers, rows=16, length=64)
    net = nets.build_net(shape, torch.device("cpu"), torch.bfloat16)
    inputs = nets.build_inputs(shape, shape.rows, torch.device("cpu"), torch.bfloat16)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), inputs)}
    gradients = {parameter.numel() * parameter.itemsize for parameter in net.parameters() if parameter.dim() > 1}
    watch = Allocations(known, gradients)
    with just_in_time.JustInTime(net, 2048), watch:
        net(inputs).backward()
    paper = least_peak.least_peak_bytes(shape, 2)
    assert paper is not None and paper <= watch.most_bytes < 1.05 * paper
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_of_a_llama_nothing_is_known_on_paper_and_its_backward_runs_just_in_time() -> None:
    shape = net_shapes.TINY["llama-tiny-32"]
    assert least_peak.least_peak_bytes(shape, 2) is None
    net = nets.build_net(shape, torch.device("cpu"), torch.float32)
    with just_in_time.JustInTime(net, 1024):
        net(nets.build_inputs(shape, shape.rows, torch.device("cpu"), torch.float32)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
