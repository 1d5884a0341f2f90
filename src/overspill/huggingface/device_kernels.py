"""The operations of another device, on tensors that have no values.

A block is traced with fake tensors on the CPU, on any machine. Nearly everything that a block does is the same operation on every
device and saves the same tensors; what is not is listed here, and a trace for `cuda` runs inside `DeviceKernels`:

1. `scaled_dot_product_attention` picks one of four kernels by dtype, mask and sizes. Flash, cuDNN and memory-efficient attention save
   q, k, v, the result and a log-sum-exp; "math" saves T x T. The choice is that of torch on this machine if it has a GPU (asked with
   tensors of a few tokens), else `choose_attention`, a transcript of torch's documented constraints for NVIDIA GPUs from compute
   capability 8.0. What surrounds the kernel in torch (padding of heads, masks made additive) is done here too; the kernel itself is
   called by its own name, so what autograd saves is torch's own formula.
2. Dropout is one kernel with a mask of a byte an element; on the CPU it is a product with a mask of the tensor's dtype.
3. Layer norm keeps mean and deviation in fp32; on the CPU in the dtype of its input.
4. The rows of a grouped product's result start at multiples of 16 bytes. Everywhere, fake tensors know it for bf16 alone.

Rules 3 and 4 are seen below autograd, by `op_trace`. A trace for `cpu` needs nothing else: fake tensors take the CPU's paths themselves.

Tests hold this to what a GPU saves for real (`tests/workload/test_gpu_workload.py`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_HALVES = (torch.float16, torch.bfloat16)
_MASK_ALIGNMENT = 16
"""Elements to which memory-efficient attention pads an additive mask's rows (torch, `pad_bias`)."""
_FLASH_HEAD_ALIGNMENT = 8
"""Elements to which flash attention pads heads (torch, `pad_last_dim`)."""
_ROW_ALIGNMENT_BYTES = 16
"""Of a grouped product's result on CUDA (torch, `create_grouped_gemm_output_tensor`)."""
_PROBE_TOKENS = 16
"""Of the tensors with which torch is asked for its choice: any number above one gives the same."""

ATTENTION_NAMES = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}


class DeviceKernels(TorchFunctionMode):
    """Inside, the rules' operations are those of CUDA (rules 1 and 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[str] = []
        """Kernels met, each once."""
        self.has_doubt = False
        """Whether the choice of a kernel met depends on the version of torch."""
        self.asks_device = can_ask_device()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in (F.dropout, torch.dropout):
            return _drop(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        ask = _ask_device if self.asks_device else choose_attention
        backend = ask(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if ATTENTION_NAMES[backend] not in self.attention:
            self.attention.append(ATTENTION_NAMES[backend])
        if backend is SDPBackend.MATH:
            self.has_doubt |= query.shape[-3] != key.shape[-3] and not self.asks_device
            with sdpa_kernel([SDPBackend.MATH]):
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if backend is SDPBackend.FLASH_ATTENTION:
            return _flash(query, key, value, dropout_p, is_causal, scale)
        mask = _additive(attn_mask, query)
        needs_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if backend is SDPBackend.CUDNN_ATTENTION:
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, mask, needs_lse, dropout_p, is_causal, False, scale=scale
            )[0]
        return _efficient(query, key, value, mask, needs_lse, dropout_p, is_causal, scale)


def can_ask_device() -> bool:
    """Whether there is an NVIDIA GPU, of which torch can be asked (rule 1)."""
    return torch.cuda.is_available() and torch.version.hip is None


def choose_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, enable_gqa: bool
) -> SDPBackend:
    """The kernel that torch takes on an NVIDIA GPU of compute capability 8.0 or later, for dense [B, heads, T, head size].

    cuDNN, which torch prefers on some GPUs where its version allows, is not among the answers: it saves the same tensors as the kernel
    that stands for it here, to a few bytes.
    """
    sizes = {tensor.shape[-1] for tensor in (query, key, value)}
    is_grouped = len({tensor.shape[-3] for tensor in (query, key, value)}) > 1
    is_dense = query.dim() == 4 and all(t.stride(-1) == 1 for t in (query, key, value)) and query.shape[-2] > 0
    if not is_dense or (is_grouped and not enable_gqa):
        return SDPBackend.MATH
    is_square = query.shape[-2] == key.shape[-2]
    if mask is None and query.dtype in _HALVES and len(sizes) == 1 and max(sizes) <= 256 and (is_square or not is_causal):
        return SDPBackend.FLASH_ATTENTION
    alignment = 8 if query.dtype in _HALVES else 4
    is_aligned = query.shape[-1] == key.shape[-1] and all(size % alignment == 0 for size in sizes)
    if not is_grouped and is_aligned and query.dtype in (*_HALVES, torch.float32):
        return SDPBackend.EFFICIENT_ATTENTION
    return SDPBackend.MATH


def keep_statistics(out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rule 3: the result of `native_layer_norm` as on CUDA."""
    result, mean, deviation = out
    return (result, mean.float(), deviation.float()) if result.dtype in _HALVES else out


