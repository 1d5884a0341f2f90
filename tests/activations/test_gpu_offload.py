"""Saved tensors of a CUDA device: bits, memory, and a host that never waits for the device in forward.

Limits: as in `tests/runtime/test_gpu.py`, deterministic algorithms are on, or a plain loop would not repeat itself to the bit.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import overspill
from overspill.activations.links import CudaLink
from overspill.units import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
VOCAB, ROWS, LENGTH = 512, 4, 512


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def llama(dtype: torch.dtype = torch.bfloat16, *, num_layers: int = 6) -> LlamaForCausalLM:
    """Blocks whose saved tensors are megabytes, so that copies take as long as kernels."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=2048, num_hidden_layers=num_layers, num_attention_heads=8,
        max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", dtype)


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)).cuda()


def run(model: nn.Module, ids: torch.Tensor, *, is_autocast: bool = False) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16) if is_autocast else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def offload(model: nn.Module, **settings: Any) -> Any:
    return overspill.offload_activations(
        model, **{"host_budget": "2GiB", "min_bytes": "64KiB", "window": "8MiB", "amount": "everything", **settings}
    )


def assert_same(found: tuple[float, list[torch.Tensor]], expected: tuple[float, list[torch.Tensor]]) -> None:
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))


TIERS = {"host": {}, "ssd": {"host_budget": "64MiB", "ssd_budget": "2GiB"}}


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("amount", ["everything", "adaptive", "ssdtrain"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("is_autocast", [False, True], ids=["bf16", "autocast"])
def test_gradients_equal_plain_pytorch_bitwise(is_autocast: bool, tier: str, amount: str, recompute: str, tmp_path: Path) -> None:
    model = llama(torch.float32 if is_autocast else torch.bfloat16)
    seeds = range(10)  # amounts are decided anew up to the ninth
    expected = [run(model, batch(seed), is_autocast=is_autocast) for seed in seeds]
    place = {"ssd_dir": tmp_path / "ssd"} if tier == "ssd" else {}
    with offload(model, amount=amount, recompute=recompute, **TIERS[tier], **place) as active:
        for seed in seeds:
            assert_same(run(model, batch(seed), is_autocast=is_autocast), expected[seed])
        report = active.report()
        assert report.pinned_bytes > 0 and report.num_live == 0
    assert (report.ssd_bytes if tier == "ssd" else report.host_bytes) > 0
    assert (report.rebuilt_bytes > 0) == (recompute == "cheap")
    assert report.left_alone["cast_of_parameter" if is_autocast else "parameter"] > 0


@pytest.mark.parametrize("amount", ["everything", "adaptive"])
@pytest.mark.parametrize("tier", TIERS)
def test_streams_that_run_late_change_no_bit(tier: str, amount: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy may sleep on its stream, before or after its work, for up to 2 ms: a missing wait shows as other bits."""
    model = llama()
    expected = [run(model, batch(seed)) for seed in range(4)]
    start = CudaLink._start

    def late(self, stream, target, source, mark, after, is_timed):  # type: ignore[no-untyped-def]
        if delays.random() < 0.3:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(int(delays.random() * 4_000_000))
        end = start(self, stream, target, source, mark, after, is_timed)
        if delays.random() < 0.3:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(int(delays.random() * 4_000_000))
        return end

    monkeypatch.setattr(CudaLink, "_start", late)
    place = {"ssd_dir": tmp_path / "ssd"} if tier == "ssd" else {}
    for number in range(3):
        delays = random.Random(number)
        with offload(model, **TIERS[tier], **place, amount=amount, window=["64MiB", "1MiB", None][number]):
            for step in range(4 if amount == "everything" else 8):  # from the fourth or so on memory is let go by a pace
                assert_same(run(model, batch(step % 4)), expected[step % 4])


def peak_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Beyond the weights, of a second step. Without gradients before it: its beginning frees them, and they would be taken off its peak."""
    for _ in range(2):
        model.zero_grad()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_the_devices_peak_falls_by_what_has_left() -> None:
    """Of a deep model; what stays is a window's worth each way, the gradients, and what the head needs."""
    model, ids = llama(num_layers=16), batch()
    plain = peak_bytes(model, ids)
    with offload(model) as active:
        ours = peak_bytes(model, ids)
        packed = active.report().rounds[-1].packed_bytes
        window = active._cache().mover.window_bytes
    gradients = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert plain > packed, "the test needs a model whose peak is its saved tensors"
    assert ours <= plain - packed + 2 * window + gradients + 64 * MIB, (plain, ours, packed, window)
    assert ours < 0.7 * plain


def stack(depth: int) -> tuple[nn.Module, torch.Tensor]:
    """Nothing in it asks the device for a number, so whatever waits is ours."""

    def block() -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))

    torch.manual_seed(0)
    return nn.Sequential(*[block() for _ in range(depth)]).to("cuda", torch.bfloat16), torch.randn(4096, 1024).to("cuda", torch.bfloat16)


def test_the_host_does_not_wait_for_the_device() -> None:
    """Neither in an op that synchronises (torch's debug mode raises there) nor in an event: the device sleeps, and forward is over."""
    model, inputs = stack(6)
    with offload(model) as active:
        for _ in range(4):
            model(inputs).float().square().mean().backward()
        torch.cuda.synchronize()
        waits, begun = active.report().num_waits, time.perf_counter()
        model(inputs).float().square().mean().backward()
        torch.cuda.synchronize()
        took_s = time.perf_counter() - begun
        forward, backward = torch.cuda.Event(), torch.cuda.Event()
        torch.cuda._sleep(int(4e9 * max(1.0, 10 * took_s)))  # two seconds and more, at any clock rate of today
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = model(inputs).float().square().mean()
            forward.record()
            assert not forward.query(), "the device still sleeps while the host has all of forward behind it"
            loss.backward()
            backward.record()
            assert not backward.query(), "and all of backward"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert active.report().num_waits == waits


def test_rates_are_measured_and_amounts_follow_them() -> None:
    model, ids = llama(num_layers=8), batch()
    with offload(model, amount="adaptive") as active:
        for _ in range(8):
            run(model, ids)
    report = active.report()
    assert [item.is_planned for item in report.rounds[-3:]] == [True] * 3
    assert report.rates.d2h_bytes_per_s is not None and 1e9 < report.rates.d2h_bytes_per_s < 1e12
    assert report.rounds[-1].kept_bytes >= 0 and report.rounds[0].kept_bytes == 0


def test_a_device_budget_is_kept_whatever_it_costs() -> None:
    model, ids = llama(num_layers=8), batch()
    expected = run(model, ids)
    with offload(model, amount="adaptive", device_budget="16MiB") as active:
        for _ in range(6):
            assert_same(run(model, ids), expected)
        window = active._cache().mover.window_bytes
    assert all(item.kept_bytes <= 16 * MIB for item in active.report().rounds)
    assert active.report().device_peak_bytes <= 16 * MIB + 2 * window + 64 * MIB


def assert_a_kept_graph_and_an_exception_leave_nothing(**settings: Any) -> None:
    model, ids = llama(), batch()
    run(model, ids)
    model.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    active = offload(model, **settings)
    with pytest.raises(ZeroDivisionError), active:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        first = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(model.parameters(), first, strict=True))
        raise ZeroDivisionError
    del loss, first
    model.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    report = active.report()
    assert (report.num_live, report.host_used_bytes, report.ssd_used_bytes, report.pinned_bytes) == (0, 0, 0, 0)
    assert torch.cuda.memory_allocated() <= before + MIB


@pytest.mark.parametrize("tier", TIERS)
def test_a_kept_graph_and_an_exception_leave_nothing_on_the_device(tier: str, tmp_path: Path) -> None:
    place = {"ssd_dir": tmp_path / "ssd"} if tier == "ssd" else {}
    assert_a_kept_graph_and_an_exception_leave_nothing(**TIERS[tier], **place)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_lossy_forms_run_on_the_device_and_report_their_error(form: str) -> None:
    model, ids = llama(torch.float32), batch()
    active = offload(model, storage=form)
    error = active.measure_gradient_error(lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert 0 < error < 0.05
    report = active.report()
    assert report.stored_bytes < (0.6 if form == "bf16" else 0.4) * report.host_bytes


def test_checkpointed_and_compiled_blocks_give_their_own_bits() -> None:
    model, ids = llama(), batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    expected = run(model, ids)
    with offload(model) as active:
        for _ in range(2):
            assert_same(run(model, ids), expected)
    assert active.report().host_bytes > 0
    model = llama(num_layers=2)
    for block in model.model.layers:
        block.compile()
    run(model, ids)
    with offload(model) as active:
        expected = run(model, ids)
        assert_same(run(model, ids), expected)
    assert active.report().host_bytes > 0
