"""The loss of a causal LM without its full logits, in plain PyTorch: for the systems that a comparison runs on transformers' own model.

Loss and gradients are made in one visit: the backward of the head runs inside the forward, chunk of rows by chunk of rows, so nothing
is computed twice and at most `CHUNK_BYTES` of fp32 logits exist. The head's gradient adds up over chunks in fp32.

Shapes: N = B x T positions, r rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_BYTES = 512 << 20
"""fp32 logits of one chunk: 4,096 rows of a vocabulary of 32,000. Chosen, not tuned."""
IGNORED = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, factor: float, chunk_rows: int) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head_VH = weight_VH.detach().to(hidden_NH.dtype)
            hidden_gradient_NH = torch.empty_like(hidden_NH)
            weight_gradient_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
            total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
            is_target_N1 = (targets_N != IGNORED).unsqueeze(1)
            tokens_N1 = targets_N.clamp(min=0).unsqueeze(1)
            for start in range(0, hidden_NH.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                counts_r1, tokens_r1 = is_target_N1[rows], tokens_N1[rows]
                log_p_rV = F.log_softmax(hidden_NH[rows] @ head_VH.T, dim=-1, dtype=torch.float32)
                total -= (log_p_rV.gather(1, tokens_r1) * counts_r1).sum()
                error_rV = log_p_rV.exp_().scatter_add_(1, tokens_r1, torch.full_like(tokens_r1, -1, dtype=torch.float32))
                error_rV = error_rV.to(hidden_NH.dtype)
                hidden_gradient_NH[rows] = (error_rV @ head_VH) * counts_r1
                weight_gradient_VH += error_rV.T @ (hidden_NH[rows] * counts_r1)
        ctx.save_for_backward(hidden_gradient_NH, weight_gradient_VH)
        ctx.factor, ctx.weight_dtype = factor, weight_VH.dtype
        return total * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_NH, weight_gradient_VH = ctx.saved_tensors
        scale = gradients[0] * ctx.factor
        return hidden_gradient_NH * scale, (weight_gradient_VH * scale).to(ctx.weight_dtype), None, None, None


def shifted(labels_BT: Tensor) -> Tensor:
    """[B * T]: position t has the label at t + 1, the last of a sample has none."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()


class CausalLoss(nn.Module):
    """transformers' decoder with the chunked loss instead of the full logits.

    Args:
        model: a causal LM whose head is a plain projection of the decoder's hidden states (Llama, Qwen2).
        dtype: of the head's products.
    """

    def __init__(self, model: PreTrainedModel, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, input_ids: Tensor, labels: Tensor, *, num_targets: int) -> Tensor:
        """Sum of the micro-batch's losses over `num_targets`, the targets of the whole step."""
        hidden_BTH = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        weight_VH = self.model.lm_head.weight
        chunk_rows = max(64, CHUNK_BYTES // (4 * weight_VH.shape[0]))
        hidden_NH = hidden_BTH.flatten(0, 1).to(self.dtype)
        return _ChunkedCrossEntropy.apply(hidden_NH, weight_VH, shifted(labels), 1.0 / num_targets, chunk_rows)


def recompute_blocks(model: PreTrainedModel) -> None:
    """Every block keeps its input and is recomputed in the backward; the same call for every system that runs transformers' own model."""
    # There is no dropout to repeat, and comparing shapes of what is recomputed costs time on the host.
    options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
