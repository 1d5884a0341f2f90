"""Host and device memory: exact sizes, budgets, and that freed memory is given back."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from overspill.errors import BudgetError
from overspill.tiers import DeviceMemory, HostMemory, Memory
from overspill.tiers import memory as memory_module
from overspill.tiers import pinned as pinned_module
from overspill.units import MIB

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def resident_bytes() -> int:
    """Resident memory of this process, counted from its page tables (statm is approximate on recent kernels)."""
    match = re.search(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert match
    return int(match.group(1)) * 1024


def present_bytes(address: int, num_bytes: int) -> int:
    """Of a range's own pages, by the kernel's page map: what else the process does meanwhile is not in it."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(address // mmap.PAGESIZE * 8)
        entries = file.read(-(-num_bytes // mmap.PAGESIZE) * 8)
    return sum(entry >> 7 for entry in entries[7::8]) * mmap.PAGESIZE


def make_memories(budget_bytes: int | None) -> list[Memory]:
    return [
        HostMemory(pin=False, budget_bytes=budget_bytes),
        DeviceMemory(torch.device("cpu"), budget_bytes=budget_bytes),
        *([DeviceMemory(torch.device("cuda"), budget_bytes=budget_bytes)] if torch.cuda.is_available() else []),
    ]


def test_resident_memory_grows_by_what_was_asked_and_falls_when_freed() -> None:
    size = 33 * MIB + 12345  # a caching host allocator would take 64 MiB
    memory = HostMemory(pin=False, budget_bytes=None)
    for name in ("warm-up", "a"):  # the first loads the code that runs here, which is resident too
        gc.collect()
        before = resident_bytes()
        tensor = memory.allocate(name, size)
        tensor.fill_(1)
        grown = resident_bytes() - before
        own = present_bytes(tensor.data_ptr(), size)
        assert memory.resident_bytes() == own, "the memory's own count is the page map's"
        view = tensor[5:10]  # a forgotten view does not keep the memory
        memory.free(name)
        left = resident_bytes() - before
        assert view.tolist() == [0] * 5 and memory.resident_bytes() == 0
    memory.allocate("b", 8 * MIB)[5 * MIB] = 1
    assert 0 < memory.resident_bytes() <= 2 * MIB, "only what was touched: a page, or a huge one"
    assert own == -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    assert grown <= 1.01 * size + mmap.PAGESIZE  # the process may have given back something else meanwhile
    assert left <= 0.01 * size + mmap.PAGESIZE


def test_memories_meet_their_protocol_and_allocate_aligned_zeros_of_exactly_the_asked_size() -> None:
    for memory in make_memories(None):
        assert isinstance(memory, Memory)
        for num_bytes in (1, 4095, 4096, 100_001):
            tensor = memory.allocate(f"t{num_bytes}", num_bytes)
            assert tensor.shape == (num_bytes,) and tensor.dtype == torch.uint8 and not tensor.any()
            alignment = mmap.PAGESIZE if tensor.device.type == "cpu" else 256
            assert tensor.data_ptr() % alignment == 0
        memory.close()
        assert memory.allocated_bytes == 0


def test_bytes_are_counted_rounded_and_the_peak_stays() -> None:
    for memory, granule in zip(make_memories(None), (mmap.PAGESIZE, 512, 512), strict=False):
        memory.allocate("a", granule + 1)
        memory.allocate("b", granule)
        assert memory.allocated_bytes == memory.peak_bytes == 3 * granule
        memory.free("a")
        assert (memory.allocated_bytes, memory.peak_bytes, memory.pinned_bytes) == (granule, 3 * granule, 0)
        memory.allocate("a", 1)
        memory.close()
        memory.close()


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda b: HostMemory(pin=False, budget_bytes=b), "--host-budget"),
        (lambda b: DeviceMemory(torch.device("cpu"), budget_bytes=b), "--device-budget"),
    ],
)
def test_an_exceeded_budget_names_the_allocation_both_numbers_and_the_flag(make, flag: str) -> None:
    memory: Memory = make(3 * 4096)
    memory.allocate("a", 8192)
    with pytest.raises(
        BudgetError, match=rf"layers\.7 needs 8\.00 KiB \(8192 B\) .* leaves 4\.00 KiB \(4096 B\); raise {flag} to at least 16384 B"
    ):
        memory.allocate("layers.7", 8192)
    assert memory.allocated_bytes == memory.peak_bytes == 8192
    memory.allocate("layers.7", 4096)
    memory.free("a")
    memory.allocate("a", 8192)
    memory.close()


