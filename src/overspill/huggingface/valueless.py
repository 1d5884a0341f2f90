"""A streamed model on tensors without values: what has to be put aside so that its own code runs on them as it runs on others.

1. Buffers (rotary frequencies, masks) are replaced by fake ones, and put back afterwards.
2. transformers makes another mask when it meets fake tensors, because it cannot look at them. Here it can (`op_trace`, rule 6), so it
   is told that they are ordinary.
3. Settings that would take code which needs values, or packages that may not be here, are replaced by their equivalents, with a note:
   experts that loop over the tokens they got by their grouped form, attention kernels of other packages by torch's own.
4. That all this is right is checked: on a few tokens the blocks must be called with the same arguments as with values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import transformers.utils.import_utils as import_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from overspill.huggingface.inspection import NUM_TOKENS
from overspill.huggingface.stand_ins import BlockArguments
from overspill.huggingface.streamed_model import EMBEDDING, StreamedModel
from overspill.huggingface.templates import lazy_zeros

_IS_FAKE = "is_fake_tensor"
"""What transformers asks before it looks at a tensor (rule 2)."""


def build_batch(streamed: StreamedModel, num_samples: int, num_tokens: int, *, is_masked: bool) -> dict[str, Tensor]:
    """A micro-batch of one token that is not padding; with `is_masked` the last of every sample is."""
    token = 1 if streamed.config.get_text_config().pad_token_id == 0 else 0
    ids = torch.full((num_samples, num_tokens), token, dtype=torch.int64)
    if not is_masked:
        return {"input_ids": ids}
    mask = (torch.arange(num_tokens) < num_tokens - 1).to(torch.int64).unsqueeze(0).expand(num_samples, num_tokens)
    return {"input_ids": ids, "attention_mask": mask}


def described_arguments(streamed: StreamedModel, *, is_masked: bool) -> object:
    """What the blocks are called with on a few tokens, with values: rule 4's other side. For comparison with `shapes_of`."""
    zeros = {
        name: lazy_zeros(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta"))
        for name, spec in streamed.parameters.items()
        if name in streamed.unit_parameters[EMBEDDING]
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad(), streamed.bound(EMBEDDING, zeros):  # an embedding may have a dropout
        return shapes_of(streamed.embed(build_batch(streamed, 1, NUM_TOKENS, is_masked=is_masked)).arguments)


def shapes_of(arguments: BlockArguments) -> Mapping[str, object]:
    """Every block's arguments with shape and dtype in place of each tensor."""
    hidden = torch.empty(0)

    def describe(value: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), value)

    return {unit: describe(arguments.rebuilt(unit, hidden)) for unit in arguments.calls}


def find_classes(streamed: StreamedModel, arguments: BlockArguments | None) -> Mapping[str, tuple[str, ...]]:
    """First block of every class -> all its blocks: of one kind, reading hidden states of one dtype, called with arguments of the same
    shapes (a mask or none).

    Args:
        arguments: None: they are not known, and not compared.
    """
    shapes: Mapping[str, Any] = shapes_of(arguments) if arguments is not None else {}
    found: list[tuple[Any, list[str]]] = []
    for before, unit in zip(streamed.unit_names, streamed.block_names, strict=False):
        key = (streamed.kinds[unit], streamed.hidden_dtypes[before], shapes.get(unit))
        same = next((units for known, units in found if known == key), None)
        if same is None:
            found.append((key, [unit]))
        else:
            same.append(unit)
    return {units[0]: tuple(units) for _, units in found}


@contextlib.contextmanager
def without_values(streamed: StreamedModel, notes: list[str]) -> Iterator[None]:
    """Tensors made inside are fake, and the model runs on them (rules 1 to 3).

    The model should not be used with values afterwards: some keep tables that they made.
    """
    modules = [*streamed.model.modules(), *(module for unit in streamed.block_names for module in streamed.block(unit).modules())]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    fakes: dict[int, Tensor] = {}
    try:
        for module, own in buffers:
            for name, buffer in own.items():
                if buffer is not None:
                    fakes.setdefault(id(buffer), fake.from_tensor(buffer))
                    module._buffers[name] = fakes[id(buffer)]
        with (
            _replaced_setting([module for module in modules if _has_experts(module)], "_experts_implementation", _grouped, notes),
            _replaced_setting(modules, "_attn_implementation", _own_attention, notes),
            mock.patch.object(import_utils, _IS_FAKE, lambda tensor: False, create=True),
            fake,
        ):
            yield
    finally:
        for module, own in buffers:
            module._buffers.update(own)
        streamed.reset_rotary()


@contextlib.contextmanager
def _replaced_setting(modules: list[nn.Module], name: str, replace: Callable[[str], str | None], notes: list[str]) -> Iterator[None]:
    """Configurations of the modules have another value for the setting `name` inside; a note says so.

    Args:
        replace: value -> the one to have inside; None: as it is.
    """
    configs: dict[int, Any] = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    changed = []
    try:
        for config in configs.values():
            value = getattr(config, name, None)
            instead = replace(value) if isinstance(value, str) else None
            if instead is not None:
                setattr(config, name, instead)
                changed.append((config, value))
                note = f"{name.strip('_')} {value!r} is described as {instead!r}"
                notes += [note] if note not in notes else []
        yield
    finally:
        for config, value in changed:
            setattr(config, name, value)


def _has_experts(module: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _grouped(implementation: str) -> str | None:
    return "grouped_mm" if implementation == "eager" else None


def _own_attention(implementation: str) -> str | None:
    return None if implementation in ("eager", "sdpa") else "sdpa"
