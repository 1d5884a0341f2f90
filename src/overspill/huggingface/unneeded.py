"""Products that a block's recomputation need not make: those whose result no gradient reads.

A block's backward runs its forward once more, only for what autograd saves on the way. The last product of a block (Llama's `down_proj`)
feeds nothing but the sum with the residual stream, and a sum saves nothing: its result was needed in the forward and is needed no more.
Leaving it out saves a quarter of the recomputation of Llama's MLP, 3 % of a step. Autograd's graph is the same, the product's gradients
are computed as ever, and so are their bits.

Rules:

1. Whether a product is needed is found out, not assumed: at the first backward of a kind of block (`templates`) it is done twice as ever
   and then with each of `FILLS` in place of the product's result. A gradient that depends on the result by arithmetic is NaN with NaN
   there; one that depends on it by comparison (a rectifier, a mask, an order) is another one with some of them. Only if every gradient is
   what it was with all of them the product is left out from then on, in all blocks of that kind. "What it was" are the same bits, on a CPU
   or with deterministic algorithms. Else attention's backward need not give the same bits twice, and may do so by chance where few are
   looked at: a third run is made, and each gradient may be off by `TOLERANCE`, or by `NOISE_FACTOR` of what it is off among the three.
   Held by the norm and a sample of the elements. A product that did not run with anything in it (an expert without tokens, another
   kernel) has not been tried and is made.
2. Candidates are the last `MOST_LEFT_OUT` linear modules that ran: what a block does before, something later reads.
3. Nothing is left out where no graph is built, nor in a forward whose graph is kept (`making_all`): their result is needed.
4. In place of the result there are zeros, so that code that looks at it (a check for infinity) always does the same.

Limit: code that reads the product for some batches and not for others, and decides that by something else than the product (the length
of the batch), is seen as the first batch shows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

MOST_LEFT_OUT = 2
"""Parallel attention and MLP (GPT-NeoX, Phi) both end in a sum."""
LARGE = 2.0**63
"""Finite with its square, in fp32; at most that in a smaller range."""
FILLS = (float("nan"), 0.0, float("inf"), float("-inf"), LARGE, -LARGE)
"""Tried in place of a product's result: what later stands there, what arithmetic passes on, and what is above and below every threshold;
also finite, for sums on the way to a comparison make NaN of infinities, which is neither above nor below."""
TOLERANCE = 0.01
"""Relative, of a gradient's norm and of its sample's difference, where a block's backward does not give the same bits twice."""
NOISE_FACTOR = 4.0
"""Chosen: three runs show some of the spread."""
MOST_SAMPLED = 4096
"""Elements of each gradient that are compared one by one."""

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
        self._makes_all = False

    @contextlib.contextmanager
    def making_all(self) -> Iterator[None]:
        """Inside, nothing is left out (rule 3)."""
        self._makes_all = True
        try:
            yield
        finally:
            self._makes_all = False

    def is_decided(self, unit: str) -> bool:
        """Whether it is known what the unit's recomputation needs."""
        return self._kinds[unit] in self.left_out

    def decide(self, unit: str, differentiate: Differentiate) -> None:
        """Find out (rule 1). Nothing is decided if the gradients are zero or not finite, as nothing can be seen in them then."""
        kind, block = self._kinds[unit], self._blocks[unit]
        try:
            with _listening(block) as ran:
                gradients = differentiate()
            repeats = all(_repeats(gradient.device) for gradient in gradients if gradient is not None)
            before = [_Seen.of(gradient) for gradient in gradients]
            del gradients
            if not any(seen.norm for seen in before) or not all(math.isfinite(seen.norm) for seen in before):
                return
            again = [_Seen.of(gradient) for gradient in differentiate()]
            allowed = None
            if not repeats or not _agree(before, again, None):
                allowed = _allowances(before, [again, [_Seen.of(gradient) for gradient in differentiate()]])
            chosen: list[str] = []
            for path in list(dict.fromkeys(reversed(ran)))[:MOST_LEFT_OUT]:
                if all(self._is_unread(block, [*chosen, path], fill, differentiate, before, allowed) for fill in FILLS):
                    chosen.append(path)
        except torch.OutOfMemoryError:  # there is no room to find out
            chosen = []
        for name, other in self._blocks.items():
            if self._kinds[name] == kind:
                for path in chosen:
                    _leave_out(other.get_submodule(path), fill=0.0, is_needed=lambda: self._makes_all)
        self.left_out[kind] = tuple(chosen)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what the trial took lies in other pieces than what every step takes

    def reset(self) -> None:
        """After an interruption: nothing is on trial, and what was found out holds."""
        self._makes_all = False
        for module in self._on_trial:
            vars(module).pop("forward", None)
        self._on_trial = []

    def _is_unread(
        self,
        block: nn.Module,
        paths: Sequence[str],
        fill: float,
        differentiate: Differentiate,
        before: Sequence[_Seen],
        allowed: Sequence[_Allowance] | None,
    ) -> bool:
        """Whether all gradients are what they were with `fill` in place of the products, and each of these ran."""
        self._on_trial = [block.get_submodule(path) for path in paths]
        filled = [0] * len(paths)

        def note(index: int, num_elements: int) -> None:
            filled[index] += num_elements

        try:
            for index, module in enumerate(self._on_trial):
                _leave_out(module, fill=fill, note=functools.partial(note, index))
            after = [_Seen.of(gradient) for gradient in differentiate()]
        finally:
            self.reset()
        return all(filled) and _agree(before, after, allowed)