def test_wrong_arguments_are_refused() -> None:
    for memory in make_memories(None):
        memory.allocate("a", 1)
        with pytest.raises(ValueError, match="a is already allocated"):
            memory.allocate("a", 1)
        with pytest.raises(ValueError, match="b is not allocated"):
            memory.free("b")
        with pytest.raises(ValueError, match="at least 1 byte"):
            memory.allocate("b", 0)
        memory.close()
        with pytest.raises(AssertionError, match="closed"):
            memory.allocate("b", 1)
    with pytest.raises(ValueError, match="cannot be negative"):
        HostMemory(pin=False, budget_bytes=-1)


def test_a_mapping_that_the_system_refuses_is_a_budget_error_and_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    memory = HostMemory(pin=False, budget_bytes=None)
    monkeypatch.setattr(memory_module, "map_anonymous", refuse)
    with pytest.raises(BudgetError, match=r"a needs 4.00 KiB but the system refused.*Cannot allocate memory.*--host-budget"):
        memory.allocate("a", 1)
    assert memory.allocated_bytes == 0


def test_refused_pinning_warns_once_and_falls_back_to_pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def refuse(address: int, num_bytes: int) -> str:
        attempts.append(num_bytes)
        return "cudaHostRegister failed with CUDA error 2: out of memory"

    monkeypatch.setattr(pinned_module, "cuda_register", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = HostMemory(pin=True, budget_bytes=None)
    with pytest.warns(RuntimeWarning, match=r"a: 4.00 KiB of host memory could not be pinned.*error 2.*ulimit -l.*--host-budget") as caught:
        tensors = [memory.allocate(name, 10) for name in ("a", "b")]
    assert len(caught) == 1 and attempts == [4096]
    assert memory.pinned_bytes == 0 and memory.pin_refusal is not None
    assert all(not tensor.any() for tensor in tensors)
    memory.close()


def test_pages_are_unpinned_before_they_are_dropped_and_counted_while_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}
    monkeypatch.setattr(pinned_module, "cuda_register", lambda address, num_bytes: pinned.update({address: num_bytes}))
    monkeypatch.setattr(pinned_module, "cuda_unregister", lambda address: None if pinned.pop(address) else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = HostMemory(pin=True, budget_bytes=None)
    first, second = memory.allocate("a", 5000), memory.allocate("b", 1)
    assert pinned == {first.data_ptr(): 8192, second.data_ptr(): 4096} and memory.pinned_bytes == 12288
    memory.free("a")
    assert pinned == {second.data_ptr(): 4096} and memory.pinned_bytes == 4096
    del memory
    gc.collect()
    assert pinned == {}  # also without close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="claims what happens without CUDA")
def test_pinning_without_cuda_says_so() -> None:
    memory = HostMemory(pin=True, budget_bytes=None)
    with pytest.warns(RuntimeWarning, match="this torch sees no CUDA device"):
        assert not memory.allocate("a", 10).is_pinned()
    memory.close()


@pytest.mark.gpu
@needs_cuda
def test_host_memory_is_pinned_exactly_and_unpinned_when_freed() -> None:
    memory = HostMemory(pin=True, budget_bytes=None)
    tensor = memory.allocate("a", 5 * MIB + 1)
    assert tensor.is_pinned() and memory.pinned_bytes == 5 * MIB + mmap.PAGESIZE
    on_device = tensor.fill_(7).to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert (on_device == 7).all()
    memory.free("a")
    assert not tensor.is_pinned() and memory.pinned_bytes == 0
    memory.close()


@pytest.mark.gpu
@needs_cuda
def test_a_refused_registration_leaves_cuda_usable() -> None:
    memory = HostMemory(pin=True, budget_bytes=None)
    tensor = memory.allocate("a", MIB)
    reason = pinned_module.cuda_register(tensor.data_ptr(), MIB)
    assert reason is not None and "already" in reason
    assert (torch.ones(8, device="cuda") * 2).sum().item() == 16
    memory.close()


@pytest.mark.gpu
@needs_cuda
def test_pinned_memory_dropped_without_close_can_be_mapped_and_pinned_again() -> None:
    for _ in range(3):
        memory = HostMemory(pin=True, budget_bytes=None)
        assert memory.allocate("a", 3 * MIB).is_pinned()
        del memory
        gc.collect()


@pytest.mark.gpu
@needs_cuda
def test_device_memory_takes_device_memory_and_returns_it_to_torch() -> None:
    memory = DeviceMemory(torch.device("cuda"), budget_bytes=None)
    before = torch.cuda.memory_allocated()
    tensor = memory.allocate("a", 3 * MIB + 5)
    assert torch.cuda.memory_allocated() - before == memory.allocated_bytes and tensor.data_ptr() % 256 == 0
    del tensor
    memory.free("a")
    assert torch.cuda.memory_allocated() == before
