"""GPUDirect Storage with a CUDA device: bits, order of streams, memory.

Three ways: the stand-in, which moves a GPU's bytes by ordinary copies on the stream that it is given; kvikio itself, where it is installed,
through its own host memory (what `gpudirect=True` refuses outside of tests); and kvikio past host memory, where nvidia-fs is there.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from stand_in_kvikio import install
from test_gpu_offload import assert_a_kept_graph_and_an_exception_leave_nothing, assert_same, batch, deterministic, llama, offload, run

from overspill.tiers import gpudirect

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
__all__ = ["deterministic"]


@pytest.fixture(params=["stand-in", "kvikio through host memory", "kvikio past host memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if request.param == "stand-in":
        install(monkeypatch, tmp_path)
        return "stand-in"
    pytest.importorskip("kvikio", reason="pip install 'overspill[gds]'", exc_type=Exception)
    if request.param == "kvikio through host memory":
        monkeypatch.setattr(gpudirect, "NEEDS_NVIDIA_FS", False)
    elif not importlib.import_module("kvikio.cufile_driver").get("is_gds_available"):
        pytest.skip("needs the nvidia-fs kernel module")
    return str(request.param)


@pytest.mark.parametrize("amount", ["everything", "adaptive"])
@pytest.mark.parametrize("window", ["1MiB", "64MiB"])
def test_gradients_equal_plain_pytorch_bitwise(window: str, amount: str, way: str, tmp_path: Path) -> None:
    model = llama()
    expected = [run(model, batch(seed)) for seed in range(5)]
    place = {"host_budget": "64KiB", "ssd_dir": tmp_path / "ssd", "ssd_budget": "2GiB", "gpudirect": True}
    with offload(model, amount=amount, window=window, **place) as active:
        for seed in range(5):
            assert_same(run(model, batch(seed)), expected[seed])
        report = active.report()
    assert report.ssd_bytes > 0 and report.num_live == 0 and report.pinned_bytes <= 64 * 1024


@pytest.mark.parametrize("is_own_stream", [False, True], ids=["default stream", "own stream"])
def test_a_device_that_runs_late_changes_no_bit(is_own_stream: bool, way: str, tmp_path: Path) -> None:
    """Before each block the device sleeps, so the host is far ahead of it: a transfer that does not wait for compute moves other bytes."""
    model = llama()
    expected = run(model, batch())
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(4_000_000))
        block.register_full_backward_pre_hook(lambda *_: torch.cuda._sleep(4_000_000))
    stream = torch.cuda.Stream() if is_own_stream else torch.cuda.current_stream()
    torch.cuda.synchronize()
    place = {"host_budget": "64KiB", "ssd_dir": tmp_path / "ssd", "ssd_budget": "2GiB", "gpudirect": True}
    with torch.cuda.stream(stream), offload(model, window="4MiB", **place):
        for _ in range(3):
            found = run(model, batch())
            torch.cuda.synchronize()
            assert_same(found, expected)


def test_a_kept_graph_and_an_exception_leave_nothing_on_the_device(way: str, tmp_path: Path) -> None:
    assert_a_kept_graph_and_an_exception_leave_nothing(host_budget="64KiB", ssd_dir=tmp_path / "ssd", ssd_budget="2GiB", gpudirect=True)
