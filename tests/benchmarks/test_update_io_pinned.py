"""The benchmarks of update, I/O and pinned memory: they run small, and what they conclude follows from their figures."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from loaded_python import run_loaded

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(path: str) -> ModuleType:
    """By path: several benchmarks are called `run`."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), BENCHMARKS / f"{path}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_price_of_the_look_has_a_row_for_every_rule_and_format(tmp_path: Path) -> None:
    command = [BENCHMARKS / "update" / "check.py", "--out", tmp_path / "o.json"]
    command += ["--parameters", "65536", "--pairs", "3", "--threads", "2", "--where", "memory"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = run_loaded(*command, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert {(row["optimizer"], row["state_format"]) for row in rows} == {
        (optimizer, state_format) for optimizer in ("adamw", "sgd_momentum", "sgd", "lion") for state_format in ("fp32", "bf16", "int8")
    }
    for row in rows:
        assert row["low"] <= row["cost_fraction"] <= row["high"] and row["pairs"] == 3 and row["with_g_parameters_per_s"] > 0
    assert "from memory at most" in done.stdout


def one_run(*, is_backwards: bool, io_uring: float, cpu: float = 1.0) -> dict[str, Any]:
    """Threads at 2 GB/s and 1 s of CPU a GB, io_uring at `io_uring` GB/s."""

    def moved(rate: float, cpu_s: float) -> dict[str, Any]:
        return {way: {"gb_per_s": rate, "cpu_s_per_gb": cpu_s} for way in ("write", "read")}

    backends = {"threads": {"4 MiB": moved(2.0, 1.0)}} | {n: {"4 MiB": moved(io_uring, cpu)} for n in ("io_uring", "io_uring, registered")}
    return {"is_backwards": is_backwards, "results": {"plain": moved(1.9, 0.1), "plain-4": moved(2.5, 0.1), **backends}}


@pytest.mark.parametrize(
    ("forwards", "backwards", "cpu", "winner"),
    [
        (2.4, 2.2, 1.0, "io_uring"),
        (2.4, 1.9, 1.0, "undecided"),  # the order decided, not the backend
        (1.8, 1.7, 1.0, "threads"),
        (2.0, 2.0, 0.6, "io_uring"),  # on CPU time
        (1.5, 1.5, 0.6, "threads"),  # which does not outweigh bandwidth
    ],
)
def test_a_backend_wins_only_in_both_orders(forwards: float, backwards: float, cpu: float, winner: str) -> None:
    orders = load("io/orders")
    runs = [one_run(is_backwards=False, io_uring=forwards, cpu=cpu), one_run(is_backwards=True, io_uring=backwards, cpu=cpu)]
    cases = orders.judge(runs)
    assert [case["winner"] for case in cases] == [winner, winner]
    assert cases[0]["gain_by_order"] == pytest.approx([forwards / 2 - 1, backwards / 2 - 1]) and cases[0]["of_plain"] == pytest.approx(0.8)
    assert winner in orders.describe(cases[0])


def test_without_io_uring_there_is_no_case() -> None:
    run = one_run(is_backwards=False, io_uring=1.0)
    del run["results"]["io_uring"]
    assert load("io/orders").judge([run, run]) == []


def test_resident_pages_are_told_apart_by_whose_they_are() -> None:
    resident = load("pinned/resident")
    before, after = resident.Reading(), resident.Reading()
    pages, others = (mmap.mmap(-1, count * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for count in (40, 300))
    for mapping in (pages, others):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert resident.own_bytes(address, 40 * mmap.PAGESIZE) == 0
    before.take()
    for number in range(7):
        pages[number * 3 * mmap.PAGESIZE] = 1
    for number in range(300):
        others[number * mmap.PAGESIZE] = 1
    after.take()
    own = resident.own_bytes(address, 40 * mmap.PAGESIZE)
    assert own == 7 * mmap.PAGESIZE
    elsewhere = resident.grown_elsewhere(before, after, own)
    assert 300 <= elsewhere["anonymous"] // mmap.PAGESIZE <= 310  # other threads of this process may touch pages, too
