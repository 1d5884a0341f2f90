"""Checking a directory's checkpoints, and writing one out as an ordinary model folder. Neither changes the directory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from overspill.checkpoint.manifests import find_manifests, manifest_path, read_latest, read_manifest
from overspill.checkpoint.records import open_records
from overspill.errors import ModelFolderError, StorageError
from overspill.huggingface import build_meta_model, expected_tensors, open_checkpoint, write_model_folder
from overspill.huggingface.export import OutgoingTensor
from overspill.spec.checkpoint import Manifest
from overspill.spec.schedule import Piece, Role
from overspill.spec.tensors import Bundle, TensorSlot
from overspill.tiers import RecordStore
from overspill.units import format_bytes


def verify_checkpoints(directory: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(description, problems) of every checkpoint in a directory, oldest first; every byte is read.

    Raises:
        StorageError: there is no checkpoint, or a run is using the directory.
    """
    found = find_manifests(directory)
    if not found:
        raise StorageError(f"there is no checkpoint in {directory}")
    for generation, path in found.items():
        try:
            manifest = read_manifest(path)
            records, _ = open_records(directory, manifest)
        except StorageError as error:
            if "in use by another run" in str(error):
                raise
            yield f"checkpoint {generation}", [str(error)]
            continue
        with records:
            size = sum(entry.num_bytes for entry in manifest.records)
            what = f"checkpoint {generation}: step {manifest.step}, {len(manifest.records)} records, {format_bytes(size)}"
            yield what, records.verify(records.names)


def export_checkpoint(
    directory: str | Path, out: str | Path, *, model: str | Path | None = None, generation: int | None = None
) -> tuple[Path, Manifest]:
    """Write the weights of a checkpoint as a folder that `from_pretrained` loads, verified on the way.

    Args:
        model: the folder that was trained: gives the tokenizer, the generation settings, and the tensors that are not trained and are in no
            checkpoint (stored buffers), which few models have.
        generation: which checkpoint; None: the newest.

    Raises:
        StorageError: no checkpoint, or a damaged one, or a file system that fails.
        ModelFolderError: the model has tensors that are not in the checkpoint, and no `model` was given.
    """
    manifest = read_latest(directory) if generation is None else read_manifest(manifest_path(Path(directory), generation))
    settings = dict(manifest.config)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    skeleton = build_meta_model(config, dtype=getattr(torch, manifest.plan.dtype))
    slots = {slot.tensor.name: (bundle, slot) for bundle in manifest.plan.bundles.values() for slot in bundle.slots}
    expected = expected_tensors(skeleton)
    missing = sorted(set(expected) - set(slots))
    others: list[OutgoingTensor] = []
    if missing:
        if model is None:
            raise ModelFolderError(
                f"{', '.join(missing[:3])} of the model are not trained and in no checkpoint; give its folder with --model"
            )
        for name, tensor in open_checkpoint(model).read(expected):
            if name in missing:
                others.append((name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor))  # type: ignore[misc]
    records, _ = open_records(directory, manifest)
    with records:
        tensors: list[OutgoingTensor] = [
            (name, slot.tensor.shape, getattr(torch, bundle.dtype), functools.partial(_read_tensor, records, bundle, slot))
            for name, (bundle, slot) in slots.items()
        ]
        path = write_model_folder(
            out, config=config, generation_config=_generation_config(model), tokenizer_source=model, tensors=[*tensors, *others]
        )
    return path, manifest


def _generation_config(model: str | Path | None) -> transformers.GenerationConfig | None:
    """Of the folder that was trained, which needs no weights for this; None if it has none."""
    if model is None or not (Path(model) / "generation_config.json").is_file():
        return None
    return transformers.GenerationConfig.from_pretrained(model)


def _read_tensor(records: RecordStore, bundle: Bundle, slot: TensorSlot) -> torch.Tensor:
    parts = []
    for chunk in bundle.chunks:
        start, end = max(slot.offset, chunk.start), min(slot.end, chunk.end)
        if start < end:
            record = str(Piece(role=Role.PARAMETER, owner=bundle.name, index=chunk.index))
            first = (start - chunk.start) * bundle.element_bytes
            parts.append(records.read_part(record, first, (end - start) * bundle.element_bytes))
    return torch.cat(parts).view(getattr(torch, bundle.dtype)).view(slot.tensor.shape)
