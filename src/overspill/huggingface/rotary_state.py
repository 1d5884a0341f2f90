"""Rotary embeddings that change while they run: every micro-batch finds them as they were built.

Two kinds of rotary embedding of transformers switch their frequencies by the length of the sequence before them, by writing to
themselves: "longrope" (Phi-3: a long and a short table) and "dynamic" (NTK: stretched beyond the longest sequence seen so far).
Left alone, "dynamic" would let a micro-batch depend on those before it, and the plain loop, unit-major order and a
recomputation would see different ones.

Rule. Before every entry of the model's forward (inspection, embedding, tail) buffers and attributes of these modules are what they are in
a new model. So a micro-batch's numbers are those of a model that sees it first, whatever the order. For "longrope" that is the
plain loop exactly; a plain loop over a "dynamic" one keeps the stretch of a longer batch for later ones between the two lengths.

Only such modules outside the blocks are looked after; a block that writes to itself is refused (`inspection`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from overspill.huggingface.templates import MODULE_INTERNALS


class RotaryStates:
    """The rotary embeddings of a model that write to themselves, and how they were built."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """
        Args:
            modules: those outside the blocks; others than self-writing rotary embeddings are passed over.
        """
        self.modules = tuple(module for module in modules if _writes_to_itself(module))
        self._buffers = [_original_buffers(module) for module in self.modules]
        self._attributes = [_original_attributes(module) for module in self.modules]

    def to(self, device: torch.device) -> int:
        """Reset on `device`; returns the bytes taken there."""
        self._buffers = [{name: buffer.to(device) for name, buffer in buffers.items()} for buffers in self._buffers]
        self.reset()
        return 2 * sum(buffer.nbytes for buffers in self._buffers for buffer in buffers.values())

    def reset(self) -> None:
        """Put every module's state back (the rule)."""
        for module, buffers, attributes in zip(self.modules, self._buffers, self._attributes, strict=True):
            for name in [name for name in _plain_attributes(module) if name not in attributes]:
                del vars(module)[name]
            vars(module).update(attributes)
            # New ones, not overwritten ones: what was recorded of the micro-batch before may be a view of the old.
            module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})


def _writes_to_itself(module: nn.Module) -> bool:
    kind = vars(module).get("rope_type")
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(isinstance(item, str) and ("dynamic" in item or item == "longrope") for item in kinds)


def _original_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Each buffer, the frequencies in use being those that the module keeps as its original ones."""
    buffers = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
    for name in buffers:
        original = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
        if name.endswith("inv_freq") and isinstance(original, Tensor):
            buffers[name] = original.detach().to(buffers[name].device, copy=True)
    return buffers


def _original_attributes(module: nn.Module) -> dict[str, Any]:
    attributes = _plain_attributes(module)
    for name in attributes:
        if name.endswith("max_seq_len_cached"):
            attributes[name] = attributes.get("original_max_seq_len", attributes[name])
    return attributes


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in MODULE_INTERNALS and name != "training"}
