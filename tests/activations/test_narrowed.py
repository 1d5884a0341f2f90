"""What was cast to a wider dtype is stored in the one that it was cast from: kept or moved, to the bit, and where that is chosen."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import NAMES, assert_same_gradients, build, offload, run_step, settings_of
from torch import nn

from overspill.activations.amounts import Adaptive, Room, Target
from overspill.activations.flight import Profile
from overspill.activations.forms import CastFrom
from overspill.activations.mix import THRIFT, Mix, choose_mix, rebuild_all, what_is_left
from overspill.activations.windows import decide
from overspill.spec.activations import ActivationRates

ROWS, WIDTH = 32, 64
WIDE = ROWS * WIDTH * 4


class Norm(nn.Module):
    """As in Llama: hidden states of bf16, squares and a product in fp32, which save the cast's result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


def net(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16), Norm())]
    return nn.Sequential(*layers)


def hidden_states() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)


@pytest.mark.parametrize("amount", ["everything", "nothing", "adaptive"])
def test_half_the_bytes_of_a_norms_input_are_kept_or_moved_and_gradients_have_the_same_bits(amount: str) -> None:
    model, inputs = net(), hidden_states()
    expected = run_step(model, lambda: model(inputs).float().sum())
    with offload(model, amount=amount) as active:
        run_step(model, lambda: model(inputs).float().sum())
        plain = active.report().rounds[-1]
    with offload(model, amount=amount, recompute="cheap") as active:
        for _ in range(6):
            found = run_step(model, lambda: model(inputs).float().sum())
            assert found[0] == expected[0]
            assert_same_gradients(found[1], expected[1])
        report = active.report()
    last = report.rounds[-1]
    assert last.rebuilt_bytes >= 3 * WIDE // 2 and last.packed_bytes + last.rebuilt_bytes == plain.packed_bytes
    assert report.num_live == 0
    if amount == "everything":
        assert last.host_bytes == last.packed_bytes < plain.host_bytes
    if amount == "nothing":
        assert last.kept_bytes == last.packed_bytes < plain.kept_bytes and last.device_peak_bytes < plain.device_peak_bytes


