"""What runs when a template is timed: one block forward and back, or the tail, over random weights; launched, or replayed as CUDA graphs.

    run = BlockRun(streamed, "model.layers.0", clock, leaves, sums, arguments, source, above)
    sample = run()                   # launched, as the executor launches it
    replay = run.record(recorder)    # as `runtime/graphs.py` records it
    sample = replay()

A launched run waits for the device when it is over, so the next one finds it idle: what the host takes to launch (`Sample.forward_issue_s`)
and what the device takes (`Sample.forward_s`) are apart, and where the device waits for launches its time is theirs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from overspill.huggingface import StreamedModel
from overspill.huggingface.stand_ins import BlockArguments
from overspill.runtime.compute import forget_casts, seed_generators
from overspill.runtime.graphs import LaunchRecorder, Static, launch_backward, launch_forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One repetition."""

    forward_s: float
    """Of the device; 0 of the tail, which goes both ways at once."""
    backward_s: float
    forward_issue_s: float = 0.0
    """Of the host, to launch it. 0 where the host computes."""
    backward_issue_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


class Clock(Protocol):
    """Reads the host's time and the device's."""

    is_apart: bool
    """Whether the device works while the host goes on."""

    def now(self) -> float:
        """Of the host, in seconds."""
        ...

    def mark(self) -> Any:
        """A point in what the device has to do."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Of the device between two marks; waits for the second."""
        ...


class HostClock:
    """The host computes."""

    is_apart = False

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """By events in the current stream."""

    is_apart = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