def multiply_groups(left: Tensor, right: Tensor, offsets: Tensor | None, dtype: torch.dtype | None, *, is_cuda: bool) -> Tensor:
    """Rule 4: an empty tensor in place of the result of `_grouped_mm`."""
    columns = right.shape[-1]
    match left.dim(), right.dim():
        case (2, 2):
            assert offsets is not None
            size: tuple[int, ...] = (offsets.shape[0], left.shape[0], columns)
        case (2, 3):
            size = (left.shape[0], columns)
        case (3, 2):
            size = (left.shape[1], columns)
        case _:
            size = (left.shape[0], left.shape[1], columns)
    dtype = dtype or left.dtype
    alignment = _ROW_ALIGNMENT_BYTES // dtype.itemsize if is_cuda else 1
    row = columns + -columns % alignment
    return torch.empty_strided(size, (row, 1) if len(size) == 2 else (size[1] * row, row, 1), dtype=dtype)


def _ask_device(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, enable_gqa: bool
) -> SDPBackend:
    """Torch's own choice on this machine's GPU."""
    described = tuple((tensor.shape[-3], tensor.shape[-1], tensor.dtype, tensor.requires_grad) for tensor in (query, key, value))
    mask_dtype = None if mask is None else mask.dtype
    return _ask_device_once(described, mask_dtype, dropout, is_causal, enable_gqa)


@functools.cache
def _ask_device_once(
    described: tuple[tuple[int, int, torch.dtype, bool], ...], mask_dtype: torch.dtype | None, dropout: float, causal: bool, gqa: bool
) -> SDPBackend:
    with _disable_current_modes():
        real = [
            torch.zeros(1, heads, _PROBE_TOKENS, size, dtype=dtype, device="cuda", requires_grad=grad)
            for heads, size, dtype, grad in described
        ]
        mask = None if mask_dtype is None else torch.zeros(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, dtype=mask_dtype, device="cuda")
        number = torch.ops.aten._fused_sdp_choice.default(*real, mask, dropout, causal, enable_gqa=gqa)
    # Not SDPBackend(number): some versions of torch make a new object of it, which is equal to the member and not the same.
    return next(backend for backend in ATTENTION_NAMES if backend.value == number)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    size = query.shape[-1]
    missing = -size % _FLASH_HEAD_ALIGNMENT
    if missing:
        query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
    result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)[0]
    return result[..., :size] if missing else result


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, needs_lse: bool, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    if mask is not None:
        tokens = mask.shape[-1]
        if tokens % _MASK_ALIGNMENT:
            mask = F.pad(mask, (0, -tokens % _MASK_ALIGNMENT))[..., :tokens]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], tokens)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, needs_lse, dropout, is_causal, scale=scale)[0]


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as 0 and -inf in the dtype of the queries, as fused kernels read it: one more tensor of its size."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


def _drop(func: Any, tensor: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and 0 < p < 1 and not inplace and tensor.numel():
        return torch.native_dropout(tensor, p, True)[0]
    return func(tensor, p, training, inplace) if func is F.dropout else func(tensor, p, training)
