"""A GPU and its link on paper: compute and both directions of the link have clocks of their own, and nothing sleeps.

Rules:

1. Whoever stands for compute says how long an op takes (`spend`); nothing else takes time.
2. A copy begins when its direction is free, compute has reached its mark, and what it comes after has ended; it takes its bytes over the
   rate. The bytes themselves are there at once: what order they arrive in is `late_link.py`'s business, how long it takes is this one's.
3. Whatever waits for a copy moves compute's clock to the copy's end (`stalled_s`).
4. The host is for ever ahead: no copy is seen to be done before compute has waited for it or the step has ended (`synchronize`).

`PacedNet` gives the nets of `benchmarks/activations/nets.py` the times that a device would take at another width, so that a net of 256 has
the clock of one of 12288: bytes shrink, and the link's rate with them. A Llama is an eighth as wide, in every width; its head and loss are
time alone. `charge_rebuilds` lets what is rebuilt take the time of the bytes that its ops read and write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from overspill.activations.forms import CastFrom
from overspill.activations.links import End
from overspill.activations.rebuild import Rebuild

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS / "activations"), str(BENCHMARKS)]

from bounds import simulate_host  # noqa: E402
from net_shapes import SHAPES, NetShape  # noqa: E402
from nets import Attention, Block, build_net  # noqa: E402
from shapes import SHAPES as LLAMAS  # noqa: E402

__all__ = ["LINK_BYTES_PER_S", "SHAPES", "PacedLink", "PacedNet", "charge_rebuilds", "simulate_host"]

FLOPS = 600e12
"""Of large bf16 products on an H100: what gives the link's bound of 80 % at hidden 12288. Assumed, not measured."""
MEMORY_BYTES_PER_S = 2.5e12
"""Of ops that only read and write. Assumed."""
LINK_BYTES_PER_S = 55e9
"""Each way; PCIe 5."""
LLAMA_SHRINKS = 8
NORM_BYTES, ADD_BYTES, GATED_BYTES = 38, 6, 10
"""That forward reads and writes of an element of bf16: a Llama's norm in fp32, a sum of two, and SiLU and the product of an MLP."""
ATTENTION_FLOPS = 320e12
"""Of a Llama's heads; as in `benchmarks/activations/estimates.py`."""


class PacedEnd:
    def __init__(self, link: PacedLink, num_bytes: int, begin_s: float, end_s: float) -> None:
        self._link, self.num_bytes, self.begin_s, self.end_s = link, num_bytes, begin_s, end_s

    @property
    def is_done(self) -> bool:
        return self.end_s <= self._link.seen_s

    def wait(self) -> None:
        self._link.hold(self)

    def span_s(self) -> float | None:
        return self.end_s - self.begin_s


class PacedLink:
    """Meets the protocol `Link`."""

    def __init__(self, out_bytes_per_s: float, in_bytes_per_s: float) -> None:
        self._rates = {"out": out_bytes_per_s, "in": in_bytes_per_s}
        self._free_s = {"out": 0.0, "in": 0.0}
        self.now_s = self.seen_s = self.stalled_s = 0.0

    def spend(self, seconds: float) -> None:
        """Compute is busy."""
        self.now_s += seconds

    def slow_down(self, factor: float) -> None:
        """Copies take so much longer from here on."""
        self._rates = {way: rate / factor for way, rate in self._rates.items()}

    def synchronize(self) -> None:
        """The step has ended, and the host has seen it; copies that nobody waits for go on."""
        self.seen_s = self.now_s

    def start_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[End], *, is_timed: bool) -> End:
        return self._start("out", target, source, self.now_s, after)

    def start_in(self, target: torch.Tensor, source: torch.Tensor, mark: float, after: Sequence[End], *, is_timed: bool) -> End:
        return self._start("in", target, source, mark, after)

    def mark(self) -> float:
        return self.now_s

    time_mark = mark

    def has_passed(self, mark: float) -> bool:
        return mark <= self.seen_s

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def hold(self, end: End) -> None:
        assert isinstance(end, PacedEnd)
        self.stalled_s += max(0.0, end.end_s - self.now_s)
        self.now_s = max(self.now_s, end.end_s)

    def touch(self, tensor: torch.Tensor, mark: float) -> None:
        pass

    def let_go(self, end: End) -> None:
        pass

    def close(self) -> None:
        self.seen_s = float("inf")

    def _start(self, way: str, target: torch.Tensor, source: torch.Tensor, mark: float, after: Sequence[End]) -> PacedEnd:
        target.copy_(source)
        begin_s = max([self._free_s[way], mark, *(end.end_s for end in after if isinstance(end, PacedEnd))])
        self._free_s[way] = begin_s + target.numel() / self._rates[way]
        return PacedEnd(self, target.numel(), begin_s, self._free_s[way])


