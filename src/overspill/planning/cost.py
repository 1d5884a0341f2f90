"""How long each op of a program takes alone, and what it needs of what the lanes share.

Words:

* **alone**: nothing else is under way. What is beside it slows it down (`planning/timeline.py`), by what is said here.
* **template times**: one block of every class and the tail, timed on the device at hand (`spec.workload.TemplateTimes`).

Where the seconds of a compute op come from, the first of these that is known:

1. Template times of its class, scaled by FLOPs where another number of tokens is computed. Of blocks that will be replayed as CUDA graphs
   (`planning/graphs.py`) those of a replay; where none was timed, at most what rule 2 says, and the source says so.
2. A workload and the rates of a matrix product and of the device's memory: matrix products and attention (a causal kernel does half of
   T x T) at the first rate, elementwise work at the second. Where the probe has measured the kinds of kernels apart, each kind at its own
   (`_kinds_seconds`).
3. A workload and one rate for everything (`HardwareSpec.device_flops`): the same FLOPs over it, and each byte of elementwise work is
   part of what that rate was assumed for.
4. Neither: the FLOPs that the program itself names, without attention.

What the host takes to launch it, and the runtime to dispatch any op, is `planning/dispatching.py`'s to say.

A unit whose graph is kept (`Compute.is_retained`) computes no recomputation and rebuilds what is not stored: a template's time, which is
of both passes, less a forward, plus elementwise work over the device's memory.

`Costs.source` says which, beside what the rates are from. Links, drives and updates are bytes and elements over their rates.

Host memory: what an op reads and writes there, in bytes, for each it moves: an update its record, parameter and gradient; a copy to or
from the device 1; a transfer of a drive 2, because a core goes over it once more for its checksum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from overspill.planning.dispatching import (
    EMBEDDING_OPERATIONS,
    REPLAY_OPERATIONS,
    RETAINED_LAUNCHES,
    STAND_IN_OPERATIONS,
    TAIL_OPERATIONS,
    TAIL_STAND_IN_OPERATIONS,
    Dispatching,
    Turn,
    find_operation_s,
    issue_s,
)
from overspill.planning.graphs import choose_replayed
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Lane, Op, Phase, Role, ScheduledOp, Update
from overspill.spec.tensors import DTYPE_BYTES
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes, UnitWork, Work, WorkloadSpec

ASSUMED_DEVICE_MEMORY_BYTES_PER_S = 1.5e12
"""Of a GPU whose memory nobody has measured: what goes over parameters and gradients on the device is little of a step. Assumed."""
ASSUMED_HOST_MEMORY_BYTES_PER_S = 1e10
"""The same of a CPU."""
KERNEL_S = 2e-6
"""The least that a kernel takes with what lies between it and the next one in a graph. Assumed."""
UPDATE_IN_STEP = 0.9
"""Of the rate that the host's update has alone, what it has in a step beside a GPU, where nothing else touches host memory. The calibration
runs of two calls on H100 machines: 0.87 to 0.92, clipped or not, when each chunk was handed over after the one before."""
DRIVE_PASSES = 2
"""Over each byte in host memory: the transfer's and the checksum's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What the ops of one plan's programs cost."""

    plan: Plan
    hardware: HardwareSpec
    source: str
    """Where the times come from, in words."""
    has_times: bool
    """Whether compute and lanes rest on measurements."""
    compute_s: Callable[[Compute], float]
    launched_s: Callable[[Compute], float]
    """Of the host, to launch an op's kernels."""
    operation_s: float
    """Of the host in a session, for one operation (`planning/dispatching.py`). 0: not known, or the host computes."""
    is_asynchronous: bool
    """Whether compute and copies are put into streams of a device; else the dispatching thread computes."""

    def turns(self, ops: Sequence[ScheduledOp]) -> list[Turn]:
        """Of the dispatching thread, for each op of a program."""
        if not self.operation_s:
            return [Turn(0.0)] * len(ops)
        updates = any(isinstance(item.op, Update) for item in ops)  # else nothing is under way when the program begins
        dispatching = Dispatching(self.operation_s, begins_beside_updates=updates and bool(self.plan.deferred))
        return [
            dispatching.turn(item.op, item.lane, launched_s=self.launched_s(item.op) if isinstance(item.op, Compute) else 0.0)
            for item in ops
        ]

    def seconds(self, op: Op, lane: Lane) -> float:
        """Alone on its lane, once it is launched."""
        hardware = self.hardware
        match op:
            case Fetch() | Evict():
                return op.num_bytes / lane_rate(hardware, lane)
            case Compute():
                return self.compute_s(op)
            case Update() if lane is Lane.HOST_UPDATE:
                share = UPDATE_IN_STEP if self.is_asynchronous and hardware.is_measured else 1.0
                return op.num_elements / (share * hardware.host_update_parameters_per_s)
            case Update() | Compress():
                return self._device_bytes(op) / self._device_memory_bytes_per_s
            case _:
                return 0.0

    def host_bytes(self, op: Op, lane: Lane) -> float:
        """Read and written in host memory."""
        match op:
            case Fetch() | Evict():
                return op.num_bytes * (DRIVE_PASSES if lane in (Lane.SSD_READ, Lane.SSD_WRITE) else 1)
            case Update() if lane is Lane.HOST_UPDATE:
                return float(self._update_bytes(op))
            case _:
                return 0.0

    @property
    def _device_memory_bytes_per_s(self) -> float:
        if not self.is_asynchronous:
            return self.hardware.host_memory_bytes_per_s or ASSUMED_HOST_MEMORY_BYTES_PER_S
        return self.hardware.device_memory_bytes_per_s or ASSUMED_DEVICE_MEMORY_BYTES_PER_S

    def _update_bytes(self, op: Update) -> int:
        """Gradient read; parameter and record read and written."""
        parameter = op.num_elements * self.plan.bundles[op.bundle].element_bytes
        return op.num_bytes + 2 * (parameter + self.plan.state_record_bytes(op.bundle, op.chunk))

    def _device_bytes(self, op: Update | Compress) -> int:
        if isinstance(op, Update):
            return self._update_bytes(op)
        made = sum(size for _, size in op.produced)
        if op.is_in_place:
            return made  # its norm
        return sum(size for _, size in op.partials) + 2 * made


