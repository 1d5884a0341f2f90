"""Products that a block's recomputation need not make: those whose result no gradient reads.

A block's backward runs its forward once more, only for what autograd saves on the way. The last product of a block (Llama's `down_proj`)
feeds nothing but the sum with the residual stream, and a sum saves nothing: its result was needed in the forward and is needed no more.
Leaving it out saves a quarter of the recomputation of Llama's MLP, 3 % of a step. Autograd's graph is the same, the product's gradients
are computed as ever, and so are their bits.

Rules:

1. Whether a product is needed is found out, not assumed: at the first backward of a kind of block (`templates`) it is done once as ever and
   once with NaN in place of the product's result. A gradient that depends on the result is NaN then or, if it depends by comparison,
   of another size. Only if every gradient is finite and as large as before (`TOLERANCE`: attention's backward need not give the same
   bits twice) the product is left out from then on, in all blocks of that kind.
2. Candidates are the last `MOST_LEFT_OUT` linear modules that ran: what a block does before, something later reads.
3. Nothing is left out where no graph is built: a forward's result is needed.
4. In place of the result there are zeros, so that code that looks at it (a check for infinity) always does the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

MOST_LEFT_OUT = 2
"""Parallel attention and MLP (GPT-NeoX, Phi) both end in a sum."""
TOLERANCE = 0.01
"""Relative, of a gradient's norm."""

Differentiate = Callable[[], Sequence[Tensor | None]]
"""A block's backward: its gradients, in a fixed order. Done again it gives the same."""


class UnneededProducts:
    """What is left out of the recomputation of each kind of block.

    Args:
        blocks: name -> module.
        kinds: block -> the first block of its kind.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], kinds: Mapping[str, str]) -> None:
        self._blocks, self._kinds = blocks, kinds
        self.left_out: dict[str, tuple[str, ...]] = {}
        """Kind -> names within the block of the modules whose product is left out; decided kinds only."""
        self._on_trial: list[nn.Module] = []

    def is_decided(self, unit: str) -> bool:
        """Whether it is known what the unit's recomputation needs."""
        return self._kinds[unit] in self.left_out

    def decide(self, unit: str, differentiate: Differentiate) -> None:
        """Find out (rule 1). Nothing is decided if the gradients are zero or not finite, as nothing can be seen in them then."""
        kind, block = self._kinds[unit], self._blocks[unit]
        try:
            with _listening(block) as ran:
                before = _norms(differentiate())
            if not any(before) or not all(norm is None or 0.0 <= norm < float("inf") for norm in before):
                return
            chosen: list[str] = []
            for path in list(dict.fromkeys(reversed(ran)))[:MOST_LEFT_OUT]:
                with self._trying(block, [*chosen, path]):
                    after = _norms(differentiate())
                if all(_agree(one, other) for one, other in zip(before, after, strict=True)):
                    chosen.append(path)
        except torch.OutOfMemoryError:  # there is no room to find out
            chosen = []
        for name, other in self._blocks.items():
            if self._kinds[name] == kind:
                for path in chosen:
                    _leave_out(other.get_submodule(path), fill=0.0)
        self.left_out[kind] = tuple(chosen)

    def reset(self) -> None:
        """After an interruption: nothing is on trial."""
        for module in self._on_trial:
            vars(module).pop("forward", None)
        self._on_trial = []

    @contextlib.contextmanager
    def _trying(self, block: nn.Module, paths: Sequence[str]) -> Iterator[None]:
        self._on_trial = [block.get_submodule(path) for path in paths]
        try:
            for module in self._on_trial:
                _leave_out(module, fill=float("nan"))
            yield
        finally:
            self.reset()


class _NoProduct(TorchDispatchMode):
    """Matrix products inside give `fill`; autograd, above this, sees products."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self._fill = fill

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default or func is torch.ops.aten.addmm.default:
            left, right = args[-2:]
            return left.new_full((left.shape[0], right.shape[1]), self._fill)
        return func(*args, **(kwargs or {}))


def _leave_out(module: nn.Module, *, fill: float) -> None:
    forward = type(module).forward.__get__(module)

    def without_product(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # rule 3
            return forward(*args, **kwargs)
        with _NoProduct(fill):
            return forward(*args, **kwargs)

    vars(module)["forward"] = without_product


@contextlib.contextmanager
def _listening(block: nn.Module) -> Iterator[list[str]]:
    """The linear modules that run inside, in their order."""
    ran: list[str] = []
    hooks = []
    for path, module in block.named_modules():
        if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module):
            hooks.append(module.register_forward_hook(lambda *_, path=path: ran.append(path)))
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _norms(gradients: Sequence[Tensor | None]) -> list[float | None]:
    norms = [None if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return [None if norm is None else float(norm) for norm in norms]


def _agree(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= TOLERANCE * one  # NaN agrees with nothing
