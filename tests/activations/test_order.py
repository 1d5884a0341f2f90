"""The rules of buffers and waits hold when no copy is ever done before somebody waits for it, as on a GPU that the host is far ahead of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from late_link import LateLink
from small_nets import assert_same_gradients, build, offload, run_step
from torch import nn

from overspill.activations.amounts import Target
from overspill.tiers import FakeStore
from overspill.units import MIB


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[LateLink]:
    made: list[LateLink] = []

    def open_link(device: torch.device) -> LateLink:
        made.append(LateLink(seed=len(made), early=getattr(request, "param", 0.0)))
        return made[-1]

    monkeypatch.setattr("overspill.activations.opened.open_link", open_link)
    return made


@pytest.mark.parametrize("links", [0.0, 0.5], indirect=True, ids=["late", "mixed"])
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("tier", ["host", "ssd", "slow ssd"])
@pytest.mark.parametrize("name", ["llama", "conv"])
def test_copies_that_happen_as_late_as_they_may_change_no_bit(name: str, tier: str, recompute: str, links: list[LateLink]) -> None:
    model, step = build(name)
    expected = run_step(model, step)
    delay_s = 0.0005 if tier == "slow ssd" else 0.0  # then what is wanted is often still on its way to the drive
    ssd = {"host_budget": "256KiB", "open_store": lambda size: FakeStore(size, delay_s=delay_s), "ssd_budget": "4MiB"}
    settings = {} if tier == "host" else ssd
    for window in (1, 20_000, 10**7):
        model, step = build(name)
        with offload(model, window=window, recompute=recompute, **settings) as active:
            for _ in range(3):
                found = run_step(model, step)
                if name != "conv":  # whose running statistics change from step to step
                    assert found[0] == expected[0]
                    assert_same_gradients(found[1], expected[1])
            assert active.report().num_live == 0
    assert [link.violations for link in links] == [[]] * 3
    assert all(link.num_late > 0 for link in links)


@pytest.mark.parametrize("links", [0.0, 0.5], indirect=True, ids=["late", "mixed"])
@pytest.mark.parametrize("schedule", ["F0 B0", "F0 F1 B1 B0", "F0 F1 B0 F2 B2 B1"])
def test_what_is_let_go_by_a_measured_pace_waits_for_its_copy(
    schedule: str, links: list[LateLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pace says when a copy should have ended; no copy has before somebody waits. Windows are chosen, small, and not asked for."""
    monkeypatch.setattr("overspill.activations.windows.LEAST_WINDOW_BYTES", 8192)
    model, _ = build("llama")
    batches = [torch.randint(0, 96, (2, 12 + number)) for number in range(3)]

    def train() -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses: dict[str, torch.Tensor] = {}
        for word in schedule.split():
            if word[0] == "F":
                ids = batches[int(word[1])]
                losses[word[1]] = model(input_ids=ids, labels=ids).loss
            else:
                losses.pop(word[1]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = train()
    with offload(model, amount="adaptive", window=None) as active:
        for _ in range(7):
            assert_same_gradients(train(), expected)
            links[0].close()  # the device has done everything, and the round can be read
        cache = active._cache()
        decision = cache.rounds._decision
        assert decision is not None and decision.pace is not None and active.report().rounds[-1].is_planned
        assert decision.pace.num_gone_at_turn > 0 and any(target is not Target.KEEP for target in decision.targets)
        assert cache.mover.window_bytes < 128 * MIB and active.report().num_live == 0
    assert [link.violations for link in links] == [[]] and links[0].num_late > 0


def test_memory_stays_bounded_though_no_copy_is_ever_seen_to_be_done(links: list[LateLink]) -> None:
    """The host has all of forward behind it before the device begins; what has left is let go in compute's order all the same."""
    peaks = []
    for depth in (8, 64):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)])
        with offload(model, window=3 * 64 * 32 * 4) as active:
            model(torch.randn(64, 32)).sum().backward()
        peaks.append(active.report().device_peak_bytes)
    assert peaks[0] == peaks[1] <= 2 * 3 * 64 * 32 * 4 + 64 * 32 * 4
    assert [link.violations for link in links] == [[], []]


@pytest.mark.parametrize("links", [0.0, 0.3], indirect=True, ids=["late", "mixed"])
def test_host_memory_that_is_lent_again_waits_for_what_still_reads_it(links: list[LateLink], tmp_path: Path) -> None:
    """Room for little more than one micro-batch, so that every range is used again at once, over several of them in flight."""
    model, _ = build("gpt2")
    batches = [torch.randint(0, 96, (2, 8 + number)) for number in range(3)]

    def train() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        losses = [model(input_ids=ids, labels=ids).loss for ids in batches[:2]]
        losses.pop(0).backward()
        losses.append(model(input_ids=batches[2], labels=batches[2]).loss)
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = train()
    for budget in ("300KiB", "600KiB"):
        with offload(model, host_budget=budget, ssd_dir=tmp_path / "ssd", ssd_budget="8MiB") as active:
            for _ in range(3):
                assert_same_gradients(train(), expected)
        assert active.report().ssd_bytes > 0
    assert [link.violations for link in links] == [[], []]


class Stop(torch.autograd.Function):
    """Ends backward half-way."""

    @staticmethod
    def forward(ctx, hidden):  # type: ignore[no-untyped-def]
        return hidden * 1

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError


@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_a_graph_that_dies_with_copies_under_way_frees_nothing_that_they_fill(tier: str, links: list[LateLink]) -> None:
    """Backward stops after half of the layers, with a window's worth of the others fetched ahead."""
    size = 64 * 32 * 4
    layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(20))
    settings = {} if tier == "host" else {"host_budget": "256KiB", "open_store": FakeStore, "ssd_budget": "4MiB"}

    def broken_step() -> None:
        hidden = torch.randn(64, 32)
        for number, layer in enumerate(layers):
            hidden = layer(Stop.apply(hidden) if number == 10 else hidden)
        with pytest.raises(ZeroDivisionError):
            hidden.sum().backward()
        assert active._cache().mover.ahead_bytes >= size

    with offload(layers, window=4 * size, **settings) as active:
        for _ in range(3):
            broken_step()
            assert active.report().num_live == 0 and active._cache().mover.ahead_bytes == 0
    assert links[0].violations == []