def lane_rate(hardware: HardwareSpec, lane: Lane) -> float:
    """Bytes a second of a link's or drive's direction alone."""
    match lane:
        case Lane.H2D:
            return hardware.h2d_bytes_per_s
        case Lane.D2H:
            return hardware.d2h_bytes_per_s
        case Lane.SSD_READ:
            return hardware.ssd_read_bytes_per_s
        case _:
            assert lane is Lane.SSD_WRITE, lane
            return hardware.ssd_write_bytes_per_s


def build_costs(
    plan: Plan,
    hardware: HardwareSpec,
    *,
    workload: WorkloadSpec | None = None,
    times: TemplateTimes | None = None,
    replayed: Collection[str] | None = None,
) -> Costs:
    """What ops cost under `plan` on `hardware`.

    Args:
        workload: of the plan's model; FLOPs with attention.
        times: measured on this device; needs the workload, which says what units are of a class.
        replayed: blocks that are replayed as CUDA graphs; None: as `choose_replayed` has it.

    Raises:
        ValueError: times without a workload, or of another dtype.
    """
    if times is not None and workload is None:
        raise ValueError("template times need the workload that says which units are of one class; give workload=describe_workload(...)")
    if times is not None and times.dtype != plan.dtype:
        raise ValueError(f"the template times are of {times.dtype}, the plan computes in {plan.dtype}; time them in {plan.dtype}")
    is_asynchronous = not plan.device.startswith("cpu")
    if replayed is None:
        replayed = choose_replayed(plan, workload, hardware=hardware, times=times)
    operation_s = find_operation_s(hardware, workload, times) if is_asynchronous and hardware.is_measured else 0.0
    table = _ComputeTable(plan, hardware, workload, times, replayed=replayed, operation_s=operation_s)
    return Costs(
        plan=plan,
        hardware=hardware,
        source=_describe_source(hardware, table),
        has_times=hardware.is_measured and table.is_measured,
        compute_s=table.seconds,
        launched_s=table.launched_seconds,
        operation_s=operation_s,
        is_asynchronous=is_asynchronous,
    )


def _describe_source(hardware: HardwareSpec, table: _ComputeTable) -> str:
    """What the rates are from, with what compute rests on in place of what a machine file alone would assume."""
    if not hardware.is_measured or not table.source:
        return hardware.source
    parts = [part for part in hardware.source.split("; ") if not part.startswith("blocks assumed")]
    return "; ".join([*parts, table.source])


