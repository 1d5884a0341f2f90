"""Where a model keeps its decoder blocks, which of them are alike, and that they share nothing.

A causal LM has one list of them (`nn.ModuleList`) in a base model of its own, around which it is nothing but a head. Several lists (an
encoder, a vision tower), none, or blocks beside the head are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import NoReturn

from torch import nn
from transformers import PreTrainedModel

from overspill.errors import UnsupportedModelError
from overspill.huggingface.templates import build_kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockList:
    """Where a model keeps its blocks."""

    owner: PreTrainedModel
    """The module whose forward loops over them."""
    container: nn.ModuleList
    blocks: Mapping[str, nn.Module]
    """By qualified name, in order."""


def find_blocks(model: PreTrainedModel) -> BlockList:
    """The one list of decoder blocks.

    Raises:
        UnsupportedModelError: an encoder-decoder, no list or several.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        _refuse(model, "it has an encoder and a decoder; causal language models with one stack of blocks are supported")
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_other = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_other and _are_blocks(model, module):
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(f"{name} ({len(module)} modules)" for name, module in found) or "none"
        _refuse(model, f"it needs exactly one list of blocks, found {names}")
    name, container = found[0]
    owner = model.get_submodule(name.rpartition(".")[0])
    if owner is model or not isinstance(owner, PreTrainedModel):
        _refuse(model, f"its blocks {name} are not in a base model of their own, so its head cannot run apart from them")
    if float(getattr(owner, "layerdrop", 0) or 0) > 0:
        _refuse(model, f"layerdrop={owner.layerdrop} skips blocks at random; set config.layerdrop=0")
    return BlockList(owner=owner, container=container, blocks={f"{name}.{index}": block for index, block in enumerate(container)})


def find_kinds(blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Block -> the first block of its kind (`templates`). Before anything of ours is hooked to them."""
    first_of: dict[Hashable, str] = {}
    return {name: first_of.setdefault(build_kind(block), name) for name, block in blocks.items()}


def validate_sharing(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> None:
    """Refuse a parameter that two blocks read, or a block and the rest of the model."""
    readers: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((unit for unit in blocks if name.startswith(f"{unit}.")), "the rest of the model")
        first = readers.setdefault(id(parameter), unit)
        if first != unit:
            _refuse(model, f"{name} is shared by {first} and {unit}")


def _are_blocks(model: PreTrainedModel, modules: nn.ModuleList) -> bool:
    """Whether a list is one of decoder blocks: transformers names their classes, or they are as many as the config says."""
    named = set(getattr(model, "_no_split_modules", None) or ())
    if {type(module).__name__ for module in modules} <= named:
        return True
    config = model.config.get_text_config()
    return not named and len(modules) == getattr(config, "num_hidden_layers", None)


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"{type(model).__name__} cannot be streamed: {reason}")
