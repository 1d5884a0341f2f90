"""How long one block of every class, and the tail, take on a device: what FLOPs alone cannot say.

    times = time_templates("path/to/model", device="cuda", seq_len=2048, micro_batch=4)
    print(times.blocks[0].forward_s, times.blocks[0].forward_backward_s, times.tail.forward_backward_s)

One block with random weights is on the device at a time, never the model; the tail brings its output projection. Each runs as the
runtime runs it (`runtime/compute.py`): forward without a graph; then the forward again with one, the gradients, and their addition to
fp32 sums, as with more than one micro-batch; without the products that a recomputation need not make (`huggingface/unneeded.py`), where
there is time to find them. Nothing is fetched, so these are the times of resident parameters (design 12).

Rules:

1. Which sizes are run, and which runs count, is in `template_repetitions.py`. What does not fit the time is measured at the largest size
   that did, which the result and its note say.
2. Every class has an equal share of the time that is left when its turn comes; what one does not need goes to the next. A unit whose
   weights alone would take longer to make and to go through once is not begun: judged by the unit before it, the first one, on a CPU,
   by an assumption. A GPU that loads kernels for the first run on a machine (0.7 s a block) does not take longer for larger weights, so
   there its steady runs count.
3. On a GPU the host's time to launch is measured beside the device's. Where it bounds a block, or nearly (`spec/launches.py`), forward
   and backward are recorded as CUDA graphs and their replays are timed as well: that is what such a block takes in a run, and no slow host
   is in it.
4. Where a GPU's result is doubtful (`_is_doubtful`) and time is left when all had their turn, the unit is timed again from the beginning;
   of two results at one size the quicker one counts, because whatever disturbs makes slower. A result far from the other is told.
5. No size is begun for which memory is predicted not to suffice; what runs out of it all the same is a note, not an error.
6. Of the device's times the median counts, of launching the mean (`mean_of_most`): a step launches dozens of ops one after the other, so on
   a host that is held up every now and then it has its share of that in every step.
7. Torch's generators are as before afterwards, and what torch's allocator kept is given back.

Limits: blocks are not compiled. On a machine's first run the tail's loss kernel is compiled before the time begins that is limited, which
takes some seconds more.
"""

from __future__ import annotations

import dataclasses
import functools
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
from overspill.huggingface.tail import load_loss
from overspill.huggingface.workload import build_streamed, describe_workload
from overspill.planning.graphs import paper_s
from overspill.runtime.graphs import CudaRecorder, LaunchRecorder
from overspill.runtime.template_repetitions import MOST_REPETITIONS, Repetitions, Size, build_sizes, spread_of
from overspill.runtime.template_runs import BlockRun, Clock, CudaClock, HostClock, Sample, TailRun
from overspill.spec.launches import LAUNCH_S
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes, UnitWork, Work, WorkloadSpec, default_loss_chunk_rows
from overspill.tiers.cuda import cuda_index, give_back_unused
from overspill.units import format_bytes, format_seconds

LIMIT_S = 5.0
ROOM_SHARE = 0.8
"""Of free memory that a size may be predicted to take (rule 5). Chosen, not tuned."""
ASSUMED_FIRST_RUN_S_PER_BYTE = 10e-9
"""Of the first unit's parameters, on a CPU (rule 2): pages are touched for the first time. Measured 14 to 38 ns on two slow cores."""
UNNEEDED_RUNS, UNNEEDED_SHARE = 16, 0.2
"""What finding out what a recomputation can leave out takes at most, in runs of the smallest size, and what it may take of the time that is
left. Chosen: 3 % of a block's time are at stake."""
MOST_ROUNDS = 3
"""In which a unit is timed (rule 4). Chosen."""
LEAST_REPETITIONS = 3
"""Fewer are doubtful (rule 4). Chosen."""
DOUBTED_FACTOR = 8.0
"""Slower than that times what launches, FLOPs and bytes are assumed to take is doubtful (rule 4). Chosen: a GPU with an eighth of the
assumed rates is timed again for nothing. A mixture of experts on an H100 of which a first run had counted was 36 times slower."""
MOST_HELD_UP = 3.0
"""How much of the median one repetition's launching counts at most (rule 6). Chosen: of twenty one is then a tenth."""
FAR_FACTOR = 2.0
"""Results of two rounds that differ by more are told (rule 4)."""
_PATTERN_ELEMENTS = 1 << 20
"""Random numbers that fill all weights, over and over: drawing as many as there are weights takes seconds on a CPU."""

