"""From a model folder to the tensors a model expects, one at a time.

A folder names its tensors as they were when it was written: with or without the base model's prefix, an embedding under
one of its two tied names, one matrix per expert where the model now has one tensor for all. `Checkpoint.read` answers
with the names, shapes and order that the model has today, in five rules:

Rule 1. A tensor's identity is its canonical name: the one `model.named_parameters()` (or `named_buffers()`) gives.
        A tied tensor may be on file under any of its names; under several, the bytes must agree.
Rule 2. Renames and merges are transformers' own (`conversion_mapping`), applied to one target tensor at a time.
Rule 3. All names are settled before the first tensor is read. What is missing or left over raises, with names and counts;
        only keys that the model class itself ignores (old rotary buffers and the like) are passed over.
Rule 4. Reading follows the file: targets in the order of their first byte, without a memory map.
Rule 5. Nothing is cast. A float32 file stays float32; the caller decides what to round.

Cost: one tensor, plus the one that the caller still holds; a merge of N experts holds them twice while it stacks them.
Limits: safetensors only (a pickle can run code when it is opened), no quantized checkpoints, no adapters, no custom code.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import conversion_mapping, core_model_loading
from transformers.utils.loading_report import LoadStateDictInfo

from overspill.errors import ModelFolderError
from overspill.huggingface.model_folder import find_model_folder, find_shards, require_config
from overspill.huggingface.safetensors_file import TORCH_DTYPES, StoredTensor, TensorFile, as_bytes, read_header

_MOST_NAMES = 8
"""Names printed of a long list of missing or left-over tensors."""


class TensorSpecLike(Protocol):
    """What `Checkpoint.read` asks of an expected tensor: `overspill.spec.tensors.TensorSpec` and torch tensors meet it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """Expected tensors that come out of one transform, and the stored tensors that go in."""

    key: str
    """The transform's first target name, under which transformers collects."""
    sources: tuple[tuple[StoredTensor, str], ...]
    """Stored tensors with the pattern each matched, in the order in which the transform wants them."""
    transform: Any
    """A `WeightRenaming` (one in, one out) or a `WeightConverter` of transformers."""
    copies: tuple[StoredTensor, ...] = ()
    """The same tensor under its other tied names (rule 1)."""

    @property
    def position(self) -> tuple[str, int]:
        return min((stored.path.name, stored.offset) for stored, _ in self.sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened model folder: its headers were read and checked, no tensor yet."""

    folder: Path
    config: transformers.PretrainedConfig
    tensors: Mapping[str, StoredTensor]
    """Every stored tensor by its name on file, shard after shard, in byte order."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    @property
    def generation_config(self) -> transformers.GenerationConfig | None:
        """The folder's generation settings, to be saved along; None if it has none."""
        if not (self.folder / "generation_config.json").is_file():
            return None
        return transformers.GenerationConfig.from_pretrained(self.folder)

    def build_skeleton(self) -> transformers.PreTrainedModel:
        """The causal language model of this folder on the meta device: names and shapes, no memory."""
        try:
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except ValueError as error:
            raise ModelFolderError(f"{self.folder} is no causal language model that transformers can build: {error}") from error

    def read(
        self, expected: Mapping[str, TensorSpecLike], *, model: transformers.PreTrainedModel | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every expected tensor once, as (canonical name, CPU tensor in the dtype on file).

        Args:
            expected: canonical name -> shape; see `expected_tensors`. A subset of the model's raises (rule 3).
            model: the model whose names these are, on any device; built on the meta device when not given.

        Raises:
            ModelFolderError: before the first tensor, for names, and at a tensor, for a shape or a merge that fails.
            StorageError: a read failed.
        """
        model = self.build_skeleton() if model is None else model
        targets = _resolve(self, expected, model)
        return self._read_targets(targets, expected, model)

    def _read_targets(
        self, targets: list[_Target], expected: Mapping[str, TensorSpecLike], model: transformers.PreTrainedModel
    ) -> Iterator[tuple[str, torch.Tensor]]:
        canonical = canonical_names(model)
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(TensorFile(path)) for path in {stored.path for stored in self.tensors.values()}}

            def read(stored: StoredTensor) -> torch.Tensor:
                return files[stored.path].read(stored)

            done: set[str] = set()
            for target in targets:
                results = _convert(target, read, model)
                while results:
                    alias, tensor = results.popitem()
                    name = canonical.get(alias, alias)
                    if name in done or name not in expected:
                        raise ModelFolderError(f"the conversion of {target.key} gave {alias}, which is unexpected or there already")
                    done.add(name)
                    _check(name, tensor, expected[name], self.folder)
                    _check_copies(name, tensor, target.copies, read)
                    yield name, tensor
                    del tensor
        if len(done) != len(expected):
            raise ModelFolderError(f"{self.folder} gave {len(done)} of {len(expected)} tensors; {_listed(set(expected) - done, 'missing')}")


def open_checkpoint(path_or_hub_name: str | Path, *, allow_remote: bool = True) -> Checkpoint:
    """Open a local model folder or a hub name, and check everything that can be checked without reading a tensor.

    Args:
        allow_remote: whether a name that is no local folder may be downloaded; if not, only the hub's local cache is looked at.

    Raises:
        ModelFolderError: no such folder or name, no config, no safetensors (or only pickles), a damaged or missing shard,
            a quantized checkpoint.
        StorageError: a file cannot be read.
    """
    folder = find_model_folder(path_or_hub_name, allow_remote=allow_remote)
    shards = find_shards(folder)
    config = _read_config(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for stored in read_header(shard):
            if stored.name in tensors:
                raise ModelFolderError(f"{stored.name} is in {tensors[stored.name].path.name} and in {shard.name}; delete the stale shard")
            tensors[stored.name] = stored
    return Checkpoint(folder=folder, config=config, tensors=tensors)


def open_config(path_or_hub_name: str | Path) -> transformers.PreTrainedConfig:
    """The configuration of a local folder or hub name, which needs to have no weights.

    Raises:
        ModelFolderError: no such folder or name, no config, a quantized checkpoint.
    """
    folder = find_model_folder(path_or_hub_name, only_config=True)
    require_config(folder)
    return _read_config(folder)


def _read_config(folder: Path) -> transformers.PreTrainedConfig:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a foreign file makes transformers trip over: wrong types, impossible sizes, unknown names
        raise ModelFolderError(
            f"{folder / 'config.json'} is no config transformers {transformers.__version__} knows: {type(error).__name__}: {error}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelFolderError(f"{folder} is quantized (quantization_config in config.json); train the full-precision model")
    return config


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of every parameter and persistent buffer -> its canonical name (rule 1)."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    persistent = set(model.state_dict(keep_vars=True))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name in persistent:
            canonical[name] = first.setdefault(id(tensor), name)
    return canonical


def expected_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name -> tensor of everything that a folder must hold for `model`: parameters and persistent buffers."""
    held = model.state_dict(keep_vars=True)
    return {name: held[name] for name in dict.fromkeys(canonical_names(model).values())}


def _resolve(checkpoint: Checkpoint, expected: Mapping[str, TensorSpecLike], model: transformers.PreTrainedModel) -> list[_Target]:
    """Decide which stored tensors make which expected ones (rules 1 to 4).

    Raises:
        ModelFolderError: names are missing or left over.
    """
    held = model.state_dict(keep_vars=True)
    canonical = canonical_names(model)
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = {
        pattern: transform
        for transform in transforms
        if isinstance(transform, core_model_loading.WeightConverter)
        for pattern in transform.source_patterns
    }
    sources: dict[str, list[tuple[StoredTensor, str]]] = {}
    chosen: dict[str, Any] = {}
    unexpected: set[str] = set()
    # transformers collects a converter's tensors in natural order (expert 2 before expert 10); a merge stacks in that order.
    for name in sorted(checkpoint.tensors, key=core_model_loading.dot_natural_key):
        key, pattern = _rename(name, transforms, model.base_model_prefix, held)
        if key not in held:
            unexpected.add(name)
            continue
        if key not in chosen:
            chosen[key] = core_model_loading.WeightRenaming(name, key) if pattern is None else copy.deepcopy(converters[pattern])
        sources.setdefault(key, []).append((checkpoint.tensors[name], pattern or name))

    targets = [_Target(key=key, sources=tuple(pairs), transform=chosen[key]) for key, pairs in sources.items()]
    targets = _merge_tied(targets, canonical)
    produced = {canonical[name] for target in targets for name in _outputs(target) if name in canonical}
    _refuse_misfits(checkpoint, model, missing=set(expected) - produced, unexpected=unexpected, unasked=produced - set(expected))
    order = {path: index for index, path in enumerate(dict.fromkeys(stored.path.name for stored in checkpoint.tensors.values()))}
    return sorted(targets, key=lambda target: (order[target.position[0]], target.position[1]))


def _rename(name: str, transforms: list[Any], prefix: str, held: dict[str, torch.Tensor]) -> tuple[str, str | None]:
    """Today's name of a stored tensor, and the converter pattern that it matched: the library's rule, and its second try."""
    renamings = [entry for entry in transforms if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, core_model_loading.WeightConverter)]
    key, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, held)
    if key not in held and name in held:
        return core_model_loading.rename_source_key(name, [], [], prefix, held)
    return key, pattern


