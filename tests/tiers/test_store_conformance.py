"""What every store promises (`tiers/protocol.py`), held by each of them: the SSD store direct, buffered and unlinked, and the fake."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.stateful
import pytest
import torch
from hypothesis import strategies as st

from overspill._native import has_io_uring
from overspill.errors import BudgetError
from overspill.tiers import FakeStore, SsdStore, Store, Transfer
from overspill.tiers import extent_file as extent_file_module
from overspill.tiers.checksums import block_checksums
from overspill.tiers.transfer import DamagedBlock
from overspill.units import MIB

MakeStore = Callable[[int], Store]


def open_buffered(directory: Path, capacity_bytes: int) -> SsdStore:
    """An SSD store on a file system that refuses direct I/O."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(extent_file_module, "_enable_direct", lambda fd, folder: False)
        return SsdStore(directory, capacity_bytes=capacity_bytes)


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


MAKERS: dict[str, Callable[[Path, int], Store]] = {
    "ssd": lambda directory, capacity: SsdStore(directory, capacity_bytes=capacity),
    "ssd-unlinked": lambda directory, capacity: SsdStore(directory, capacity_bytes=capacity, unlink=True),
    "ssd-buffered": open_buffered,
    "ssd-striped": lambda directory, capacity: SsdStore(
        [_made(directory) / name for name in ("first", "second", "third")], capacity_bytes=capacity
    ),
    "fake": lambda directory, capacity: FakeStore(capacity),
}


if has_io_uring():
    MAKERS["ssd-io_uring"] = lambda directory, capacity: SsdStore(directory, capacity_bytes=capacity, backend="io_uring", num_threads=2)


@pytest.fixture(params=sorted(MAKERS))
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    stores: list[Store] = []

    def make(capacity_bytes: int) -> Store:
        stores.append(MAKERS[request.param](tmp_path / "tier", capacity_bytes))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def aligned(num_bytes: int, shift: int = 0) -> torch.Tensor:
    """A uint8 buffer of shape [num_bytes] that starts `shift` bytes after a page boundary."""
    storage = torch.zeros(num_bytes + 4096 + shift, dtype=torch.uint8)
    start = -storage.data_ptr() % 4096 + shift
    return storage[start : start + num_bytes]


def random_bytes(num_bytes: int, seed: int, shift: int = 0) -> torch.Tensor:
    buffer = aligned(num_bytes, shift)
    buffer.copy_(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return buffer


def read(store: Store, name: str, offset: int, num_bytes: int, shift: int = 0) -> torch.Tensor:
    buffer = aligned(num_bytes, shift).fill_(0xEE)
    store.start_read(name, offset, buffer).wait()
    return buffer


def test_stores_and_transfers_meet_their_protocols(make_store: MakeStore) -> None:
    store = make_store(MIB)
    store.allocate("a", 10)
    transfer = store.start_read("a", 0, aligned(10))
    assert isinstance(store, Store) and isinstance(transfer, Transfer)
    transfer.wait()
    assert transfer.is_done
    transfer.wait()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("offset", [0, 4096, 17])
@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 12288, 20 * 1024 * 1024 + 5])
def test_what_was_written_is_read_and_neighbours_are_untouched(make_store: MakeStore, num_bytes: int, offset: int, shift: int) -> None:
    store = make_store(24 * MIB)
    size = offset + num_bytes + 100
    store.allocate("before", 5000)
    store.allocate("a", size)
    store.allocate("after", 5000)
    data = random_bytes(num_bytes, seed=num_bytes, shift=shift)
    store.start_write("a", offset, data).wait()
    expected = torch.zeros(size, dtype=torch.uint8)
    expected[offset : offset + num_bytes] = data
    assert torch.equal(read(store, "a", 0, size), expected)
    assert torch.equal(read(store, "a", offset, num_bytes, shift=1 - shift), data)
    assert not read(store, "before", 0, 5000).any() and not read(store, "after", 0, 5000).any()


def test_extents_read_zeros_before_their_first_write_also_where_bytes_were_used_before(make_store: MakeStore) -> None:
    store = make_store(64 * 1024)
    store.allocate("a", 10_000)
    assert not read(store, "a", 0, 10_000).any()
    store.start_write("a", 0, torch.full((10_000,), 7, dtype=torch.uint8)).wait()
    store.free("a")
    store.allocate("b", 30_000)  # takes the used range and fresh bytes behind it
    assert not read(store, "b", 0, 30_000).any()


