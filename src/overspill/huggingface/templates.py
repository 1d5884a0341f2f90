"""Templates: which blocks are the same machine, and how a unit's weights get into its modules for a visit.

Words:

* **template**: the structure that a unit's weights are swapped into. Every block is its own: its module stays in memory with
  meta parameters (a few kilobytes), so its `layer_idx`, its buffers and each setting that differs from layer to layer are
  right by construction, and no visit has to put them right.
* **kind**: blocks of equal structure. One block of a kind is enough to learn a return value, to time, or to compile from.
* **slot**: a place (module, attribute) that a parameter is read from. A tied parameter has several.

Rules:

1. Two blocks are of one kind only if class, names, shapes, dtypes and trainability of parameters, names, shapes and dtypes of
   buffers, hooks, and **every other attribute of every submodule** are equal. Shape alone is not enough: SmolLM3, Cohere2, Gemma
   and Llama 4 change rotary or attention kind every few layers between blocks of identical shapes.
2. Only an integer that counts the layers (`LAYER_NUMBER_NAMES`) may differ.
3. An attribute that cannot be compared by value (a configuration, a function, any unknown object) is compared by identity:
   when in doubt, two kinds.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import mmap
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LAYER_NUMBER_NAMES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_num", "layer_number"})
"""Attributes that hold a layer's own number in transformers 5."""

MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module of torch has."""
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def build_kind(block: nn.Module) -> Hashable:
    """A value that is equal for two living blocks exactly if they are of one kind (rules 1 to 3)."""
    inside = {id(module): name for name, module in block.named_modules()}
    tied: dict[int, str] = {}
    described = []
    for path, module in block.named_modules():
        attributes = vars(module)
        plain = sorted(name for name in attributes if name not in MODULE_INTERNALS)
        described.append(
            (
                path,
                id(type(module)),
                tuple(
                    (name, None if p is None else (tuple(p.shape), p.dtype, p.requires_grad, tied.setdefault(id(p), f"{path}.{name}")))
                    for name, p in module._parameters.items()
                ),
                tuple((name, None if b is None else (tuple(b.shape), b.dtype)) for name, b in module._buffers.items()),
                tuple(id(hook) for table in _HOOK_TABLES for hook in attributes[table].values()),
                tuple(
                    (name, _comparable(attributes[name], inside))
                    for name in plain
                    if not (name in LAYER_NUMBER_NAMES and type(attributes[name]) is int)
                ),
            )
        )
    return tuple(described)


def _comparable(value: object, inside: Mapping[int, str]) -> Hashable:
    """What `value` is compared by; two results are equal only if the values are interchangeable."""
    if value is None or isinstance(value, bool | int | str | bytes | enum.Enum | torch.dtype | torch.device):
        return (id(type(value)), value)
    if isinstance(value, float | complex):
        return (id(type(value)), repr(value))
    if isinstance(value, tuple | list):
        return (id(type(value)), tuple(_comparable(item, inside) for item in value))
    if isinstance(value, set | frozenset) and all(isinstance(item, str | int) for item in value):
        return (id(type(value)), frozenset(value))
    if type(value) is dict:
        return (id(dict), tuple((_comparable(key, inside), _comparable(item, inside)) for key, item in value.items()))
    if isinstance(value, nn.Module):
        return ("module", inside.get(id(value), id(value)))
    if isinstance(value, types.MethodType):
        return ("method", id(value.__func__), _comparable(value.__self__, inside))
    if isinstance(value, functools.partial):
        return ("partial", *(_comparable(part, inside) for part in (value.func, value.args, value.keywords)))
    return ("identity", id(value))


class ParameterSlots:
    """The places that a set of parameters is read from; between visits every place holds its meta placeholder."""

    def __init__(self, modules: Iterable[tuple[nn.Module, Mapping[int, str]]]) -> None:
        """
        Args:
            modules: each with the canonical names of its own parameters, keyed by `id` of the parameter.
        """
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._placeholders: dict[tuple[int, str], Tensor] = {}
        for module, names in modules:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    self.places.setdefault(names[id(parameter)], []).append((module, attribute))
                    self._placeholders[id(module), attribute] = parameter

    def placeholder(self, name: str) -> Tensor:
        """The meta parameter `name`: its shape, dtype and trainability."""
        module, attribute = self.places[name][0]
        return self._placeholders[id(module), attribute]

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The places of every name in `tensors` hold its tensor inside, and their placeholder again afterwards.

        Raises:
            ValueError: a shape or dtype differs from the parameter's.
        """
        for name, tensor in tensors.items():
            wanted = self.placeholder(name)
            if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
                raise ValueError(
                    f"{name} is {wanted.dtype} of shape {tuple(wanted.shape)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        places = [(module, attribute, tensor) for name, tensor in tensors.items() for module, attribute in self.places[name]]
        try:
            for module, attribute, tensor in places:
                module._parameters[attribute] = tensor  # type: ignore[assignment]
            yield
        finally:
            for module, attribute, tensor in places:
                if module._parameters[attribute] is tensor:  # else `empty` was there first, and another visit may be
                    module._parameters[attribute] = self._placeholders[id(module), attribute]  # type: ignore[assignment]

    def empty(self) -> None:
        """Every place holds its placeholder, whatever fills it now."""
        for places in self.places.values():
            for module, attribute in places:
                module._parameters[attribute] = self._placeholders[id(module), attribute]  # type: ignore[assignment]


def move_buffers(modules: Iterable[nn.Module], device: torch.device) -> int:
    """Move every buffer of `modules` to `device`, equal ones once; returns the bytes that they then take there.

    Safe because a block that writes to its buffers is refused (`inspection`): causal masks of one mebibyte in each of 48 blocks
    become one.
    """
    moved: dict[tuple[Hashable, ...], list[tuple[Tensor, Tensor]]] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            alike = moved.setdefault((buffer.dtype, tuple(buffer.shape), buffer.device), [])
            known = next((there for here, there in alike if here is buffer or torch.equal(here, buffer)), None)
            if known is None:
                known = buffer.to(device)
                alike.append((buffer, known))
            module._buffers[name] = known
    storages = {there.untyped_storage().data_ptr(): there.untyped_storage().nbytes() for alike in moved.values() for _, there in alike}
    return sum(storages.values())


def lazy_zeros(like: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `like`, on pages that exist only once written: reading costs no memory.

    All of them are one huge page of zeros where the kernel has that: a matrix of 1.5 GB is then read in 90 ms and not in 300.
    """
    num_bytes = like.numel() * like.dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(like.shape, dtype=like.dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype, count=math.prod(like.shape)).view(like.shape)
