"""The records of a directory's checkpoints, opened for going on, checking or exporting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from overspill.checkpoint.manifests import find_manifests, manifest_path, read_manifest, remove_manifest
from overspill.errors import StorageError
from overspill.spec.checkpoint import Manifest
from overspill.tiers import RecordStore, SsdStore
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy
from overspill.tiers.checksums import ALGORITHM, BLOCK_BYTES, from_hex
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.tiers.records import Generation, RecordVersion
from overspill.tiers.striped_file import relocate
from overspill.units import align_up


def open_records(
    directory: str | Path,
    manifest: Manifest,
    *,
    keep: int | None = None,
    calls: FileCalls = OS_CALLS,
    space: SpacePolicy | None = None,
    num_threads: int = 4,
    places: Sequence[str] = (),
) -> tuple[RecordStore, dict[int, Generation]]:
    """The records of `manifest`, which become the current ones, and the pinned generations by number.

    Rules: the manifests are looked at again under the lock, since another run may have been ending while this one started.
    Every checkpoint that is there stays pinned, older and newer ones too: opening changes none of them, and the first
    checkpoint that is saved removes what is not kept.

    Args:
        places: where parts of the data may be, if not where the manifest says (it was moved); each says itself which part it is.
        num_threads: for each of them.
        keep: checkpoints that shall fit from now on (the file grows if it must); None: only look, with a shared lock.

    Raises:
        StorageError: the data file is missing, too short, or in use; or the checkpoint is not there any more.
    """
    folder = Path(directory)
    path = folder / manifest.data_file
    if (manifest.checksum, manifest.block_bytes) != (ALGORITHM, BLOCK_BYTES):
        raise StorageError(f"{path} has {manifest.checksum} of {manifest.block_bytes} B, this program knows {ALGORITHM} of {BLOCK_BYTES} B")
    stripes = None if manifest.stripes is None else relocate(manifest.stripes, [str(folder), *places])
    size = os.stat(path).st_size if path.is_file() else None
    if stripes is None and (size is None or size < manifest.data_file_bytes):
        found = "is missing" if size is None else f"has {size} B"
        raise StorageError(
            f"{path} {found}, checkpoint {manifest.generation} needs {manifest.data_file_bytes} B of it: the file was cut or moved"
        )
    num_slots = keep + 1 if keep is not None else 1
    missing = sum(max(0, num_slots - len(entry.slots)) * align_up(entry.num_bytes, EXTENT_ALIGNMENT_BYTES) for entry in manifest.records)
    store = SsdStore(
        folder if stripes is None else stripes.places,
        capacity_bytes=manifest.data_file_bytes + missing,
        existing=True,
        stripes=stripes,
        kept_bytes=manifest.data_file_bytes,
        read_only=keep is None,
        calls=calls,
        space=space,
        num_threads=num_threads * (1 if stripes is None else len(stripes.places)),
    )
    try:
        present = _read_again(folder, manifest, calls, others=keep is not None)
        table = _slot_table(present)
        for positions, entry in zip(table.values(), manifest.records, strict=True):
            for name, position in positions.items():
                store.adopt(name, position, entry.num_bytes)
        records = RecordStore(store, num_slots=num_slots)
        for entry in manifest.records:
            slots = tuple(table[entry.name])
            current = slots.index(entry.slots[entry.slot])
            records.restore(
                entry.name, RecordVersion(num_bytes=entry.num_bytes, slots=slots, slot=current, checksums=from_hex(entry.checksums))
            )
        return records, {} if keep is None else _pin_all(folder, present, manifest, records, calls)
    except BaseException:
        store.close()
        raise


def _read_again(folder: Path, manifest: Manifest, calls: FileCalls, *, others: bool) -> dict[int, Manifest]:
    """The checkpoints that are there now, the lock held, oldest first: `manifest`, and the `others` if they matter."""
    found = find_manifests(folder)
    wanted = found if others else {number: path for number, path in found.items() if number == manifest.generation}
    present = {number: read_manifest(path, calls=calls) for number, path in wanted.items()}
    if present.get(manifest.generation) != manifest:
        raise StorageError(
            f"checkpoint {manifest.generation} of {folder} is gone: another run was still saving there while this one started; "
            f"there {'are' if found else 'is'} now {', '.join(map(str, found)) or 'none'}; start again"
        )
    return present


def _slot_table(present: Mapping[int, Manifest]) -> dict[str, dict[str, int]]:
    """Record -> its slots and their places in the file: of all checkpoints, for a newer one may have been given more of them."""
    table: dict[str, dict[str, int]] = {}
    for manifest in present.values():
        for entry in manifest.records:
            table.setdefault(entry.name, {}).update(zip(entry.slots, entry.positions, strict=True))
    return table


def _pin_all(
    folder: Path, present: Mapping[int, Manifest], manifest: Manifest, records: RecordStore, calls: FileCalls
) -> dict[int, Generation]:
    """Pin every checkpoint. One more than there is room for is what a kill left between two steps of saving: finish that."""
    generations: dict[int, Generation] = {}
    for number, kept in present.items():
        versions = {entry.name: records.version(entry.name).slots.index(entry.slots[entry.slot]) for entry in kept.records}
        records.pin(versions)
        generations[number] = versions
    num_slots = min(len(records.version(entry.name).slots) for entry in manifest.records)
    while len(generations) >= num_slots:
        oldest = min(number for number in generations if number != manifest.generation)
        remove_manifest(manifest_path(folder, oldest), calls=calls)
        records.unpin(generations.pop(oldest))
    return generations