class _NoProduct(TorchDispatchMode):
    """Matrix products inside give `fill`; autograd, above this, sees products. `note` is told the elements of each."""

    def __init__(self, fill: float, note: Callable[[int], None] | None) -> None:
        super().__init__()
        self._fill, self._note = fill, note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default or func is torch.ops.aten.addmm.default:
            left, right = args[-2:]
            if self._note is not None:
                self._note(left.shape[0] * right.shape[1])
            most = torch.finfo(left.dtype).max ** 0.5
            fill = max(-most, min(self._fill, most)) if math.isfinite(self._fill) else self._fill
            return left.new_full((left.shape[0], right.shape[1]), fill)
        return func(*args, **(kwargs or {}))


def _leave_out(
    module: nn.Module, *, fill: float, note: Callable[[int], None] | None = None, is_needed: Callable[[], bool] = lambda: False
) -> None:
    forward = type(module).forward.__get__(module)

    def without_product(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or is_needed():  # rule 3
            return forward(*args, **kwargs)
        with _NoProduct(fill, note):
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


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is kept of a gradient to compare it with another."""

    norm: float
    """0 if there is no gradient."""
    sample: Tensor | None
    """fp32, on the CPU; None if there is no gradient."""

    @staticmethod
    def of(gradient: Tensor | None) -> _Seen:
        if gradient is None:
            return _Seen(0.0, None)
        flat = gradient.reshape(-1)
        sample = flat[:: max(1, flat.numel() // MOST_SAMPLED) | 1]  # odd: not one column of a matrix
        return _Seen(float(torch.linalg.vector_norm(gradient, dtype=torch.float32)), sample.to("cpu", torch.float32, copy=True))

    def distance(self, other: _Seen) -> _Allowance:
        """How far apart two of one gradient are."""
        if self.sample is None or other.sample is None:
            return _Allowance(0.0, 0.0)
        return _Allowance(abs(self.norm - other.norm), float(torch.linalg.vector_norm(self.sample - other.sample)))

    def agrees(self, other: _Seen, allowed: _Allowance | None) -> bool:
        """NaN agrees with nothing.

        Args:
            allowed: None: the same bits.
        """
        if self.sample is None or other.sample is None:
            return self.sample is other.sample
        if allowed is None:
            return self.norm == other.norm and torch.equal(self.sample, other.sample)
        apart = self.distance(other)
        return apart.norm <= allowed.norm and apart.sample <= allowed.sample


@dataclasses.dataclass(frozen=True)
class _Allowance:
    """Of a gradient's norm, and of the norm of its sample's difference."""

    norm: float
    sample: float


def _repeats(device: torch.device) -> bool:
    """Whether the same backward gives the same bits there, as far as is known beforehand."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def _allowances(before: Sequence[_Seen], others: Sequence[Sequence[_Seen]]) -> list[_Allowance]:
    """What each gradient may be off, by what it is off in equal runs (rule 1)."""
    found = []
    for index, seen in enumerate(before):
        noise = [seen.distance(other[index]) for other in others]
        size = float(torch.linalg.vector_norm(seen.sample)) if seen.sample is not None else 0.0
        norm = max(TOLERANCE * seen.norm, *(NOISE_FACTOR * one.norm for one in noise))
        found.append(_Allowance(norm, max(TOLERANCE * size, *(NOISE_FACTOR * one.sample for one in noise))))
    return found


def _agree(one: Sequence[_Seen], other: Sequence[_Seen], allowed: Sequence[_Allowance] | None) -> bool:
    each = [None] * len(one) if allowed is None else allowed
    return all(a.agrees(b, limit) for a, b, limit in zip(one, other, each, strict=True))
