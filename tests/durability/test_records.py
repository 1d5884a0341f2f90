"""Records by themselves: slots, pins, checksums of wholes and parts."""

from __future__ import annotations

import pytest
import torch

from overspill import _native
from overspill.errors import StorageError
from overspill.tiers import FakeStore, RecordStore
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
