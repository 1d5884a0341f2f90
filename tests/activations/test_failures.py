"""Drives that fail, and exceptions anywhere: the right error, never a wrong gradient, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from small_nets import assert_nothing_left, assert_same_gradients, build, chain_step, offload, run_step, settings_of, train_and_fail

from overspill.activations.links import ThreadLink
from overspill.errors import StorageError
from overspill.tiers import Failure, FakeStore, Fault, FaultInjector, FaultKind, SsdStore
from overspill.units import MIB


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_a_failing_write_is_an_error_and_never_a_wrong_gradient(kind: int) -> None:
    model, step = chain_step()
    opened = []

    def open_store(num_bytes: int) -> FakeStore:
        opened.append(FakeStore(num_bytes, failures=Failure(operation="write", call_index=2, errno=kind)))
        return opened[-1]

    active = offload(model, host_budget="256KiB", open_store=open_store, ssd_budget="4MiB")
    with pytest.raises(StorageError, match=f"write of saved-tensors failed.*{errno.errorcode[kind]}"), active:
        for _ in range(3):
            run_step(model, step)
    assert_nothing_left(active)


def test_a_failing_read_is_an_error_and_never_a_wrong_gradient() -> None:
    model, step = chain_step()
    failure = Failure(operation="read", call_index=1, errno=errno.EIO)
    active = offload(model, host_budget="256KiB", open_store=lambda size: FakeStore(size, failures=failure), ssd_budget="4MiB")
    with pytest.raises(StorageError, match="read of saved-tensors failed.*EIO"), active:
        for _ in range(3):
            run_step(model, step)
    assert_nothing_left(active)


@pytest.mark.parametrize("kind", [FaultKind.EIO, FaultKind.ENOSPC, FaultKind.FLIPPED, FaultKind.TORN])
def test_a_failing_drive_under_real_files_is_an_error(kind: FaultKind, tmp_path: Path) -> None:
    """A bit that flips, or half a page that a drive forgot, is found by its checksum.

    All writes end before backward, so that nothing is given from memory instead; calls 3 and 4 are writes.
    """
    model, step = chain_step()
    calls = FaultInjector(Fault(kind=kind, call_index=3, num_calls=2))
    active = offload(
        model, host_budget="256KiB", ssd_budget="4MiB",
        open_store=lambda size: SsdStore(tmp_path / "ssd", capacity_bytes=size, unlink=True, calls=calls, num_threads=1),
    )  # fmt: skip

    def train() -> None:
        with active:
            mover = active._cache().mover
            loss = step()
            for copy in tuple(mover._under_way):
                copy.settle()
            mover.drop_left()
            assert len(calls.log) >= 5
            loss.backward()

    with pytest.raises(StorageError):
        train()
    assert_nothing_left(active)


@pytest.mark.parametrize("seed", range(6))
def test_a_drive_that_lies_at_any_time_gives_an_error_or_the_right_gradient(seed: int) -> None:
    """What was given from memory was not read; what was read was compared."""
    model, step = chain_step()
    expected = run_step(model, step)
    calls = FaultInjector(Fault(kind=FaultKind.FLIPPED, call_index=2 * seed, num_calls=1))
    active = offload(model, host_budget="256KiB", ssd_budget="4MiB", open_store=lambda size: FakeStore(size, calls=calls))
    with contextlib.suppress(StorageError), active:
        for _ in range(3):
            assert_same_gradients(run_step(model, step)[1], expected[1])
    assert_nothing_left(active)


@pytest.mark.parametrize("where", ["forward", "backward", "between"])
@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_an_exception_leaves_nothing_behind(where: str, tier: str, tmp_path: Path) -> None:
    model, step = chain_step()
    settings = settings_of(tier, tmp_path, ssd_budget="4MiB")
    active = offload(model, **settings)

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        train_and_fail(active, model, step, where)
    assert_nothing_left(active)
    if tier == "ssd":
        assert os.listdir(tmp_path / "ssd") == []
    expected = run_step(model, step)
    with active:  # and it can be entered again
        assert_same_gradients(run_step(model, step)[1], expected[1])
    assert_nothing_left(active)


@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_a_backward_that_fails_beside_nodes_that_wait_leaves_nothing_behind(tier: str, tmp_path: Path) -> None:
    """Torch's engine holds the nodes that were ready, and with them the graph, until the thread's next backward."""
    model, step = build("llama")
    settings = settings_of(tier, tmp_path, ssd_budget="4MiB")
    active = offload(model, **settings)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in backward")

    for name in ("q_proj", "k_proj", "v_proj"):  # all three are ready at once
        getattr(model.model.layers[1].self_attn, name).register_full_backward_hook(fail)
    with contextlib.suppress(ZeroDivisionError), active:
        step().backward()
    assert_nothing_left(active)


@pytest.mark.parametrize("method", ["hold", "start_out", "start_in", "mark"])
@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_ctrl_c_in_any_wait_or_start_leaves_nothing_behind(method: str, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = chain_step(3)
    settings = settings_of(tier, tmp_path, ssd_budget="4MiB")
    inner, copy, calls = getattr(ThreadLink, method), ThreadLink.copy, [0]

    def slow(self, end, target, source, after):  # type: ignore[no-untyped-def]
        time.sleep(0.002)  # so that there is something to wait for
        copy(self, end, target, source, after)

    monkeypatch.setattr(ThreadLink, "copy", slow)
    for num_calls in itertools.count(1):
        calls[0] = 0

        def once(self, *arguments, when=num_calls, **more):  # type: ignore[no-untyped-def]
            calls[0] += 1
            if calls[0] == when:
                raise KeyboardInterrupt
            return inner(self, *arguments, **more)

        monkeypatch.setattr(ThreadLink, method, once)
        active = offload(model, **settings)
        with contextlib.suppress(KeyboardInterrupt, StorageError), active:  # the second if it was a thread's turn
            step().backward()
        assert_nothing_left(active)
        if calls[0] < num_calls:
            break  # the step ended before its turn
    assert num_calls > 1


def test_ctrl_c_in_an_attached_forward_leaves_no_hook_behind_for_longer_than_the_next_one() -> None:
    """Torch calls no hook of a forward that ends with it."""
    model, step = build("gpt2")
    expected = run_step(model, step)[1]
    active = offload(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for is_trained_on in (True, False):
        active.attach()
        handle = model.transformer.h[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            step()
        handle.remove()
        if is_trained_on:
            assert_same_gradients(run_step(model, step)[1], expected)
            assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        active.detach()
        assert_nothing_left(active)
    assert_same_gradients(run_step(model, step)[1], expected)


@pytest.mark.parametrize("way", ["start_write", "start_read"])
def test_a_store_that_fails_in_its_own_words_is_a_storage_error_and_keeps_no_graph_alive(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = chain_step()
    store = FakeStore(capacity_bytes=1 << 20)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "the drive is gone")

    monkeypatch.setattr(store, way, fail)
    active = offload(model, host_budget="256KiB", ssd_budget="1MiB", open_store=lambda num_bytes: store)

    def train() -> None:
        with active:
            loss = step()  # held by this frame, which the error knows
            loss.backward()

    with pytest.raises(StorageError, match="the drive is gone") as caught:
        train()
    assert isinstance(caught.value.__cause__, OSError)
    del caught
    assert_nothing_left(active)


def test_ctrl_c_at_any_time_in_a_hook_leaves_the_grad_mode_as_it_was() -> None:
    """Forward that is broken off and begun anew would make no graph, and say nothing."""
    before, num_broken_off = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    model, _ = chain_step(1)
    try:
        with offload(model, min_bytes=MIB) as active:
            pack, hidden = active._tiers.cache.pack, torch.ones(8)
            for _ in range(300):
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2e-3))
                    try:
                        for _ in range(10_000):
                            pack(hidden)
                    except KeyboardInterrupt:
                        num_broken_off += 1
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert torch.is_grad_enabled(), f"not after {num_broken_off} times"
        assert num_broken_off > 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)