class _SpendInBackward(torch.autograd.Function):
    """The same tensor; the op behind it takes time in backward, after it has been given what it saved."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, spend: Callable[[], None]) -> torch.Tensor:
        ctx.spend = spend
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.spend()
        return gradient, None


class SmallLlama(nn.Module):
    """A Llama's blocks at an eighth of every width; [rows, length] of token numbers to a number."""

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        large = LLAMAS[shape.kind]
        config = LlamaConfig(
            hidden_size=shape.hidden // LLAMA_SHRINKS, intermediate_size=large.ffn_size // LLAMA_SHRINKS, vocab_size=64,
            num_hidden_layers=shape.layers, num_attention_heads=max(1, large.num_heads // LLAMA_SHRINKS), use_cache=False,
            num_key_value_heads=large.num_kv_heads // LLAMA_SHRINKS, attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = LlamaModel(config).bfloat16()
        self.blocks = self.model.layers

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).last_hidden_state.float().square().mean()


class PacedNet:
    """A net whose ops take the times of `shape` on a device, and the link's rates that go with its small tensors.

    Args:
        hidden: width of the net that really runs, unless it is a Llama.
        length: tokens of one of its sequences.
    """

    def __init__(self, shape: NetShape, *, hidden: int = 256, length: int = 16) -> None:
        self.shape, is_llama = shape, shape.kind in LLAMAS
        hidden = shape.hidden // LLAMA_SHRINKS if is_llama else hidden
        self.small = NetShape(kind=shape.kind, hidden=hidden, layers=shape.layers, rows=shape.rows, length=length)
        self.net = SmallLlama(shape) if is_llama else build_net(self.small, torch.device("cpu"), torch.bfloat16)
        torch.manual_seed(1)
        tokens = torch.randint(0, 64, (shape.rows, length))
        self.inputs = tokens if is_llama else torch.randn(shape.rows, length, hidden).bfloat16()
        self.scale = shape.tokens() * shape.hidden / (self.small.tokens() * hidden)
        """Bytes of the shape's tensors over bytes of those that run."""
        self.bytes_per_s = LINK_BYTES_PER_S / self.scale
        self.link = PacedLink(1.0, 1.0)
        self.slowness = 1.0
        """Of compute: what everything takes of its usual time."""
        for module in self.net.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | LlamaRMSNorm):
                seconds = self._seconds(module)
                module.register_forward_pre_hook(self._before(2 * seconds))
                module.register_forward_hook(self._after(seconds))
        for module in self.net.modules():
            if isinstance(module, Attention):
                seconds = 4 * shape.length * shape.hidden * shape.tokens() / (2 if module.is_causal else 1) / FLOPS
                module.out.register_forward_pre_hook(self._both(2 * seconds, seconds))
            if isinstance(module, Block):
                seconds = 8 * 2 * shape.tokens() * shape.hidden / MEMORY_BYTES_PER_S  # GELU reads and writes
                module.down.register_forward_pre_hook(self._both(seconds, seconds))
            if isinstance(module, LlamaAttention):
                seconds = 2 * shape.length * shape.hidden * shape.tokens() / ATTENTION_FLOPS
                module.o_proj.register_forward_pre_hook(self._both(2 * seconds, seconds))
            if isinstance(module, LlamaMLP):
                seconds = GATED_BYTES * shape.tokens() * LLAMAS[shape.kind].ffn_size / MEMORY_BYTES_PER_S
                module.down_proj.register_forward_pre_hook(self._both(2 * seconds, seconds))
        if is_llama:  # the head, and its gradients, which the loss makes in forward
            head_s = 3 * 2 * shape.tokens() * shape.hidden * LLAMAS[shape.kind].vocab_size / FLOPS
            self.net.model.norm.register_forward_hook(self._after(head_s))

    def open_link(self, device: torch.device) -> PacedLink:
        self.link = PacedLink(self.bytes_per_s, self.bytes_per_s)
        return self.link

    def step(self) -> tuple[float, list[torch.Tensor]]:
        """Seconds of one forward and backward on the clock, and gradients."""
        link = self.link
        self.net.zero_grad(set_to_none=True)
        begun_s = link.now_s
        self.net(self.inputs).backward()
        link.synchronize()
        return link.now_s - begun_s, [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]

    def spend(self, seconds: float) -> None:
        self.link.spend(seconds * self.slowness)

    def _seconds(self, module: nn.Module) -> float:
        tokens, factor = self.shape.tokens(), self.shape.hidden / self.small.hidden
        if isinstance(module, nn.Linear):
            return 2 * module.in_features * module.out_features * factor**2 * tokens / FLOPS
        moved_bytes = NORM_BYTES + ADD_BYTES if isinstance(module, LlamaRMSNorm) else 4
        return moved_bytes * tokens * self.shape.hidden / MEMORY_BYTES_PER_S

    def _before(self, backward_s: float) -> Callable[..., Any]:
        return lambda module, inputs: (_SpendInBackward.apply(inputs[0], lambda: self.spend(backward_s)), *inputs[1:])

    def _after(self, forward_s: float) -> Callable[..., None]:
        return lambda module, inputs, output: self.spend(forward_s)

    def _both(self, backward_s: float, forward_s: float) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            self.spend(forward_s)
            return (_SpendInBackward.apply(inputs[0], lambda: self.spend(backward_s)), *inputs[1:])

        return hook


def charge_rebuilds(net: PacedNet, monkeypatch: Any) -> None:
    """What is rebuilt takes the time of the bytes that its ops move, on the net's clock."""
    plain = Rebuild._rebuild

    def paced(self: Rebuild) -> torch.Tensor:
        is_alive = not self.weak.expired()
        result = plain(self)
        net.spend(0.0 if is_alive else self.moved_bytes * net.scale / MEMORY_BYTES_PER_S)
        return result

    monkeypatch.setattr(Rebuild, "_rebuild", paced)
    plain_encode, plain_decode = CastFrom.encode, CastFrom.decode

    def encode(self: CastFrom, values: torch.Tensor) -> torch.Tensor:
        stored = plain_encode(self, values)
        net.spend((values.nbytes + stored.nbytes) * net.scale / MEMORY_BYTES_PER_S)
        return stored

    def decode(self: CastFrom, stored: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        values = plain_decode(self, stored, dtype, num_elements)
        net.spend((values.nbytes + stored.nbytes) * net.scale / MEMORY_BYTES_PER_S)
        return values

    monkeypatch.setattr(CastFrom, "encode", encode)
    monkeypatch.setattr(CastFrom, "decode", decode)
