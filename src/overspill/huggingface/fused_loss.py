"""The cross entropy of a chunk of logits and its gradient in one kernel: logits are read twice, the gradient is written once.

Plain torch makes fp32 logits, their log-softmax, and an fp32 gradient on the way: some 18 passes over what is here three bf16 ones, and
12 bytes a logit of memory. Both compute in fp32 and round the gradient once, to the dtype of the logits.

One program a row goes through the vocabulary in blocks, in order, so the result is the same in every run. A NaN or an infinite logit
makes the loss of its row not finite, as in torch.

Needs Triton and an NVIDIA GPU; `is_usable` tries it once and says why if not. Imported only where Triton is.
"""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Columns at a time. Chosen, not tuned."""
NUM_WARPS = 8


@triton.jit
def _rows_kernel(
    logits, tokens, losses, gradients, factor, row_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr
):  # fmt: skip
    """One row.

    Args:
        logits: [rows, VOCAB], rows `row_stride` elements apart.
        tokens: int64 [rows].
        losses: float32 [rows], written.
        gradients: [rows, VOCAB], contiguous, written: of factor x loss.
    """
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * row_stride
    columns = tl.arange(0, BLOCK)
    most = -3.0e38  # and not -inf, whose difference with a masked block is NaN
    total = 0.0
    for first in range(0, VOCAB, BLOCK):
        x = tl.load(values + first + columns, mask=first + columns < VOCAB, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), axis=0)
        most = higher
    token = tl.load(tokens + row)
    tl.store(losses + row, tl.log(total) + (most - tl.load(values + token).to(tl.float32)))
    if WITH_GRADIENT:
        for first in range(0, VOCAB, BLOCK):
            inside = first + columns < VOCAB
            x = tl.load(values + first + columns, mask=inside, other=0.0).to(tl.float32)
            share = tl.exp(x - most) / total - tl.where(first + columns == token, 1.0, 0.0)
            tl.store(gradients + row * VOCAB + first + columns, share * factor, mask=inside)


def cross_entropy_fused(logits_rV: Tensor, tokens_r: Tensor, *, factor: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The cross entropy of every row (float32, [r]) and the gradient of factor x their sum by the logits, in their dtype.

    Args:
        logits_rV: float dtype on a CUDA device, a row's elements one after the other.
        tokens_r: int64 targets, all in the vocabulary.
    """
    num_rows, vocab = logits_rV.shape
    assert logits_rV.stride(1) == 1 or vocab == 1, logits_rV.stride()
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits_rV.device)
    gradients = torch.empty((num_rows, vocab), dtype=logits_rV.dtype, device=logits_rV.device) if with_gradient else None
    if num_rows:
        _rows_kernel[(num_rows,)](
            logits_rV, tokens_r, losses, logits_rV if gradients is None else gradients, factor, logits_rV.stride(0),
            VOCAB=vocab, BLOCK=min(WIDTH, triton.next_power_of_2(vocab)), WITH_GRADIENT=with_gradient, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses, gradients


@functools.cache
def is_usable(index: int) -> bool:
    """Whether the kernel works on CUDA device `index`; warns with the reason if not."""
    try:
        logits = torch.zeros((1, 2), device=torch.device("cuda", index))
        losses, _ = cross_entropy_fused(logits, torch.zeros(1, dtype=torch.int64, device=logits.device), factor=1.0, with_gradient=True)
        found = losses.item()
    except Exception as error:  # Triton's ways to fail are its own
        warnings.warn(f"the loss takes plain torch operations on cuda:{index}: {type(error).__name__}: {str(error)[:300]}", stacklevel=2)
        return False
    return torch.version.hip is None and abs(found - 0.6931472) < 1e-6
