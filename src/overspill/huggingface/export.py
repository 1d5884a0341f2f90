"""Write a model folder that `from_pretrained` loads, one tensor in memory at a time.

Rule 1. Everything is written to a new folder beside the target, flushed to the drive, read back with the safetensors
        library and compared by checksum; only then it takes the target's name. Until then the target is untouched.
Rule 2. An existing target is replaced as a whole, and only if nothing lies in it but files of a model folder.
Rule 3. A tied tensor is written once, under its canonical name; loading ties the rest.
Rule 4. In a shard, dtypes of wider elements come first, so that every tensor is aligned to its element.

Tensors keep the names that the model has in memory. Limit: for models whose experts transformers merges on loading, other
programs may want the older per-expert names; loading with transformers and `save_pretrained` writes those.

Cost: one tensor; the bytes are written once and read once. A crash between the two renames of rule 1 leaves the old folder
as `.NAME.replaced-PID` beside the target, complete.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from overspill.errors import ModelFolderError, StorageError
from overspill.huggingface.model_folder import INDEX_FILE, SINGLE_FILE, TOKENIZER_FILES
from overspill.huggingface.safetensors_file import TensorFileWriter, build_header, checksum_of
from overspill.units import GIB, MIB, format_bytes

OutgoingTensor = tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]
"""Name, shape, dtype, and a function that gives the CPU tensor when its turn comes."""

_REOPEN_BYTES = 256 * MIB
"""While reading back, mapped pages that may pile up before the file is mapped anew. Chosen, not tuned."""

_MODEL_FILES = {
    "config.json",
    "generation_config.json",
    SINGLE_FILE,
    INDEX_FILE,
    "chat_templates",
    "README.md",
    "LICENSE",
    *TOKENIZER_FILES,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shard:
    file_name: str
    tensors: tuple[OutgoingTensor, ...]


def write_model_folder(
    out_dir: str | Path,
    *,
    config: transformers.PretrainedConfig,
    generation_config: transformers.GenerationConfig | None = None,
    tokenizer_source: str | Path | Any | None = None,
    tensors: Iterable[OutgoingTensor],
    max_shard_bytes: int = 4 * GIB,
) -> Path:
    """Write `tensors`, the configs and the tokenizer to `out_dir`, replacing a model folder there only after success.

    Args:
        tokenizer_source: a folder whose tokenizer files are copied, a tokenizer that saves itself, or None.
        tensors: in the order of writing; each read function is called once and its result dropped before the next call.
        max_shard_bytes: a shard holds at most this, or one larger tensor alone.

    Raises:
        StorageError: the file system is full or fails, or what was read back differs; nothing old was touched.
        ModelFolderError: `out_dir` holds something else than a model, or a tensor is not what was announced.
    """
    out_dir = Path(os.path.abspath(out_dir))
    outgoing = list(tensors)
    validate_target(out_dir)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out_dir)
        _refuse_full_disk(out_dir, outgoing)
        partial.mkdir()
        shards = _plan_shards(outgoing, max_shard_bytes)
        checksums: dict[str, int] = {}
        for shard in shards:
            checksums.update(_write_shard(partial, shard))
        _write_metadata(partial, shards, config, generation_config, tokenizer_source, outgoing)
        for shard in shards:
            _read_back(partial, shard, checksums)
        _flush_folder(partial)
        _replace(partial, out_dir)
    except StorageError as error:
        raise StorageError(f"the model was not saved: {error}; {_untouched(out_dir)}") from error
    except OSError as error:
        raise StorageError(
            f"the model was not saved to {out_dir}: {error.strerror} (errno {error.errno}, {error.filename}); {_untouched(out_dir)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _untouched(out_dir: Path) -> str:
    return f"the model already in {out_dir} was not touched" if out_dir.exists() else "nothing old was touched"


def validate_target(out_dir: Path) -> None:
    """Refuse to replace what is no model folder (rule 2)."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise ModelFolderError(f"{out_dir} is a file; name a folder to save the model in")
    foreign = sorted(entry.name for entry in out_dir.iterdir() if entry.name not in _MODEL_FILES and entry.suffix != ".safetensors")
    if foreign:
        raise ModelFolderError(f"{out_dir} holds more than a model ({', '.join(foreign[:5])}) and is not replaced; save to another folder")


def _remove_abandoned(out_dir: Path) -> None:
    """Free what a killed process had begun to write here."""
    for path in out_dir.parent.glob(f".{out_dir.name}.partial-*"):
        if not Path("/proc", path.name.rpartition("-")[2]).exists():
            shutil.rmtree(path, ignore_errors=True)


