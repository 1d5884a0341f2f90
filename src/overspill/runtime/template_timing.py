"""How long one block of every class, and the tail, take on a device: what FLOPs alone cannot say.

    times = time_templates("path/to/model", device="cuda", seq_len=2048, micro_batch=4)
    print(times.blocks[0].forward_s, times.blocks[0].forward_backward_s, times.tail.forward_backward_s)

One block with random weights is on the device at a time, never the model; the tail brings its output projection. Each runs as the
runtime runs it (`runtime/compute.py`): forward without a graph; then the forward again with one, the gradients, and their addition to
fp32 sums, as with more than one micro-batch. Nothing is fetched, so these are the times of resident parameters (design 12).

Rules:

1. Sizes grow from a few tokens to those asked for, by the factor `GROWTH`, as long as two runs of the next size are predicted to fit the
   time that is left: a run cannot be cut short, so a slow one must not be begun. What does not fit is measured at the largest size that
   did, which the result and its note say. Predicted is by FLOPs, from the last size: too much where a small size is bound by weights.
2. The first run of the smallest size is not counted, because it loads kernels, unless there is no time for another.
3. Every class has an equal share of the time that is left when its turn comes; what one does not need goes to the next. A unit whose
   weights alone would take longer to make and to go through once is not begun: judged by the unit before it, the first one, on a CPU,
   by an assumption.
4. No size is begun for which memory is predicted not to suffice; what runs out of it all the same is a note, not an error.
5. Torch's generators are as before afterwards, and what torch's allocator kept is given back.

Limits: launches are part of the time, as in a run without CUDA graphs; so are blocks that are not compiled. On a machine's first run
the tail's loss kernel is compiled, which may take some seconds more.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from overspill.huggingface import Embedded, StreamedModel
from overspill.huggingface.workload import build_streamed, describe_workload
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes, UnitWork, WorkloadSpec, default_loss_chunk_rows
from overspill.tiers.cuda import cuda_index
from overspill.units import format_bytes, format_seconds

LIMIT_S = 5.0
SMALLEST_TOKENS = 32
"""Of the first size. Chosen: its time is that of reading the weights, anywhere."""
GROWTH = 4
MOST_REPETITIONS = 20
"""Chosen: the median of as many is steady, and a small model needs no more."""
ROOM_SHARE = 0.8
"""Of free memory that a size may be predicted to take (rule 4). Chosen, not tuned."""
ASSUMED_FIRST_RUN_S_PER_BYTE = 10e-9
"""Of the first unit's parameters, on a CPU (rule 3): pages are touched for the first time. Measured 14 to 38 ns on two slow cores."""
_PATTERN_ELEMENTS = 1 << 20
"""Random numbers that fill all weights, over and over: drawing as many as there are weights takes seconds on a CPU."""

Size = tuple[int, int]
"""Samples, tokens."""
Run = Callable[[], tuple[float, float]]
"""One repetition: seconds of the forward and of the backward."""
MakeRun = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor], Size], Run]
"""(unit, its parameters, sums of their gradients, size) -> what is repeated."""


