"""What stays is not looked into again in rounds that repeat: the same bits and books, and nothing is assumed of rounds that differ."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paced_link import SHAPES, PacedNet
from small_nets import assert_same_gradients, build, offload, run_step
from torch import nn

from overspill.activations import cache as caches
from overspill.activations import windows
from overspill.activations.repeating import MOST_OTHERS, SavedKept
from overspill.activations.saved import SavedView
from overspill.activations.timeline import is_watched
from overspill.units import MIB


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[type]:
    """What pack returned, counted."""
    found: collections.Counter[type] = collections.Counter()
    plain = caches.TensorCache.pack

    def pack(cache: caches.TensorCache, tensor: torch.Tensor) -> Any:
        saved = plain(cache, tensor)
        found[type(saved)] += 1
        return saved

    monkeypatch.setattr(caches.TensorCache, "pack", pack)
    return found


def amounts(active: Any) -> list[tuple[int, ...]]:
    """Of each round: what was packed and kept, of how many records, and the most on the device."""
    return [(item.packed_bytes, item.kept_bytes, item.num_records, item.device_peak_bytes) for item in active.report().rounds]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "conv", "shared"])
def test_rounds_that_repeat_have_the_books_and_bits_of_the_first(name: str, kinds: collections.Counter[type]) -> None:
    model, step = build(name)
    loss, expected = run_step(model, step)
    with offload(model, amount="nothing", min_bytes=256) as active:
        for number in range(4):
            kinds.clear()
            found = run_step(model, step)
            assert found[0] == loss
            assert_same_gradients(found[1], expected)
            assert (kinds[SavedKept] > 0) == (number > 0), "the first is noted"
            assert number == 0 or kinds[SavedKept] > 2 * kinds[SavedView], "but for the first record of the round, and other spans"
        first, *others = amounts(active)
        assert others == [first] * 3
        cache = active._cache()
        assert cache.num_live == cache.mover.device_bytes == 0 and not cache._dead


def test_beside_moving_tensors_the_books_are_those_of_a_round_that_was_looked_into(monkeypatch: pytest.MonkeyPatch, kinds: Any) -> None:
    net = PacedNet(SHAPES["gpt-12288x3"])
    monkeypatch.setattr("overspill.activations.opened.open_link", net.open_link)
    monkeypatch.setattr(windows, "LEAST_WINDOW_BYTES", int(128 * MIB / net.scale))
    _, expected = net.step()
    with offload(net.net, amount="adaptive", host_budget="256MiB", min_bytes=int(MIB / net.scale), window=None) as active:
        for number in range(1, 12):
            kinds.clear()
            _, found = net.step()
            assert all(map(torch.equal, found, expected))
            if is_watched(number) or number == 1:
                assert not kinds[SavedKept]
            elif number in (7, 10, 11):
                assert kinds[SavedKept] > 0, "whatever was decided in 6 and 9, of the rounds before, was noted then"
        rounds = [dataclasses.replace(item, round=0, wait_s=0.0) for item in active.report().rounds]
        assert rounds[5] == rounds[6] and rounds[8] == rounds[9] == rounds[10] and rounds[5].host_bytes > 0
        assert active._cache().num_live == active._cache().mover.device_bytes == 0


class Changing(nn.Module):
    """Saves something else when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.how = "plain"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.one(inputs)
        if self.how == "more":
            hidden = torch.sigmoid(hidden)
        if self.how == "wider":
            hidden = torch.tanh(hidden.double()).float()
        if self.how == "views":
            hidden = hidden.view(2, -1, 64).transpose(0, 1).reshape(-1, 64)
        hidden = torch.tanh(hidden) * torch.sigmoid(hidden)
        if self.how == "weight":
            hidden = hidden * self.other.weight
        hidden = torch.tanh(self.other(hidden))
        if self.how == "fewer":
            return hidden.sum()
        return (hidden * hidden.exp()).sum()