UnitRun = BlockRun | TailRun
MakeRun = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor], Size], UnitRun]
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
    replays: bool = True,
    clock: Clock | None = None,
    recorder: Callable[[], LaunchRecorder] | None = None,
) -> TemplateTimes:
    """Measure one block of every class and the tail, in about `limit_s` at most.

    Args:
        model: a folder, a hub name, a configuration, or a model object (which is not touched). No weights are read.
        device: where; it should have nothing else to do.
        seq_len: tokens of every sample.
        micro_batch: samples.
        dtype: what the model computes in.
        limit_s: for everything but looking at the model and compiling the loss.
        loss_chunk_rows: rows of logits at a time; None: as the planner has it.
        spec: what `describe_workload` says of it for these sizes; None: it is asked.
        replays: of blocks that launches bound; False: the run that is predicted has no CUDA graphs.
        clock, recorder: what reads time and, anew for each block, records launches; None: the device's own. Tests give theirs.

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
    if clock is None:
        clock = CudaClock(place) if place.type == "cuda" else HostClock()
    if not replays:
        recorder = None
    elif recorder is None and place.type == "cuda":
        recorder = functools.partial(CudaRecorder, place)
    if place.type == "cuda":
        load_loss(spec.vocab_size, getattr(torch, dtype), place)
    begin_s = clock.now()
    with torch.random.fork_rng(devices=[cuda_index(place)] if place.type == "cuda" else []):
        rows = loss_chunk_rows or default_loss_chunk_rows(spec.vocab_size)
        bench = _Bench(streamed, spec, place, rows, clock=clock, recorder=recorder)
        blocks, tail = bench.measure(deadline=begin_s + limit_s)
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


class _Bench:
    def __init__(
        self,
        streamed: StreamedModel,
        spec: WorkloadSpec,
        device: torch.device,
        chunk_rows: int,
        *,
        clock: Clock,
        recorder: Callable[[], LaunchRecorder] | None,
    ) -> None:
        self.streamed, self.spec, self.device, self.chunk_rows = streamed, spec, device, chunk_rows
        self.clock, self.recorder = clock, recorder
        self.wanted = (spec.micro_batch, spec.seq_len)
        streamed.to(device)
        self.pattern = torch.randn(_PATTERN_ELEMENTS, device=device) * 0.02
        self.side_outputs: dict[str, tuple[tuple[int, torch.dtype], ...]] = {}
        """Unit -> elements a token, and dtype, of its router logits."""
        self.late: set[str] = set()
        """Units whose last round had no time for the sizes asked for."""
        self.first_run_s_per_byte = 0.0 if clock.is_apart else ASSUMED_FIRST_RUN_S_PER_BYTE
        """Of parameters: to make the last unit's, and to go through them once."""

    def measure(self, *, deadline: float) -> tuple[tuple[UnitTimes, ...], UnitTimes]:
        *blocks, tail = self.spec.classes[1:]
        classes: list[tuple[UnitWork, MakeRun]] = [*((item, self._block_run) for item in blocks), (tail, self._tail_run)]
        found: dict[str, UnitTimes] = {}
        for number, (item, make) in enumerate(classes):
            first_s = self.first_run_s_per_byte * item.parameter_bytes
            found[item.name] = self._measure_unit(item, self._share(deadline, len(classes) - number), make, first_s=first_s)
            self.side_outputs |= dict.fromkeys(item.units, self.side_outputs.get(item.name, ()))
        rounds = {name: [times] for name, times in found.items()}
        for _ in range(MOST_ROUNDS - 1):
            doubtful = [(item, make) for item, make in classes if self._is_doubtful(item, found[item.name])]
            for number, (item, make) in enumerate(doubtful):
                first_s = 2 * found[item.name].forward_backward_s
                rounds[item.name].append(self._measure_unit(item, self._share(deadline, len(doubtful) - number), make, first_s=first_s))
                found[item.name] = choose_best(rounds[item.name])
        *others, last = (found[item.name] for item, _ in classes)
        return tuple(others), last

    def _is_doubtful(self, item: UnitWork, times: UnitTimes) -> bool:
        """Whether it should be timed once more (rule 4). What could not be measured is not: its reason stays."""
        timing = times.backward
        if not self.clock.is_apart or timing is None:
            return False
        if item.name in self.late:
            return True
        most_s = self._most_s(item, (times.micro_batch, times.seq_len))
        return (
            timing.num_repetitions < LEAST_REPETITIONS
            or (timing.num_repetitions > MOST_REPETITIONS and timing.spread_s > timing.median_s / 2)
            or (most_s > 0 and times.forward_backward_s > most_s)
        )

    def _measure_unit(self, item: UnitWork, deadline: float, make: MakeRun, *, first_s: float) -> UnitTimes:
        """`first_s`: what its first runs are thought to take (rule 2)."""
        start = self.clock.now()
        if start + first_s > deadline:
            note = f"not measured: one run takes about {format_seconds(first_s)}, {format_seconds(max(0, deadline - start))} were left"
            return _describe(item.name, self.wanted, [], note)
        try:
            return self._repeat(item, deadline, make)
        except torch.OutOfMemoryError as error:
            return _describe(item.name, self.wanted, [], f"out of memory: {str(error).splitlines()[0][:160]}")
        finally:
            self._give_back()

    def _repeat(self, item: UnitWork, deadline: float, make: MakeRun) -> UnitTimes:
        """The largest size that fits, its repetitions, and why it is not the one asked for."""
        start = self.clock.now()
        leaves: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        repetitions = Repetitions(
            self.wanted,
            self.clock,
            work=lambda size: self._flops(item, size),
            most_s=self._most_s(item, build_sizes(self.wanted)[0]) or math.inf,
            make=lambda size: make(item.name, leaves, sums, size),
            missing_room=lambda size: self._missing_room(item, size),
            deadline=deadline,
        )
        if note := repetitions.missing_room():
            return _describe(item.name, self.wanted, [], f"not measured: {note}")
        leaves |= self._random_leaves(item.name)
        sums |= {name: torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False) for name, leaf in leaves.items()}
        made_s = self.clock.now() - start
        with self.streamed.bound(item.name, leaves):
            found = repetitions.begin()
            first_s = made_s + found.wall_s if self.clock.is_apart else self.clock.now() - start
            self.first_run_s_per_byte = first_s / max(1, item.parameter_bytes)
            if isinstance(found.run, BlockRun) and UNNEEDED_RUNS * found.wall_s < UNNEEDED_SHARE * (deadline - self.clock.now()):
                found.run.leave_out_unneeded()
            found = repetitions.grow(found)
            (self.late.add if found.is_late else self.late.discard)(item.name)
            samples = repetitions.repeat(found)
            size, run = found.size, found.run
            note = f"measured at {size[0]} x {size[1]} tokens: {found.note}" if found.note else ""
            times = _describe(item.name, size, samples, note)
            if isinstance(run, BlockRun):
                self.side_outputs[item.name] = run.side_outputs
                times = self._with_replays(times, run, samples, deadline)
        return times

    def _with_replays(self, times: UnitTimes, run: BlockRun, samples: Sequence[Sample], deadline: float) -> UnitTimes:
        """Rule 3."""
        if self.recorder is None or not self.clock.is_apart:
            return times
        if run.refusal():
            return dataclasses.replace(times, is_replayable=False)
        if not times.is_worth_replaying:
            return times
        recorder = self.recorder()
        if run.draws(recorder):
            return dataclasses.replace(times, is_replayable=False)
        try:
            replay = run.record(recorder)
            replay()  # the first one loads it
            replays = [replay()]
            last_s = samples[-1].total_s
            while len(replays) < MOST_REPETITIONS and self.clock.now() + last_s < deadline:
                replays.append(replay())
        except torch.OutOfMemoryError as error:
            return _noted(times, f"a replay was not timed, there was no memory for it: {str(error).splitlines()[0][:120]}")
        except RuntimeError as error:
            times = _noted(times, f"it cannot be recorded as a CUDA graph: {str(error).splitlines()[0][:120]}")
            return dataclasses.replace(times, is_replayable=False)
        forward, backward = _timings(replays)
        return dataclasses.replace(times, replayed_forward=forward, replayed_backward=backward)

    def _share(self, deadline: float, parts: int) -> float:
        """The end of the first of equal parts of the time that is left (rule 2)."""
        now = self.clock.now()
        return now + max(0.0, deadline - now) / parts

    def _most_s(self, item: UnitWork, size: Size) -> float:
        """What is not believed to be exceeded at `size`: several times what FLOPs, bytes and launches are assumed to take. 0: not known, as
        on a device whose rates nobody assumed."""
        work = _work(item)
        device_s = paper_s(work)
        if not self.clock.is_apart or not device_s:
            return 0.0
        return DOUBTED_FACTOR * (device_s * self._flops(item, size) + work.num_ops * LAUNCH_S)

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

    def _block_run(self, unit: str, leaves: Mapping[str, Tensor], sums: Mapping[str, Tensor], size: Size) -> BlockRun:
        streamed = self.streamed
        before = streamed.unit_names[streamed.unit_names.index(unit) - 1]
        source, above = self._hidden(size, streamed.hidden_dtypes[before]), self._hidden(size, streamed.hidden_dtypes[unit])
        return BlockRun(streamed, unit, self.clock, leaves, sums, self._embed(size).arguments, source, above)

    def _tail_run(self, unit: str, leaves: Mapping[str, Tensor], sums: Mapping[str, Tensor], size: Size) -> TailRun:
        streamed = self.streamed
        return TailRun(
            streamed,
            self.clock,
            leaves,
            sums,
            batch={**self._batch(size), "labels": torch.zeros(size, dtype=torch.int64)},
            hidden=self._hidden(size, streamed.hidden_dtypes[streamed.block_names[-1]]),
            side_outputs={
                unit: tuple(torch.randn(math.prod(size), count, device=self.device).to(dtype) for count, dtype in described)
                for unit, described in self.side_outputs.items()
            },
            chunk_rows=self.chunk_rows,
        )

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

    def _give_back(self) -> None:
        """Rule 6."""
        if self.device.type == "cuda":
            give_back_unused()


