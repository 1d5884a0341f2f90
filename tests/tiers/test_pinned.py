"""Pinned memory: exactly what was asked, under a cap, given back with its last view; and what happens where it is refused."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import overspill
from overspill.errors import BudgetError
from overspill.tiers import DeviceMemory, HostMemory
from overspill.tiers import mapped as mapped_module
from overspill.tiers import pinned as pinned_module
from overspill.tiers.mapped import HUGE_PAGE_BYTES, map_anonymous, nearest_node, populate, prefer_node
from overspill.tiers.pinned import CopyRates, PageLocker, hold_until
from overspill.units import MIB, align_up

PAGE = mmap.PAGESIZE
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeCuda:
    """Registers ranges in a dict, and says no from a limit on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit_bytes: int | None = None) -> None:
        self.locked: dict[int, int] = {}
        self.log: list[str] = []
        self.limit_bytes = limit_bytes
        monkeypatch.setattr(pinned_module, "cuda_register", self._register)
        monkeypatch.setattr(pinned_module, "cuda_unregister", self._unregister)
        monkeypatch.setattr(pinned_module, "node_of_device", lambda device: None)
        monkeypatch.setattr(pinned_module, "_process_locker", PageLocker(is_wanted=True, flag="budget_bytes"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def _register(self, address: int, num_bytes: int) -> str | None:
        if self.limit_bytes is not None and sum(self.locked.values()) + num_bytes > self.limit_bytes:
            return "cudaHostRegister failed with CUDA error 2: out of memory"
        self.locked[address] = num_bytes
        self.log.append("register")
        return None

    def _unregister(self, address: int) -> str | None:
        del self.locked[address]
        self.log.append("unregister")
        return None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def resident_pages(address: int, num_bytes: int) -> int:
    """Pages of a range that are in memory, by the kernel's page map."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        entries = file.read(num_bytes // PAGE * 8)
    return sum(entries[index + 7] >> 7 for index in range(0, len(entries), 8))


# -- exact size ------------------------------------------------------------------------------------------------------


def test_a_block_becomes_resident_to_the_page_and_never_to_the_huge_page() -> None:
    """In a process of its own, whose neighbouring mappings do not grow meanwhile."""
    code = textwrap.dedent(
        """
        import re, sys
        from overspill.tiers.mapped import map_anonymous, populate
        from overspill.units import align_up
        def resident():
            return int(re.search("Rss: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1]) * 1024
        def own(block):  # whatever else the process gives back or takes meanwhile
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                file.seek(block.address // 4096 * 8)
                return sum(entry >> 7 for entry in file.read(block.num_bytes // 4096 * 8)[7::8]) * 4096
        for size in (1, 3 << 20, 5000, 2 << 20, (2 << 20) + 1, (4 << 20) - 1, (4 << 20) + 4097, 33333333, (64 << 20) + 1):
            for round in range(2):  # the first loads code, and starts threads
                before = resident()
                block = map_anonymous(size)
                populate(block.address, block.num_bytes)
                grown = resident() - before
                present = own(block)
                del block
            assert present == align_up(size, 4096), (size, present)
            assert grown <= 1.01 * align_up(size, 4096) + 16384, (size, grown)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_block_of_huge_pages_starts_on_one_and_a_small_block_on_a_page() -> None:
    for num_bytes in (1, HUGE_PAGE_BYTES - PAGE, HUGE_PAGE_BYTES, 5 * MIB + 1):
        block = map_anonymous(num_bytes)
        tensor = block.tensor(num_bytes)
        assert tensor.data_ptr() == block.address and tensor.shape == (num_bytes,) and not tensor.any()
        assert block.address % (HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else PAGE) == 0
        tensor.fill_(3)  # to the last byte


@pytest.mark.parametrize("num_threads", [None, 1, 2, 5])
def test_pages_touched_by_any_number_of_threads_keep_their_bytes(num_threads: int | None) -> None:
    block = map_anonymous(9 * MIB + PAGE)
    tensor = block.tensor(block.num_bytes)
    tensor[::100_000] = 7
    populate(block.address, block.num_bytes, num_threads=num_threads)
    assert resident_pages(block.address, block.num_bytes) == block.num_bytes // PAGE
    assert int(tensor.sum()) == 7 * len(tensor[::100_000])


def test_a_kernel_without_populate_has_its_pages_touched_by_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_module, "_MADV_POPULATE_WRITE", 9999)
    block = map_anonymous(MIB)
    tensor = block.tensor(MIB)
    tensor[5] = 9
    populate(block.address, block.num_bytes)
    assert resident_pages(block.address, MIB) == MIB // PAGE and tensor[5] == 9


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64]),
)
def test_a_pinned_tensor_is_zeros_of_its_shape_and_dtype(shape: list[int], dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no GPU here
        tensor = overspill.pinned_empty(shape, dtype)
    assert tensor.shape == torch.Size(shape) and tensor.dtype == dtype and not tensor.any() and tensor.is_contiguous()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # no GPU here
def test_sizes_may_be_whole_numbers_of_numpy_as_torch_takes_them() -> None:
    assert overspill.pinned_empty((np.int64(3), np.int32(2))).shape == (3, 2)  # type: ignore[arg-type]
    assert overspill.pinned_empty(np.int64(4), budget_bytes=np.int64(0)).shape == (4,)  # type: ignore[arg-type]


def test_wrong_sizes_are_refused_with_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"sizes cannot be negative, got \(3, -1\)"):
        overspill.pinned_empty((3, -1))
    with pytest.raises(ValueError, match="budget cannot be negative, got -5 B"):
        overspill.pinned_empty(3, budget_bytes=-5)
    with pytest.raises(ValueError, match="budget is a whole number of bytes, got '1GiB'"):
        overspill.pinned_empty(3, budget_bytes="1GiB")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"torch.float32 needs 4194304.00 TiB, which the system refused to map"):
        overspill.pinned_empty(1 << 60)
    with pytest.raises(ValueError, match="pinned memory cannot be negative"):
        HostMemory(pin=True, budget_bytes=None, pinned_budget_bytes=-1)


# -- lifetime --------------------------------------------------------------------------------------------------------


def test_memory_is_unpinned_when_the_last_view_dies_and_not_before(cuda: FakeCuda) -> None:
    tensor = overspill.pinned_empty((100, 100))
    address = tensor.data_ptr()
    assert cuda.locked == {address: 40960}
    view = tensor.view(-1)[5:10].view(torch.uint8)
    array = tensor.numpy()
    del tensor
    gc.collect()
    assert cuda.locked and view.tolist() == [0] * 20
    array[3, 3] = 5
    del view
    gc.collect()
    assert cuda.locked  # numpy still looks at it
    del array
    gc.collect()
    assert cuda.locked == {}


def test_memory_that_is_gone_is_unmapped(cuda: FakeCuda) -> None:
    def mapped_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE

    before = mapped_bytes()
    for _ in range(50):
        overspill.pinned_empty(4 * MIB, torch.uint8)
    assert mapped_bytes() - before < 20 * MIB


def test_memory_dies_with_a_cycle_and_from_another_thread(cuda: FakeCuda) -> None:
    holder: list[object] = [overspill.pinned_empty(10)]
    holder.append(holder)
    del holder
    gc.collect()
    tensors = [overspill.pinned_empty(1000) for _ in range(20)]
    threads = [threading.Thread(target=lambda: tensors.pop()) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cuda.locked == {} and cuda.log.count("unregister") == 21


def test_threads_that_allocate_and_free_never_share_memory(cuda: FakeCuda) -> None:
    wrong: list[int] = []

    def work(mark: int) -> None:
        for size in range(1, 60):
            tensor = overspill.pinned_empty(size * 500, torch.uint8).fill_(mark)
            if int((tensor != mark).sum()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong and cuda.locked == {}


def test_memory_with_a_copy_in_flight_is_unpinned_after_its_event(cuda: FakeCuda) -> None:
    class Event:
        def __init__(self, is_done: bool) -> None:
            self.is_done = is_done

        def query(self) -> bool:
            return self.is_done

        def synchronize(self) -> None:
            cuda.log.append("synchronize")

    tensor = overspill.pinned_empty(100)
    hold_until(tensor[5:], Event(is_done=True))
    hold_until(tensor.view(10, 10)[3], Event(is_done=False))  # forgets the one that is done
    del tensor
    gc.collect()
    assert cuda.log == ["register", "synchronize", "unregister"]


def test_a_forked_child_unregisters_nothing(cuda: FakeCuda) -> None:
    tensor = overspill.pinned_empty(10_000)
    child = os.fork()
    if child == 0:
        del tensor
        gc.collect()
        os._exit(0 if cuda.log == ["register"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(cuda.locked) == 1 and not tensor.any()


# -- budget and refusal ----------------------------------------------------------------------------------------------


def test_locked_bytes_never_exceed_the_budget_and_one_warning_has_both_prices(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = CopyRates(h2d_bytes_per_s=55e9, d2h_bytes_per_s=52e9), CopyRates(h2d_bytes_per_s=9e9, d2h_bytes_per_s=8e9)
    asked: list[int] = []
    monkeypatch.setattr(pinned_module, "measure_price", lambda num_bytes: asked.append(num_bytes) or rates)
    memory = HostMemory(pin=True, budget_bytes=None, pinned_budget_bytes=10 * MIB)
    memory.allocate("a", 6 * MIB)
    with pytest.warns(
        RuntimeWarning,
        match=r"b: 5.00 MiB .* stay pageable, because 6.00 MiB are pinned and --pinned-budget is 10.00 MiB \(measured here: "
        r"pinned 55.0 GB/s to the GPU and 52.0 GB/s from it, pageable 9.0 GB/s to the GPU and 8.0 GB/s from it\); "
        r"raise --pinned-budget to at least 11534336 B",
    ) as caught:
        memory.allocate("b", 5 * MIB)
        memory.allocate("c", 7 * MIB)
        memory.allocate("d", 4 * MIB)  # fits
    assert len(caught) == 1 and asked == [4 * MIB]  # the measurement kept to the budget as well
    assert memory.pinned_bytes == sum(cuda.locked.values()) == 10 * MIB and memory.pin_refusal is None
    memory.free("a")
    memory.allocate("e", 6 * MIB)
    assert memory.pinned_bytes == 10 * MIB and memory.allocated_bytes == 22 * MIB
    memory.close()
    assert cuda.locked == {}


def test_a_budget_of_nothing_pins_nothing_and_says_that_it_was_not_measured(cuda: FakeCuda) -> None:
    with pytest.warns(RuntimeWarning, match=r"budget_bytes is 0 B \(copies are slower .* not measured\)"):
        tensor = overspill.pinned_empty(10, budget_bytes=0)
    assert cuda.log == [] and not tensor.any()


def test_states_stay_pageable_and_only_locked_bytes_are_counted(cuda: FakeCuda) -> None:
    memory = HostMemory(pin=True, budget_bytes=None)
    memory.allocate("layers.0.parameter", 3 * MIB)
    states = memory.allocate("layers.0.state", 5 * MIB, pinned=False)
    assert list(cuda.locked.values()) == [3 * MIB] and memory.pinned_bytes == 3 * MIB
    assert memory.allocated_bytes == 8 * MIB and states.data_ptr() % HUGE_PAGE_BYTES == 0
    memory.close()
    device = DeviceMemory(torch.device("cpu"), budget_bytes=None)
    assert device.allocate("a", 1, pinned=False).numel() == 1


def test_a_refusal_leaves_a_pageable_tensor_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, limit_bytes=MIB)
    small = overspill.pinned_empty(1000)
    with pytest.warns(RuntimeWarning, match=r"pinned_empty\(1000000,\).*error 2: out of memory.*ulimit -l.*raise the limit") as caught:
        large = overspill.pinned_empty(1_000_000).fill_(2)
        overspill.pinned_empty(10)
    assert len(caught) == 1 and len(fake.locked) == 1 and int(large.sum()) == 2_000_000
    del small
    gc.collect()
    assert fake.locked == {}


def test_everything_works_at_a_lock_limit_of_64_kib() -> None:
    """Registering needs no `mlock` of ours; without CUDA the memory is plain."""
    code = textwrap.dedent(
        """
        import resource, warnings
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        import torch, overspill
        from overspill.tiers import HostMemory
        warnings.simplefilter("ignore", RuntimeWarning)
        memory = HostMemory(pin=True, budget_bytes=None)
        tensor = memory.allocate("a", 20_000_001).fill_(1)
        other = overspill.pinned_empty((1000, 1000)).fill_(1)
        assert int(tensor.sum()) == 20_000_001 and int(other.sum()) == 1_000_000
        assert torch.cuda.is_available() or memory.pinned_bytes == 0
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- NUMA ------------------------------------------------------------------------------------------------------------


def make_sysfs(root: Path, *, num_nodes: int, node: str) -> Path:
    for index in range(num_nodes):
        (root / f"devices/system/node/node{index}").mkdir(parents=True)
    (root / "devices/system/node/online").write_text(f"0-{num_nodes - 1}")
    (root / "bus/pci/devices/0000:3b:00.0").mkdir(parents=True)
    (root / "bus/pci/devices/0000:3b:00.0/numa_node").write_text(f"{node}\n")
    return root


def test_the_node_is_the_gpus_where_there_are_several_and_nothing_elsewhere(tmp_path: Path) -> None:
    two = make_sysfs(tmp_path / "two", num_nodes=2, node="1")
    assert nearest_node("0000:3B:00.0", sysfs=two) == 1
    assert nearest_node("0000:af:00.0", sysfs=two) is None
    assert nearest_node("0000:3b:00.0", sysfs=make_sysfs(tmp_path / "one", num_nodes=1, node="0")) is None
    assert nearest_node("0000:3b:00.0", sysfs=make_sysfs(tmp_path / "unknown", num_nodes=2, node="-1")) is None
    assert nearest_node("0000:3b:00.0", sysfs=tmp_path / "nothing") is None
    assert mapped_module.node_of_device(torch.device("cpu")) is None


def test_a_preferred_node_is_taken_or_refused_and_the_memory_works_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    block = map_anonymous(4 * MIB)
    prefer_node(block.address, block.num_bytes, 0)  # a container may forbid it
    assert not prefer_node(block.address, block.num_bytes, 900)  # no such node
    assert int(block.tensor(4 * MIB).fill_(1).sum()) == 4 * MIB
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("overspill.tiers.memory.prefer_node", lambda address, num_bytes, node: asked.append((num_bytes, node)))
    memory = HostMemory(pin=False, budget_bytes=None, numa_node=1)
    memory.allocate("a", 5000)
    assert asked == [(8192, 1)]
    memory.close()


# -- with a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
def test_pinned_tensors_are_pinned_copy_asynchronously_and_are_unpinned_at_their_end() -> None:
    host = overspill.pinned_empty((1001, 1003))
    assert host.is_pinned() and host[5:, 3].is_pinned()
    host.copy_(torch.arange(host.numel()).view(host.shape))
    device = host.to("cuda", non_blocking=True)
    back = overspill.pinned_empty(host.shape)
    back.copy_(device, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    hold_until(back, event)
    event.synchronize()
    assert torch.equal(back, host)
    del host
    gc.collect()
    assert (torch.ones(4, device="cuda") + 1).sum().item() == 8


@pytest.mark.gpu
@needs_cuda
def test_a_pinned_tensor_is_in_memory_to_its_last_page() -> None:
    """That it takes no page more is measured in processes of their own (`benchmarks/pinned`): here neighbouring mappings grow meanwhile."""
    for num_bytes in (129 * MIB + 1, 64 * MIB, 5 * MIB + 3):
        tensor = overspill.pinned_empty(num_bytes, torch.uint8)
        assert tensor.is_pinned() and resident_pages(tensor.data_ptr(), align_up(num_bytes, PAGE)) == align_up(num_bytes, PAGE) // PAGE
        del tensor


@pytest.mark.gpu
@needs_cuda
def test_the_price_of_pageable_memory_is_measured_and_the_budget_kept() -> None:
    memory = HostMemory(pin=True, budget_bytes=None, pinned_budget_bytes=96 * MIB)
    with pytest.warns(RuntimeWarning, match=r"measured here: pinned [\d.]+ GB/s to the GPU and [\d.]+ GB/s from it, pageable"):
        memory.allocate("a", 97 * MIB)
    assert memory.pinned_bytes == 0 and memory.allocate("b", 96 * MIB).is_pinned()
    memory.close()


@pytest.mark.parametrize("shape", [2.5, "a", [[2]], True, [-1]])
def test_a_shape_that_is_none_is_refused_by_name(shape: object) -> None:
    with pytest.raises(ValueError, match="pinned_empty"):
        overspill.pinned_empty(shape)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="torch.float32"):
        overspill.pinned_empty(4, dtype="float32")  # type: ignore[arg-type]


def test_all_finite_refuses_what_has_no_values() -> None:
    for thing in ([1.0], torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(ValueError, match="dense tensor with values"):
            overspill.all_finite(thing)  # type: ignore[arg-type]
