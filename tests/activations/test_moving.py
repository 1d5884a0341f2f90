"""How records move: forwarding, cancelling, prefetch in backward's order, bounded memory, several micro-batches."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_nets import INPUTS, SIZE, assert_nothing_left, assert_same_gradients, build, chain_step, offload, run_step

from overspill.activations.amounts import Target
from overspill.activations.links import ThreadEnd, ThreadLink
from overspill.activations.records import Where
from overspill.activations.saved import SavedView
from overspill.activations.ssd_lane import SsdLane
from overspill.tiers import FakeStore


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies out wait until the event is set; those in do not."""
    go = threading.Event()
    copy = ThreadLink.copy

    def slow(self, end, target, source, after):  # type: ignore[no-untyped-def]
        if threading.current_thread().name.startswith("overspill-saved-out"):
            go.wait(20)
        copy(self, end, target, source, after)

    monkeypatch.setattr(ThreadLink, "copy", slow)
    yield go
    go.set()


def test_what_is_wanted_before_its_copy_has_ended_is_given_from_memory(slow_link: threading.Event) -> None:
    model, step = chain_step()
    expected = run_step(model, step)
    with offload(model, window="1MiB") as active:
        found = run_step(model, step)  # backward runs before a single copy has
        assert_same_gradients(found[1], expected[1])
        report = active.report()
        assert report.forwarded_bytes == report.host_bytes == 8 * SIZE
        assert report.num_live == 0
        slow_link.set()


def test_a_write_that_has_not_begun_is_cancelled_and_never_done(slow_link: threading.Event) -> None:
    """Four threads wait for the copies of the first four records; the writes behind them are taken back."""
    stores: list[FakeStore] = []

    def open_store(num_bytes: int) -> FakeStore:
        stores.append(FakeStore(num_bytes))
        return stores[-1]

    model, step = chain_step(12)
    expected = run_step(model, step)
    with offload(model, window="1MiB", host_budget="4MiB", open_store=open_store, ssd_budget="4MiB") as active:
        active._cache().rounds._targets = (Target.SSD,) * 12
        found = run_step(model, step)
        assert_same_gradients(found[1], expected[1])
        cancelled_bytes = active.report().cancelled_bytes
        assert cancelled_bytes >= 8 * SIZE
        slow_link.set()
    assert stores[0].written_bytes == 12 * SIZE - cancelled_bytes
    assert active.report().host_used_bytes == active.report().ssd_used_bytes == 0


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.02])
def test_the_race_between_write_and_backward_never_changes_a_bit(delay_s: float) -> None:
    """The device has let go of the tensor, the write is queued, in flight or done, and backward wants it."""
    model, step = chain_step()
    expected = run_step(model, step)
    settings = {"open_store": lambda num_bytes: FakeStore(num_bytes, delay_s=delay_s), "ssd_budget": "4MiB", "host_budget": "256KiB"}
    with offload(model, **settings) as active:
        for _ in range(3):
            found = run_step(model, step)
            assert found[0] == expected[0]
            assert_same_gradients(found[1], expected[1])
        assert active.report().ssd_bytes > 0 and active.report().num_live == 0


def records_of(loss: torch.Tensor) -> list[SavedView]:
    """The saved views of a graph's records, the last packed first."""
    found: dict[int, SavedView] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(next_node for next_node, _ in node.next_functions)
        for saved in gc.get_referents(node):
            if isinstance(saved, SavedView):
                found[saved.record.index] = saved
    return [found[index] for index in sorted(found, reverse=True)]


def test_backward_fetches_ahead_in_its_own_order_and_no_further_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = chain_step()
    with offload(model, window=2 * SIZE) as active:
        cache = active._cache()
        loss = step()
        for _ in range(100):
            cache.mover.drop_left()
            time.sleep(0.002)
            if not cache.mover._leaving:
                break
        live = sorted({record.index: record for same in cache._by_storage.values() for record in same}.items(), reverse=True)
        assert [record.where for _, record in live] == [Where.AWAY] * 8
        order: list[int] = []
        fetch = cache.mover.fetch
        most_ahead = [0]

        def watched(record, *, must, is_timed):  # type: ignore[no-untyped-def]
            order.append(record.index)
            most_ahead[0] = max(most_ahead[0], cache.mover.ahead_bytes)
            return fetch(record, must=must, is_timed=is_timed)

        monkeypatch.setattr(cache.mover, "fetch", watched)
        loss.backward()
        assert order == [7, 6, 5, 4, 3, 2, 1, 0]
        assert most_ahead[0] <= cache.mover.window_bytes
        assert active.report().rounds[-1].device_peak_bytes <= 2 * cache.mover.window_bytes


