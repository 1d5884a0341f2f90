"""What a step did, on paper and for real: the same fields, so that the two subtract."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from overspill.spec.prediction import MemoryTerm, total_bytes
from overspill.spec.rates import Floor
from overspill.spec.trace import Span

LINK_LANES = ("h2d", "d2h", "ssd_read", "ssd_write")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Fields that the simulator predicts and the executor measures."""

    step_s: float
    """Wall time of the step: what `Session.step` ran its program for. Without clip its last updates may land under the next step."""
    lane_bytes: Mapping[str, int]
    """Bytes that crossed each link; exact on both sides."""
    num_ops: int
    device_resident_peak_bytes: int
    """Most bytes of pieces on the device at one time (activations inside a unit are not pieces)."""
    host_resident_peak_bytes: int
    ssd_resident_peak_bytes: int

    @property
    def ssd_read_bytes(self) -> int:
        return self.lane_bytes.get("ssd_read", 0)

    @property
    def ssd_written_bytes(self) -> int:
        return self.lane_bytes.get("ssd_write", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction(StepFigures):
    """Made by `planning.simulate`."""

    lane_busy_s: Mapping[str, float]
    """Seconds in which a lane has work."""
    source: str
    """Whether the rates behind its times were assumed or measured."""
    has_times: bool = False
    """Whether what its times rest on was measured, so that they can be held against a step's."""
    exposed_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """As `StepTimes` has it; with `lane_busy_s["compute"]` they sum to `step_s`."""
    alone_s: float = 0.0
    """Of one run of the program, from nothing under way until nothing is. `step_s` is less where steps overlap."""
    spans: tuple[Span, ...] = dataclasses.field(default=(), repr=False)
    """When each op would run, in program order; a `Free` has none."""
    phase_peak_bytes: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """Phase (`forward`, `backward`, `landing`: after the last compute) -> tier -> most bytes of pieces there at one time."""
    device_terms: tuple[MemoryTerm, ...] = ()
    """What the device's peak is made of, as the driver sees it; empty: nobody asked."""
    num_replays: int = 0
    """Blocks' passes that are replayed as CUDA graphs."""
    replays_bytes: int = 0
    """What recordings take of the device, or would take if blocks were replayed that are predicted not to be. 0: not known."""
    host_terms: tuple[MemoryTerm, ...] = ()
    """What the process's peak in host memory is made of; empty: nobody asked."""

    @property
    def device_peak_bytes(self) -> int:
        """As the driver sees it: what the allocator reserves, and the context."""
        return total_bytes(self.device_terms)

    @property
    def host_peak_bytes(self) -> int:
        """The process's VmHWM."""
        return total_bytes(self.host_terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeClassReport:
    """The slots of one size in a pool; bytes now unless it says peak."""

    slot_bytes: int
    used_bytes: int
    """Of the slots lent."""
    wasted_bytes: int
    """Rounding in the slots lent: held, and not asked for."""
    idle_bytes: int
    peak_bytes: int
    """The most that this class has held, lent and idle."""
    most_in_flight: int
    """Most slots lent at one time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolReport:
    """What a pool of slots holds and has held, beside what one size of slot for everything would have taken."""

    name: str
    classes: tuple[SizeClassReport, ...]
    """Largest first."""
    peak_bytes: int
    """The most that the pool has held, lent and idle. The classes' peaks may be at other times, so it is at most their sum."""
    peak_asked_bytes: int
    """Most bytes that were asked for at one time: what a pool without any waste would have taken."""
    most_in_flight: int
    """Most slots lent at one time, of all classes."""
    num_created: int
    num_trimmed: int
    """Slots freed to make room for others; each costs an allocation when its class is wanted again."""

    @property
    def used_bytes(self) -> int:
        return sum(item.used_bytes for item in self.classes)

    @property
    def wasted_bytes(self) -> int:
        return sum(item.wasted_bytes for item in self.classes)

    @property
    def idle_bytes(self) -> int:
        return sum(item.idle_bytes for item in self.classes)

    @property
    def waste_fraction(self) -> float:
        """Share of the peak that was never asked for at one time."""
        return 1 - self.peak_asked_bytes / self.peak_bytes if self.peak_bytes else 0.0

    @property
    def one_size_bytes(self) -> int:
        """A pool of the same slots in flight, each as large as the largest."""
        return self.most_in_flight * max((item.slot_bytes for item in self.classes), default=0)

    @property
    def one_size_waste_fraction(self) -> float:
        return 1 - self.peak_asked_bytes / self.one_size_bytes if self.one_size_bytes else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where a step's time went."""

    lane_busy_s: Mapping[str, float]
    """Seconds in which a lane had work of this step, what landed after its end included."""
    exposed_s: Mapping[str, float]
    """Seconds of the step in which the compute lane was idle and waited for that lane, or for `dispatch` (`spec/trace.py`); with
    `lane_busy_s["compute"]` they sum to `step_s`."""
    floor: Floor | None
    """None: nobody has asked the session for its rates yet."""
    trace_s: float
    """What it took to find this out, when it was asked for; not in `step_s`."""


def _no_times() -> StepTimes:
    return StepTimes(lane_busy_s={}, exposed_s={}, floor=None, trace_s=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport(StepFigures):
    """Made by the executor. Where its time went is found out when it is first asked for (`times`)."""

    step: int
    """Optimizer step, from 1."""
    loss: float
    """Sum over the step's targets divided by their number, router loss included."""
    grad_norm: float
    """Global 2-norm of the step's gradient, before clipping."""
    lr: float
    num_tokens: int
    num_targets: int
    skipped: bool
    """Whether the update was skipped because fp16 gradients overflowed."""
    loss_scale: float
    device_peak_bytes: int
    """As the allocator saw it (CUDA: most reserved; cpu: same as resident)."""
    host_peak_bytes: int
    """The process's VmHWM."""
    pinned_bytes: int
    """Page-locked now."""
    num_replays: int = 0
    """Blocks' passes that were replayed as CUDA graphs; none before a block has run a few times."""
    device_context_bytes: int = 0
    """What the driver counts as used beside the allocator's: the context and kernels of this process, and other programs; 0 on a CPU."""
    pool_peak_bytes: int = 0
    """Most that the pools of slots have held since the session was opened, both together."""
    pool_waste_bytes: int = 0
    """Of that, what was never asked for at one time."""
    pool_one_size_bytes: int = 0
    """What pools with one slot size each would have held."""
    ssd_life_written_bytes: int = 0
    """Everything overspill ever wrote in the SSD directory, this step included; 0 without one."""

    read_times: Callable[[], StepTimes] = dataclasses.field(default=_no_times, repr=False, compare=False)
    """Called once, when one of the times is first asked for: the figures of a step of 550 ops take milliseconds to put together."""

    @functools.cached_property
    def times(self) -> StepTimes:
        return self.read_times()

    @property
    def lane_busy_s(self) -> Mapping[str, float]:
        return self.times.lane_busy_s

    @property
    def exposed_s(self) -> Mapping[str, float]:
        return self.times.exposed_s

    @property
    def floor(self) -> Floor | None:
        return self.times.floor

    @property
    def trace_s(self) -> float:
        return self.times.trace_s

    @property
    def floor_s(self) -> float | None:
        """The least time that this step's work takes at the rates of this machine's lanes."""
        return self.floor.floor_s if self.floor is not None else None

    @property
    def step_over_floor(self) -> float | None:
        """1: nothing is left to gain without less work or a faster machine."""
        return self.step_s / self.floor.floor_s if self.floor is not None and self.floor.floor_s else None

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.step_s if self.step_s else 0.0

    def __sub__(self, prediction: Prediction) -> Difference:
        return Difference(
            step_s=self.step_s - prediction.step_s,
            lane_bytes={lane: self.lane_bytes.get(lane, 0) - prediction.lane_bytes.get(lane, 0) for lane in LINK_LANES},
            num_ops=self.num_ops - prediction.num_ops,
            device_resident_peak_bytes=self.device_resident_peak_bytes - prediction.device_resident_peak_bytes,
            host_resident_peak_bytes=self.host_resident_peak_bytes - prediction.host_resident_peak_bytes,
            ssd_resident_peak_bytes=self.ssd_resident_peak_bytes - prediction.ssd_resident_peak_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Measured minus predicted."""

    step_s: float
    lane_bytes: Mapping[str, int]
    num_ops: int
    device_resident_peak_bytes: int
    host_resident_peak_bytes: int
    ssd_resident_peak_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    loss: float
    """Mean over all targets; a router loss, if the model has one, is added as in training."""
    num_targets: int