def time_templates(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    *,
    device: str | torch.device,
    seq_len: int,
    micro_batch: int,
    dtype: str = "bfloat16",
    limit_s: float = LIMIT_S,
    loss_chunk_rows: int | None = None,
    spec: WorkloadSpec | None = None,
) -> TemplateTimes:
    """Measure one block of every class and the tail, in about `limit_s` at most.

    Args:
        model: a folder, a hub name, a configuration, or a model object (which is not touched). No weights are read.
        device: where; it should have nothing else to do.
        seq_len: tokens of every sample.
        micro_batch: samples.
        dtype: what the model computes in.
        limit_s: for everything but looking at the model.
        loss_chunk_rows: rows of logits at a time; None: as the planner has it.
        spec: what `describe_workload` says of it for these sizes; None: it is asked.

    Raises:
        ValueError: a size or limit out of range, an unknown dtype, a spec of other sizes.
        UnsupportedModelError: the model cannot be streamed.
    """
    if not limit_s > 0:
        raise ValueError(f"limit_s must be positive, got {limit_s}")
    place = torch.device(device)
    if spec is None:
        kernels = "cuda" if place.type == "cuda" else "cpu"
        spec = describe_workload(
            model, seq_len=seq_len, micro_batch=micro_batch, dtype=dtype, device=kernels, loss_chunk_rows=loss_chunk_rows
        )
    if (spec.seq_len, spec.micro_batch, spec.dtype) != (seq_len, micro_batch, dtype):
        raise ValueError(
            f"the spec is of {spec.micro_batch} x {spec.seq_len} tokens in {spec.dtype}, asked for were {micro_batch} x {seq_len} "
            f"in {dtype}"
        )
    streamed = build_streamed(model, dtype).train()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[cuda_index(place)] if place.type == "cuda" else []):
        bench = _Bench(streamed, spec, place, loss_chunk_rows or default_loss_chunk_rows(spec.vocab_size))
        blocks, tail = bench.measure(deadline=start + limit_s)
    return TemplateTimes(
        model=type(streamed.model).__name__,
        dtype=dtype,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        seq_len=seq_len,
        micro_batch=micro_batch,
        blocks=blocks,
        tail=tail,
        elapsed_s=time.perf_counter() - start,
    )


def build_sizes(wanted: Size) -> list[Size]:
    """Sizes that grow to `wanted`, tokens before samples (rule 1)."""
    samples, tokens = wanted
    sizes = []
    now = min(SMALLEST_TOKENS, tokens)
    while now < tokens:
        sizes.append((1, now))
        now = min(now * GROWTH, tokens)
    now = 1
    while now < samples:
        sizes.append((now, tokens))
        now = min(now * GROWTH, samples)
    return [*sizes, wanted]


