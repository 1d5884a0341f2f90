"""Raw block devices: what is refused, what the second word allows, and that a device of ours is known again.

Without root: a regular file stands for the device, and a folder for /sys and /proc (`Prober` takes both). One test uses a loop device
where this machine lets us have one.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import OPTIMIZER, SCHEDULE, assert_equal, content, train, uninterrupted
from tiny_models import tiny_model

import overspill
from overspill.checkpoint import read_latest
from overspill.checkpoint.export import verify_checkpoints
from overspill.errors import BudgetError, StorageError
from overspill.runtime.session import Session
from overspill.tiers import Fault, FaultInjector, FaultKind, SsdStore, block_device
from overspill.tiers.block_device import BASE_BYTES, build_header, parse_header
from overspill.tiers.device_probe import Prober, find_signature
from overspill.tiers.wear import COUNTER_NAME
from overspill.units import MIB

SIZE = 64 * MIB


class FileProber(Prober):
    """Regular files called `*.device` are block devices 7:1, 7:2, ... in a /sys and a /proc of the test's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(sys=folder / "sys", proc=folder / "proc")
        self.folder, self.calls = folder, list[tuple[str, int, int]]()
        self.can_discard = True

    def is_block_device(self, path: Path) -> bool:
        return path.suffix == ".device" and path.exists()

    def number(self, path: Path) -> str:
        name = path.resolve().name
        return f"7:{name.removesuffix('.device')}" if name.endswith(".device") else ""

    def logical_block_bytes(self, fd: int) -> int:
        return 512

    def discard(self, fd: int, offset: int, num_bytes: int) -> None:
        if not self.can_discard:
            raise OSError(95, "Operation not supported")
        self.calls.append(("discard", offset, num_bytes))
        self._fill(fd, offset, num_bytes, b"\xd5")  # a discarded range may read as anything

    def zero(self, fd: int, offset: int, num_bytes: int) -> None:
        self.calls.append(("zero", offset, num_bytes))
        self._fill(fd, offset, num_bytes, b"\0")

    def _fill(self, fd: int, offset: int, num_bytes: int, byte: bytes) -> None:
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # without O_DIRECT
        os.pwrite(other, byte * num_bytes, offset)
        os.fsync(other)
        os.close(other)


@pytest.fixture
def prober(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileProber:
    fake = FileProber(tmp_path)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "mountinfo").write_text("25 1 8:2 / / rw - ext4 /dev/root rw\n")
    (tmp_path / "proc" / "swaps").write_text("Filename Type Size Used Priority\n")
    monkeypatch.setattr(block_device, "PROBER", fake)
    return fake


@pytest.fixture
def device(tmp_path: Path, prober: FileProber) -> Path:
    """`7:1`, a whole disk without partitions, all zeros."""
    return make_device(tmp_path, "1")


def make_device(folder: Path, minor: str) -> Path:
    path = folder / f"{minor}.device"
    with path.open("wb") as file:
        file.truncate(SIZE)
    (folder / "sys" / "dev" / "block" / f"7:{minor}" / "holders").mkdir(parents=True)
    return path