def test_device_memory_stays_within_the_window_however_deep_the_model() -> None:
    peaks = []
    for depth in (10, 40):
        model, step = chain_step(depth)
        with offload(model, window=2 * SIZE) as active:
            run_step(model, step)
        peaks.append(active.report().device_peak_bytes)
    assert peaks[0] == peaks[1] <= 2 * 2 * SIZE + SIZE


def test_a_record_goes_as_soon_as_backward_has_used_it() -> None:
    model, step = chain_step()
    live: list[int] = []
    with offload(model) as active:
        loss = step()
        hidden = loss.grad_fn.next_functions[0][0]
        nodes = []
        while hidden is not None:
            nodes.append(hidden)
            hidden = hidden.next_functions[0][0] if hidden.next_functions else None
        for node in nodes:
            if node.name() == "TanhBackward0":
                node.register_hook(lambda *_: live.append(active.report().num_live))
        loss.backward()
    assert live == [7, 6, 5, 4, 3, 2, 1, 0] or live == [8, 7, 6, 5, 4, 3, 2, 1]
    assert active.report().num_live == 0


@pytest.mark.parametrize("schedule", ["F0 F1 F2 B0 B1 B2", "F0 F1 F2 B2 B1 B0", "F0 F1 B0 F2 B1 F3 B2 B3"])
@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_several_micro_batches_in_flight_give_the_bits_of_one_after_the_other(schedule: str, tier: str, tmp_path: Path) -> None:
    model, _ = chain_step()
    inputs = [INPUTS * (1 + number) for number in range(4)]

    def run(hint: Callable[[str, int], None]) -> torch.Tensor:
        model.zero_grad()
        losses = {}
        for word in schedule.split():
            number = int(word[1])
            if word[0] == "F":
                hint("forward", number)
                losses[number] = model(inputs[number])
            else:
                hint("backward", number)
                losses.pop(number).backward()
        return model.scale.grad.clone()

    expected = run(lambda phase, number: None)
    settings = {} if tier == "host" else {"host_budget": "512KiB", "ssd_dir": tmp_path / "ssd", "ssd_budget": "16MiB"}
    with offload(model, amount="adaptive", **settings) as active:
        for _ in range(4):
            assert torch.equal(run(lambda phase, number: None), expected)
        numbers = iter(range(1000))
        known: dict[int, int] = {}

        def hint(phase: str, number: int) -> None:
            if phase == "forward":
                known[number] = next(numbers)
                active.next_micro_batch()
            else:
                active.phase("backward")

        assert torch.equal(run(hint), expected)
        assert active.report().num_live == 0


def test_a_backward_hint_fetches_the_last_tensors_of_that_micro_batch() -> None:
    model, step = chain_step()
    with offload(model, window=2 * SIZE) as active:
        cache = active._cache()
        model._forward_pre_hooks.clear()  # a schedule that calls parts of a model speaks for itself
        losses = []
        for number in (7, 8, 9):
            active.phase("forward", micro_batch=number)
            losses.append(step())
        time.sleep(0.05)
        cache.mover._leaving.clear()  # whatever was still on its way counts as gone
        for record in cache.fetching._moved:
            record.leaving.wait()
            record.is_only_here = False
            cache.mover.leave_again(record)
        cache.mover._leaving_bytes = 0
        active.phase("backward", micro_batch=8)
        assert [record.index for record in cache.fetching._fetched] == [7, 6] and cache.fetching._moved[15].is_ahead
        with pytest.raises(ValueError, match=r"micro-batch 3 has no saved tensors in this round; those that have: .*7, 8, 9"):
            active.phase("backward", micro_batch=3)
        with pytest.raises(ValueError, match="phase 'update' is not known"):
            active.phase("update")
        sum(losses).backward()


def test_a_graph_outlives_the_block_with_its_memory() -> None:
    model, step = chain_step()
    expected = run_step(model, step)
    model.zero_grad()
    with offload(model) as active:
        loss = step()
    assert active.report().num_live == 8 and active._tiers.memory.allocated_bytes > 0
    loss.backward()
    assert torch.equal(model.scale.grad, expected[1]["scale"])
    del loss
    assert_nothing_left(active)


def test_staging_that_is_full_makes_forward_wait_and_not_fail(tmp_path: Path) -> None:
    """64 KiB of staging: one record at a time, in both directions."""
    model, step = chain_step(20)
    expected = run_step(model, step)
    with offload(model, host_budget=4 * SIZE, open_store=lambda size: FakeStore(size, delay_s=0.001), ssd_budget="4MiB") as active:
        found = run_step(model, step)
        assert_same_gradients(found[1], expected[1])
    report = active.report()
    assert report.kept_bytes == 0 and report.ssd_bytes == 17 * SIZE and report.num_waits > 0
    assert report.host_peak_bytes <= 4 * SIZE