def test_a_rewritten_extent_survives_freeing_of_its_neighbours(make_store: MakeStore) -> None:
    store = make_store(5 * 4096)
    for name in "abcde":
        store.allocate(name, 4096)
        store.start_write(name, 0, torch.full((4096,), ord(name), dtype=torch.uint8)).wait()
    store.free("b")
    store.free("d")
    store.allocate("f", 4096)
    for name in "ace":
        assert (read(store, name, 0, 4096) == ord(name)).all()


def test_disjoint_bytes_of_one_page_can_be_written_at_the_same_time(make_store: MakeStore) -> None:
    store = make_store(MIB)
    store.allocate("a", 4096)
    pieces = [torch.full((8,), index % 251 + 1, dtype=torch.uint8) for index in range(512)]
    for transfer in [store.start_write("a", 8 * index, piece) for index, piece in enumerate(pieces)]:
        transfer.wait()
    assert torch.equal(read(store, "a", 0, 4096), torch.cat(pieces))


def test_empty_transfers_do_nothing(make_store: MakeStore) -> None:
    store = make_store(MIB)
    store.allocate("a", 10)
    store.start_write("a", 10, aligned(0)).wait()
    store.start_read("a", 0, aligned(0)).wait()
    assert store.read_bytes == store.written_bytes == 0


def test_counters_hold_payload_and_allocation_is_rounded_to_4096(make_store: MakeStore) -> None:
    store = make_store(10 * 4096 + 5)
    assert store.capacity_bytes == 10 * 4096
    store.allocate("a", 4097)
    assert store.num_bytes("a") == 4097 and store.allocated_bytes == 8192
    store.start_write("a", 5, aligned(300)).wait()
    read(store, "a", 0, 4097)
    read(store, "a", 1, 1)
    assert (store.written_bytes, store.read_bytes) == (300, 4098)
    store.free("a")
    assert store.allocated_bytes == 0


def test_a_full_store_names_both_numbers_and_the_flag_and_keeps_its_content(make_store: MakeStore) -> None:
    store = make_store(4 * 4096)
    store.allocate("a", 3 * 4096)
    with pytest.raises(BudgetError, match=r"big needs 8.00 KiB \(8192 B\) .* leaves 4.00 KiB \(4096 B\).*--ssd-budget to at least 20480 B"):
        store.allocate("big", 4097)
    assert store.allocated_bytes == 3 * 4096
    store.allocate("small", 4096)


def test_a_fragmented_store_says_how_long_its_longest_range_is(make_store: MakeStore) -> None:
    store = make_store(3 * 4096)
    for name in "abc":
        store.allocate(name, 4096)
    store.free("a")
    store.free("c")
    with pytest.raises(BudgetError, match=r"leaves 8.00 KiB \(8192 B\), at most 4096 B of it in one piece"):
        store.allocate("d", 8192)
    store.free("b")
    store.allocate("d", 3 * 4096)  # free neighbours were merged


def test_wrong_arguments_are_refused_at_the_call(make_store: MakeStore) -> None:
    store = make_store(MIB)
    store.allocate("a", 100)
    for offset, num_bytes in ((-1, 1), (0, 101), (100, 1), (4096, 1)):
        with pytest.raises(ValueError, match="outside of a, which has 100 B"):
            store.start_read("a", offset, aligned(num_bytes))
        with pytest.raises(ValueError, match="outside of a, which has 100 B"):
            store.start_write("a", offset, aligned(num_bytes))
    for buffer in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="contiguous one-dimensional uint8"):
            store.start_read("a", 0, buffer)
    with pytest.raises(ValueError, match="a is already allocated"):
        store.allocate("a", 1)
    with pytest.raises(ValueError, match="at least 1 byte"):
        store.allocate("b", 0)
    for use in (store.free, store.num_bytes, lambda name: store.start_read(name, 0, aligned(1))):
        with pytest.raises(ValueError, match="missing is not allocated"):
            use("missing")
    assert store.read_bytes == store.written_bytes == 0


def test_a_closed_store_is_not_used_and_may_be_closed_again(make_store: MakeStore) -> None:
    store = make_store(MIB)
    store.allocate("a", 1)
    with store:
        pass
    store.close()
    with pytest.raises(AssertionError, match="closed"):
        store.allocate("b", 1)
    with pytest.raises(AssertionError, match="closed"):
        store.start_read("a", 0, aligned(1))