def random_bytes(num_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def put(device: Path, offset: int, content: bytes) -> None:
    with device.open("r+b") as file:
        file.seek(offset if offset >= 0 else SIZE + offset)
        file.write(content)


# Who uses it (rule 1).


def test_a_mounted_device_is_refused_whatever_the_user_says(device: Path, prober: FileProber) -> None:
    mounts = prober.folder / "proc" / "self" / "mountinfo"
    mounts.write_text(mounts.read_text() + "40 25 7:1 / /data rw - ext4 /dev/thing rw\n")
    before = device.read_bytes()
    for overwrite in ((), (str(device),)):
        with pytest.raises(StorageError, match=r"1.device is in use: it is mounted at /data; it is never written to"):
            SsdStore(device, capacity_bytes=MIB, overwrite=overwrite)
    assert device.read_bytes() == before


def test_a_device_whose_file_system_has_a_number_of_its_own_is_found_by_its_source(device: Path, prober: FileProber) -> None:
    mounts = prober.folder / "proc" / "self" / "mountinfo"
    mounts.write_text(f"40 25 0:55 / /data rw - btrfs {device} rw\n")
    with pytest.raises(StorageError, match="it is mounted at /data"):
        SsdStore(device, capacity_bytes=MIB)


def test_a_disk_with_a_mounted_or_held_partition_is_refused(device: Path, prober: FileProber) -> None:
    partition = prober.folder / "sys" / "dev" / "block" / "7:1" / "loop1p1"
    (partition / "holders").mkdir(parents=True)
    (partition / "partition").write_text("1\n")
    (partition / "dev").write_text("7:99\n")
    SsdStore(device, capacity_bytes=MIB).close()
    (partition / "holders" / "dm-0").mkdir()
    with pytest.raises(StorageError, match="its partition loop1p1 is held by dm-0"):
        SsdStore(device, capacity_bytes=MIB, overwrite=[str(device)])
    (partition / "holders" / "dm-0").rmdir()
    (prober.folder / "proc" / "self" / "mountinfo").write_text("40 25 7:99 / /home rw - xfs /dev/thing rw\n")
    with pytest.raises(StorageError, match="its partition loop1p1 is mounted at /home"):
        SsdStore(device, capacity_bytes=MIB, overwrite=[str(device)])


def test_swap_and_members_of_other_devices_are_refused(device: Path, prober: FileProber) -> None:
    holder = prober.folder / "sys" / "dev" / "block" / "7:1" / "holders" / "md0"
    holder.mkdir()
    with pytest.raises(StorageError, match="it is held by md0"):
        SsdStore(device, capacity_bytes=MIB, overwrite=[str(device)])
    holder.rmdir()
    (prober.folder / "proc" / "swaps").write_text(f"Filename Type Size Used Priority\n{device} partition 1 0 -2\n")
    with pytest.raises(StorageError, match="it is in use as swap"):
        SsdStore(device, capacity_bytes=MIB, overwrite=[str(device)])


def test_a_partition_of_a_held_disk_is_refused(tmp_path: Path, prober: FileProber) -> None:
    device = make_device(tmp_path, "3")
    own = tmp_path / "sys" / "dev" / "block" / "7:3"
    disk = tmp_path / "sys" / "disk"
    (disk / "part" / "holders").mkdir(parents=True)
    (disk / "part" / "partition").write_text("3\n")
    (disk / "holders" / "md127").mkdir(parents=True)
    (own / "holders").rmdir()
    own.rmdir()
    own.symlink_to(disk / "part")
    with pytest.raises(StorageError, match="its disk is held by md127"):
        SsdStore(device, capacity_bytes=MIB)


# What is on it (rule 2).

SIGNATURES = {
    "ext": (1080, b"\x53\xef", "ext4"),
    "xfs": (0, b"XFSB", "XFS"),
    "btrfs": (65600, b"_BHRfS_M", "Btrfs"),
    "f2fs": (1024, struct.pack("<I", 0xF2F52010), "F2FS"),
    "ntfs": (3, b"NTFS    ", "NTFS"),
    "fat": (82, b"FAT32   ", "FAT"),
    "exfat": (3, b"EXFAT   ", "exFAT"),
    "zfs": (128 * 1024 + 5 * 1024, struct.pack("<Q", 0x00BAB10C), "ZFS"),
    "zfs-end": (-256 * 1024 + 130 * 1024, struct.pack(">Q", 0x00BAB10C), "ZFS"),
    "lvm": (512 + 24, b"LVM2 001", "LVM2"),
    "luks": (0, b"LUKS\xba\xbe\x00\x02", "LUKS"),
    "md-1.2": (4096, struct.pack("<I", 0xA92B4EFC), "md RAID"),
    "md-1.0": (-8192, struct.pack("<I", 0xA92B4EFC), "md RAID"),
    "md-0.90": (-65536, struct.pack("<I", 0xA92B4EFC), "md RAID"),
    "swap": (4086, b"SWAPSPACE2", "swap"),
    "gpt": (512, b"EFI PART", "GPT"),
    "gpt-end": (-512, b"EFI PART", "GPT"),
    "mbr": (510, b"\x55\xaa", "MBR"),
    "unknown": (MIB - 1, b"\x01", "content that is not known"),
}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_content_is_refused_by_name_unless_the_user_names_the_device_again(name: str, device: Path) -> None:
    offset, magic, what = SIGNATURES[name]
    put(device, offset, magic)
    before = device.read_bytes()
    for overwrite in ((), (str(device.with_name("2.device")),)):
        with pytest.raises(StorageError, match=rf"1.device holds .*{what}.*, which would be overwritten; .* --ssd-overwrite {device}"):
            SsdStore(device, capacity_bytes=MIB, overwrite=overwrite)
    assert device.read_bytes() == before
    SsdStore(device, capacity_bytes=MIB, overwrite=[str(device)]).close()


def test_a_device_of_zeros_has_no_signature() -> None:
    assert find_signature(lambda offset, size: bytes(size), SIZE) == ""


# How it is used.


def test_extents_read_zeros_and_the_rest_of_the_device_is_not_touched(device: Path, prober: FileProber) -> None:
    put(device, 5 * MIB, b"\xff" * (20 * MIB))
    with SsdStore(device, capacity_bytes=8 * MIB) as store:
        assert store.is_direct and store.capacity_bytes == 8 * MIB
        store.allocate("a", 6 * MIB)
        buffer = torch.ones(6 * MIB, dtype=torch.uint8)
        store.start_read("a", 0, buffer).wait()
        assert not buffer.any()
        store.start_write("a", 0, random_bytes(6 * MIB)).wait()
        assert device.read_bytes()[BASE_BYTES : BASE_BYTES + 6 * MIB] == random_bytes(6 * MIB).numpy().tobytes()
    content = device.read_bytes()
    assert ("discard", BASE_BYTES, 8 * MIB) == prober.calls[0] == prober.calls[-1]
    assert content[BASE_BYTES + 8 * MIB : 25 * MIB] == b"\xff" * (16 * MIB)


def test_state_and_scratch_share_a_device_and_scratch_is_gone_at_the_end(device: Path, prober: FileProber) -> None:
    prober.can_discard = False
    with SsdStore(device, capacity_bytes=8 * MIB, unlink=True) as scratch, SsdStore(device, capacity_bytes=8 * MIB) as store:
        for one in (scratch, store):
            one.allocate("a", MIB)
            one.start_write("a", 0, random_bytes(MIB)).wait()
        with pytest.raises(StorageError, match="has a store for state already"):
            SsdStore(device, capacity_bytes=MIB)
        assert device.read_bytes().count(random_bytes(MIB).numpy().tobytes()) == 2
        scratch.close()
        with pytest.raises(BudgetError, match=r"scratch needs 60.00 MiB .* but .*1.device has 55.00 MiB"):
            SsdStore(device, capacity_bytes=60 * MIB, unlink=True)
    assert random_bytes(MIB).numpy().tobytes() not in device.read_bytes()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_that_ends_discards_nothing_of_its_parents(device: Path, prober: FileProber) -> None:
    with SsdStore(device, capacity_bytes=8 * MIB) as store:
        store.allocate("a", MIB)
        written = store.start_write("a", 0, random_bytes(MIB), with_checksums=True)
        written.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        store.start_read("a", 0, torch.empty(MIB, dtype=torch.uint8), expected=written.checksums).wait()


def test_a_device_that_cannot_be_written_or_has_no_bytes_is_a_storage_error(
    device: Path, prober: FileProber, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prober, "size_bytes", lambda fd: 0)  # a loop device without a file, a card reader without a card
        with pytest.raises(StorageError, match=r"1.device has 0 B, fewer than the 1048576 B .* attach its medium"):
            SsdStore(device, capacity_bytes=MIB)
    calls = FaultInjector(Fault(kind=FaultKind.EIO, call_index=0))
    with pytest.raises(StorageError, match=r"the header of .*1.device could not be written \(.*\); give a device that can be written"):
        SsdStore(device, capacity_bytes=MIB, calls=calls)
    SsdStore(device, capacity_bytes=MIB).close()


def test_another_run_is_kept_out(device: Path) -> None:
    code = (
        "import sys, os; sys.path[:0] = sys.argv[2:]\nfrom pathlib import Path\nfrom overspill.tiers import block_device, SsdStore\n"
        "block_device.PROBER.is_block_device = lambda path: True\nblock_device.PROBER.users = lambda path: []\n"
        "block_device.PROBER.logical_block_bytes = lambda fd: 512\nSsdStore(sys.argv[1], capacity_bytes=1 << 20)"
    )
    with SsdStore(device, capacity_bytes=MIB):
        done = subprocess.run([sys.executable, "-c", code, str(device), *sys.path], capture_output=True, text=True)
    assert "1.device is in use by another run" in done.stderr, done.stderr


def test_a_device_of_a_killed_run_is_used_again_and_one_with_checkpoints_is_not(device: Path) -> None:
    store = SsdStore(device, capacity_bytes=MIB)
    left = device.read_bytes()
    store.close()
    device.write_bytes(left)  # as a kill leaves it
    store = SsdStore(device, capacity_bytes=MIB)
    store.allocate("a", 4096)
    store.start_write("a", 0, random_bytes(4096)).wait()
    store.flush()
    store.keep()
    stripes, position = store.stripe_set, store.position("a")
    assert stripes is not None and stripes.places == (str(device),)
    store.close()
    with pytest.raises(StorageError, match=r"holds the checkpoints of another run \(set .*--ssd-overwrite"):
        SsdStore(device, capacity_bytes=MIB)
    with SsdStore(stripes.places, capacity_bytes=MIB, existing=True, stripes=stripes) as again:
        again.adopt("a", position, 4096)
        buffer = torch.empty(4096, dtype=torch.uint8)
        again.start_read("a", 0, buffer).wait()
        assert torch.equal(buffer, random_bytes(4096))
    SsdStore(device, capacity_bytes=MIB, overwrite=[str(device)]).close()


def test_a_foreign_device_is_not_mistaken_for_the_one_of_a_checkpoint(device: Path, tmp_path: Path) -> None:
    store = SsdStore(device, capacity_bytes=MIB)
    store.keep()
    stripes = store.stripe_set
    store.close()
    assert stripes is not None
    header = device.read_bytes()[:4096]
    device.write_bytes(bytes(SIZE))
    with pytest.raises(StorageError, match="should belong to set .*, but it has no overspill header; attach the right device"):
        SsdStore(device, capacity_bytes=MIB, existing=True, stripes=stripes)
    fields = parse_header(header)
    assert fields is not None
    put(device, 0, build_header({**fields, "set_id": "other"}))
    with pytest.raises(StorageError, match="but it belongs to set other"):
        SsdStore(device, capacity_bytes=MIB, existing=True, stripes=stripes)
    put(device, 0, header[:100] + bytes([header[100] ^ 1]) + header[101:])
    with pytest.raises(StorageError, match="has no overspill header"):
        SsdStore(device, capacity_bytes=MIB, existing=True, stripes=stripes)


def test_a_run_on_a_device_goes_on_from_its_checkpoint_with_the_same_bits(device: Path, tmp_path: Path) -> None:
    plan = overspill.PlanRequest(
        dtype="float32", seq_len=12, micro_batch=2, accumulate=2, device="cpu", clip=1.0, parameters="ssd", states="ssd", boundaries="ssd",
        ssd_dir=str(device),
    )  # fmt: skip
    folder = tmp_path / "checkpoints"

    def open_run(**settings: object) -> Session:
        policy = overspill.CheckpointPolicy(directory=str(folder))
        return Session(
            tiny_model("llama_tied"), plan=plan, optimizer=OPTIMIZER, learning_rate=SCHEDULE, seed=3, checkpoints=policy, **settings
        )  # type: ignore[arg-type]

    with open_run() as session:
        train(session, 2)
        assert session.wear is not None and session.wear.state.own_bytes > 0
    assert (folder / COUNTER_NAME).is_file()
    manifest = read_latest(folder)
    assert manifest.stripes is not None and manifest.stripes.places == (str(device),)
    assert [problems for _, problems in verify_checkpoints(folder)] == [[]]
    with pytest.raises(StorageError, match="has 1 checkpoint|holds the checkpoints"):
        open_run()
    with overspill.resume(folder, model=tiny_model("llama_tied")) as session:
        train(session, 4)
        assert_equal(content(session), uninterrupted(4, clip=1.0))


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A real block device, where this machine lets us make one."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    try:
        made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no losetup here")
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_real_loop_device_is_written_discarded_and_refused_once_it_has_a_file_system(loop_device: Path) -> None:
    assert Prober().users(loop_device) == []
    with SsdStore(loop_device, capacity_bytes=16 * MIB) as store:
        store.allocate("a", 8 * MIB)
        buffer = torch.ones(8 * MIB, dtype=torch.uint8)
        store.start_read("a", 0, buffer).wait()
        assert not buffer.any()
        written = store.start_write("a", 0, random_bytes(8 * MIB), with_checksums=True)
        written.wait()
        store.start_read("a", 0, buffer, expected=written.checksums).wait()
        with pytest.raises(OSError, match="busy"):
            os.close(os.open(loop_device, os.O_RDWR | os.O_EXCL))
    SsdStore(loop_device, capacity_bytes=MIB).close()
    if subprocess.run(["mkfs.ext4", "-q", "-F", str(loop_device)], capture_output=True).returncode == 0:
        with pytest.raises(StorageError, match="an ext2, ext3 or ext4 file system"):
            SsdStore(loop_device, capacity_bytes=MIB)
