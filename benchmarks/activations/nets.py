"""The models whose saved tensors are measured: SSDTrain's three kinds of wide blocks, and Llamas of transformers.

`bert-8192x4` is four blocks of hidden size 8192 without embedding and head, whose share shrinks with the width: here the blocks count.

* `gpt`: pre-norm, causal. `bert`: post-norm, every token sees every other. Attention by torch's SDPA, an MLP of four times the width with
  GELU.
* `t5`: blocks that encode, without a mask, pre-norm; half of all, rounded down, decode: causal, with a cross attention to what the encoder
  gave. (No relative positions, which flash attention does not take.)
* `llama-1.10B`, `llama-3.02B`: transformers' own, with the loss of `throughput/chunked_loss.py`, which never has all logits.

Random weights; a sum of squares for the loss of the first three. No dropout. `blocks` of a net are what recomputation may wrap.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent), str(HERE.parent / "throughput")]

from net_shapes import NetShape  # noqa: E402

HEAD_SIZE = 128
"""As in SSDTrain's models."""


class Attention(nn.Module):
    """[rows, length, hidden] to the same, from itself or from `source`."""

    def __init__(self, hidden: int, *, is_causal: bool, is_cross: bool = False) -> None:
        super().__init__()
        self.num_heads, self.is_causal, self.is_cross = max(1, hidden // HEAD_SIZE), is_causal, is_cross
        self.inner = (
            nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)]) if is_cross else nn.Linear(hidden, 3 * hidden)
        )
        self.out = nn.Linear(hidden, hidden)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        rows, length, width = hidden.shape
        if isinstance(self.inner, nn.ModuleList):
            assert source is not None
            parts = [*self.inner[0](hidden).split(width, -1), *self.inner[1](source).split(width, -1)]
        else:
            parts = list(self.inner(hidden).split(width, -1))
        heads = [part.view(rows, -1, self.num_heads, width // self.num_heads).transpose(1, 2) for part in parts]
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.is_causal)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """[rows, length, hidden] to the same."""

    def __init__(self, hidden: int, *, is_causal: bool, is_post_norm: bool = False, is_cross: bool = False) -> None:
        super().__init__()
        self.is_post_norm = is_post_norm
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3 if is_cross else 2))
        self.attention = Attention(hidden, is_causal=is_causal)
        self.cross = Attention(hidden, is_causal=False, is_cross=True) if is_cross else None
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self._add(0, hidden, self.attention)
        if self.cross is not None:
            hidden = self._add(2, hidden, functools.partial(self.cross, source=source))
        return self._add(1, hidden, lambda inner: self.down(nn.functional.gelu(self.up(inner), approximate="tanh")))

    def _add(self, number: int, hidden: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        norm = self.norms[number]
        return norm(hidden + part(hidden)) if self.is_post_norm else hidden + part(norm(hidden))


class WideNet(nn.Module):
    """Blocks and a sum of squares; [rows, length, hidden] to a number."""

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        is_decoder = [shape.kind == "t5" and index >= shape.layers - shape.layers // 2 for index in range(shape.layers)]
        self.blocks = nn.ModuleList(
            Block(shape.hidden, is_causal=shape.kind == "gpt" or late, is_post_norm=shape.kind == "bert", is_cross=late)
            for late in is_decoder
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        given, source = hidden, None
        for block in self.blocks:
            if block.cross is not None and source is None:
                source, hidden = hidden, given
            hidden = block(hidden, source)
        return hidden.float().square().mean()


class LlamaNet(nn.Module):
    """transformers' Llama and its chunked loss; [rows, length] of token numbers to a number."""

    def __init__(self, shape: NetShape, dtype: torch.dtype) -> None:
        super().__init__()
        from chunked_loss import CausalLoss
        from shapes import SHAPES as LLAMAS
        from transformers import LlamaForCausalLM

        config = LLAMAS[shape.kind].config(max_positions=max(4096, shape.length))
        config._attn_implementation = "sdpa"
        self.loss = CausalLoss(LlamaForCausalLM(config), dtype=dtype)
        self.blocks = self.loss.model.model.layers

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.loss(tokens, tokens, num_targets=tokens.numel())


def build_net(shape: NetShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The net with random weights of `dtype` on `device`, drawn there."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            net = WideNet(shape) if shape.kind in ("gpt", "bert", "t5") else LlamaNet(shape, dtype)
    finally:
        torch.set_default_dtype(before)
    return net.train()


def build_inputs(shape: NetShape, rows: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One micro-batch."""
    if shape.kind in ("gpt", "bert", "t5"):
        return torch.randn(rows, shape.length, shape.hidden, device=device).to(dtype)
    return torch.randint(0, 32000, (rows, shape.length), device=device)


def parts(net: nn.Module) -> list[str]:
    """Patterns of what may be run again (`throughput`): attentions and, of a Llama, MLPs; a wide net's MLP is no module."""
    if isinstance(net, LlamaNet):
        return ["*.layers.*.self_attn", "*.layers.*.mlp"]
    has_cross = any(block.cross is not None for block in net.blocks)  # type: ignore[union-attr]
    return ["blocks.*.attention", *(["blocks.*.cross"] if has_cross else [])]


def recompute(net: nn.Module, numbers: Iterable[int]) -> Callable[[], None]:
    """Let blocks keep their input alone and run again in backward; what is given undoes it."""
    blocks: Any = net.blocks
    chosen = [blocks[number] for number in numbers]
    for block in chosen:
        inner = functools.partial(type(block).forward, block)
        block.forward = functools.partial(checkpoint, inner, use_reentrant=False, preserve_rng_state=False, determinism_check="none")

    def undo() -> None:
        for block in chosen:
            del block.forward

    return undo
