"""What one operation of torch costs: FLOPs by a formula, bytes by what it reads and writes.

FLOPs are two per multiplication and addition of matrix products, convolutions and attention. They agree with
`torch.utils.flop_counter` (tests hold them together) but for what that does not know or has wrong:

* grouped products of mixture-of-experts layers: S rows with [E, K, N] are 2 S K N, however the rows are spread over the experts;
* the CPU's attention kernel, and attention with fewer key heads than query heads before torch 2.13;
* the weight gradient of a grouped convolution, which it counts as often as there are groups.

Moved bytes count a dimension of stride 0 (an expanded tensor) once, because it is there once.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from overspill.spec.workload import Work

_ALLOCATIONS = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
_RANDOM = frozenset({"native_dropout", "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "normal_", "uniform_"})
_GROUPED = frozenset({"_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback_backward"})
_PUTS = frozenset({"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"})
_SUMS_INTO_ROWS = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_"})
_LOOKS_LIKE_PRODUCTS = re.compile(r"attention|mm|conv(?!ert)|matmul|gemm|linear|lstm|gru|einsum|_scan")


def name_of(func: Any) -> str:
    """As people write it: `aten.mm`."""
    return f"{func.namespace}.{_name(func)}"


def is_allocation(func: Any) -> bool:
    """Whether it only reserves memory."""
    return _name(func) in _ALLOCATIONS


def is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it draws random numbers."""
    return _name(func) in _RANDOM or float(_argument(func, args, kwargs, "dropout_p") or 0) > 0


def has_unknown_cost(func: Any) -> bool:
    """Whether it may have FLOPs that no formula here counts: products by name, and whatever is not torch's own."""
    if _name(func) in _FORMULAS:
        return False
    return func.namespace not in ("aten", "prims", "prim") or _LOOKS_LIKE_PRODUCTS.search(_name(func)) is not None


def touched_bytes(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor touches."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0 or size == 0) * tensor.dtype.itemsize


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


def cost_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    """Of one operation that runs a kernel."""
    formula = _FORMULAS.get(_name(func))
    flops = formula(args, out) if formula is not None else 0
    is_attention = flops > 0 and "attention" in _name(func)
    moved = sum(touched_bytes(tensor) for tensor in tensors_in(args, kwargs)) + sum(touched_bytes(tensor) for tensor in tensors_in(out))
    return Work(
        flops=flops,
        attention_flops=flops if is_attention else 0,
        causal_flops=flops if is_attention and _argument(func, args, kwargs, "is_causal") else 0,
        grouped_flops=flops if _name(func) in _GROUPED else 0,
        moved_bytes=moved,
        elementwise_bytes=0 if flops else moved,
        scattered_bytes=moved if _is_sum_into_rows(func, args, kwargs) else 0,
        num_ops=1,
    )


def _is_sum_into_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _name(func) in _SUMS_INTO_ROWS or (_name(func) in _PUTS and bool(_argument(func, args, kwargs, "accumulate")))


@functools.cache
def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The value that an operation was given for its parameter `name`; its default; None if it has no such parameter."""
    position, default = _parameter(func, name)
    return kwargs.get(name, args[position] if position is not None and position < len(args) else default)


@functools.cache
def _parameter(func: Any, name: str) -> tuple[int | None, Any]:
    """Position and default of a parameter."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return position, argument.default_value if argument.has_default_value() else None
    return None, None


def _product(left: Tensor, right: Tensor) -> int:
    """[..., M, K] x [..., K, N]."""
    return 2 * left.numel() * right.shape[-1]


def _grouped_product(args: tuple[Any, ...], out: Any) -> int:
    """[S, K] x [E, K, N], [M, S] x [S, N] cut along S, [E, M, K] x [K, S] cut along S, [E, M, K] x [E, K, N]."""
    left, right = args[0], args[1]
    if left.dim() == 3 and right.dim() == 2:  # every column of the cut dimension meets one expert
        return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
    return _product(left, right)


def _convolution(inputs: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> int:
    """Every element of the output (of the input, if transposed) meets the weights of one filter."""
    return 2 * (inputs if transposed else output).numel() * math.prod(weight.shape[1:])


def _convolution_backward(args: tuple[Any, ...], out: Any) -> int:
    gradient, inputs, weight = args[:3]
    return sum(_convolution(inputs, weight, gradient, args[7]) for wanted in args[10][:2] if wanted)


def _attention(args: tuple[Any, ...], out: Any) -> int:
    """Q x K^T and scores x V, over the heads of Q and all pairs of positions."""
    query, key, value = args[:3]
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(args: tuple[Any, ...], out: Any) -> int:
    """Scores again, their gradient and V's, Q's and K's: five products."""
    _, query, key, value = args[:4]
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


_FORMULAS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "mm": lambda args, out: _product(args[0], args[1]),
    "bmm": lambda args, out: _product(args[0], args[1]),
    "addmm": lambda args, out: _product(args[1], args[2]),
    "baddbmm": lambda args, out: _product(args[1], args[2]),
    "_addmm_activation": lambda args, out: _product(args[1], args[2]),
    "mv": lambda args, out: 2 * args[0].numel(),
    "addmv": lambda args, out: 2 * args[1].numel(),
    "dot": lambda args, out: 2 * args[0].numel(),
    "addr": lambda args, out: 2 * args[0].numel(),
    "_grouped_mm": _grouped_product,
    "grouped_mm_fallback": _grouped_product,
    "grouped_mm_fallback_backward": lambda args, out: 2 * _grouped_product(args, out),
    "convolution": lambda args, out: _convolution(args[0], args[1], out, args[6]),
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(
        (
            f"_scaled_dot_product_{kind}"
            for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
        ),
        _attention,
    ),
    **dict.fromkeys(
        (
            f"_scaled_dot_product_{kind}_backward"
            for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
        ),
        _attention_backward,
    ),
}
