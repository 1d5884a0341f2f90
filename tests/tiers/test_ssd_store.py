"""The SSD store's own claims: its file, its directory checks, its faults, and that nothing leaks."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overspill import _native
from overspill.errors import BudgetError, StorageError
from overspill.tiers import Fault, FaultInjector, FaultKind, SsdStore
from overspill.tiers import extent_file as extent_file_module
from overspill.tiers.checksums import block_checksums
from overspill.tiers.extent_file import FILE_NAME, ExtentFile
from overspill.tiers.load import TransferSpan, load_profile, peak_to_mean
from overspill.tiers.memory import HostMemory
from overspill.tiers.run_lock import NOTE_NAME
from overspill.tiers.ssd import BACKEND_VARIABLE, PART_BYTES
from overspill.units import MIB


def page_aligned(num_bytes: int) -> torch.Tensor:
    return HostMemory(pin=False, budget_bytes=None).allocate("buffer", num_bytes)


# The file.


def test_the_file_is_preallocated_private_and_removed_on_close(tmp_path: Path) -> None:
    directory = tmp_path / "ssd"
    with SsdStore(directory, capacity_bytes=3 * MIB + 1):
        status = (directory / FILE_NAME).stat()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700 and stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == 3 * MIB and status.st_blocks * 512 >= 3 * MIB
    assert list(directory.iterdir()) == []


def test_an_unlinked_store_has_no_name_and_shares_its_directory(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=MIB, unlink=True) as scratch, SsdStore(tmp_path, capacity_bytes=MIB) as named:
        assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, NOTE_NAME]
        scratch.allocate("a", 5)
        named.allocate("a", 5)
        scratch.start_write("a", 0, torch.full((5,), 3, dtype=torch.uint8)).wait()
        buffer = torch.ones(5, dtype=torch.uint8)
        named.start_read("a", 0, buffer).wait()
        assert not buffer.any()


def test_a_scratch_file_never_has_a_name_unless_the_file_system_wants_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    inner = extent_file_module._open_locked
    monkeypatch.setattr(extent_file_module, "_open_locked", lambda path, **how: opened.append(path) or inner(path, **how))
    with SsdStore(tmp_path, capacity_bytes=MIB, unlink=True) as scratch:
        assert opened == [] and list(tmp_path.iterdir()) == []
        assert scratch.path.startswith(f"{tmp_path}/overspill.scratch-"), "messages still say where it is"
    monkeypatch.setattr(extent_file_module, "_open_unnamed", lambda folder: None)
    with SsdStore(tmp_path, capacity_bytes=MIB, unlink=True):
        assert len(opened) == 1 and list(tmp_path.iterdir()) == [], "its name is gone at once"


def test_a_file_in_use_is_refused_and_one_left_behind_is_discarded(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff" * 9000)
    with SsdStore(tmp_path, capacity_bytes=MIB) as store:
        store.allocate("a", 9000)
        buffer = torch.ones(9000, dtype=torch.uint8)
        store.start_read("a", 0, buffer).wait()
        assert not buffer.any()
        with pytest.raises(StorageError, match=rf"in use by another run \(pid {os.getpid()} on .*since .*\); wait for it"):
            SsdStore(tmp_path, capacity_bytes=MIB)
        assert (tmp_path / FILE_NAME).stat().st_size == MIB


def test_a_killed_run_leaves_at_most_an_unlocked_file(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from overspill.tiers import SsdStore\n"
        "keep = [SsdStore(sys.argv[1], capacity_bytes=1 << 20, unlink=unlink) for unlink in (False, True)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, NOTE_NAME]
    SsdStore(tmp_path, capacity_bytes=MIB).close()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_discard_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff" * 9000)

    def refuse() -> None:
        raise StorageError("there are checkpoints")

    with pytest.raises(StorageError, match="there are checkpoints"):
        SsdStore(tmp_path, capacity_bytes=MIB, before_discarding=refuse)
    assert (tmp_path / FILE_NAME).read_bytes() == b"\xff" * 9000
    with pytest.raises(StorageError, match="there are checkpoints"):
        SsdStore(tmp_path / "fresh", capacity_bytes=MIB, before_discarding=refuse)
    assert list((tmp_path / "fresh").iterdir()) == []


def test_a_symbolic_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / FILE_NAME).symlink_to(victim)
    with pytest.raises(StorageError, match="ELOOP"):
        SsdStore(tmp_path, capacity_bytes=MIB)
    assert victim.read_bytes() == b"precious"


def test_a_dropped_store_removes_its_file(tmp_path: Path) -> None:
    SsdStore(tmp_path, capacity_bytes=MIB)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_open_or_running_after_close(tmp_path: Path) -> None:
    def open_files() -> list[str]:
        return [link for fd in os.listdir("/proc/self/fd") if "overspill" in (link := _readlink(fd))]

    with SsdStore(tmp_path, capacity_bytes=4 * MIB) as store:
        store.allocate("a", 4 * MIB)
        for _ in range(8):
            store.start_write("a", 0, torch.zeros(MIB, dtype=torch.uint8))
        assert open_files() and engine_threads() == 4
    assert not open_files()
    assert engine_threads() == 0


def engine_threads() -> int:
    """The engine's threads are not Python's; the kernel knows their name."""
    return sum(Path(f"/proc/self/task/{task}/comm").read_text().strip() == "overspill-io" for task in os.listdir("/proc/self/task"))


def _readlink(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_refused_direct_io_warns_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with (
        pytest.warns(RuntimeWarning, match=r"refuses direct I/O \(EINVAL.*ext4") as caught,
        SsdStore(tmp_path, capacity_bytes=MIB) as store,
    ):
        assert not store.is_direct
        store.allocate("a", 7)
        store.start_write("a", 1, torch.arange(6, dtype=torch.uint8)).wait()
        buffer = torch.ones(7, dtype=torch.uint8)
        store.start_read("a", 0, buffer).wait()
        assert buffer.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert len(caught) == 1


def test_ranges_are_zeroed_by_writing_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ExtentFile(tmp_path, 4 * MIB, unlink=True)
    os.pwritev(
        file.fd, [memoryview(bytearray(b"\xff" * (4 * MIB)))] if not file.is_direct else [page_aligned(4 * MIB).fill_(255).numpy()], 0
    )
    monkeypatch.setattr(extent_file_module, "_FALLOC_FL_ZERO_RANGE", 0x8000)  # a mode that no file system knows: EOPNOTSUPP
    file.zero(4096, 2 * MIB + 4096)
    content = page_aligned(4 * MIB)
    os.preadv(file.fd, [content.numpy()], 0)
    assert not content[4096 : 2 * MIB + 8192].any()
    assert (content[:4096] == 255).all() and (content[2 * MIB + 8192 :] == 255).all()
    file.close()
    file.close()


# The directory.


def test_a_directory_without_a_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing is no directory; create it or give another --ssd-dir"):
        SsdStore(tmp_path / "missing" / "ssd", capacity_bytes=MIB)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file and not a directory.*--ssd-dir"):
        SsdStore(tmp_path / "file", capacity_bytes=MIB)
    with pytest.raises(ValueError, match=r"is no directory.*--ssd-dir"):
        SsdStore(tmp_path / "file" / "ssd", capacity_bytes=MIB)


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StorageError, match=r"EISDIR.*--ssd-dir"):
        SsdStore(tmp_path, capacity_bytes=MIB)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_an_unwritable_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=rf"cannot be opened for writing \({errno.errorcode[number]}.*--ssd-dir") as caught:
        SsdStore(tmp_path, capacity_bytes=MIB)
    assert isinstance(caught.value.__cause__, OSError)


def test_too_little_free_space_names_both_numbers_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"needs 1024.00 TiB .* B\) free; give another --ssd-dir or lower --ssd-budget"):
        SsdStore(tmp_path, capacity_bytes=1 << 50)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_reservation_is_reported_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=r"1.00 MiB could not be reserved .*ENOSPC.*--ssd-budget"):
        SsdStore(tmp_path, capacity_bytes=MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_ram_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent_file_module, "filesystem_of", lambda folder: "tmpfs")
    with pytest.warns(RuntimeWarning, match=r"is in RAM \(tmpfs\).*--ssd-dir on a drive"):
        SsdStore(tmp_path, capacity_bytes=MIB).close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_the_file_system_is_recognised() -> None:
    assert extent_file_module.filesystem_of(Path("/dev/shm")) == "tmpfs"
    assert extent_file_module.filesystem_of(Path("/proc")) == "proc"


def test_useless_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 4096 B, got 100 B; raise --ssd-budget"):
        SsdStore(tmp_path, capacity_bytes=100)
    with pytest.raises(ValueError, match="at least 1 thread"):
        SsdStore(tmp_path, capacity_bytes=MIB, num_threads=0)
    assert list(tmp_path.iterdir()) == []


# Faults in transfers.


def always(kind: FaultKind, **fields: object) -> FaultInjector:
    return FaultInjector(Fault(kind=kind, call_index=0, num_calls=1 << 40, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("moved_bytes", [None, 5 * 4096 + 512])
def test_short_transfers_are_continued_until_every_byte_moved(tmp_path: Path, start: int, moved_bytes: int | None) -> None:
    """Half of what is asked, or a length that is no multiple of a page, as drives and signals do."""
    size = 3 * MIB + 4096
    calls = always(FaultKind.SHORT, moved_bytes=moved_bytes)
    with SsdStore(tmp_path, capacity_bytes=4 * MIB, calls=calls) as store:
        store.allocate("a", size)
        data = page_aligned(size)
        data.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8))
        store.start_write("a", start, data[start:]).wait()
        back = page_aligned(size)
        store.start_read("a", start, back[start:]).wait()
        assert torch.equal(back[start:], data[start:])
        assert len(calls.log) > 2 * 5


@pytest.mark.parametrize(("operation", "number"), [("read", errno.EIO), ("write", errno.EIO), ("write", errno.ENOSPC)])
def test_a_failing_call_names_extent_path_offset_bytes_and_errno(tmp_path: Path, operation: str, number: int) -> None:
    kind = {errno.EIO: FaultKind.EIO, errno.ENOSPC: FaultKind.ENOSPC}[number]
    calls = FaultInjector(Fault(kind=FaultKind.SHORT, call_index=0, moved_bytes=16384), Fault(kind=kind, call_index=1, num_calls=9))
    store = SsdStore(tmp_path, capacity_bytes=MIB, calls=calls)
    store.allocate("first", 8192)
    store.allocate("layers.7.exp_avg", 65536)
    start = store.start_read if operation == "read" else store.start_write
    transfer = start("layers.7.exp_avg", 0, page_aligned(65536))
    with pytest.raises(StorageError) as caught:
        transfer.wait()
    message = str(caught.value)
    verb = {"read": "got", "write": "wrote"}[operation]
    assert message.startswith(
        f"{operation} of layers.7.exp_avg failed: wanted 65536 B at offset 8192 of {tmp_path / FILE_NAME}, "
        f"{verb} 16384 B ({errno.errorcode[number]}: {os.strerror(number)}); "
    )
    assert "--ssd-dir" in message and isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == number
    with pytest.raises(StorageError):
        transfer.wait()
    store.free("layers.7.exp_avg")
    store.close()  # the failure was seen


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("moved_bytes", [0, 1])
def test_transfers_that_stop_moving_are_errors(tmp_path: Path, operation: str, moved_bytes: int) -> None:
    with SsdStore(tmp_path, capacity_bytes=MIB, calls=always(FaultKind.SHORT, moved_bytes=moved_bytes)) as store:
        if moved_bytes and not store.is_direct:
            pytest.skip("through the page cache, bytes may move one by one")
        store.allocate("a", 8192)
        start = store.start_read if operation == "read" else store.start_write
        with pytest.raises(StorageError, match=rf"short {operation} of a: wanted 8192 B at offset 0 of .*{moved_bytes} B \(no error"):
            start("a", 0, page_aligned(8192)).wait()


def test_a_file_that_was_cut_is_a_short_read(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=MIB) as store:
        store.allocate("a", MIB)
        os.truncate(tmp_path / FILE_NAME, 8192)
        with pytest.raises(StorageError, match=r"short read of a: wanted 1048576 B at offset 0 .* got 8192 B"):
            store.start_read("a", 0, page_aligned(MIB)).wait()


def test_a_failure_that_nobody_waited_for_is_raised_by_close(tmp_path: Path) -> None:
    store = SsdStore(tmp_path, capacity_bytes=MIB, calls=always(FaultKind.EIO))
    store.allocate("a", 4096)
    store.start_write("a", 0, page_aligned(4096))
    with pytest.raises(StorageError, match="1 failed transfers were never waited for; the first: write of a failed.*EIO"):
        store.close()
    assert list(tmp_path.iterdir()) == []


def test_failures_that_nobody_waited_for_are_kept_while_others_come_and_go(tmp_path: Path) -> None:
    store = SsdStore(tmp_path, capacity_bytes=MIB, num_threads=1, calls=FaultInjector(Fault(kind=FaultKind.EIO, call_index=1)))
    store.allocate("a", 4096)
    for _ in range(5):
        transfer = store.start_write("a", 0, page_aligned(4096))
        while not transfer.is_done:
            pass
    with pytest.raises(StorageError, match="1 failed transfers were never waited for"):
        store.close()


def test_an_unseen_failure_does_not_hide_the_error_that_ends_the_with_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as caught, SsdStore(tmp_path, capacity_bytes=MIB, calls=always(FaultKind.EIO)) as store:
        store.allocate("a", 4096)
        store.start_write("a", 0, page_aligned(4096))
        raise KeyError("the first error")
    assert "write of a failed" in caught.value.__notes__[0]


def test_failed_zeroing_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ExtentFile, offset: int, num_bytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with SsdStore(tmp_path, capacity_bytes=MIB) as store:
        store.allocate("a", 4096)
        store.free("a")
        monkeypatch.setattr(ExtentFile, "zero", fail)
        with pytest.raises(StorageError, match="write of b failed: wanted 4096 B at offset 0 .*EIO"):
            store.allocate("b", 8192)
        assert store.allocated_bytes == 0


def test_freeing_an_extent_in_flight_is_asserted(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=MIB, calls=always(FaultKind.DELAYED, delay_s=0.4)) as store:
        store.allocate("a", 4096)
        transfer = store.start_read("a", 0, page_aligned(4096))
        assert not transfer.is_done
        with pytest.raises(AssertionError, match="a is freed with 1 transfers in flight"):
            store.free("a")
        transfer.wait()
        store.free("a")


def test_aligned_transfers_make_no_copy_and_one_call_a_part(tmp_path: Path) -> None:
    calls = FaultInjector()
    with SsdStore(tmp_path, capacity_bytes=32 * MIB, calls=calls) as store:
        store.allocate("a", 20 * MIB)
        store.start_read("a", 0, page_aligned(20 * MIB)).wait()
        assert calls.log == ["preadv"] * (20 * MIB // PART_BYTES)
        assert store.copied_bytes == 0 and store.moved_bytes == (20 * MIB, 0)
        store.start_read("a", 5, page_aligned(100)).wait()
        assert store.copied_bytes == (100 if store.is_direct else 0)
        assert store.moved_bytes == ((20 * MIB + 4096, 0) if store.is_direct else (20 * MIB + 100, 0))
        assert store.read_bytes == 20 * MIB + 100


def test_a_transfer_that_has_not_begun_can_be_taken_back_and_moves_nothing(tmp_path: Path) -> None:
    calls = FaultInjector(Fault(kind=FaultKind.DELAYED, call_index=1, delay_s=0.4))
    with SsdStore(tmp_path, capacity_bytes=MIB, num_threads=1, calls=calls) as store:
        store.allocate("a", 8192)
        store.start_write("a", 0, page_aligned(8192).fill_(1)).wait()
        slow = store.start_read("a", 0, page_aligned(8192))
        while len(calls.log) < 2:
            time.sleep(0.001)
        later = store.start_write("a", 0, page_aligned(8192).fill_(2))
        assert later.cancel() and later.is_done and not slow.cancel()
        with pytest.raises(StorageError, match="write of a was taken back before it began"):
            later.wait()
        slow.wait()
        assert not slow.cancel()
        back = page_aligned(8192)
        store.start_read("a", 0, back).wait()
        assert (back == 1).all()


def test_many_threads_may_start_and_wait_at_once(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=17 * MIB) as store:
        for index in range(8):
            store.allocate(f"{index}", 2 * MIB)
        wrong: list[int] = []

        def work(index: int) -> None:
            generator = torch.Generator().manual_seed(index)
            for _ in range(10):
                data = page_aligned(2 * MIB)
                data.copy_(torch.randint(0, 256, (2 * MIB,), dtype=torch.uint8, generator=generator))
                written = store.start_write(f"{index}", 0, data, with_checksums=True)
                written.wait()
                back = page_aligned(2 * MIB)
                store.start_read(f"{index}", 0, back, expected=written.checksums).wait()
                if not torch.equal(back, data) or written.checksums != block_checksums(data):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# Forks.


def child_status(work: Callable[[], None]) -> int:
    """Exit status of a child of a fork that does `work`, and ends; one that hangs is killed by SIGALRM."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def finalize(store: SsdStore) -> None:
    """What the interpreter's ending does with a store that nobody closed."""
    for item in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        if item.peek()[0] is store:
            item()
    del store._engine
    gc.collect()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("ending", [SsdStore.close, finalize])