def test_what_has_no_room_anywhere_stays_on_the_device() -> None:
    model, step = chain_step(20)
    expected = run_step(model, step)
    with offload(model, host_budget=8 * SIZE, open_store=FakeStore, ssd_budget=4 * SIZE) as active:
        found = run_step(model, step)
        assert_same_gradients(found[1], expected[1])
    report = active.report()
    assert (report.host_bytes, report.ssd_bytes, report.kept_bytes) == (6 * SIZE, 4 * SIZE, 10 * SIZE)
    assert report.host_peak_bytes <= 8 * SIZE and report.ssd_peak_bytes <= 4 * SIZE


def test_a_late_thread_still_finds_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph dies while its writes are in flight; their memory is used again only after them."""
    model, step = chain_step()
    expected = run_step(model, step)
    writes = SsdLane._write

    def late(self, copy, staging, arrived):  # type: ignore[no-untyped-def]
        time.sleep(0.005)
        writes(self, copy, staging, arrived)

    monkeypatch.setattr(SsdLane, "_write", late)
    with offload(model, host_budget="256KiB", open_store=FakeStore, ssd_budget="4MiB") as active:
        for _ in range(3):
            step()  # and dropped at once
            found = run_step(model, step)
            assert_same_gradients(found[1], expected[1])
    assert_nothing_left(active)


def test_a_round_that_never_ends_forgets_its_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds one graph for ever."""
    monkeypatch.setattr("overspill.activations.fetching.MOST_DEAD", 100)
    model, step = chain_step(2)
    with offload(model, host_budget="1MiB") as active:
        held = step()
        cache = active._cache()
        for _ in range(400):
            step()
        assert len(cache.fetching._moved) <= 110 and len(cache.fetching._ends) <= 210
        held.backward()


def test_every_model_trains_the_same_with_slow_and_fast_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copies and writes that take random times, over both tiers."""
    generator = torch.Generator().manual_seed(0)
    copy = ThreadLink.copy

    def slow(self, end, target, source, after):  # type: ignore[no-untyped-def]
        time.sleep(float(torch.rand((), generator=generator)) * 0.0005)
        copy(self, end, target, source, after)

    monkeypatch.setattr(ThreadLink, "copy", slow)
    model, step = build("gpt2")
    expected = run_step(model, step)
    with offload(model, amount="adaptive", host_budget="256KiB", ssd_dir=tmp_path / "ssd", ssd_budget="16MiB") as active:
        for _ in range(6):
            found = run_step(model, step)
            assert found[0] == expected[0]
            assert_same_gradients(found[1], expected[1])
    assert active.report().ssd_bytes > 0


@pytest.mark.clock
def test_amounts_follow_a_slow_link_from_the_third_round_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 ms a copy beside a forward of few: at first everything leaves and compute waits; then almost nothing does, and nobody waits."""

    def slow(self, target, source, after):  # type: ignore[no-untyped-def]
        for end in after:
            end.wait()
        begun = time.perf_counter()
        time.sleep(0.05)
        target.copy_(source)
        self._took_s = time.perf_counter() - begun

    monkeypatch.setattr(ThreadEnd, "run", slow)
    model, step = chain_step()
    expected = run_step(model, step)
    with offload(model, amount="adaptive", window=2 * SIZE) as active:
        for _ in range(4):
            assert_same_gradients(run_step(model, step)[1], expected[1])
    report = active.report()
    assert [item.is_planned for item in report.rounds] == [False, False, True, True]
    assert [item.kept_bytes for item in report.rounds[:2]] == [0, 0] and report.rounds[1].wait_s > 0.05
    assert report.rounds[-1].kept_bytes >= 4 * SIZE and report.rounds[-1].wait_s < report.rounds[1].wait_s
    assert report.rates.d2h_bytes_per_s is not None and SIZE / 0.5 < report.rates.d2h_bytes_per_s <= SIZE / 0.05


def test_a_device_budget_makes_more_leave_than_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = ThreadEnd.run

    def slow(self, target, source, after):  # type: ignore[no-untyped-def]
        time.sleep(0.005)
        copy(self, target, source, after)
        self._took_s = 0.005

    monkeypatch.setattr(ThreadEnd, "run", slow)
    model, step = chain_step()
    with offload(model, amount="adaptive", window=SIZE, device_budget=2 * SIZE) as active:
        for _ in range(4):
            run_step(model, step)
    assert active.report().rounds[-1].is_planned
    assert all(item.kept_bytes <= 2 * SIZE for item in active.report().rounds)
