"""What a review of widening casts and of fetching just in time found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paced_link import PacedLink
from small_nets import offload
from torch import nn

from overspill.activations import windows
from overspill.activations.rounds import Rounds

ROWS, WIDTH = 32, 64


@pytest.mark.parametrize("amount", ["everything", "nothing"])
def test_a_complex_view_of_a_narrowed_result_is_a_view_of_its_record(amount: str) -> None:
    """Rotary positions as complex numbers: what is narrowed must not be stored once more, nor take a place that it has not elsewhere."""
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.ones(WIDTH, requires_grad=True)
    turns = torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2).float()).requires_grad_()

    def gradients() -> list[torch.Tensor]:
        wide = (inputs * 1).float()
        scaled = wide * scale
        turned = torch.view_as_complex(wide.view(ROWS, WIDTH // 2, 2)) * turns
        return list(torch.autograd.grad(scaled.sum() + torch.view_as_real(turned).sum(), (inputs, scale, turns)))

    def run(**more: Any) -> tuple[list[torch.Tensor], Any]:
        with offload(nn.Linear(1, 1), amount=amount, min_bytes=1024, **more) as active:
            found = gradients()
        return found, active.report()

    expected = gradients()
    found, report = run(recompute="cheap")
    _, plain = run()
    assert all(map(torch.equal, found, expected))
    assert report.packed_bytes + report.rebuilt_bytes == plain.packed_bytes and report.packed_bytes < plain.packed_bytes
    assert report.rounds[-1].num_records == plain.rounds[-1].num_records


class Timed(torch.autograd.Function):
    """Saves so many bytes and what it is given, and takes a time in forward and another in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, sizes: list[int], tables: list[torch.Tensor], seconds: tuple[float, float], spend: Any
    ) -> Any:
        ctx.save_for_backward(*(torch.zeros(size, dtype=torch.uint8) for size in sizes), *tables)
        ctx.seconds, ctx.spend = seconds[1], spend
        spend(seconds[0])
        return hidden * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        assert isinstance(ctx.saved_tensors, tuple)
        ctx.spend(ctx.seconds)
        return gradient, None, None, None, None


Layer = tuple[list[int], bool, float, float]
"""Bytes that are saved, whether tables are as well, seconds of forward and of backward."""


class TimedNet(nn.Module):
    def __init__(self, layers: list[Layer], spend: Callable[[float], None]) -> None:
        super().__init__()
        self.weight, self.layers, self.spend = nn.Parameter(torch.ones(2)), layers, spend

    def forward(self) -> torch.Tensor:
        hidden, tables = self.weight.sum(), [torch.zeros(400, dtype=torch.uint8) for _ in range(2)]
        for sizes, has_tables, *seconds in self.layers:
            hidden = Timed.apply(hidden, sizes, tables if has_tables else [], seconds, self.spend)
        return hidden


@pytest.fixture
def stalled_s(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., float]]:
    """Seconds in which compute waits in the last of some rounds, each of so many micro-batches; backward of the last of them is first."""
    monkeypatch.setattr(windows, "LEAST_WINDOW_BYTES", 3000)

    def run(layers: list[Layer], num_micro_batches: int, bytes_per_s: float, **more: Any) -> float:
        link = PacedLink(bytes_per_s, bytes_per_s)
        monkeypatch.setattr("overspill.activations.opened.open_link", lambda device: link)
        net = TimedNet(layers, link.spend)
        with offload(net, amount="adaptive", host_budget="1MiB", min_bytes=32, **more):
            for _ in range(6):
                before_s = link.stalled_s
                losses = [net() for _ in range(num_micro_batches)]
                while losses:
                    losses.pop().backward()
                link.synchronize()
        return link.stalled_s - before_s

    yield run


@pytest.mark.parametrize("window", [4096, 16384])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_the_micro_batch_whose_backward_is_next_is_not_waited_for(
    num_micro_batches: int, window: int, stalled_s: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All must leave, so that the records that its backward begins with come back while the backward before it runs."""
    quick, usual, last = ([64], False, 0.002, 0.004), ([1024], False, 0.01, 0.02), ([2048], False, 0.01, 0.02)
    layers = [quick, quick, *[usual] * 9, last]
    late_s = stalled_s(layers, num_micro_batches, 1e5, window=window, device_budget=64)
    monkeypatch.setattr(Rounds, "way_back", lambda self, record: None)
    assert late_s <= stalled_s(layers, num_micro_batches, 1e5, window=window, device_budget=64) + 1e-9


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_tables_that_are_wanted_in_between_let_nothing_come_before_what_is_wanted_sooner(
    num_micro_batches: int, stalled_s: Callable[..., float]
) -> None:
    """At the tables' turn the window reaches the micro-batch before, whose records took the window of what was wanted next."""
    layers: list[Layer] = [
        ([], False, 0.01, 0.02), ([8000, 4000, 4000], True, 0.002, 0.06), ([], True, 0, 0), ([4000, 8000], True, 0.01, 0),
        ([40], False, 0.01, 0.06), ([8000, 4000], False, 0.002, 0.06), ([240], False, 0.03, 0.02), ([40, 4000], True, 0.03, 0.02),
        ([240], False, 0.002, 0), ([4000], True, 0.01, 0.02), ([], False, 0, 0.004), ([], False, 0.03, 0),
    ]  # fmt: skip
    assert stalled_s(layers, num_micro_batches, 1e6) == 0


def test_what_only_the_tables_turn_reaches_is_fetched_then(stalled_s: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables were packed long before: when they are wanted what lies before them is near, and later it is out of the window."""
    layers: list[Layer] = [
        ([240], False, 0.03, 0.004), ([4000], True, 0.01, 0.02), ([4000, 4000], True, 0.002, 0.004), ([4000, 40, 4000], False, 0.002, 0.0),
        ([], True, 0.002, 0.004), ([8000, 4000], False, 0.0, 0.06), ([240], True, 0.01, 0.06), ([8000], False, 0.0, 0.0),
        ([40, 8000], False, 0.01, 0.004), ([], False, 0.0, 0.02), ([4000], False, 0.0, 0.0), ([4000, 240], False, 0.002, 0.0),
        ([], False, 0.01, 0.02),
    ]  # fmt: skip
    late_s = stalled_s(layers, 1, 3e5)
    monkeypatch.setattr(Rounds, "way_back", lambda self, record: None)
    assert late_s <= stalled_s(layers, 1, 3e5) + 1e-9


def test_of_two_micro_batches_the_next_ones_records_never_come_before_what_this_one_wants(stalled_s: Callable[..., float]) -> None:
    """They are near enough for the window while much of this one's is still to come, just in time."""
    layers: list[Layer] = [
        ([240, 4000], False, 0.0, 0.0), ([240, 4000, 4000], False, 0.03, 0.02), ([4000, 4000], False, 0.01, 0.0), ([], False, 0.042, 0.064),
        ([40, 4000, 4000], False, 0.03, 0.004), ([8000, 40], False, 0.01, 0.004), ([8000, 4000, 4000], False, 0.0, 0.0),
        ([8000, 40, 4000], False, 0.002, 0.06), ([], False, 0.002, 0.02), ([8000], False, 0.01, 0.004), ([], False, 0.04, 0.12),
        ([8000, 8000, 4000], False, 0.03, 0.02), ([8000, 8000, 40], False, 0.0, 0.02), ([40, 4000], False, 0.0, 0.0),
        ([4000], False, 0.03, 0.06), ([8000], False, 0.01, 0.0), ([4000], False, 0.0, 0.06),
    ]  # fmt: skip
    assert stalled_s(layers, 2, 3e5) == 0