@pytest.mark.parametrize("backend", ["threads", "io_uring"])
def test_a_forked_child_that_ends_leaves_its_parents_files_alone(backend: str, ending: Callable[[SsdStore], None], tmp_path: Path) -> None:
    if backend == "io_uring" and not _native.has_io_uring():
        pytest.skip("this kernel or container has no io_uring")
    places = [tmp_path / "a", tmp_path / "b"]
    with SsdStore(places, capacity_bytes=16 * MIB, backend=backend) as store:
        store.allocate("a", 9 * MIB)
        data = torch.arange(9 * MIB, dtype=torch.uint8)
        store.start_write("a", 0, data).wait()
        before = [sorted(path.iterdir()) for path in places]
        assert child_status(lambda: ending(store)) == 0
        assert [sorted(path.iterdir()) for path in places] == before
        with pytest.raises(StorageError, match="in use by another run"):
            SsdStore(places[0], capacity_bytes=MIB)
        back = torch.empty_like(data)
        store.start_read("a", 0, back).wait()
        assert torch.equal(back, data)
    assert not any(list(path.iterdir()) for path in places)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_is_refused_a_transfer_that_would_never_end(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=MIB) as store:
        store.allocate("a", 4096)

        def use() -> None:
            with pytest.raises(ValueError, match="the I/O engine is of the process that was forked"):
                store.start_write("a", 0, page_aligned(4096))

        assert child_status(use) == 0