class _ComputeTable:
    """Seconds of compute ops, found once for each (unit, phase, tokens)."""

    def __init__(
        self,
        plan: Plan,
        hardware: HardwareSpec,
        workload: WorkloadSpec | None,
        times: TemplateTimes | None,
        *,
        replayed: Collection[str],
        operation_s: float,
    ) -> None:
        self.plan, self.hardware, self.workload, self.replayed, self.operation_s = plan, hardware, workload, replayed, operation_s
        self.timed: Mapping[str, UnitTimes] = {item.name: item for item in (*times.blocks, times.tail)} if times is not None else {}
        self.known: dict[tuple[str, Phase, bool], float] = {}
        """Of a micro-batch at its longest."""
        self.launched: dict[tuple[str, Phase, bool], float] = {}
        is_whole = workload is not None and workload.is_complete
        self.is_measured = bool(times) or (is_whole and hardware.matrix_flops > 0)
        if times is not None:
            self.source = f"blocks timed on {times.device}"
            if self._lacks_replays():
                self.source += ", replayed ones from their FLOPs and bytes where that is less"
        elif is_whole and hardware.matrix_flops and hardware.device_memory_bytes_per_s:
            self.source = "blocks from their FLOPs and bytes at the rates of a matrix product and of device memory, which is coarser"
        elif is_whole:
            self.source = "blocks from their FLOPs, attention included"
        else:
            self.source = ""

    def seconds(self, op: Compute) -> float:
        if self.workload is None:
            return op.flops / self.hardware.device_flops
        key = op.unit, op.phase, op.is_retained
        if key not in self.known:
            self.known[key] = self._full_seconds(op)
        return self.known[key] * self._share(op)

    def launched_seconds(self, op: Compute) -> float:
        """Of the host: as many launches however few the tokens."""
        if self.workload is None:
            return 0.0
        key = op.unit, op.phase, op.is_retained
        if key not in self.launched:
            self.launched[key] = self._launch_seconds(op, self.workload.class_of(op.unit))
        return self.launched[key]

    def _launch_seconds(self, op: Compute, item: UnitWork) -> float:
        if self._is_replayed(op):
            return issue_s(self._replay(item, op.phase)) or REPLAY_OPERATIONS * self.operation_s
        factor = RETAINED_LAUNCHES if op.is_retained and op.phase is Phase.FORWARD else 1.0
        found = self.timed.get(item.name)
        timing = None if found is None else found.forward if op.phase is Phase.FORWARD else None if op.is_retained else found.backward
        if timing is not None and timing.issue_s:
            return factor * issue_s(timing)
        work = self._work(op, item)
        return factor * (self._model_operations(op) + (0 if work is None else work.num_ops)) * self.operation_s

    def _model_operations(self, op: Compute) -> float:
        """Beside kernels, where the model's own forward runs around its blocks."""
        num_blocks = len(self.plan.units) - 2
        if op.unit == self.plan.units[-1].name:
            return TAIL_STAND_IN_OPERATIONS * num_blocks + TAIL_OPERATIONS
        if op.unit == self.plan.units[0].name and op.phase is Phase.FORWARD:  # its graph is kept for the backward
            return STAND_IN_OPERATIONS * num_blocks + EMBEDDING_OPERATIONS
        return 0.0

    def _share(self, op: Compute) -> float:
        """Tokens of the op's micro-batch, over those of the longest: by the boundary that it reads or makes."""
        for piece, size in op.produced:
            if piece.role in (Role.BOUNDARY, Role.BOUNDARY_GRADIENT):
                return size / self.plan.boundary_bytes(piece.owner)
        return 1.0

    def _full_seconds(self, op: Compute) -> float:
        assert self.workload is not None
        item = self.workload.class_of(op.unit)
        timed = self._timed_seconds(op, item)
        work = self._work(op, item)
        if timed is None:
            return op.flops / self.hardware.device_flops if work is None else self._work_seconds(work, item, op.phase)
        if not self._is_replayed(op) or self._replay(item, op.phase) is not None or work is None:
            return timed
        return min(timed, self._work_seconds(work, item, op.phase))

    def _work(self, op: Compute, item: UnitWork) -> Work | None:
        """What the op does, and makes again of a graph that was kept; None: it could not be traced."""
        work = unit_work(item, op.phase, is_retained=op.is_retained)
        return work + self._rebuilt(op, item) if work is not None and op.consumed else work

    def _is_replayed(self, op: Compute) -> bool:
        return op.unit in self.replayed and not op.is_retained

    def _replay(self, item: UnitWork, phase: Phase) -> Timing | None:
        """Of a replay; None: none of this class was timed."""
        found = self.timed.get(item.name)
        if found is None:
            return None
        return found.replayed_forward if phase is Phase.FORWARD else found.replayed_backward

    def _lacks_replays(self) -> bool:
        """Whether a class is replayed of which no replay was timed."""
        assert self.workload is not None
        replayed = [item for item in self.workload.classes if any(unit in self.replayed for unit in item.units)]
        return any(self._replay(item, phase) is None for item in replayed for phase in Phase)

    def _timed_seconds(self, op: Compute, item: UnitWork) -> float | None:
        """From the template of the unit's class; None: it was not timed."""
        found = self.timed.get(item.name)
        if found is None or found.backward is None:
            return None
        replay = self._replay(item, op.phase) if self._is_replayed(op) else None
        seconds = found.backward.median_s
        if replay is not None:
            seconds = replay.median_s
        elif op.phase is Phase.FORWARD:
            is_tail = op.unit == self.plan.units[-1].name
            seconds = seconds / 3 if is_tail else found.forward_s  # the tail was timed forward and backward at once
        assert self.workload is not None
        if op.phase is Phase.BACKWARD and op.is_retained:
            rebuilt_bytes = self._rebuilt(op, item).elementwise_bytes
            share = self.workload.num_tokens / (found.seq_len * found.micro_batch)
            return max(seconds - found.forward_s, seconds / 2) * share + rebuilt_bytes / self._memory_bytes_per_s
        return seconds * (self.workload.num_tokens / (found.seq_len * found.micro_batch))

    def _work_seconds(self, work: Work, item: UnitWork, phase: Phase) -> float:
        hardware = self.hardware
        flops = work.flops - work.causal_flops / 2
        elementwise = work.elementwise_bytes + (self._summing_bytes(item) if phase is Phase.BACKWARD else 0)
        memory = self._memory_bytes_per_s
        if hardware.product_flops and hardware.device_memory_bytes_per_s:
            return _kinds_seconds(work, hardware, summed_bytes=elementwise - work.elementwise_bytes)
        if hardware.matrix_flops and hardware.device_memory_bytes_per_s:
            return flops / hardware.matrix_flops + elementwise / memory + work.num_ops * KERNEL_S
        return max(flops / hardware.device_flops, (work.moved_bytes - work.elementwise_bytes + elementwise) / memory)

    def _rebuilt(self, op: Compute, item: UnitWork) -> Work:
        """What the backward of a graph that was kept makes again."""
        return Work() if item.retention is None else item.retention.of(self.plan.activation_mode(op.unit)).rebuilt

    @property
    def _memory_bytes_per_s(self) -> float:
        if self.plan.device.startswith("cpu"):
            return self.hardware.host_memory_bytes_per_s or ASSUMED_HOST_MEMORY_BYTES_PER_S
        return self.hardware.device_memory_bytes_per_s or ASSUMED_DEVICE_MEMORY_BYTES_PER_S

    def _summing_bytes(self, item: UnitWork) -> int:
        """Read and written while gradients of parameters are added to their fp32 sums, which begin as zeros."""
        assert self.workload is not None
        width = DTYPE_BYTES[self.plan.dtype]
        contributions = 1
        if item.name == self.workload.classes[-1].name and self.workload.loss is not None:
            contributions = self.workload.loss.num_chunks
        return (item.trainable_bytes // width) * (4 + contributions * (8 + width))


def _kinds_seconds(work: Work, hardware: HardwareSpec, *, summed_bytes: int) -> float:
    """Of a GPU whose kinds of kernels were measured: each kind's operations at its rate and what products move at the memory's, one after
    the other, which is how a kernel that first reads, then computes and then writes spends its time unless it is large.

    Args:
        summed_bytes: read and written at the memory's rate, beside the work's own.
    """
    memory, product = hardware.device_memory_bytes_per_s, hardware.product_flops
    plain = work.flops - work.attention_flops - work.grouped_flops
    seconds = plain / product
    seconds += (work.attention_flops - work.causal_flops / 2) / (hardware.attention_flops or product)
    seconds += work.grouped_flops / (hardware.grouped_flops or product)
    seconds += (work.moved_bytes - work.elementwise_bytes + summed_bytes) / memory
    elementwise = hardware.elementwise_bytes_per_s or memory
    seconds += (work.elementwise_bytes - work.scattered_bytes) / elementwise
    seconds += work.scattered_bytes / (hardware.scattered_bytes_per_s or elementwise)
    return seconds + work.num_ops * KERNEL_S


def unit_work(item: UnitWork, phase: Phase, *, is_retained: bool = False) -> Work | None:
    """What one op of a unit does, but for what a retained one rebuilds; None: it could not be traced."""
    if item.forward is None or item.recompute is None or item.backward is None:
        return None
    if phase is Phase.FORWARD:
        return item.forward.work
    if is_retained:
        return item.backward.work
    return item.recompute.work + item.backward.work