def _outputs(target: _Target) -> list[str]:
    """Names that a target's transform gives: its own, and for one-to-many converters the other target patterns put in its place."""
    patterns = target.transform.target_patterns
    if not isinstance(target.transform, core_model_loading.WeightConverter) or len(patterns) == 1:
        return [target.key]
    return [target.key.replace(patterns[0], pattern) for pattern in patterns]


def _merge_tied(targets: list[_Target], canonical: Mapping[str, str]) -> list[_Target]:
    """One target per canonical name; the other names of a tied tensor become copies to compare (rule 1)."""
    merged: dict[str, _Target] = {}
    for target in sorted(targets, key=lambda target: canonical[target.key] != target.key):  # canonical names first
        name = canonical[target.key]
        if name not in merged:
            merged[name] = target
            continue
        first = merged[name]
        if len(first.sources) != 1 or len(target.sources) != 1:
            raise ModelFolderError(f"{name} is on file under several names, some of them merged: {first.key}, {target.key}")
        merged[name] = dataclasses.replace(first, copies=(*first.copies, target.sources[0][0]))
    return list(merged.values())


def _refuse_misfits(
    checkpoint: Checkpoint, model: transformers.PreTrainedModel, *, missing: set[str], unexpected: set[str], unasked: set[str]
) -> None:
    """Raise when names are missing or left over, after the model class's own exceptions (rule 3)."""
    info = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)  # not public, but the one place that knows each class's exceptions
    left_over = info.unexpected_keys | unasked
    if missing or left_over:
        problems = [_listed(missing, "missing"), _listed(left_over, "left over")]
        raise ModelFolderError(
            f"{checkpoint.folder} does not hold a {type(model).__name__}: {'; '.join(filter(None, problems))} "
            f"({len(checkpoint.tensors)} tensors on file); check that it is the whole model and of this architecture"
        )


