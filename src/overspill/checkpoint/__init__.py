"""Checkpoints on disk: manifests, the records they name, checking and exporting them. Saving and resuming is `runtime`'s."""

from __future__ import annotations

from overspill.checkpoint.manifests import (
    discard_manifests,
    find_manifests,
    manifest_path,
    read_latest,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from overspill.checkpoint.records import open_records

__all__ = [
    "discard_manifests",
    "find_manifests",
    "manifest_path",
    "open_records",
    "read_latest",
    "read_manifest",
    "remove_manifest",
    "write_manifest",
]
