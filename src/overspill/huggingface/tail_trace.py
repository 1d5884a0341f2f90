"""The tail on tensors without values: the model's own code to `last_hidden_state`, then rows through head and loss, chunk by chunk.

As in `tail`, whose functions run here. Chunks are alike, so one full chunk, two, and the last, shorter one are traced:
what two cost more than one is a chunk; what one costs more than that is done once.

On CUDA the loss is one kernel (`fused_loss`), which no fake tensor enters: it reads the logits twice, and writes their gradient
once and a loss a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from overspill.huggingface.op_costs import touched_bytes
from overspill.huggingface.op_trace import OpTrace
from overspill.huggingface.tail import Tail, Targets, cross_entropy_chunks, cross_entropy_of_chunk, last_hidden_state
from overspill.spec.workload import LossWork, Pass, SavedTensor, Work

_FUSED_LOSS_OPS = 2
"""The kernel, and the sum of its rows' losses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunks:
    """Work of some chunks, by part; parts overlap (`head` and `loss` are in the others)."""

    forward: Work = Work()
    gradients: Work = Work()
    head: Work = Work()
    loss: Work = Work()

    def __add__(self, other: _Chunks) -> _Chunks:
        return _Chunks(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(_Chunks)})

    def times(self, count: int) -> _Chunks:
        return _Chunks(**{f.name: getattr(self, f.name).times(count) for f in dataclasses.fields(_Chunks)})