def _listed(names: set[str], what: str) -> str:
    if not names:
        return ""
    shown = sorted(names, key=core_model_loading.dot_natural_key)[:_MOST_NAMES]
    return f"{len(names)} {what} ({', '.join(shown)}{', …' if len(names) > len(shown) else ''})"


def _convert(target: _Target, read: Callable[[StoredTensor], torch.Tensor], model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Read the sources of one target and put them through its transform."""
    if not isinstance(target.transform, core_model_loading.WeightConverter):
        return {target.key: read(target.sources[0][0])}
    for stored, pattern in target.sources:
        collect: Any = target.transform.add_tensor  # takes a function as well as a future
        collect(target.key, stored.name, pattern, functools.partial(read, stored))
    try:
        # Without a loading_info the library lets errors through instead of collecting them.
        results = target.transform.convert(target.key, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, KeyError, StopIteration) as error:
        names = _listed({stored.name for stored, _ in target.sources}, "tensors")
        raise ModelFolderError(f"{names} on file could not be converted to {target.key}: {error}") from error
    return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}


def _check(name: str, tensor: torch.Tensor, spec: TensorSpecLike, folder: Path) -> None:
    if tuple(tensor.shape) != tuple(spec.shape):
        raise ModelFolderError(
            f"{name} has shape {tuple(tensor.shape)} in {folder} but the model expects {tuple(spec.shape)}; "
            "config.json and weights do not belong together"
        )
    if re.match(r"torch\.float8", str(tensor.dtype)):
        raise ModelFolderError(f"{name} is stored as {tensor.dtype}, which is quantized; train the full-precision model")


def _check_copies(name: str, tensor: torch.Tensor, copies: tuple[StoredTensor, ...], read: Callable[[StoredTensor], torch.Tensor]) -> None:
    for stored in copies:
        same = stored.shape == tuple(tensor.shape) and TORCH_DTYPES[stored.dtype] == tensor.dtype
        if not same or as_bytes(read(stored)) != as_bytes(tensor):
            raise ModelFolderError(
                f"{name} and {stored.name} are tied by the config but differ on file; "
                "set tie_word_embeddings to false in config.json to train both"
            )