def choose_best(rounds: Sequence[UnitTimes]) -> UnitTimes:
    """Of the results of a unit, in order (rule 4): the largest size; of one size the quickest."""
    timed = [item for item in rounds if item.backward is not None]
    if not timed:
        return rounds[-1]
    most = max(item.micro_batch * item.seq_len for item in timed)
    *slower, quickest = sorted(
        (item for item in timed if item.micro_batch * item.seq_len == most), key=lambda item: -item.forward_backward_s
    )
    replayed = next((item for item in (quickest, *slower[::-1]) if item.replayed_backward is not None), quickest)
    quickest = dataclasses.replace(quickest, replayed_forward=replayed.replayed_forward, replayed_backward=replayed.replayed_backward)
    if not slower or slower[0].forward_backward_s <= FAR_FACTOR * quickest.forward_backward_s:
        return quickest
    return _noted(
        quickest,
        f"another round of repetitions, which does not count, took {format_seconds(slower[0].forward_backward_s)}, this one "
        f"{format_seconds(quickest.forward_backward_s)}",
    )


def _work(item: UnitWork) -> Work:
    """Of all passes of a training step."""
    passes = [part.work for part in (item.recompute, item.backward) if part is not None]
    return sum(passes, item.forward.work if item.forward is not None and item.boundary_bytes else Work())