def _refuse_full_disk(out_dir: Path, outgoing: Sequence[OutgoingTensor]) -> None:
    needed = sum(_num_bytes(entry) for entry in outgoing)
    free = shutil.disk_usage(out_dir.parent).free
    if needed > free:
        raise StorageError(f"it needs {format_bytes(needed)} beside {out_dir} but {format_bytes(free)} are free; make room")


def _num_bytes(entry: OutgoingTensor) -> int:
    return math.prod(entry[1]) * entry[2].itemsize


def _plan_shards(outgoing: Sequence[OutgoingTensor], max_shard_bytes: int) -> list[_Shard]:
    groups: list[list[OutgoingTensor]] = [[]]
    room = max_shard_bytes
    for entry in outgoing:
        if groups[-1] and _num_bytes(entry) > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(entry)
        room -= _num_bytes(entry)
    for group in groups:
        group.sort(key=lambda entry: -entry[2].itemsize)  # rule 4; stable, so the order given stays within a dtype width
    if len(groups) == 1:
        return [_Shard(file_name=SINGLE_FILE, tensors=tuple(groups[0]))]
    total = len(groups)
    return [
        _Shard(file_name=f"model-{index:05d}-of-{total:05d}.safetensors", tensors=tuple(group)) for index, group in enumerate(groups, 1)
    ]


def _write_shard(folder: Path, shard: _Shard) -> dict[str, int]:
    """Write one shard; returns the checksum of each tensor's bytes."""
    header = build_header([entry[:3] for entry in shard.tensors])
    checksums: dict[str, int] = {}
    with TensorFileWriter(folder / shard.file_name, header) as writer:
        for name, shape, dtype, read in shard.tensors:
            tensor = read()
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ModelFolderError(f"{name} was announced as {tuple(shape)} {dtype} and came as {tuple(tensor.shape)} {tensor.dtype}")
            checksums[name] = writer.write(name, tensor.detach().contiguous())
            del tensor
    return checksums


def _write_metadata(
    folder: Path,
    shards: Sequence[_Shard],
    config: transformers.PretrainedConfig,
    generation_config: transformers.GenerationConfig | None,
    tokenizer_source: str | Path | Any | None,
    outgoing: Sequence[OutgoingTensor],
) -> None:
    config = copy.deepcopy(config)
    floats = [(_num_bytes(entry), entry[2]) for entry in outgoing if entry[2].is_floating_point]
    if floats:
        totals: dict[torch.dtype, int] = {}
        for num_bytes, dtype in floats:
            totals[dtype] = totals.get(dtype, 0) + num_bytes
        config.dtype = max(totals, key=lambda dtype: totals[dtype])  # what most bytes are in: norms may be wider
    config.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    if isinstance(tokenizer_source, (str, Path)):
        _copy_tokenizer(Path(tokenizer_source), folder)
    elif tokenizer_source is not None:
        tokenizer_source.save_pretrained(folder)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_num_bytes(entry) for entry in outgoing)},
            "weight_map": {entry[0]: shard.file_name for shard in shards for entry in shard.tensors},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "chat_templates").is_dir():
        shutil.copytree(source / "chat_templates", folder / "chat_templates")


def _read_back(folder: Path, shard: _Shard, checksums: dict[str, int]) -> None:
    """Read a shard with the safetensors library and compare every tensor with what was handed to the drive (rule 1)."""
    path = folder / shard.file_name
    for names in _runs([(entry[0], _num_bytes(entry)) for entry in shard.tensors], _REOPEN_BYTES):
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if checksum_of(file.get_tensor(name)) != checksums[name]:
                        raise StorageError(f"{name} read back from {path} differs from what was written; the drive or its memory is faulty")
        except SafetensorError as error:
            raise StorageError(f"{path} cannot be read back: {error}") from error


def _runs(sizes: Sequence[tuple[str, int]], limit_bytes: int) -> Iterator[list[str]]:
    """Consecutive names of at most `limit_bytes` together, or one alone."""
    names: list[str] = []
    total = 0
    for name, num_bytes in sizes:
        if names and total + num_bytes > limit_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += num_bytes
    if names:
        yield names


def _flush_folder(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, out_dir: Path) -> None:
    """Give `partial` the name `out_dir`; what had it is removed afterwards, or gets it back when the rename fails."""
    replaced = out_dir.with_name(f".{out_dir.name}.replaced-{os.getpid()}")
    had_old = out_dir.exists()
    if had_old:
        out_dir.rename(replaced)
    try:
        partial.rename(out_dir)
    except OSError:
        if had_old:
            replaced.rename(out_dir)
        raise
    descriptor = os.open(out_dir.parent, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename itself has happened
        os.fsync(descriptor)
    os.close(descriptor)
    if had_old:
        shutil.rmtree(replaced, ignore_errors=True)
