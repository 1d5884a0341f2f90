"""Claims about a whole probe of a machine with a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from overspill.probe.cache import load_hardware
from overspill.probe.machine import probe_machine
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import MachineFile, parse_machine_file
from overspill.units import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MachineFile, float, Path]]:
    """The command as a person calls it, in a process of its own: the file, its wall-clock seconds, the drive's directory."""
    folder = tmp_path_factory.mktemp("ssd")
    cache = tmp_path_factory.mktemp("cache")
    begin_s = time.perf_counter()
    code = "from overspill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "probe", "--ssd-dir", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    took_s = time.perf_counter() - begin_s
    assert done.returncode == 0, done.stderr
    print(f"\n{took_s:.1f} s\n{done.stdout}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield parse_machine_file(done.stdout, "stdout"), took_s, folder


def test_a_whole_probe_with_a_gpu_ends_within_30_s_and_leaves_nothing(probed: tuple[MachineFile, float, Path]) -> None:
    file, took_s, folder = probed
    assert took_s < 30 and list(folder.iterdir()) == []
    assert [note for note in file.notes if "was not measured" in note] == []


def test_a_gpus_figures_are_there_and_fit_each_other(probed: tuple[MachineFile, float, Path]) -> None:
    file, _, _ = probed
    rates, found = file.rates, file.capacities
    assert file.identity.device == torch.cuda.get_device_name(DEVICE) and file.identity.device_uuid and file.identity.driver
    assert found.device_free_bytes and found.device_total_bytes and found.device_free_bytes <= found.device_total_bytes
    assert [link.unit_bytes for link in rates.link] == [128 * MIB, 32 * MIB]
    for link in rates.link:
        assert link.is_pinned and 2e9 < link.h2d.median_per_s < 1e12 and 2e9 < link.d2h.median_per_s < 1e12
        assert 0.4 < link.duplex_factor < 1.1, "both directions together do not exceed what they reach apart"
        assert link.h2d.spread_fraction < 0.5
    assert rates.update_parameter_dtype == "bfloat16" and set(rates.update) == {"fp32", "bf16", "int8"}
    assert rates.host_copy is not None and rates.host_in_place is not None
    moved_per_parameter = {"fp32": 26, "bf16": 14}
    for name, num_bytes in moved_per_parameter.items():
        assert rates.update[name].median_per_s * num_bytes < 1.5 * rates.host_in_place.median_per_s, "no update beats its bandwidth"
    compute = rates.compute
    assert compute is not None and compute.alone.median_per_s > 1e13, "matrix units of bf16"
    assert compute.compute_slowdown is not None and 0.9 < compute.compute_slowdown < 3
    assert compute.copies_slowdown is not None and 0.8 < compute.copies_slowdown < 5
    assert rates.host_set_bytes >= 256 * MIB and rates.launches is not None and 3e3 < rates.launches.median_per_s < 1e6
    assert rates.update_beside_copies is not None and rates.copies_beside_update is not None
    assert rates.update_beside_copies.min_per_s < 1.1 * rates.update["fp32"].max_per_s, "company makes no update quicker"
    assert compute.attention is not None and 0.05 < compute.attention.rate.median_per_s / compute.alone.median_per_s < 1.2
    assert compute.elementwise is not None and compute.scattered is not None and compute.device_memory is not None
    assert compute.scattered.median_per_s < 1.5 * compute.device_memory.median_per_s
    assert compute.elementwise.median_per_s < 2 * compute.device_memory.median_per_s, "a cache may keep some of it"
    assert len(rates.ssd) == 2 and all(drive.read.median_per_s > 0 for drive in rates.ssd)


def test_predictions_on_the_gpu_use_the_file_and_on_the_cpu_they_do_not(probed: tuple[MachineFile, float, Path]) -> None:
    file, _, folder = probed
    hardware = load_hardware(HardwareSpec(), DEVICE, [str(folder)])
    assert hardware.source.startswith("measured") and "SSD" not in hardware.source
    assert hardware.h2d_bytes_per_s == file.rates.link[1].h2d.median_per_s
    assert load_hardware(HardwareSpec(), torch.device("cpu"), []) == HardwareSpec()
    assert json.loads(file.to_json())["identity"]["device"] != "cpu"


def test_a_probe_gives_the_devices_memory_back() -> None:
    torch.cuda.init()
    torch.zeros(1, device=DEVICE)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(DEVICE)
    probe_machine(DEVICE, [])
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) - held <= 64 * MIB, "a library's workspace may stay"
