"""The data of a store over one or several places: directories with a preallocated file each, or block devices.

With several places, addresses are dealt out in turn (`stripes.py`), capacity is split equally, and each place is checked, locked and
flushed like a single one (`extent_file.py`, `block_device.py`).

Rules:

1. The first place is opened first: only its lock protects what is decided before anything is discarded.
2. Once content is kept (a checkpoint exists), every place says to which set it belongs, which one of it it is, and where the first one
   is: in `overspill.stripe` beside the file, or in a device's header. Going on opens a set only if all of its places are there and say so.
3. A new run does not overwrite a place that says it belongs to another set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from overspill.errors import StorageError
from overspill.spec.checkpoint import StripeSet
from overspill.tiers.block_device import BlockDevice, is_block_device
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy, SpaceWaiter, write_durably
from overspill.tiers.extent_file import FILE_NAME, ExtentFile
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.tiers.stripes import STRIPE_BYTES, StripeLayout
from overspill.units import align_up

NOTE_NAME = "overspill.stripe"
Place = str | os.PathLike[str]


class PlaceFile(Protocol):
    """What one place gives: an open, locked file descriptor, and the care for what lies behind it."""

    fd: int
    path: Path
    capacity_bytes: int
    base_bytes: int
    is_direct: bool
    is_fresh_zero: bool
    keeps_content: bool

    def zero(self, offset: int, num_bytes: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """What a place says about itself (rule 2)."""

    set_id: str
    index: int
    places: tuple[str, ...]
    stripe_bytes: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Membership:
        """Raises ValueError if it is none."""
        try:
            plain = json.loads(text)
            return Membership(
                set_id=str(plain["set_id"]),
                index=int(plain["index"]),
                places=tuple(map(str, plain["places"])),
                stripe_bytes=int(plain["stripe_bytes"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no membership: {text[:80]!r}") from error


class StripedFile:
    """One address space of `capacity_bytes` over `places`.

    Args:
        places: directories and block devices, in order.
        expected: the set that a checkpoint names; None: a single file without a note, or (not `existing`) a new set.
        kept_bytes: of an expected set, what must be there at least.
        overwrite: block devices whose content may be lost; see `block_device.py`.
        unlink, existing, read_only, before_discarding: as of `ExtentFile`, `before_discarding` for the first place.

    Raises:
        ValueError, BudgetError, StorageError: as `ExtentFile` and `BlockDevice`; a place of the set is missing or another's.
    """

    def __init__(
        self,
        places: Sequence[Place],
        capacity_bytes: int,
        *,
        unlink: bool,
        existing: bool = False,
        expected: StripeSet | None = None,
        kept_bytes: int = 0,
        read_only: bool = False,
        before_discarding: Callable[[], None] | None = None,
        overwrite: Sequence[str] = (),
        calls: FileCalls = OS_CALLS,
    ) -> None:
        if not places:
            raise ValueError("a store needs a directory or a block device; give --ssd-dir")
        resolved = [str(Path(place).resolve()) for place in places]
        twice = next((place for index, place in enumerate(resolved) if place in resolved[:index]), None)
        if twice is not None:
            raise ValueError(f"{twice} is given twice; give every --ssd-dir once")
        stripe_bytes = STRIPE_BYTES if expected is None else expected.stripe_bytes
        self.layout = StripeLayout(num_files=len(places), stripe_bytes=stripe_bytes)
        set_id = secrets.token_hex(8) if expected is None else expected.set_id
        self.members = tuple(
            Membership(set_id=set_id, index=index, places=tuple(resolved), stripe_bytes=stripe_bytes) for index in range(len(places))
        )
        self._calls = calls
        self._unlinked = unlink
        self._maker_pid = os.getpid()
        self.files: list[PlaceFile] = []
        share = self.layout.file_bytes(capacity_bytes)
        try:
            for member, place in zip(self.members, places, strict=True):
                check = before_discarding if member.index == 0 else None
                if is_block_device(place):
                    self.files.append(
                        BlockDevice(
                            place,
                            share,
                            set_id=member.set_id,
                            note=member.to_json(),
                            existing=existing,
                            read_only=read_only,
                            is_scratch=unlink,
                            before_discarding=check,
                            overwrite=overwrite,
                            calls=calls,
                        )
                    )
                    continue
                if expected is not None:
                    _validate_member(Path(place), member, self.layout.file_bytes(kept_bytes))
                elif not existing and not unlink:
                    check = _refuse_others(Path(place), member, check)
                self.files.append(
                    ExtentFile(
                        place,
                        align_up(share, EXTENT_ALIGNMENT_BYTES),
                        unlink=unlink,
                        existing=existing,
                        read_only=read_only,
                        before_discarding=check,
                        calls=calls,
                    )
                )
        except BaseException:
            self.close()
            raise
        self.is_fresh_zero = all(file.is_fresh_zero for file in self.files)
        """Whether what was never written reads as zeros."""
        self.is_direct = all(file.is_direct for file in self.files)
        self.alignment_bytes = EXTENT_ALIGNMENT_BYTES if any(file.is_direct for file in self.files) else 1
        smallest = min(file.capacity_bytes for file in self.files)
        if len(self.files) > 1:
            smallest = smallest // stripe_bytes * stripe_bytes * len(self.files)
        self.capacity_bytes = smallest

    @property
    def path(self) -> str:
        """For messages."""
        return ", ".join(str(file.path) for file in self.files)

    @property
    def stripe_set(self) -> StripeSet | None:
        """What a manifest says about the places; None for a single file beside it."""
        if len(self.files) == 1 and not isinstance(self.files[0], BlockDevice):
            return None
        first = self.members[0]
        return StripeSet(set_id=first.set_id, places=first.places, stripe_bytes=first.stripe_bytes)

    def locate(self, address: int) -> tuple[PlaceFile, int]:
        """The file of an address, and the offset in it."""
        ((index, offset, _),) = self.layout.file_ranges(address, 1)
        return self.files[index], self.files[index].base_bytes + offset

    def zero(self, address: int, num_bytes: int) -> None:
        """Make whole pages read as zeros. Raises OSError."""
        for index, offset, size in self.layout.file_ranges(address, num_bytes):
            self.files[index].zero(offset, size)

    def flush(self) -> None:
        """Make what was written durable. Raises OSError: it failed; what is on the drives is unknown."""
        for file in self.files:
            file.flush()

    def keep(self, is_kept: bool) -> None:
        """Whether closing leaves the content; if so, every place says what it belongs to (rule 2).

        Raises:
            OSError: the notes could not be written.
        """
        for file, member in zip(self.files, self.members, strict=True):
            if len(self.files) > 1 and is_kept and not file.keeps_content and not isinstance(file, BlockDevice):
                space = SpaceWaiter(SpacePolicy(max_wait_s=0))
                write_durably(file.path.with_name(NOTE_NAME), member.to_json().encode(), calls=self._calls, space=space)
            if isinstance(file, BlockDevice):
                file.keep(is_kept)
            file.keeps_content = is_kept

    def close(self) -> None:
        """Close every place; closing again does nothing. The child of a fork leaves all as it is but its own descriptors."""
        has_notes = not self._unlinked and len(self.members) > 1 and os.getpid() == self._maker_pid
        with contextlib.ExitStack() as stack:
            for file in self.files:
                stack.callback(file.close)
                if has_notes and not file.keeps_content and not isinstance(file, BlockDevice):
                    stack.callback(_remove, file.path.with_name(NOTE_NAME))


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _read_note(folder: Path) -> Membership | None:
    try:
        return Membership.from_json((folder / NOTE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _validate_member(folder: Path, member: Membership, share_bytes: int) -> None:
    """Refuse a place of a set that is not what the checkpoint says."""
    number = f"part {member.index + 1} of {len(member.places)} of this checkpoint's data"
    path = folder / FILE_NAME
    if not path.is_file():
        raise StorageError(f"{path} is missing, which is {number}; mount its drive at {folder}")
    found = _read_note(folder)
    if found is None or (found.set_id, found.index) != (member.set_id, member.index):
        what = "has no note that can be read" if found is None else f"is part {found.index + 1} of set {found.set_id}"
        raise StorageError(f"{folder} should hold {number} (set {member.set_id}), but it {what}; mount the right drive at {folder}")
    size = path.stat().st_size
    if size < share_bytes:
        raise StorageError(f"{path} has {size} B, as {number} it needs {share_bytes} B: the file was cut or moved")


def relocate(stripes: StripeSet, folders: Sequence[str]) -> StripeSet:
    """The set with those of `folders` in place of their old paths that say they belong to it."""
    places = list(stripes.places)
    for folder in folders:
        found = _read_note(Path(folder))
        if found is not None and found.set_id == stripes.set_id and found.index < len(places):
            places[found.index] = str(Path(folder).resolve())
    return dataclasses.replace(stripes, places=tuple(places))


def _refuse_others(folder: Path, member: Membership, check: Callable[[], None] | None) -> Callable[[], None]:
    """Rule 3, asked under the lock."""

    def refuse() -> None:
        if check is not None:
            check()
        found = _read_note(folder)
        if found is not None and found.index and found.places[0] != member.places[0]:  # part 1 is what manifests lie beside: asked above
            raise StorageError(
                f"{folder} holds part {found.index + 1} of {len(found.places)} of the checkpoints in {found.places[0]}; give another "
                f"--ssd-dir, or delete {folder / NOTE_NAME} if they are not needed"
            )
        _remove(folder / NOTE_NAME)

    return refuse
