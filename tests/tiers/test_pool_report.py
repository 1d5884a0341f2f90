"""Pools say what they hold and waste, keep to their limit, and waste next to nothing on the shapes of real models."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_python import run_loaded
from rich.console import Console

from overspill.errors import BudgetError
from overspill.report.tables import describe_pools, pool_table
from overspill.tiers import HostMemory, SlotPool
from overspill.units import MIB

ROOT = Path(__file__).parents[2]
PAGE = 4096


def make_pool(limit_bytes: int | None = None) -> tuple[HostMemory, SlotPool]:
    memory = HostMemory(pin=False, budget_bytes=None)
    return memory, SlotPool(memory, "host", limit_bytes=limit_bytes)


def test_the_report_equals_a_count_by_hand() -> None:
    _, pool = make_pool()
    large = pool.acquire(10 * PAGE)
    small = [pool.acquire(PAGE - 96) for _ in range(3)]
    large.release()
    small.pop().release()
    small.append(pool.acquire(PAGE))  # the idle one again
    odd = pool.acquire(PAGE + 1)
    report = pool.report()
    assert [(item.slot_bytes, item.used_bytes, item.wasted_bytes, item.idle_bytes, item.peak_bytes) for item in report.classes] == [
        (10 * PAGE, 0, 0, 10 * PAGE, 10 * PAGE),
        (2 * PAGE, 2 * PAGE, PAGE - 1, 0, 2 * PAGE),
        (PAGE, 3 * PAGE, 2 * 96, 0, 3 * PAGE),
    ]
    assert [item.most_in_flight for item in report.classes] == [1, 1, 3]
    assert (report.used_bytes, report.wasted_bytes, report.idle_bytes) == (5 * PAGE, PAGE - 1 + 192, 10 * PAGE)
    assert report.peak_bytes == pool.peak_bytes == 15 * PAGE and report.most_in_flight == 4
    assert report.peak_asked_bytes == 10 * PAGE + 3 * (PAGE - 96)
    assert report.waste_fraction == 1 - report.peak_asked_bytes / (15 * PAGE)
    assert report.one_size_bytes == 4 * 10 * PAGE
    assert (report.num_created, report.num_trimmed) == (5, 0)
    for slot in (*small, odd):
        slot.release()
    pool.trim()
    report = pool.report()
    assert (report.used_bytes, report.idle_bytes, report.peak_bytes, report.num_trimmed) == (0, 0, 15 * PAGE, 5)


def test_the_pool_table_has_a_row_a_class_and_a_sum_a_pool() -> None:
    _, pool = make_pool()
    pool.acquire(2 * MIB).release()
    pool.acquire(MIB)
    console = Console(file=io.StringIO(), width=160)
    console.print(pool_table([pool.report()]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "MiB" in line]
    assert rows == [
        ["2.00 MiB", "1", "–", "–", "2.00 MiB", "2.00 MiB", "", "", ""],
        ["1.00 MiB", "1", "1.00 MiB", "–", "–", "1.00 MiB", "", "", ""],
        ["host in all", "1", "1.00 MiB", "–", "2.00 MiB", "3.00 MiB", "33.3%", "2.00 MiB", "0.0%"],
    ]
    assert describe_pools([pool.report()]).startswith("host pool 3.00 MiB at most, 33.3% of it waste (slots of one size: 2.00 MiB")
    assert describe_pools([make_pool()[1].report()]) == ""


def test_a_new_class_takes_the_room_of_the_slot_that_was_idle_longest_and_of_no_more() -> None:
    memory, pool = make_pool(limit_bytes=10 * PAGE)
    first, second, third = pool.acquire(3 * PAGE), pool.acquire(2 * PAGE), pool.acquire(4 * PAGE)
    kept = third.tensor.data_ptr()
    for slot in (second, first, third):
        slot.release()
    pool.acquire(5 * PAGE).release()  # frees 2, then 3 pages: exactly enough with the page that was free
    assert pool.resident_bytes == memory.allocated_bytes == 9 * PAGE
    assert pool.report().num_trimmed == 2
    assert pool.acquire(4 * PAGE).tensor.data_ptr() == kept


def test_what_does_not_fit_beside_the_slots_lent_is_refused_with_the_numbers() -> None:
    memory, pool = make_pool(limit_bytes=4 * PAGE)
    slot = pool.acquire(3 * PAGE)
    with pytest.raises(
        BudgetError, match=r"host/slot-1 needs 8.00 KiB \(8192 B\) but .* 16.00 KiB, leaves 4.00 KiB \(4096 B\) beside what is lent"
    ):
        pool.acquire(2 * PAGE)
    slot.release()
    pool.limit_bytes = 2 * PAGE
    pool.acquire(2 * PAGE)
    assert memory.allocated_bytes == 2 * PAGE


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 30), steps=st.lists(st.tuples(st.booleans(), st.integers(1, 12 * PAGE)), max_size=50))
def test_no_order_of_acquire_and_release_makes_a_pool_exceed_its_limit(limit: int, steps: list[tuple[bool, int]]) -> None:
    memory, pool = make_pool(limit_bytes=limit * PAGE)
    lent = []
    for is_release, num_bytes in steps:
        if is_release and lent:
            lent.pop(num_bytes % len(lent)).release()
            continue
        used, size = pool.used_bytes, -(-num_bytes // PAGE) * PAGE
        try:
            lent.append(pool.acquire(num_bytes))
            assert used + size <= limit * PAGE
        except BudgetError:
            assert used + size > limit * PAGE  # only what is lent can be in the way
        report = pool.report()
        assert pool.resident_bytes == memory.allocated_bytes <= memory.peak_bytes == report.peak_bytes <= limit * PAGE
        assert report.used_bytes + report.idle_bytes == pool.resident_bytes
        assert report.wasted_bytes + report.idle_bytes == pool.waste_bytes
    for slot in lent:
        slot.release()
    pool.close()
    assert memory.allocated_bytes == 0


def test_pools_for_the_shapes_of_four_models_waste_at_most_5_percent(tmp_path: Path) -> None:
    """With the limit that the schedule needs. Two blocks: blocks are alike, and the schedule holds no more of them at a time."""
    import json

    out = tmp_path / "pools.json"
    command = ["benchmarks/pinned/pool_shapes.py", "--blocks", "2", "--out", str(out)]
    done = run_loaded(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    models = json.loads(out.read_text())["models"]
    assert list(models) == ["Llama-3.1-8B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B"]
    for name, model in models.items():
        for tier, pool in model["pools"].items():
            assert 0 < pool["asked_bytes"] <= pool["peak_bytes"] and pool["waste_fraction"] <= 0.05, (name, tier)
            assert pool["one_size_bytes"] > 1.2 * pool["peak_bytes"], (name, tier)
    tensors = {name: round(model["slots_of_tensors"]["one_size_waste_fraction"], 3) for name, model in models.items()}
    assert tensors == {"Llama-3.1-8B": 0.823, "Qwen2.5-7B": 0.822, "Qwen2.5-14B": 0.831, "Qwen2.5-32B": 0.797}
