"""Slots: exact size classes, reuse, budgets, and that using a slot after its release is caught."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overspill.errors import BudgetError
from overspill.tiers import DeviceMemory, HostMemory, SlotPool
from overspill.units import MIB


def make_pool(budget_bytes: int | None = None) -> tuple[HostMemory, SlotPool]:
    memory = HostMemory(pin=False, budget_bytes=budget_bytes)
    return memory, SlotPool(memory, "fetch")


def test_a_slot_has_exactly_the_asked_bytes_on_a_page() -> None:
    memory, pool = make_pool()
    slot = pool.acquire(5000)
    assert slot.tensor.shape == (5000,) and slot.tensor.data_ptr() % 4096 == 0 and slot.num_bytes == 5000
    assert memory.allocated_bytes == 8192
    memory.close()


def test_a_released_slot_is_used_again_by_its_class_and_by_no_other() -> None:
    memory, pool = make_pool()
    slot = pool.acquire(8192)
    address = slot.tensor.data_ptr()
    slot.release()
    with pool.acquire(4096) as smaller, pool.acquire(5000) as same_class:
        assert smaller.tensor.data_ptr() != address and same_class.tensor.data_ptr() == address
    assert memory.allocated_bytes == 12288
    memory.close()


def test_a_pool_of_mixed_sizes_takes_the_sum_of_its_classes_and_not_the_largest_for_each() -> None:
    memory, pool = make_pool()
    slots = [pool.acquire(num_bytes) for num_bytes in (MIB, 4096, 4096, 100)]
    assert memory.allocated_bytes == MIB + 3 * 4096
    assert (pool.used_bytes, pool.peak_bytes, pool.waste_bytes) == (MIB + 3 * 4096, MIB + 3 * 4096, 3996)
    for slot in slots:
        slot.release()
    assert (pool.used_bytes, pool.waste_bytes, pool.resident_bytes) == (0, MIB + 3 * 4096, MIB + 3 * 4096)
    assert pool.trim() == MIB + 3 * 4096 and memory.allocated_bytes == pool.waste_bytes == 0
    assert pool.peak_bytes == MIB + 3 * 4096


def test_using_or_releasing_a_released_slot_is_asserted() -> None:
    memory, pool = make_pool()
    slot = pool.acquire(1)
    slot.release()
    with pytest.raises(AssertionError, match="fetch/slot-0 is used after its release"):
        _ = slot.tensor
    with pytest.raises(AssertionError, match="fetch/slot-0 is released twice"):
        slot.release()
    other = pool.acquire(1)
    with pytest.raises(AssertionError):
        slot.release()
    with pytest.raises(AssertionError, match="closed with 4096 B of slots lent"):
        pool.close()
    other.release()
    pool.close()
    assert memory.allocated_bytes == 0


def test_idle_slots_of_other_classes_give_way_and_lent_ones_do_not() -> None:
    memory, pool = make_pool(budget_bytes=4 * 4096)
    with pool.acquire(3 * 4096), pytest.raises(BudgetError, match=r"fetch/slot-1 needs 8.00 KiB.*--host-budget"):
        pool.acquire(8192)
    with pool.acquire(4 * 4096) as slot:
        assert slot.tensor.numel() == memory.allocated_bytes == 4 * 4096
    with pytest.raises(BudgetError):
        pool.acquire(5 * 4096)
    assert pool.used_bytes == 0


def test_an_empty_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="fetch: a slot has at least 1 byte"):
        make_pool()[1].acquire(0)


def test_a_pool_works_on_device_memory() -> None:
    pool = SlotPool(DeviceMemory(torch.device("cpu"), budget_bytes=8192), "device")
    with pool.acquire(8192) as slot:
        assert slot.tensor.device.type == "cpu"
    with pytest.raises(BudgetError, match="--device-budget"):
        pool.acquire(8193)


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), max_size=40))
def test_counters_follow_any_order_of_acquire_and_release(steps: list[tuple[bool, int]]) -> None:
    memory, pool = make_pool()
    lent = []
    for is_release, num_bytes in steps:
        if is_release and lent:
            slot = lent.pop(num_bytes % len(lent))
            assert (slot.tensor == slot.num_bytes % 251).all()  # nobody else wrote to it
            slot.release()
        else:
            lent.append(pool.acquire(num_bytes))
            lent[-1].tensor.fill_(num_bytes % 251)
        assert pool.used_bytes == sum(-(-slot.num_bytes // 4096) * 4096 for slot in lent)
        assert pool.waste_bytes == memory.allocated_bytes - sum(slot.num_bytes for slot in lent)
        assert pool.resident_bytes == memory.allocated_bytes == memory.peak_bytes == pool.peak_bytes
    for slot in lent:
        slot.release()
    pool.close()
    assert memory.allocated_bytes == 0
