"""The fake store's own claims: it is as slow and as faulty as it is told, and shows broken lending rules."""

from __future__ import annotations

import errno
import time

import pytest
import torch

from overspill.errors import StorageError
from overspill.tiers import Failure, FakeStore
from overspill.units import MIB


@pytest.mark.clock
def test_delay_and_bandwidth_add_up_in_order_within_one_direction() -> None:
    with FakeStore(4 * MIB, delay_s=0.02, bytes_per_s=20 * MIB) as store:
        store.allocate("a", MIB)
        begun = time.perf_counter()
        transfers = [store.start_read("a", 0, torch.empty(MIB, dtype=torch.uint8)) for _ in range(2)]
        assert time.perf_counter() - begun < 0.05 and not transfers[0].is_done
        transfers[1].wait()
        assert transfers[0].is_done
        assert time.perf_counter() - begun >= 2 * (0.02 + 1 / 20)


@pytest.mark.clock
def test_reads_and_writes_overlap() -> None:
    with FakeStore(MIB, delay_s=0.1) as store:
        store.allocate("a", 10)
        store.allocate("b", 10)
        begun = time.perf_counter()
        for transfer in (store.start_read("a", 0, torch.empty(10, dtype=torch.uint8)), store.start_write("b", 0, torch.empty(10).byte())):
            transfer.wait()
        assert 0.1 <= time.perf_counter() - begun < 0.19


def test_a_buffer_changed_before_wait_shows_in_the_store() -> None:
    with FakeStore(MIB, delay_s=0.05) as store:
        store.allocate("a", 4)
        buffer = torch.ones(4, dtype=torch.uint8)
        transfer = store.start_write("a", 0, buffer)
        buffer.fill_(2)  # breaks rule 1 of the protocol
        transfer.wait()
        back = torch.zeros(4, dtype=torch.uint8)
        store.start_read("a", 0, back).wait()
        assert back.tolist() == [2, 2, 2, 2]


def test_the_named_call_fails_in_the_form_of_the_ssd_store_and_moves_nothing() -> None:
    with FakeStore(MIB, failures=[Failure(operation="write", call_index=1, errno=errno.ENOSPC)]) as store:
        store.allocate("first", 4096)
        store.allocate("a", 100)
        store.start_write("a", 0, torch.ones(100, dtype=torch.uint8)).wait()
        store.start_read("a", 0, torch.ones(100, dtype=torch.uint8)).wait()
        with pytest.raises(StorageError) as caught:
            store.start_write("a", 10, torch.full((90,), 5, dtype=torch.uint8)).wait()
        assert str(caught.value) == (
            "write of a failed: wanted 90 B at offset 4106 of a FakeStore, wrote 0 B (ENOSPC: No space left on device); "
            "free space on its file system or give another --ssd-dir"
        )
        assert isinstance(caught.value.__cause__, OSError)
        back = torch.zeros(100, dtype=torch.uint8)
        store.start_read("a", 0, back).wait()
        assert (back == 1).all()


def test_a_rule_decides_which_calls_fail() -> None:
    def fails(operation: str, call_index: int, name: str) -> int | None:
        return errno.EIO if (operation, name) == ("read", "bad") and call_index >= 1 else None

    with FakeStore(MIB, failures=fails) as store:
        for name in ("good", "bad"):
            store.allocate(name, 1)
        buffer = torch.zeros(1, dtype=torch.uint8)
        store.start_read("bad", 0, buffer).wait()
        store.start_read("good", 0, buffer).wait()
        with pytest.raises(StorageError, match="read of bad failed.*EIO"):
            store.start_read("bad", 0, buffer).wait()


def test_a_failure_that_nobody_waited_for_is_raised_by_close() -> None:
    store = FakeStore(MIB, failures=Failure(operation="read", call_index=0, errno=errno.EIO))
    store.allocate("a", 1)
    store.start_read("a", 0, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(StorageError, match="never waited for"):
        store.close()


def test_impossible_speeds_are_refused() -> None:
    for wrong in ({"delay_s": -1.0}, {"bytes_per_s": 0.0}):
        with pytest.raises(ValueError, match="faster than at once"):
            FakeStore(MIB, **wrong)
