"""Manifests as files: JSON with a digest of its own bytes, one file a checkpoint, renamed into place when all is written.

    {"manifest": {...},
     "sha256": "<64 hex digits: of the file's bytes with these digits as zeros>"}

The digest covers every byte of the file, so a flipped bit anywhere is found before a value is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path

from overspill.errors import StorageError
from overspill.spec.checkpoint import FORMAT, VERSION, Manifest
from overspill.spec.documents import from_plain, to_plain
from overspill.tiers.calls import OS_CALLS, FileCalls, SpaceWaiter, flush_folder, read_whole, write_durably

_NAME = re.compile(r"checkpoint-(\d{8,})\.json")
_ZEROS = "0" * 64
_TAIL = '"}\n'


def manifest_path(directory: Path, generation: int) -> Path:
    return directory / f"checkpoint-{generation:08d}.json"


def find_manifests(directory: str | Path) -> dict[int, Path]:
    """Generation -> file, oldest first; empty if there is none."""
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in Path(directory).iterdir():
            match = _NAME.fullmatch(path.name)
            if match:
                found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def write_manifest(directory: Path, manifest: Manifest, *, calls: FileCalls, space: SpaceWaiter) -> Path:
    """Publish a checkpoint; when this returns it survives a power failure.

    Raises:
        StorageError: a call failed; the checkpoint may or may not be there, whole in any case.
    """
    path = manifest_path(directory, manifest.generation)
    body = json.dumps(to_plain(manifest), sort_keys=True, indent=1)
    text = f'{{"manifest": {body},\n "sha256": "{_ZEROS}{_TAIL}'
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        write_durably(path, (text[: -len(_TAIL) - 64] + digest + _TAIL).encode(), calls=calls, space=space)
    except OSError as error:
        raise StorageError(f"checkpoint of step {manifest.step} could not be written to {path}: {error.strerror or error}") from error
    return path


def read_manifest(path: Path, *, calls: FileCalls = OS_CALLS) -> Manifest:
    """A manifest, verified.

    Raises:
        StorageError: it cannot be read, is damaged, or is of a newer format.
    """
    try:
        text = read_whole(path, calls=calls).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    cut = len(text) - len(_TAIL) - 64
    expected = text[cut : cut + 64]
    found = hashlib.sha256((text[:cut] + _ZEROS + text[cut + 64 :]).encode("utf-8", "surrogateescape")).hexdigest()
    if cut <= 0 or not text.endswith(_TAIL) or expected != found:
        raise StorageError(f"{path} is damaged: its bytes have SHA-256 {found}, it says {expected!r}; {_others(path)}")
    plain = json.loads(text)["manifest"]
    if plain.get("format") != FORMAT or plain.get("version") != VERSION:
        raise StorageError(
            f"{path} is {plain.get('format')} version {plain.get('version')}, this program reads {FORMAT} version {VERSION}; "
            "use the release that wrote it"
        )
    return from_plain(Manifest, plain)


def read_latest(directory: str | Path, *, calls: FileCalls = OS_CALLS) -> Manifest:
    """The newest checkpoint of a directory.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    found = find_manifests(directory)
    if not found:
        raise StorageError(f"there is no checkpoint in {directory}; start without --resume, or name the directory of the run")
    return read_manifest(found[max(found)], calls=calls)


def remove_manifest(path: Path, *, calls: FileCalls) -> None:
    """Drop a checkpoint; when this returns its records may be overwritten."""
    try:
        calls.unlink(path)
        flush_folder(path.parent, calls)
    except OSError as error:
        raise StorageError(f"the old checkpoint {path} could not be removed: {error.strerror or error}") from error


def discard_manifests(directory: Path, *, allowed: bool) -> None:
    """What a new run does about an old run's checkpoints: delete them if it was told to, else refuse.

    Raises:
        StorageError: there are some, and it was not told to.
    """
    found = find_manifests(directory)
    if not found:
        return
    if not allowed:
        newest = found[max(found)]
        raise StorageError(
            f"{directory} has {len(found)} checkpoint{'s' if len(found) > 1 else ''} of an earlier run, the newest is {newest.name}; go on "
            "with --resume, delete them with --discard-checkpoints, or give another directory"
        )
    for path in found.values():
        remove_manifest(path, calls=OS_CALLS)


def _others(path: Path) -> str:
    others = [other.name for other in find_manifests(path.parent).values() if other != path]
    if not others:
        return "there is no other checkpoint beside it"
    return f"to go on from {others[-1]}, move this file away"