@pytest.mark.parametrize("tier", ["host", "ssd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_models_in_half_precision_keep_their_gradients(name: str, dtype: torch.dtype, tier: str, tmp_path: Path) -> None:
    if name == "conv":
        pytest.skip("its images are fp32")
    model, step = build(name)
    model.to(dtype)
    expected = run_step(model, step)
    with offload(model, recompute="cheap", **settings_of(tier, tmp_path)) as active:
        for _ in range(2):
            found = run_step(model, step)
            assert found[0] == expected[0] or math.isnan(expected[0])
            assert_same_gradients(found[1], expected[1])
    assert active.report().num_live == 0


def test_a_kept_graph_and_a_second_derivative_find_the_values_again() -> None:
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def gradients(active: Any = None) -> list[torch.Tensor]:
        loss = (inputs * 1).float().pow(3).sum()
        (first,) = torch.autograd.grad(loss, inputs, create_graph=True, retain_graph=True)
        (second,) = torch.autograd.grad(first.float().sum(), inputs, retain_graph=True)
        (again,) = torch.autograd.grad(loss, inputs)
        return [first.detach(), second, again]

    expected = gradients()
    for amount in ("everything", "nothing"):
        with offload(nn.Linear(1, 1), recompute="cheap", amount=amount) as active:
            found = gradients()
            assert all(map(torch.equal, found, expected))
        assert active.report().rebuilt_bytes >= WIDE // 2 and active.report().num_live == 0


def test_between_two_backwards_of_a_kept_graph_the_wide_values_are_not_held() -> None:
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with offload(nn.Linear(1, 1), recompute="cheap", amount="nothing") as active:
        loss = (inputs * 1).float().pow(2).sum()
        loss.backward(retain_graph=True)
        (record,) = [one for found in active._cache()._by_storage.values() for one in found]
        assert isinstance(record.form, CastFrom) and record.decoded is None and record.payload.numel() == WIDE // 2
        first, inputs.grad = inputs.grad.clone(), None
        loss.backward()
        assert torch.equal(inputs.grad, first)


@pytest.mark.parametrize("amount", ["everything", "nothing"])
def test_a_change_in_place_after_it_was_saved_is_an_error(amount: str) -> None:
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with offload(nn.Linear(1, 1), recompute="cheap", amount=amount):
        wide = (inputs * 1).float()
        loss = wide.pow(2).sum()
        with torch.no_grad():
            wide.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def changed(wide: torch.Tensor) -> torch.Tensor:
    return wide.add_(1e-4)


def written_through(wide: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        wide.view(-1)[3] = 1.0 + 2.0**-20
    return wide


CASES: dict[str, Any] = {
    "changed before": lambda hidden: changed(hidden.float()).pow(2),
    "written through a view before": lambda hidden: written_through(hidden.float()).pow(2),
    "a part": lambda hidden: hidden.float()[: ROWS // 2].pow(2),
    "transposed": lambda hidden: hidden.t().float().pow(2),
    "a view of all": lambda hidden: hidden.float().view(-1).pow(2),
    "as another dtype": lambda hidden: hidden.float().pow(2) + hidden.float().view(torch.int32).float(),
    "of a sum in fp32": lambda hidden: (hidden.float() + 1e-4).pow(2),
    "to float64": lambda hidden: hidden.double().pow(2),
    "twice": lambda hidden: hidden.float().double().pow(2),
    "of a leaf": lambda hidden: hidden.detach().requires_grad_().float().pow(2) + hidden.float().pow(2),
    "behind an op that is rebuilt": lambda hidden: nn.functional.silu(hidden).float().pow(2),
    "not finite": lambda hidden: (hidden * float("inf")).float().clamp(-3, 3).pow(2) + (hidden * 1e38).float().tanh(),
    "denormal": lambda hidden: (hidden * 1e-38).float().pow(1.5),
    "saved three times": lambda hidden: (lambda wide: wide.pow(2) + wide.sin() + wide.t().cos().t())(hidden.float()),
}


@pytest.mark.parametrize("amount", ["everything", "nothing"])
@pytest.mark.parametrize("case", CASES)
def test_only_what_was_cast_and_is_whole_is_narrowed(case: str, amount: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def gradient() -> torch.Tensor:
        inputs.grad = None
        CASES[case](inputs * 1).sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    expected = gradient()
    with offload(nn.Linear(1, 1), recompute="cheap", amount=amount) as active:
        assert torch.equal(gradient().nan_to_num(7.0), expected.nan_to_num(7.0))
        is_narrowed = active.report().rebuilt_bytes > 0
    assert is_narrowed == (case not in ("changed before", "written through a view before", "a part", "of a sum in fp32", "twice"))


def test_what_was_asked_to_be_lossy_has_that_form() -> None:
    model, inputs = net(), hidden_states()
    with offload(model, recompute="cheap", storage="int8") as active:
        loss = model(inputs).float().sum()
        forms = {record.form for found in active._cache()._by_storage.values() for record in found}
    assert CastFrom(torch.bfloat16) not in forms and loss.isfinite()


def test_without_recomputation_nothing_is_narrowed() -> None:
    model, inputs = net(), hidden_states()
    with offload(model) as active:
        run_step(model, lambda: model(inputs).float().sum())
    assert active.report().rebuilt_bytes == 0


# -- on paper ----------------------------------------------------------------------------------------------------------

CAST = Profile(
    device_bytes=(400, 400, 100), stored_bytes=(400, 400, 100), packed_s=(0.0, 1.0, 2.0), needed_s=(9.0, 6.0, 3.0), forward_s=3.0,
    moved_bytes=(1200, 800, 0), rest_bytes=(200, 0, 0), rebuild_s=(0.2, 0.1, math.inf),
)  # fmt: skip
"""A cast, a result that is rebuilt of nothing, and what backward begins with."""


def test_a_narrowed_place_takes_what_it_was_cast_from_and_goes_where_others_go() -> None:
    rest = what_is_left(CAST, rebuild_all(CAST))
    assert rest.device_bytes == rest.stored_bytes == (200, 0, 100)
    room = Room(host_bytes=10**6, ssd_bytes=0, staging_bytes=0, window_bytes=400, keep_bytes=None)
    rates = ActivationRates(d2h_bytes_per_s=1e6, h2d_bytes_per_s=1e6)
    found = decide(Adaptive(), CAST, rates, room, may_choose=False)
    assert found.targets == (Target.HOST, Target.REBUILD, Target.KEEP) and found.mix.rebuilt == (True, True, False)
    slow = dataclasses.replace(rates, d2h_bytes_per_s=1.0, h2d_bytes_per_s=1.0)
    found = decide(Adaptive(), CAST, slow, room, may_choose=False)
    assert found.targets == (Target.KEEP, Target.REBUILD, Target.KEEP) and found.mix.rebuilt[0], "it stays, and takes half"


def test_the_share_of_throughput_goes_to_what_saves_most_a_second() -> None:
    def stays(rest: Profile) -> int:
        return sum(rest.device_bytes)

    def chosen(lost_s: float) -> Mix:
        return choose_mix(CAST, 1 / (1 + lost_s / 9.0 / THRIFT), stays)

    assert chosen(0.05).rebuilt == (False, False, False)
    assert chosen(0.11).rebuilt == (False, True, False), "400 bytes for 0.1 s before 200 for 0.2"
    assert chosen(0.31).rebuilt == (True, True, False)
