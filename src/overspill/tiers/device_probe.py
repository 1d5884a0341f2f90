"""What is on a block device, and who uses it: everything that is looked at before a device is written to.

`Prober` asks the kernel (`/sys`, `/proc`, ioctls); tests give one that asks a folder. `find_signature` knows the bytes by which file
systems, partition tables, volume managers, encryption, RAID and swap are recognised; the offsets are those of the formats' own
documents and kernel headers. Any other byte that is not zero in the first MiB counts as content that is not known.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

from overspill.units import MIB

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_BLKSSZGET = 0x1268
"""From linux/fs.h."""

Read = Callable[[int, int], bytes]
"""(offset, length) -> bytes of the device."""

_AT_THE_START: tuple[tuple[str, int, bytes], ...] = (
    ("an XFS file system", 0, b"XFSB"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("an md RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    ("an md RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
    ("an ext2, ext3 or ext4 file system", 1080, b"\x53\xef"),
    ("an F2FS file system", 1024, b"\x10\x20\xf5\xf2"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 82, b"FAT32   "),
    ("a FAT file system", 54, b"FAT16   "),
    ("a FAT file system", 54, b"FAT12   "),
    ("a Btrfs file system", 65600, b"_BHRfS_M"),
    ("a bcache or bcachefs member", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("a bcachefs member", 4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("a Ceph volume", 0, b"bluestore block device"),
    ("an ISO 9660 file system", 32769, b"CD001"),
    ("a JFS file system", 32768, b"JFS1"),
    ("a ReiserFS file system", 65588, b"ReIsEr"),
    ("a SquashFS file system", 0, b"hsqs"),
    ("an EROFS file system", 1024, b"\xe2\xe1\xf5\xe0"),
    *(("an LVM2 physical volume", sector * 512 + 24, b"LVM2 001") for sector in range(4)),
    *(("swap", page - 10, magic) for page in (4096, 8192, 16384, 65536) for magic in (b"SWAPSPACE2", b"SWAP-SPACE", b"S1SUSPEND\0")),
    *(("a GPT partition table", sector, b"EFI PART") for sector in (512, 4096)),
    ("an MBR partition table or boot sector", 510, b"\x55\xaa"),
)
_ZFS_UBERBLOCK = 0x00BAB10C


def find_signature(read: Read, size_bytes: int) -> str:
    """What a device of `size_bytes` holds, in words; empty if the places that are looked at are all zeros."""
    head = read(0, min(MIB, size_bytes))
    for what, offset, magic in _AT_THE_START:
        if head[offset : offset + len(magic)] == magic:
            return what
    if _has_zfs_label(head):
        return "a ZFS member"
    tail_bytes = min(MIB, size_bytes)
    tail = read(size_bytes - tail_bytes, tail_bytes)
    if _has_zfs_label(tail[-512 * 1024 :]):
        return "a ZFS member"
    if any(tail[-sector : len(tail) - sector + 8] == b"EFI PART" for sector in (512, 4096)):
        return "a GPT partition table (its copy at the end)"
    # md 0.90: the last whole 64 KiB before the last 64 KiB; md 1.0: 8 KiB before the end, on 4 KiB.
    for offset in (size_bytes // 65536 * 65536 - 65536, (size_bytes // 512 - 16) // 8 * 8 * 512):
        start = offset - (size_bytes - tail_bytes)
        if start >= 0 and tail[start : start + 4] in (b"\xfc\x4e\x2b\xa9", b"\xa9\x2b\x4e\xfc"):
            return "an md RAID member"
    return "content that is not known" if any(head) else ""


def _has_zfs_label(region: bytes) -> bool:
    """Whether uberblocks lie at 128 KiB to 256 KiB of a label of 256 KiB, on any 1 KiB, in either byte order."""
    magics = (_ZFS_UBERBLOCK.to_bytes(8, "little"), _ZFS_UBERBLOCK.to_bytes(8, "big"))
    return any(
        region[label + at : label + at + 8] in magics
        for label in range(0, len(region), 256 * 1024)
        for at in range(128 * 1024, 256 * 1024, 1024)
    )


class Prober:
    """Asks the kernel about block devices. `sys` and `proc` are where it looks."""

    def __init__(self, *, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        self._sys, self._proc = sys, proc

    def is_block_device(self, path: Path) -> bool:
        try:
            return stat.S_ISBLK(os.stat(path).st_mode)
        except OSError:
            return False

    def number(self, path: Path) -> str:
        """`major:minor`; empty if there is none."""
        try:
            status = os.stat(path)
        except OSError:
            return ""
        return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""

    def size_bytes(self, fd: int) -> int:
        return os.lseek(fd, 0, os.SEEK_END)

    def logical_block_bytes(self, fd: int) -> int:
        answer = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
        return int.from_bytes(answer, "little")

    def discard(self, fd: int, offset: int, num_bytes: int) -> None:
        """Tell the drive that a range holds nothing; what it reads as is not defined. Raises OSError."""
        fcntl.ioctl(fd, _BLKDISCARD, bytes((ctypes.c_uint64 * 2)(offset, num_bytes)))

    def zero(self, fd: int, offset: int, num_bytes: int) -> None:
        """Make a range read as zeros. Raises OSError."""
        fcntl.ioctl(fd, _BLKZEROOUT, bytes((ctypes.c_uint64 * 2)(offset, num_bytes)))

    def users(self, path: Path) -> list[str]:
        """Who uses a device, its partitions, or the disk that it is a partition of, in words; empty: nobody that can be seen."""
        own = self.number(path)
        folder = self._sys / "dev" / "block" / own
        found = [f"it is held by {name}" for name in self._holders(folder)]
        numbers = {own: "it"}
        if (folder / "partition").exists():
            found += [f"its disk is held by {name}" for name in self._holders(folder.resolve().parent)]
        elif folder.is_dir():
            for child in sorted(folder.iterdir()):
                if (child / "partition").exists():
                    number = (child / "dev").read_text().strip()
                    numbers[number] = f"its partition {child.name}"
                    found += [f"its partition {child.name} is held by {name}" for name in self._holders(child)]
        for number, where in self._mounts():
            if number in numbers:
                found.append(f"{numbers[number]} is mounted at {where}")
        for name in self._swaps():
            number = self.number(Path(name))
            if number and number in numbers:
                found.append(f"{numbers[number]} is in use as swap")
        return found

    def _holders(self, folder: Path) -> list[str]:
        holders = folder / "holders"
        return sorted(item.name for item in holders.iterdir()) if holders.is_dir() else []

    def _mounts(self) -> list[tuple[str, str]]:
        """(device number, mount point), by the mount's own number and by that of its source (Btrfs has another)."""
        found = []
        for table in ("self", "1"):  # a container sees its own mounts; the first process's, where it may look
            try:
                lines = (self._proc / table / "mountinfo").read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                mount, _, source = line.partition(" - ")
                fields, names = mount.split(), source.split()
                if len(fields) > 4 and len(names) > 1:
                    found += [(fields[2], fields[4])]
                    number = self.number(Path(names[1])) if names[1].startswith("/") else ""
                    found += [(number, fields[4])] if number and number != fields[2] else []
        return list(dict.fromkeys(found))

    def _swaps(self) -> list[str]:
        try:
            return [line.split()[0] for line in (self._proc / "swaps").read_text().splitlines()[1:] if line.split()]
        except OSError:
            return []