def gradients(net: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad(set_to_none=True)
    net(inputs).backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("how", ["more", "wider", "views", "weight", "fewer"])
@pytest.mark.parametrize("rows", [64, 32, 2])
def test_a_round_that_differs_is_looked_into_and_leaves_the_others_as_they_were(how: str, rows: int, kinds: Any) -> None:
    torch.manual_seed(0)
    net, inputs = Changing(), torch.randn(64, 64)
    rounds = [
        ("plain", inputs),
        ("plain", inputs),
        (how, inputs),
        ("plain", inputs),
        ("plain", inputs[:rows] if how != "weight" else inputs),
    ]
    rounds += [(how, inputs[:rows] if how != "weight" else inputs), (how, inputs), ("plain", inputs)]
    expected = []
    for net.how, given in rounds:
        expected.append(gradients(net, given))
    with offload(net, amount="nothing", min_bytes=256) as active:
        for (net.how, given), wanted in zip(rounds, expected, strict=True):
            kinds.clear()
            assert all(map(torch.equal, gradients(net, given), wanted))
            cache = active._cache()
            assert cache.num_live == cache.mover.device_bytes == 0
        assert kinds[SavedKept] > 0, "the last is like the first again"
        plain = [item for number, item in enumerate(amounts(active)) if number in (0, 1, 3, 7)]
        assert plain == [plain[0]] * 4


def test_a_weight_in_the_place_of_what_stayed_is_a_weight(kinds: Any) -> None:
    """Its owner may refill its memory before backward, and gives it back then."""
    net = Changing()
    memory, content = torch.zeros(64, 64), torch.randn(64, 64)
    other = torch.randn(64, 64)

    def forward(factor: torch.Tensor) -> torch.Tensor:
        hidden = net.one(other)
        return (torch.tanh(hidden) * factor).sum()

    with offload(net, amount="nothing", min_bytes=256) as active:
        active._cache().parameters.add(memory, lambda: content.clone())
        for factor in (other, other, memory):
            kinds.clear()
            memory.copy_(content)
            loss = forward(factor)
            if factor is memory:
                memory.zero_()
            net.zero_grad()
            loss.backward()
        found = net.one.weight.grad
    net.zero_grad()
    forward(content).backward()
    assert torch.equal(found, net.one.weight.grad)


@pytest.mark.parametrize(
    "part",
    [
        lambda whole: whole[3:4, :64].expand(64, 64),
        lambda whole: whole[:8, :64].repeat(8, 1)[:8, :64],
        lambda whole: whole[5:69, 7:71],
        lambda whole: whole.view(-1)[100 : 100 + 4096].view(64, 64),
    ],
)
def test_a_part_of_a_storage_counts_the_same_in_every_round(part: Callable[[torch.Tensor], torch.Tensor], kinds: Any) -> None:
    """A record has its span, which is more or less than the tensor's own bytes."""
    net, inputs = Changing(), torch.randn(64, 64)
    with offload(net, amount="nothing", min_bytes=256) as active:
        for _ in range(3):
            factor = part(torch.randn(128, 640))
            (torch.tanh(net.one(inputs))[: len(factor)] * factor).sum().backward()
        assert kinds[SavedKept] > 0
        assert len({item for item in amounts(active)}) == 1
        assert active._cache().mover.device_bytes == 0


def test_what_was_kept_again_is_refused_after_a_change_in_place() -> None:
    net, inputs = Changing(), torch.randn(64, 64)
    changed: list[torch.Tensor] = []
    hook = net.other.register_forward_pre_hook(lambda module, args: changed.append(args[0]))
    with offload(net, amount="nothing", min_bytes=256) as active:
        for _ in range(2):
            gradients(net, inputs)
        loss = net(inputs)
        changed[-1].detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        del loss
        changed.clear()
        hook.remove()
        expected = gradients(net, inputs)
        assert active._cache().num_live == 0
    assert all(map(torch.equal, gradients(net, inputs), expected))


def test_kept_graphs_double_backward_and_errors_leave_nothing(kinds: Any) -> None:
    net, inputs = Changing(), torch.randn(64, 64, requires_grad=True)
    wanted = gradients(net, inputs)

    def failing(gradient: torch.Tensor) -> None:
        raise ArithmeticError

    with offload(net, amount="nothing", min_bytes=256) as active:
        for number in range(6):
            net.zero_grad(set_to_none=True)
            kinds.clear()
            hidden = net.one(inputs)
            loss = (hidden.tanh() * hidden.sigmoid()).sum()
            if number == 2:
                hidden.register_hook(failing)
                with pytest.raises(ArithmeticError):
                    loss.backward()
            elif number == 3:
                loss.backward(retain_graph=True)
                first = net.one.weight.grad.clone()
                net.zero_grad()
                loss.backward()
                assert torch.equal(first, net.one.weight.grad)
            elif number == 4:
                (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
                slope.square().sum().backward()
                assert kinds[SavedKept] > 0
            else:
                loss.backward()
            del loss, hidden
            slope = None
            cache = active._cache()
            assert cache.num_live == cache.mover.device_bytes == 0, number
        assert kinds[SavedKept] > 0
    assert all(map(torch.equal, gradients(net, inputs), wanted))


def test_micro_batches_in_flight_repeat_the_first(kinds: Any) -> None:
    torch.manual_seed(0)
    net, parts = Changing(), torch.randn(3, 64, 64)
    net.zero_grad(set_to_none=True)
    sum(net(part) for part in parts).backward()  # type: ignore[union-attr]
    wanted = [parameter.grad for parameter in net.parameters()]
    with offload(net, amount="nothing", min_bytes=256) as active:
        for _ in range(4):
            net.zero_grad(set_to_none=True)
            kinds.clear()
            losses = []
            for part in parts:
                losses.append(net(part))
                active.next_micro_batch()
            sum(losses).backward()
            del losses
            assert all(map(torch.equal, [parameter.grad for parameter in net.parameters()], wanted))
            assert active._cache().num_live == 0
        assert kinds[SavedKept] >= 3 * 2 and kinds[SavedView] <= 3 * 2
        first, *others = amounts(active)
        assert others == [first] * 3


def test_a_first_round_that_was_unlike_the_others_is_forgotten_or_made_whole(kinds: Any) -> None:
    net, inputs = Changing(), torch.randn(64, 64)
    with offload(net, amount="nothing", min_bytes=256) as active:
        net.one(inputs).tanh()  # a forward that was broken off
        assert active._cache().num_live == 0
        counts = []
        for _ in range(3):
            kinds.clear()
            gradients(net, inputs)
            counts.append(kinds[SavedKept])
        assert counts[0] < counts[1] == counts[2], "what is not known yet is noted in the next round"
        net.how = "wider"
        for _ in range(MOST_OTHERS + 2):
            kinds.clear()
            gradients(net, inputs)
        assert kinds[SavedKept] > counts[2], "now this is what is noted"


@pytest.mark.parametrize("rounds", [["one", "two", "two"], ["two", "one", "one"], ["one", "one", "two", "one"], ["late", "one", "late"]])
def test_the_books_of_a_round_that_shares_other_tensors_are_its_own(rounds: list[str]) -> None:
    """Dtype and dimensions are equal: `one` saves a tensor twice where `two` saves two, and `late` has a difference in between."""
    net, inputs = nn.Linear(64, 64), torch.randn(64, 64)

    def step(how: str) -> None:
        hidden = torch.tanh(net(inputs))
        one, other = hidden + 1, hidden + 2
        if how == "late":
            hidden = hidden * torch.exp(hidden.double()).float()
        (hidden * (one * one if how != "two" else one * other) * one).sum().backward()

    def books(hows: list[str]) -> list[tuple[int, ...]]:
        with offload(net, amount="nothing") as active:
            for how in hows:
                step(how)
                assert active._cache().num_live == active._cache().mover.device_bytes == 0 and not active._cache().repeating._here
            return [(item.packed_bytes, item.kept_bytes, item.num_records) for item in active.report().rounds]

    fresh = {how: books([how])[0] for how in ("one", "two", "late")}
    assert fresh["one"] != fresh["two"] and books(rounds) == [fresh[how] for how in rounds]
