"""Side outputs: router logits of mixture-of-experts blocks, which a loss reads beside the hidden states.

transformers declares them on the model class (`_can_record_outputs`: which submodule's output, which element of it) and collects
them with forward hooks while the whole model runs. Streamed blocks run apart from the model, so the same declaration
is read here and the same outputs are collected while one block runs, in the order in which its submodules return.

They matter only while the model adds the router loss: `config.output_router_logits` on and `config.router_aux_loss_coef` not 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def has_router_loss(config: Any) -> bool:
    """Whether the model adds an auxiliary loss of its routers to its loss."""
    return bool(getattr(config, "output_router_logits", False)) and float(getattr(config, "router_aux_loss_coef", 0) or 0) != 0


class SideOutputTaps:
    """Forward hooks on the routers of a model's blocks; they collect only inside `listening`."""

    def __init__(self, owner: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """
        Args:
            owner: the module whose class declares what can be recorded.
            blocks: by unit name.
        """
        declared = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", ())
        recorders = declared if isinstance(declared, Sequence) and not isinstance(declared, str) else (declared,)
        self._heard: list[Tensor] | None = None
        for unit, block in blocks.items():
            for path, module in block.named_modules():
                for recorder in recorders:
                    if _is_recorded(recorder, module, f"{unit}.{path}"):
                        module.register_forward_hook(self._hook(getattr(recorder, "index", 1)))

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Collects the side outputs of the block that runs inside."""
        heard: list[Tensor] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None

    def _hook(self, index: int) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            if self._heard is not None:
                value = output if not isinstance(output, tuple) else output[index]
                if value is not None:
                    self._heard.append(value)

        return hear


def _is_recorded(recorder: Any, module: nn.Module, name: str) -> bool:
    """Whether the declaration means this module: by class, by the end of its class's or its own name, by a part of its path."""
    if isinstance(recorder, type):
        return isinstance(module, recorder)
    if isinstance(recorder, str):
        return name.endswith(recorder)
    by_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    by_name = recorder.class_name is not None and name.endswith(recorder.class_name)
    layer_name = recorder.layer_name
    return (by_class or by_name) and (layer_name is None or f".{layer_name.strip('.')}." in f"{name}.")
