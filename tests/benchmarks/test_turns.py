"""Steps of a mode and of keep in turns: what drifts cancels out, and how many there are. The least peak on paper is measured."""

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

import just_in_time  # noqa: E402
import least_peak  # noqa: E402
import net_shapes  # noqa: E402
import nets  # noqa: E402
import turns  # noqa: E402

PLAN = turns.Plan(turns=6, limit_s=6.0, most_s=10.0, within=0.005)


def in_turns(keeps: list[float], owns: list[float]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"is_keep": True, "step_s": keeps[0]}]
    for own, keep in zip(owns, keeps[1:], strict=True):
        found += [{"is_keep": False, "step_s": own}, {"is_keep": True, "step_s": keep}]
    return found


@given(speed=st.floats(0.5, 1.5), drift=st.floats(-0.02, 0.02), num=st.integers(2, 8))
def test_a_steady_drift_cancels_out(speed: float, drift: float, num: int) -> None:
    keeps = [1 + 2 * index * drift for index in range(num + 1)]
    owns = [(1 + (2 * index + 1) * drift) / speed for index in range(num)]
    found = turns.ratios(in_turns(keeps, owns))
    assert len(found) == num and turns.middle(found) == pytest.approx(speed)
    low, high = turns.interval(found)
    assert low <= turns.middle(found) * (1 + 1e-12) and turns.middle(found) <= high * (1 + 1e-12)


def test_steps_that_are_held_up_do_not_count() -> None:
    assert turns.middle([1.0, 1.01, 0.99, 0.7]) == pytest.approx(0.995) and turns.middle([1.0, 0.8]) == 0.9
    assert turns.middle([0.1, 0.2, *[1.0] * 8, 3.0, 4.0]) == 1.0
    assert turns.interval([1.0, 0.99, 0.7]) == (0.7, 1.0)


def test_a_line_has_each_figure_of_all_steps_in_order() -> None:
    found = turns.columns([{"step_s": 1.23456789, "is_keep": True}, {"step_s": 2.0, "is_keep": False, "watts": 698.4}])
    assert found == {"step_s": [1.234568, 2.0], "is_keep": [True, False], "watts": [None, 698.4]}


def test_there_are_more_turns_until_the_ratio_is_known_or_the_time_is_over() -> None:
    def num_turns(noise: float, *, seconds: float = 0.2) -> int:
        draw, found, spent_s = random.Random(1), list[float](), 0.0
        while not PLAN.is_enough(found, spent_s):
            found.append(1 + draw.uniform(-noise, noise))
            spent_s += seconds
        return len(found)

    assert num_turns(0.001) == 6 and 6 < num_turns(0.015) < 29 <= num_turns(0.2) <= 30
    assert num_turns(0.2, seconds=1.5) == 6 and num_turns(0.2, seconds=4.0) == 2 == num_turns(0.2, seconds=20.0)


@pytest.mark.parametrize("wander", [0.0, 0.9])
def test_an_interval_has_the_true_ratio_in_it_most_of_the_time(wander: float) -> None:
    draw, num_inside = random.Random(0), 0
    for _ in range(200):
        keeps, owns, clock = [], [], 0.0
        for index in range(25):
            clock = wander * clock + draw.gauss(0, 0.02)
            (owns if index % 2 else keeps).append((1 + clock) / (0.97 if index % 2 else 1.0))
        low, high = turns.interval(turns.ratios(in_turns(keeps, owns)))
        num_inside += low <= 0.97 <= high
    assert num_inside >= 165


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
