"""The records of a directory's checkpoints, opened for going on, checking or exporting."""

from __future__ import annotations

import os
from pathlib import Path

from overspill.checkpoint.manifests import find_manifests, read_manifest, remove_manifest
from overspill.errors import StorageError
from overspill.spec.checkpoint import Manifest
from overspill.tiers import RecordStore, SsdStore
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy
from overspill.tiers.checksums import ALGORITHM, BLOCK_BYTES, from_hex
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.tiers.records import Generation, RecordVersion
from overspill.units import align_up


def open_records(
    directory: str | Path,
    manifest: Manifest,
    *,
    keep: int | None = None,
    calls: FileCalls = OS_CALLS,
    space: SpacePolicy | None = None,
    num_threads: int = 4,
) -> tuple[RecordStore, dict[int, Generation]]:
    """The records of `manifest`, which become the current ones, and the pinned generations by number.

    Args:
        keep: checkpoints that shall fit from now on (older ones beyond it are removed, and the file grows if it must);
            None: only look, change nothing.

    Raises:
        StorageError: the data file is missing, too short, or in use.
    """
    folder = Path(directory)
    path = folder / manifest.data_file
    if (manifest.checksum, manifest.block_bytes) != (ALGORITHM, BLOCK_BYTES):
        raise StorageError(f"{path} has {manifest.checksum} of {manifest.block_bytes} B, this program knows {ALGORITHM} of {BLOCK_BYTES} B")
    size = os.stat(path).st_size if path.is_file() else None
    if size is None or size < manifest.data_file_bytes:
        found = "is missing" if size is None else f"has {size} B"
        raise StorageError(
            f"{path} {found}, checkpoint {manifest.generation} needs {manifest.data_file_bytes} B of it: the file was cut or moved"
        )
    num_slots = keep + 1 if keep is not None else 1
    missing = sum(max(0, num_slots - len(entry.slots)) * align_up(entry.num_bytes, EXTENT_ALIGNMENT_BYTES) for entry in manifest.records)
    store = SsdStore(
        folder, capacity_bytes=manifest.data_file_bytes + missing, existing=True, calls=calls, space=space, num_threads=num_threads
    )
    try:
        for entry in manifest.records:
            for name, position in zip(entry.slots, entry.positions, strict=True):
                store.adopt(name, position, entry.num_bytes)
        records = RecordStore(store, num_slots=num_slots)
        for entry in manifest.records:
            version = RecordVersion(num_bytes=entry.num_bytes, slots=entry.slots, slot=entry.slot, checksums=from_hex(entry.checksums))
            records.restore(entry.name, version)
        generations: dict[int, Generation] = {}
        if keep is not None:
            generations = _pin_kept(folder, manifest, records, keep, calls)
        return records, generations
    except BaseException:
        store.close()
        raise


def _pin_kept(folder: Path, manifest: Manifest, records: RecordStore, keep: int, calls: FileCalls) -> dict[int, Generation]:
    """Pin the newest `keep` checkpoints up to `manifest`; remove the older ones, and newer ones that were passed over."""
    numbers = [number for number in find_manifests(folder) if number <= manifest.generation]
    generations: dict[int, Generation] = {}
    for number, path in find_manifests(folder).items():
        if number not in numbers[-keep:]:
            remove_manifest(path, calls=calls)
            continue
        kept = manifest if number == manifest.generation else read_manifest(path, calls=calls)
        slots = {entry.name: records.version(entry.name).slots.index(entry.slots[entry.slot]) for entry in kept.records}
        records.pin(slots)
        generations[number] = slots
    return generations
