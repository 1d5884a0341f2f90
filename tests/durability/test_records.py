"""Records by themselves: slots, pins, checksums of wholes and parts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from overspill import _native
from overspill.errors import StorageError
from overspill.tiers import FakeStore, Fault, FaultInjector, FaultKind, RecordStore, SsdStore
from overspill.tiers.checksums import BLOCK_BYTES, block_checksums, from_hex, to_hex, zero_checksums
from overspill.units import MIB


def random_bytes(num_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_checksums_are_crc_32c_and_both_implementations_agree() -> None:
    digits = torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8)
    assert block_checksums(digits) == (0xE3069283,)  # the check value of RFC 3720
    for size in (1, 7, 8, 1023, 1024, 3071, 3072, 3073, 9217, MIB, MIB + 5):
        for start in (0, 1, 3):
            data = random_bytes(size + start, size)[start:]
            arguments = (data.data_ptr(), size)
            fast = _native.crc32c_blocks(*arguments, block_bytes=BLOCK_BYTES)
            assert fast == _native.crc32c_blocks(*arguments, block_bytes=BLOCK_BYTES, portable=True)
            assert from_hex(to_hex(fast)) == tuple(fast)
    for size in (1, MIB - 1, MIB, MIB + 1, 3 * MIB):
        assert zero_checksums(size) == block_checksums(torch.zeros(size, dtype=torch.uint8))


def test_every_single_flipped_bit_changes_a_checksum() -> None:
    data = random_bytes(100)
    expected = block_checksums(data)
    for bit in range(800):
        data[bit // 8] ^= 1 << (bit % 8)
        assert block_checksums(data) != expected
        data[bit // 8] ^= 1 << (bit % 8)


def test_a_pinned_version_is_never_overwritten_and_its_slot_comes_back() -> None:
    store = FakeStore(1 << 20)
    with store:
        records = RecordStore(store, num_slots=3)
        records.create("a", 10_000)
        versions = [random_bytes(10_000, seed) for seed in range(6)]
        pins = []
        for number, version in enumerate(versions):
            records.start_write("a", versions[0]).wait()  # overwritten in place before it is pinned
            records.start_write("a", version).wait()
            pins.append(records.current())
            records.pin(pins[-1])
            if number >= 2:
                records.unpin(pins[number - 2])
                buffer = torch.empty(10_000, dtype=torch.uint8)
                store.start_read(f"a#{pins[number - 1]['a']}", 0, buffer).wait()
                assert torch.equal(buffer, versions[number - 1])
        assert store.allocated_bytes == 3 * 12288


@pytest.mark.parametrize("is_pinned", [False, True])
def test_parts_of_records_read_and_write_like_a_byte_array(is_pinned: bool) -> None:
    size = 2 * MIB + 12_288
    with FakeStore(16 * MIB) as store:
        records = RecordStore(store, num_slots=2)
        records.create("a", size)
        model = torch.zeros(size, dtype=torch.uint8)
        if is_pinned:
            records.pin(records.current())
        for seed, (start, end) in enumerate([(0, 5), (MIB - 3, MIB + 3), (5, size), (size - 1, size), (MIB, 2 * MIB)]):
            data = random_bytes(end - start, seed)
            records.write_part("a", start, data)
            model[start:end] = data
            assert torch.equal(records.read_part("a", 0, size), model)
            assert torch.equal(records.read_part("a", max(0, start - 1), end - start), model[max(0, start - 1) :][: end - start])
            assert records.version("a").checksums == block_checksums(model)


def test_a_wrong_byte_is_an_error_that_names_record_block_and_both_checksums() -> None:
    with FakeStore(16 * MIB) as store:
        records = RecordStore(store)
        records.create("layers.3.state[0]", 3 * MIB)
        data = random_bytes(3 * MIB)
        records.start_write("layers.3.state[0]", data).wait()
        wrong = torch.tensor([int(data[MIB + 7]) ^ 1], dtype=torch.uint8)
        store.start_write("layers.3.state[0]#0", MIB + 7, wrong).wait()
        read = records.start_read("layers.3.state[0]", torch.empty(3 * MIB, dtype=torch.uint8))
        for _ in range(2):
            with pytest.raises(
                StorageError, match=r"layers.3.state\[0\] is damaged: bytes \[1048576, 2097152\) .* have CRC-32C [0-9a-f]{8}, "
            ):
                read.wait()
        assert torch.equal(records.read_part("layers.3.state[0]", 0, 100), data[:100])
        assert len(records.verify(["layers.3.state[0]"])) == 1


def pinned_record(tmp_path: Path, calls: FaultInjector) -> tuple[RecordStore, torch.Tensor]:
    """A store of one thread, and a record that is pinned with known content, which took calls 0 to 2."""
    store = SsdStore(tmp_path, capacity_bytes=1 << 20, num_threads=1, calls=calls)
    records = RecordStore(store, num_slots=2)
    records.create("a", 10_000)
    records.create("b", 10_000)
    data = random_bytes(10_000)
    records.start_write("a", data).wait()
    records.pin(records.current())
    return records, data


def test_a_write_that_was_taken_back_has_not_changed_the_record(tmp_path: Path) -> None:
    calls = FaultInjector(Fault(kind=FaultKind.DELAYED, call_index=3, delay_s=0.4))
    records, data = pinned_record(tmp_path, calls)
    before, generation = records.version("a"), records.current()
    slow = records.start_write("b", random_bytes(10_000, 1))
    while len(calls.log) < 4:
        time.sleep(0.001)
    later = records.start_write("a", random_bytes(10_000, 2))
    assert later.cancel()  # type: ignore[attr-defined]
    assert records.version("a") == before and records.current()["a"] == generation["a"]
    with pytest.raises(StorageError, match="was taken back before it began"):
        later.wait()
    back = torch.empty(10_000, dtype=torch.uint8)
    records.start_read("a", back).wait()
    assert torch.equal(back, data)
    slow.wait()
    records.close()


def test_a_read_of_a_record_that_is_being_written_gives_the_new_bytes(tmp_path: Path) -> None:
    records, _ = pinned_record(tmp_path, FaultInjector(Fault(kind=FaultKind.DELAYED, call_index=3, delay_s=0.1)))
    data = random_bytes(10_000, 1)
    written = records.start_write("a", data)
    back = torch.empty(10_000, dtype=torch.uint8)
    records.start_read("a", back).wait()
    assert torch.equal(back, data) and written.is_done
    written.wait()
    assert records.version("a").checksums == block_checksums(data)
    records.close()


def test_a_record_whose_write_failed_is_neither_read_nor_put_into_a_checkpoint(tmp_path: Path) -> None:
    records, _ = pinned_record(tmp_path, FaultInjector(Fault(kind=FaultKind.EIO, call_index=3)))
    failed = records.start_write("a", random_bytes(10_000, 1))
    for use in (failed.wait, lambda: records.version("a"), lambda: records.start_read("a", torch.empty(10_000, dtype=torch.uint8))):
        with pytest.raises(StorageError, match="write of a#1 failed.*EIO"):
            use()
    data = random_bytes(10_000, 2)
    records.start_write("a", data).wait()  # who has seen the failure may try again
    assert torch.equal(records.read_part("a", 0, 10_000), data)
    records.close()