class BlockRun:
    """Forward without a graph; then recomputation, gradients, and their addition to fp32 sums.

    Args:
        leaves: the block's parameters, which are bound.
        sums: of their gradients, by name.
        source, above: hidden states that the block reads, and the gradient of those that it returns.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        unit: str,
        clock: Clock,
        leaves: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        arguments: BlockArguments,
        source: Tensor,
        above: Tensor,
    ) -> None:
        self._streamed, self._unit, self._clock, self._arguments = streamed, unit, clock, arguments
        self._leaves, self._sums, self._source, self._above = leaves, sums, source, above
        self._names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        self.side_outputs: tuple[tuple[int, torch.dtype], ...] = ()
        """Elements a token, and dtype, of its router logits; known after a run."""

    def __call__(self) -> Sample:
        return self._timed(self._forward, self._backward)

    def refusal(self) -> str:
        """Why the block is not recorded, whatever launches take; empty if it may be. Known after a run."""
        if self._arguments.side_inputs:
            return "it has side inputs"
        if self.side_outputs or self._streamed.has_router_loss:
            return "it has side outputs"
        return ""

    def leave_out_unneeded(self) -> None:
        """Find out what the recomputation of this kind of block need not make, as the run does at its first backward; some fifteen
        backwards."""
        unneeded = self._streamed.unneeded
        if unneeded is None or unneeded.is_decided(self._unit):
            return

        def seeded() -> Sequence[Tensor | None]:
            seed_generators(0, self._source.device)
            return self._differentiate()

        unneeded.decide(self._unit, seeded)
        forget_casts(self._source.device)

    def draws(self, recorder: LaunchRecorder) -> bool:
        """Whether a run draws random numbers."""
        before = recorder.random_state()
        self()
        return recorder.random_state() != before

    def record(self, recorder: LaunchRecorder) -> Callable[[], Sample]:
        """What replays it, and copies in and out as the executor does.

        Raises:
            RuntimeError: it cannot be recorded, or there is no memory for it (`torch.OutOfMemoryError`).
        """
        static, arguments = Static(self._source), self._arguments
        above, source = self._above, self._source
        targets = {name: (self._sums[name], True) for name in self._names}
        replay_forward = recorder.record(lambda: launch_forward(self._streamed, self._unit, static, arguments))

        forget_casts(source.device)

        def backward() -> None:
            launch_backward(self._streamed, self._unit, static, arguments, self._leaves, targets)

        replay_backward = recorder.record(backward)
        forget_casts(source.device)

        def run_forward() -> None:
            static.hidden.copy_(source)
            replay_forward()
            static.output.clone()

        def run_backward() -> None:
            result = torch.empty_like(static.output)
            static.hidden.copy_(source)
            static.above.copy_(above)
            replay_backward()
            result.copy_(static.output)

        return lambda: self._timed(run_forward, run_backward)

    def _timed(self, forward: Callable[[], None], backward: Callable[[], None]) -> Sample:
        clock, device = self._clock, self._source.device
        begin, begin_s = clock.mark(), clock.now()
        forward()
        forget_casts(device)
        forward_issue_s = clock.now() - begin_s
        middle, middle_s = clock.mark(), clock.now()
        backward()
        forget_casts(device)
        backward_issue_s = clock.now() - middle_s
        end = clock.mark()
        return Sample(
            forward_s=clock.seconds(begin, middle),
            backward_s=clock.seconds(middle, end),
            forward_issue_s=forward_issue_s if clock.is_apart else 0.0,
            backward_issue_s=backward_issue_s if clock.is_apart else 0.0,
        )

    def _forward(self) -> None:
        num_tokens = math.prod(self._source.shape[:2])
        with torch.no_grad():
            output = self._streamed.run_block(self._unit, self._source, self._arguments)
        self.side_outputs = tuple((tensor.numel() // num_tokens, tensor.dtype) for tensor in output.side_outputs)

    def _backward(self) -> None:
        gradients = self._differentiate()
        for name, gradient in zip(self._names, gradients[len(gradients) - len(self._names) :], strict=True):
            if gradient is not None:
                self._sums[name].add_(gradient)

    def _differentiate(self) -> Sequence[Tensor | None]:
        """Gradients of the hidden states, of the side inputs and of the parameters."""
        hidden = self._source.detach().requires_grad_()
        sides = tuple(tensor.detach().requires_grad_() for tensor in self._arguments.side_inputs)
        with torch.enable_grad():
            output = self._streamed.run_block(self._unit, hidden, self._arguments, side_inputs=sides or None)
        outputs = [tensor for tensor in (output.hidden, *output.side_outputs) if tensor.requires_grad]
        grad_outputs = [self._above, *(torch.zeros_like(tensor) for tensor in outputs[1:])]
        wanted = [hidden, *sides, *(self._leaves[name] for name in self._names)]
        return torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)


class TailRun:
    """Loss and gradients at once, chunk by chunk.

    Args:
        batch, side_outputs, chunk_rows: as `StreamedModel.run_tail` wants them.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        clock: Clock,
        leaves: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        *,
        batch: Mapping[str, Tensor],
        hidden: Tensor,
        side_outputs: Mapping[str, tuple[Tensor, ...]],
        chunk_rows: int,
    ) -> None:
        self._streamed, self._clock, self._leaves, self._sums = streamed, clock, leaves, sums
        self._batch, self._hidden, self._side_outputs, self._chunk_rows = batch, hidden, side_outputs, chunk_rows

    def __call__(self) -> Sample:
        clock = self._clock
        samples, tokens = self._hidden.shape[:2]
        begin, begin_s = clock.mark(), clock.now()
        self._streamed.run_tail(
            self._batch,
            self._hidden.detach().requires_grad_(),
            side_outputs=self._side_outputs,
            parameters=self._leaves,
            num_targets=max(1, samples * (tokens - 1)),
            chunk_rows=self._chunk_rows,
            accumulate=self._accumulate,
        )
        forget_casts(self._hidden.device)
        issue_s = clock.now() - begin_s
        seconds = clock.seconds(begin, clock.mark())
        return Sample(forward_s=0.0, backward_s=seconds, backward_issue_s=issue_s if clock.is_apart else 0.0)

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        self._sums[name].add_(gradient)