def _noted(times: UnitTimes, note: str) -> UnitTimes:
    return dataclasses.replace(times, note="; ".join(filter(None, (times.note, note))))


def _describe(unit: str, size: Size, samples: Sequence[Sample], note: str) -> UnitTimes:
    forward, backward = _timings(samples)
    return UnitTimes(name=unit, seq_len=size[1], micro_batch=size[0], forward=forward, backward=backward, note=note)


def _timings(samples: Sequence[Sample]) -> tuple[Timing | None, Timing | None]:
    """Of forwards and backwards; None of neither, and of the tail's forward."""
    if not samples:
        return None, None
    forward = _timing([item.forward_s for item in samples], [item.forward_issue_s for item in samples])
    backward = _timing([item.backward_s for item in samples], [item.backward_issue_s for item in samples])
    return forward if any(item.forward_s for item in samples) else None, backward


def _timing(seconds: list[float], issue_s: list[float]) -> Timing:
    return Timing(
        median_s=statistics.median(seconds), spread_s=spread_of(seconds), num_repetitions=len(seconds), issue_s=mean_of_most(issue_s)
    )


def mean_of_most(seconds: Sequence[float]) -> float:
    """Their mean, where one that was held up for long counts as `MOST_HELD_UP` of their median."""
    most_s = MOST_HELD_UP * statistics.median(seconds)
    return statistics.fmean(min(item, most_s) for item in seconds)
