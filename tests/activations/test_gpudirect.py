"""Saved tensors that go to the SSD past host memory, through a stand-in for kvikio: the same bits, in the same order."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from late_link import LateLink
from small_nets import INPUTS, SIZE, assert_nothing_left, assert_same_gradients, build, chain_step, offload, run_step
from stand_in_kvikio import StandIn, away, direct, install, wait_a_little

from overspill.activations.amounts import Target
from overspill.activations.records import Where


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    return install(monkeypatch, tmp_path)


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("name", ["llama", "bert", "shared"])
def test_gradients_equal_plain_pytorch_bitwise(name: str, recompute: str, kvikio: StandIn, tmp_path: Path) -> None:
    """Tensors of all sizes, most of them no whole pages, each transfer in a time of its own."""
    kvikio.before = wait_a_little(0, 0.0005)
    model, step = build(name)
    expected = run_step(model, step)
    with direct(model, tmp_path, recompute=recompute) as active:
        for _ in range(3):
            found = run_step(model, step)
            assert found[0] == expected[0]
            assert_same_gradients(found[1], expected[1])
        assert active._tiers is not None and active._tiers.staging is None and active._tiers.memory.peak_bytes == 0
    report = active.report()
    assert report.ssd_bytes > 0 and {operation for operation, _, _ in kvikio.log} == {"write", "read"}
    assert_nothing_left(active)


def test_what_leaves_is_what_comes_back_of_any_length(kvikio: StandIn, tmp_path: Path) -> None:
    """Around pages and around blocks of sums."""
    block = 1 << 20
    for size in (1, 4095, 4096, 4097, block - 100, block, block + 100, 2 * block + 4096, 3 * block - 1):
        values = torch.randint(0, 256, (size,), dtype=torch.uint8)

        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, scale: torch.Tensor, values: torch.Tensor = values) -> torch.Tensor:
                ctx.save_for_backward(values.clone())
                return scale * 1

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor, values: torch.Tensor = values) -> torch.Tensor:
                (saved,) = ctx.saved_tensors
                assert torch.equal(saved, values)
                return gradient

        model = torch.nn.Linear(1, 1)
        with direct(model, tmp_path) as active:
            away(active, lambda apply=Keep.apply, model=model: apply(model.weight)).backward()
            assert model.weight.grad is not None
            assert active.report().ssd_bytes == size
        assert_nothing_left(active)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_fewer_bits_come_back_as_through_host_memory(storage: str, kvikio: StandIn, tmp_path: Path) -> None:
    model, step = build("gpt2")
    with offload(model, storage=storage):
        expected = run_step(model, step)
    with direct(model, tmp_path, storage=storage, window=1) as active:
        assert_same_gradients(run_step(model, step)[1], expected[1])
        assert active.report().ssd_bytes > 0


def test_a_graph_that_is_kept_is_read_twice(kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()
    expected = run_step(model, step)
    with direct(model, tmp_path, window=1) as active:
        loss = away(active, step)
        for _ in range(2):
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert torch.equal(model.scale.grad, expected[1]["scale"])
        del loss
    assert sum(operation == "read" for operation, _, _ in kvikio.log) == 16
    assert_nothing_left(active)


def test_two_directories_share_what_leaves(kvikio: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overspill.tiers.striped_file.STRIPE_BYTES", 16384)
    model, step = chain_step()
    expected = run_step(model, step)
    with direct(model, tmp_path, ssd_dir=[tmp_path / "one", tmp_path / "two"], window=1) as active:
        loss = away(active, step)
        loss.backward()
        assert torch.equal(model.scale.grad, 2 * expected[1]["scale"])
        assert kvikio.num_open == 2 and {size for _, _, size in kvikio.log} == {16384}
        assert len(kvikio.log) == 2 * 8 * SIZE // 16384
    assert kvikio.num_open == 0
    assert_nothing_left(active)


@pytest.mark.parametrize("early", [0.0, 0.5])
def test_beside_copies_that_happen_as_late_as_they_may_no_bit_changes(
    early: float, kvikio: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some records go to host memory by a link on which nothing is done before it is waited for, the others past it."""
    kvikio.before = wait_a_little(1, 0.0005)
    links = [LateLink(seed=0, early=early)]
    monkeypatch.setattr("overspill.activations.opened.open_link", lambda device: links[0])
    model, step = build("llama")
    expected = run_step(model, step)
    with direct(model, tmp_path, host_budget="64KiB", window=20_000) as active:
        for _ in range(4):
            assert_same_gradients(run_step(model, step)[1], expected[1])
        report = active.report()
        assert report.host_bytes > 0 and report.ssd_bytes > 0
    assert links[0].violations == [] and links[0].num_late > 0


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.02])
def test_the_race_between_write_and_backward_never_changes_a_bit(delay_s: float, kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.before = lambda operation, number: time.sleep(delay_s)
    model, step = chain_step()
    expected = run_step(model, step)
    with direct(model, tmp_path, window=2 * SIZE) as active:
        for _ in range(3):
            found = run_step(model, step)
            assert found[0] == expected[0]
            assert_same_gradients(found[1], expected[1])
        assert active.report().ssd_bytes > 0 and active.report().num_live == 0


def test_a_write_that_has_not_begun_is_cancelled_and_what_leaves_is_given_from_the_device(kvikio: StandIn, tmp_path: Path) -> None:
    """Four threads wait within the first four writes; those behind them are taken back."""
    go = threading.Event()
    kvikio.before = lambda operation, number: go.wait(20)
    model, step = chain_step(12)
    expected = run_step(model, step)
    with direct(model, tmp_path, window="1MiB") as active:
        model.zero_grad()
        loss = step()
        while len(kvikio.log) < 4:
            time.sleep(0.001)
        loss.backward()
        assert torch.equal(model.scale.grad, expected[1]["scale"])
        del loss
        report = active.report()
        assert (report.cancelled_bytes, report.forwarded_bytes) == (8 * SIZE, 12 * SIZE)
        assert report.num_live == 0 and active._cache().mover._busy, "its four buffers are still written from"
        go.set()
    assert len(kvikio.log) == 4 and all(operation == "write" for operation, _, _ in kvikio.log)
    assert_nothing_left(active)


def test_device_memory_stays_within_the_window_however_slow_the_drive(kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.before = lambda operation, number: time.sleep(0.001)
    peaks = []
    for depth in (10, 40):
        model, step = chain_step(depth)
        with direct(model, tmp_path, window=2 * SIZE) as active:
            run_step(model, step)
        report = active.report()
        assert report.kept_bytes == 0 and report.num_waits > 0
        peaks.append(report.device_peak_bytes)
    assert max(peaks) <= 2 * 2 * SIZE + SIZE


def test_a_pace_of_the_link_does_not_make_the_host_wait_for_the_drive(kvikio: StandIn, tmp_path: Path) -> None:
    go = threading.Event()
    kvikio.before = lambda operation, number: go.wait(20)
    model, step = chain_step()
    with direct(model, tmp_path, window="1MiB") as active:
        loss = step()
        mover = active._cache().mover
        mover.drop_left(lambda record: True)
        assert len(mover._leaving) == 8 and mover.num_waits == 0
        go.set()
        loss.backward()


def test_backward_reads_ahead_and_what_nobody_wanted_is_given_back(kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()
    with direct(model, tmp_path, window=3 * SIZE) as active:
        cache = active._cache()
        loss = away(active, step)
        while cache.mover._leaving:
            cache.mover.drop_left()
        cache.prefetch_last()
        assert [record.index for record in cache.fetching._fetched] == [7, 6, 5]
        assert all(record.coming is not None and record.arriving is None for record in cache.fetching._fetched)
        first = next(iter(cache.fetching._fetched))
        assert first.where is Where.COMING
        cache._on_device(first)
        assert first.where is Where.BACK
        del loss  # with three reads under way
    assert_nothing_left(active)


@pytest.mark.clock
def test_planned_rounds_know_the_drive_and_do_not_take_it_for_the_link(kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.before = lambda operation, number: time.sleep(0.01)
    model, step = chain_step()
    expected = run_step(model, step)
    with direct(model, tmp_path, amount="adaptive", window=2 * SIZE, host_budget=2 * SIZE, device_budget=2 * SIZE) as active:
        for _ in range(8):
            assert_same_gradients(run_step(model, step)[1], expected[1])
        targets = active._cache().rounds._targets
    report = active.report()
    assert report.rounds[-1].is_planned and targets is not None and Target.SSD in targets
    assert report.rates.ssd_write_bytes_per_s is not None and report.rates.ssd_write_bytes_per_s < 4 * SIZE / 0.01
    assert report.rates.d2h_bytes_per_s is not None and report.rates.d2h_bytes_per_s > 4 * SIZE / 0.01, "two records took the link"


def test_two_hundred_steps_grow_nothing(kvikio: StandIn, tmp_path: Path) -> None:
    model, _ = chain_step()
    process = psutil.Process()

    def figures() -> tuple[int, ...]:
        gc.collect()
        cache = active._cache()
        return (
            len(cache.fetching._moved), len(cache._by_storage),
            len(cache.fetching._fetched), len(cache.mover._busy), len(cache.mover._under_way),
            len(cache.mover._leaving), cache.mover.device_bytes, process.num_fds(), threading.active_count(),
        )  # fmt: skip

    with direct(model, tmp_path, amount="adaptive") as active:
        for number in range(250):
            model(INPUTS[: 4096 + 7 * (number % 50)]).backward()
            if number == 49:
                before, objects = figures(), len(gc.get_objects())
            kvikio.log.clear()
        after = figures()
        assert all(now <= then + 12 for now, then in zip(after, before, strict=True)), (before, after)
        assert len(gc.get_objects()) <= objects + 300  # of which each round's amounts are one
        assert active.report().ssd_used_bytes == 0 and active.report().num_rounds == 250
    assert_nothing_left(active)