class TailTrace:
    """One pass over the tail, in evaluation or training."""

    forward: Pass
    backward: Pass
    loss: LossWork
    saved: tuple[SavedTensor, ...]

    def __init__(
        self,
        trace: OpTrace,
        tail: Tail,
        inputs: Mapping[str, Any],
        leaves: Mapping[str, Tensor],
        side_outputs: Mapping[str, tuple[Tensor, ...]],
        *,
        is_fused: bool,
        is_training: bool,
    ) -> None:
        """
        Args:
            inputs: keyword arguments of the model's forward, fake.
            leaves: the parameters that the tail is bound to, fake.
            side_outputs: unit -> its router logits, fake.
        """
        self.trace, self.tail, self.inputs, self.leaves, self.side_outputs = trace, tail, inputs, leaves, side_outputs
        self.is_fused, self.is_training = is_fused, is_training
        self._head, self._loss = Work(), Work()
        self._logits_bytes = 0

    def run(self, hidden: Tensor, num_targets: int, chunk_rows: int) -> None:
        """Trace it, and set the results.

        Args:
            hidden: fake [B, T, H], what the last block returns.
        """
        trace = self.trace
        trace.give("input", {"hidden_states": hidden})
        trace.forget_peak()
        start = len(trace.ops)
        leaf = hidden.detach().requires_grad_(self.is_training)
        with torch.set_grad_enabled(self.is_training), trace.saving():
            output = self.tail.run_body(self.inputs, leaf)
        last = last_hidden_state(output)
        outputs = [last] if last.requires_grad else []
        self.saved = trace.saved_tensors(outputs, last)
        body = self._since(start)
        rows = min(chunk_rows, num_targets)
        chunks, chunk_peak_bytes, gradient = self._all_chunks(output, last, num_targets, rows)
        start = len(trace.ops)
        if self.tail.has_router_loss:
            self.tail.run_router_loss(self.inputs, output, last, self.side_outputs, 1.0, self.is_training)
        if outputs:
            trainable = [self.leaves[name] for name in self.tail.body_names if self.leaves[name].requires_grad]
            results = torch.autograd.grad(outputs, [leaf, *trainable], [gradient], allow_unused=True)
            del results
        total = body + chunks + self._since(start)
        self.forward = Pass(work=total.forward, peak_bytes=trace.peak_bytes)
        self.backward = Pass(work=total.gradients, peak_bytes=trace.peak_bytes)
        self.loss = LossWork(
            num_targets=num_targets,
            chunk_rows=chunk_rows,
            num_chunks=-(-num_targets // chunk_rows),
            logits_chunk_bytes=self._logits_bytes,
            chunk_peak_bytes=chunk_peak_bytes,
            head=total.head,
            loss=total.loss,
            is_fused=self.is_fused,
        )

    def _all_chunks(self, output: Any, last: Tensor, num_targets: int, rows: int) -> tuple[_Chunks, int, Tensor | None]:
        """Work of all chunks, the peak of one, and the gradient by the last hidden states."""
        if num_targets == 0:
            return (*self._chunks(output, last, 0, 1),)
        two, rest = _Chunks(), _Chunks()
        num_full, remainder = divmod(num_targets, rows)
        if num_full > 1 or remainder:
            two = self._chunks(output, last, 2 * rows, rows)[0]
        if remainder:
            rest = self._chunks(output, last, remainder, rows)[0]
        one, peak_bytes, gradient = self._chunks(output, last, rows, rows)
        each = two + one.times(-1)
        once = one + each.times(-1)
        total = one if num_full > 0 else _Chunks()
        total += each.times(num_full - 1) if num_full > 1 else _Chunks()
        total += rest + once.times(-1) if remainder else _Chunks()
        return total, peak_bytes, gradient

    def _chunks(self, output: Any, last: Tensor, num_rows: int, chunk_rows: int) -> tuple[_Chunks, int, Tensor | None]:
        trace = self.trace
        start, before = len(trace.ops), trace.live_bytes
        earlier_peak, trace.peak_bytes = trace.peak_bytes, trace.live_bytes
        self._head, self._loss = Work(), Work()
        index = torch.zeros(num_rows, dtype=torch.int64)
        _, gradient = cross_entropy_chunks(
            lambda rows: self._run_head(output, rows),
            last,
            Targets(rows=index, tokens=index),
            chunk_rows=chunk_rows,
            factor=1.0,
            parameters={name: self.leaves[name] for name in self.tail.head_names},
            accumulate=(lambda name, gradient: None) if self.is_training else None,
            loss_of_chunk=self._lose,
        )
        peak_bytes = trace.peak_bytes - before
        trace.peak_bytes = max(trace.peak_bytes, earlier_peak)
        done = self._since(start)
        extra = self._loss if self.is_fused else Work()  # no operation stands for the kernel
        return dataclasses.replace(done, forward=done.forward + extra, head=self._head, loss=self._loss), peak_bytes, gradient

    def _run_head(self, output: Any, rows: Tensor) -> Tensor:
        start = len(self.trace.ops)
        logits = self.tail.run_head(self.inputs, output, rows)
        self._head += self._work_since(start)
        self._logits_bytes = max(self._logits_bytes, logits.numel() * logits.dtype.itemsize)
        return logits

    def _lose(self, logits: Tensor, tokens: Tensor, factor: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if self.is_fused:
            losses = torch.empty(logits.shape[0], dtype=torch.float32)
            gradient = torch.empty_like(logits, requires_grad=False) if with_gradient else None
            reads = 2 if with_gradient else 1
            moved = reads * touched_bytes(logits) + losses.numel() * 4 + (touched_bytes(gradient) if gradient is not None else 0)
            self._loss += Work(moved_bytes=moved, elementwise_bytes=moved, num_ops=_FUSED_LOSS_OPS)
            return torch.empty((), dtype=torch.float32), gradient
        start = len(self.trace.ops)
        result = cross_entropy_of_chunk(logits, tokens, factor, with_gradient)
        self._loss += self._work_since(start)
        return result

    def _since(self, start: int) -> _Chunks:
        trace = self.trace
        return _Chunks(
            forward=trace.pass_of(is_gradient=False, start=start).work, gradients=trace.pass_of(is_gradient=True, start=start).work
        )

    def _work_since(self, start: int) -> Work:
        return sum((op.cost for op in self.trace.ops[start:]), Work())