class _Bench:
    def __init__(self, streamed: StreamedModel, spec: WorkloadSpec, device: torch.device, chunk_rows: int) -> None:
        self.streamed, self.spec, self.device, self.chunk_rows = streamed, spec, device, chunk_rows
        self.wanted = (spec.micro_batch, spec.seq_len)
        streamed.to(device)
        self.pattern = torch.randn(_PATTERN_ELEMENTS, device=device) * 0.02
        self.side_outputs: dict[str, tuple[tuple[int, torch.dtype], ...]] = {}
        """Unit -> elements a token, and dtype, of its router logits."""
        self.first_run_s_per_byte = 0.0 if device.type == "cuda" else ASSUMED_FIRST_RUN_S_PER_BYTE
        """Of parameters: to make the last unit's, and to go through them once."""

    def measure(self, *, deadline: float) -> tuple[tuple[UnitTimes, ...], UnitTimes]:
        *classes, tail = self.spec.classes[1:]
        found = []
        for number, item in enumerate(classes):
            found.append(self._measure_unit(item, _share(deadline, len(classes) + 1 - number), self._block_run))
            self.side_outputs |= dict.fromkeys(item.units, self.side_outputs.get(item.name, ()))
        return tuple(found), self._measure_unit(tail, deadline, self._tail_run)

    def _measure_unit(self, item: UnitWork, deadline: float, make: MakeRun) -> UnitTimes:
        start = time.perf_counter()
        first_s = self.first_run_s_per_byte * item.parameter_bytes
        if start + first_s > deadline:
            note = f"not measured: one run takes about {format_seconds(first_s)}, {format_seconds(max(0, deadline - start))} were left"
            return _describe(item.name, self.wanted, [], note)
        measured, times, note = self.wanted, list[tuple[float, float]](), ""
        try:
            measured, times, note = self._grow(item, deadline, make)
        except torch.OutOfMemoryError as error:
            note = f"out of memory: {str(error).splitlines()[0][:160]}"
        finally:
            self._give_back()
        return _describe(item.name, measured, times, note)

    def _grow(self, item: UnitWork, deadline: float, make: MakeRun) -> tuple[Size, list[tuple[float, float]], str]:
        """The largest size that fits, its repetitions, and why it is not the one asked for (rules 1, 2 and 4)."""
        start = time.perf_counter()
        smallest, *others = build_sizes(self.wanted)
        if note := self._missing_room(item, smallest):
            return self.wanted, [], f"not measured: {note}"
        leaves = self._random_leaves(item.name)
        sums = {name: torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False) for name, leaf in leaves.items()}
        measured, note = smallest, ""
        with self.streamed.bound(item.name, leaves):
            run = make(item.name, leaves, sums, measured)
            times = [run()]
            self.first_run_s_per_byte = (time.perf_counter() - start) / max(1, item.parameter_bytes)
            if time.perf_counter() + sum(times[0]) < deadline:
                times = [run()]
            for size in others:
                note = self._too_late(item, measured, size, sum(times[-1]), deadline)
                if note and self.device.type == "cuda" and time.perf_counter() + sum(times[-1]) < deadline:
                    times = [run()]  # the first run of a size may have compiled kernels for it
                    note = self._too_late(item, measured, size, sum(times[-1]), deadline)
                if note := note or self._missing_room(item, size):
                    break
                try:
                    run = make(item.name, leaves, sums, size)
                    times = [run()]
                except torch.OutOfMemoryError as error:
                    note = f"{size[0]} x {size[1]} ran out of memory ({str(error).splitlines()[0][:120]})"
                    run = make(item.name, leaves, sums, measured)
                    break
                measured = size
            while len(times) < MOST_REPETITIONS and time.perf_counter() + sum(times[-1]) < deadline:
                times.append(run())
        return measured, times, f"measured at {measured[0]} x {measured[1]} tokens: {note}" if note else ""

    def _too_late(self, item: UnitWork, measured: Size, following: Size, last_s: float, deadline: float) -> str:
        """Why `following` is not begun (rule 1); empty if it is."""
        predicted_s = last_s * self._flops(item, following) / self._flops(item, measured)
        left_s = deadline - time.perf_counter()
        if 2 * predicted_s <= left_s:
            return ""
        return (
            f"two runs of {following[0]} x {following[1]} were predicted to take {format_seconds(2 * predicted_s)}, "
            f"{format_seconds(max(left_s, 0))} were left"
        )

    def _flops(self, item: UnitWork, size: Size) -> float:
        """Work of a unit at `size`, relative to one at the sizes asked for; attention grows with the square of a sample's tokens."""
        tokens, length = math.prod(size) / math.prod(self.wanted), size[1] / self.wanted[1]
        if item.forward is None or not item.forward.work.flops:
            return tokens * length
        attention = item.forward.work.attention_flops / item.forward.work.flops
        return tokens * (1 - attention + attention * length)

    def _missing_room(self, item: UnitWork, size: Size) -> str:
        """Why there is not enough memory for `size` (rule 4); empty if there is."""
        peaks = [part.peak_bytes for part in (self.spec.classes[0].forward, item.forward, item.backward) if part is not None]
        activations = max(peaks, default=0) * math.prod(size) / math.prod(self.wanted)
        needed = 2 * item.parameter_bytes + 4 * item.num_parameters + activations
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else psutil.virtual_memory().available
        if needed <= ROOM_SHARE * free:
            return ""
        return f"{size[0]} x {size[1]} takes about {format_bytes(needed)}, {format_bytes(free)} are free on {self.device}"

    # -- what runs ----------------------------------------------------------------------------------------------------

    def _block_run(self, unit: str, leaves: Mapping[str, Tensor], sums: Mapping[str, Tensor], size: Size) -> Run:
        streamed, arguments = self.streamed, self._embed(size).arguments
        before = streamed.unit_names[streamed.unit_names.index(unit) - 1]
        source, above = self._hidden(size, streamed.hidden_dtypes[before]), self._hidden(size, streamed.hidden_dtypes[unit])
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]

        def run() -> tuple[float, float]:
            marks = [self._mark()]
            with torch.no_grad():
                forward = streamed.run_block(unit, source, arguments)
            self.side_outputs[unit] = tuple((tensor.numel() // math.prod(size), tensor.dtype) for tensor in forward.side_outputs)
            del forward
            marks.append(self._mark())
            hidden = source.detach().requires_grad_()
            sides = tuple(tensor.detach().requires_grad_() for tensor in arguments.side_inputs)
            output = streamed.run_block(unit, hidden, arguments, side_inputs=sides or None)
            outputs = [tensor for tensor in (output.hidden, *output.side_outputs) if tensor.requires_grad]
            grad_outputs = [above, *(torch.zeros_like(tensor) for tensor in outputs[1:])]
            wanted = [hidden, *sides, *(leaves[name] for name in names)]
            gradients = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)
            for name, gradient in zip(names, gradients[len(wanted) - len(names) :], strict=True):
                if gradient is not None:
                    sums[name].add_(gradient)
            marks.append(self._mark())
            return self._seconds(marks[0], marks[1]), self._seconds(marks[1], marks[2])

        return run

    def _tail_run(self, unit: str, leaves: Mapping[str, Tensor], sums: Mapping[str, Tensor], size: Size) -> Run:
        streamed = self.streamed
        hidden = self._hidden(size, streamed.hidden_dtypes[streamed.block_names[-1]])
        batch = {**self._batch(size), "labels": torch.zeros(size, dtype=torch.int64)}
        sides = {
            unit: tuple(torch.randn(math.prod(size), count, device=self.device).to(dtype) for count, dtype in described)
            for unit, described in self.side_outputs.items()
        }

        def accumulate(name: str, gradient: Tensor) -> None:
            sums[name].add_(gradient)

        def run() -> tuple[float, float]:
            start = self._mark()
            streamed.run_tail(
                batch,
                hidden.detach().requires_grad_(),
                side_outputs=sides,
                parameters=leaves,
                num_targets=max(1, size[0] * (size[1] - 1)),
                chunk_rows=self.chunk_rows,
                accumulate=accumulate,
            )
            return 0.0, self._seconds(start, self._mark())

        return run

    def _embed(self, size: Size) -> Embedded:
        """The blocks' arguments for a micro-batch of `size`, over an embedding of zeros that take no memory."""
        specs = self.streamed.parameters
        zeros = {
            name: torch.zeros(1, dtype=getattr(torch, specs[name].dtype), device=self.device).expand(specs[name].shape)
            for name in self.streamed.unit_parameters["embedding"]
        }
        with torch.no_grad(), self.streamed.bound("embedding", zeros):
            return self.streamed.embed(self._batch(size))

    def _batch(self, size: Size) -> dict[str, Tensor]:
        token = 1 if self.streamed.config.get_text_config().pad_token_id == 0 else 0
        return {"input_ids": torch.full(size, token, dtype=torch.int64, device=self.device)}

    def _hidden(self, size: Size, dtype: torch.dtype) -> Tensor:
        return self._filled((*size, self.spec.hidden_size), dtype).mul_(50)  # deviation 1, as behind a norm

    def _random_leaves(self, unit: str) -> dict[str, Tensor]:
        specs = self.streamed.parameters
        return {
            name: self._filled(specs[name].shape, getattr(torch, specs[name].dtype)).requires_grad_(specs[name].trainable)
            for name in self.streamed.unit_parameters[unit]
        }

    def _filled(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        for part in tensor.view(-1).split(_PATTERN_ELEMENTS):
            part.copy_(self.pattern[: part.numel()])
        return tensor

    # -- the device ---------------------------------------------------------------------------------------------------

    def _mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)
            return end - start
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _give_back(self) -> None:
        """Rule 5."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _share(deadline: float, parts: int) -> float:
    """The end of the first of equal parts of the time that is left (rule 3)."""
    now = time.perf_counter()
    return now + max(0.0, deadline - now) / parts


def _describe(unit: str, size: Size, times: Sequence[tuple[float, float]], note: str) -> UnitTimes:
    forward, backward = ([pair[part] for pair in times] for part in (0, 1))
    return UnitTimes(
        name=unit,
        seq_len=size[1],
        micro_batch=size[0],
        forward=_timing(forward) if any(forward) else None,
        backward=_timing(backward) if backward else None,
        note=note,
    )


def _timing(seconds: Sequence[float]) -> Timing:
    lower, _, upper = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else (0.0, 0.0, 0.0)
    return Timing(median_s=statistics.median(seconds), spread_s=upper - lower, num_repetitions=len(seconds))