def test_an_interrupt_ends_a_wait_and_the_transfer_goes_on(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=MIB, calls=always(FaultKind.DELAYED, delay_s=0.5)) as store:
        store.allocate("a", 4096)
        transfer = store.start_write("a", 0, page_aligned(4096).fill_(3))
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            transfer.wait()
        transfer.wait()


@pytest.mark.clock
def test_starting_a_transfer_of_a_chunk_takes_less_than_30_microseconds(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=64 * MIB, num_threads=1, calls=always(FaultKind.EIO)) as store:
        store.allocate("a", 32 * MIB)
        data = page_aligned(32 * MIB)
        took_s = []
        for _ in range(200):  # nothing moves, so nothing is measured but the start
            begun = time.perf_counter()
            transfer = store.start_write("a", 0, data)
            took_s.append(time.perf_counter() - begun)
            with pytest.raises(StorageError):
                transfer.wait()
        assert sorted(took_s)[50] < 30e-6


def test_a_trace_has_every_request_and_says_how_even_the_load_was(tmp_path: Path) -> None:
    with SsdStore(tmp_path, capacity_bytes=16 * MIB) as store:
        store.allocate("a", 8 * MIB)
        store.start_write("a", 0, page_aligned(8 * MIB)).wait()
        begun = time.monotonic()
        store.start_trace()
        store.start_write("a", 0, page_aligned(8 * MIB)).wait()
        store.start_read("a", 0, page_aligned(4 * MIB)).wait()
        spans = store.take_trace()
        ended = time.monotonic()
        store.start_read("a", 0, page_aligned(4 * MIB)).wait()
        assert sum(span.num_bytes for span in spans if span.is_write) == 8 * MIB
        assert sum(span.num_bytes for span in spans if not span.is_write) == 4 * MIB
        assert all(begun <= span.start_s <= span.end_s <= ended for span in spans)
        profile = load_profile(spans, interval_s=(ended - begun) / 8, start_s=begun, end_s=ended + 1e-9)
        assert sum(profile) == pytest.approx(12 * MIB, rel=0.01)


def test_an_even_load_has_a_peak_of_its_mean() -> None:
    even = [TransferSpan(start_s=at, end_s=at + 1.0, num_bytes=100, is_write=True, file=0) for at in range(10)]
    assert peak_to_mean(load_profile(even, interval_s=0.5, start_s=0.0, end_s=10.0)) == pytest.approx(1.0)
    assert peak_to_mean(load_profile(even[:5], interval_s=0.5, start_s=0.0, end_s=10.0)) == pytest.approx(2.0)
    assert peak_to_mean(load_profile([], interval_s=1.0, start_s=0.0, end_s=4.0)) == 0.0
    assert all(peak_to_mean([value] * count) >= 1.0 for value in (0.1, 0.7, 1 / 3) for count in range(1, 100)), "whatever the sum rounds to"


def test_an_unknown_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "magic")
    with pytest.raises(ValueError, match="I/O backend 'magic' is not known; choose one of threads, io_uring"):
        SsdStore(tmp_path, capacity_bytes=MIB)
    assert list(tmp_path.iterdir()) == []