def test_a_buffer_whose_tensor_is_dropped_after_the_start_is_still_written(make_store: MakeStore) -> None:
    store = make_store(8 * MIB)
    store.allocate("a", 4 * MIB)
    transfer = store.start_write("a", 0, torch.full((4 * MIB,), 9, dtype=torch.uint8))
    noise = [torch.zeros(4 * MIB, dtype=torch.uint8) for _ in range(4)]
    transfer.wait()
    assert (read(store, "a", 0, 4 * MIB) == 9).all() and len(noise) == 4


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("offset", [0, 4096, 17])
@pytest.mark.parametrize("num_bytes", [1, 4096, MIB, MIB + 1, 3 * MIB + 4097])
def test_checksums_are_those_of_the_buffers_blocks_and_damage_is_found(
    make_store: MakeStore, num_bytes: int, offset: int, shift: int
) -> None:
    store = make_store(8 * MIB)
    store.allocate("a", num_bytes + offset)
    data = random_bytes(num_bytes, seed=1, shift=shift)
    written = store.start_write("a", offset, data, with_checksums=True)
    written.wait()
    assert written.checksums == block_checksums(data)
    buffer = aligned(num_bytes, shift)
    store.start_read("a", offset, buffer, expected=written.checksums).wait()
    assert torch.equal(buffer, data)
    for block in {0, len(written.checksums) - 1}:
        wrong = list(written.checksums)
        wrong[block] ^= 1
        read_wrong = store.start_read("a", offset, buffer, expected=wrong)
        for _ in range(2):
            with pytest.raises(DamagedBlock) as caught:
                read_wrong.wait()
        assert (caught.value.block, caught.value.expected, caught.value.found) == (block, wrong[block], written.checksums[block])


class StoreAgainstModel(hypothesis.stateful.RuleBasedStateMachine):
    """Any sequence of calls leaves the store equal to a dict of byte arrays."""

    maker = "fake"
    directory = Path()

    def __init__(self) -> None:
        super().__init__()
        self.store = MAKERS[self.maker](self.directory, 16 * 4096)
        self.model: dict[str, torch.Tensor] = {}

    @hypothesis.stateful.rule(name=st.sampled_from("abcdef"), num_bytes=st.integers(1, 5 * 4096))
    def allocate(self, name: str, num_bytes: int) -> None:
        if name in self.model:
            return
        try:
            self.store.allocate(name, num_bytes)
        except BudgetError:
            assert self.store.allocated_bytes + num_bytes > 5 * 4096  # never refused while the store is nearly empty
        else:
            self.model[name] = torch.zeros(num_bytes, dtype=torch.uint8)

    @hypothesis.stateful.precondition(lambda self: self.model)
    @hypothesis.stateful.rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.store.free(name)
        del self.model[name]

    @hypothesis.stateful.precondition(lambda self: self.model)
    @hypothesis.stateful.rule(data=st.data(), shift=st.sampled_from([0, 0, 1, 511]), byte=st.integers(1, 255))
    def write(self, data: st.DataObject, shift: int, byte: int) -> None:
        name, start, end = self.draw_range(data)
        buffer = random_bytes(end - start, seed=byte, shift=shift)
        self.store.start_write(name, start, buffer).wait()
        self.model[name][start:end] = buffer

    @hypothesis.stateful.precondition(lambda self: self.model)
    @hypothesis.stateful.rule(data=st.data(), shift=st.sampled_from([0, 0, 1, 511]))
    def read(self, data: st.DataObject, shift: int) -> None:
        name, start, end = self.draw_range(data)
        assert torch.equal(read(self.store, name, start, end - start, shift), self.model[name][start:end])

    def draw_range(self, data: st.DataObject) -> tuple[str, int, int]:
        name = data.draw(st.sampled_from(sorted(self.model)))
        size = self.model[name].numel()
        edges = st.one_of(st.integers(0, size), st.sampled_from([x for x in (0, 4096, 8192, size) if x <= size]))
        start, end = sorted((data.draw(edges), data.draw(edges)))
        return name, start, end

    @hypothesis.stateful.invariant()
    def every_extent_equals_its_model(self) -> None:
        assert self.store.allocated_bytes == sum(-(-content.numel() // 4096) * 4096 for content in self.model.values())
        for name, content in self.model.items():
            assert torch.equal(read(self.store, name, 0, content.numel()), content)

    def teardown(self) -> None:
        self.store.close()


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_any_sequence_of_calls_equals_a_dict_of_byte_arrays(maker: str, tmp_path: Path) -> None:
    machine = type("Machine", (StoreAgainstModel,), {"maker": maker, "directory": tmp_path})
    settings = hypothesis.settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
    hypothesis.stateful.run_state_machine_as_test(machine, settings=settings)
