"""The schedule's second interpreter: execute it for real.

Serial: one op after the other in the program's order, each done before the next starts; an op's waits are then always met,
which is asserted. The lanes' overlap is a matter of this file alone; schedule, residency and compute stay as they are.

The executor takes no decisions: what moves, when and where to is in the schedule. It owns waiting, timing, and one retry:
when the device is out of memory, an op that has not yet added to a gradient is run again after idle buffers were freed (its
inputs are still held), never the whole step.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence

import torch

from overspill.errors import NonFiniteError
from overspill.huggingface import StreamedModel, share_equal_tensors
from overspill.runtime.compute import MicroBatch, StepContext, UnitRunner, check_losses
from overspill.runtime.gradients import Gradients
from overspill.runtime.memory_guard import HostMemoryGuard
from overspill.runtime.residency import Residency
from overspill.runtime.updating import UpdateContext, Updater
from overspill.runtime.visit import TORCH_DTYPES, Visit
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.report import LINK_LANES, StepFigures
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Op, Phase, Piece, Role, Schedule, Update
from overspill.spec.tensors import Tier


class Executor:
    """Runs schedules of one plan."""

    def __init__(self, plan: Plan, model: StreamedModel, residency: Residency) -> None:
        self.plan, self.residency = plan, residency
        self.model = model
        self.units = UnitRunner(plan, model, residency)
        self.updater = Updater(plan, residency)
        self.device = torch.device(plan.device)
        self._visit: Visit | None = None
        self.guard = HostMemoryGuard(residency)
        self.updated: list[str] = []
        """Bundles updated by the step that runs, for the error that stops it half-way."""

    def run(
        self,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        context: StepContext,
        *,
        updates: UpdateContext | None = None,
    ) -> tuple[StepFigures, Gradients]:
        """Execute all ops.

        Args:
            updates: for the updates in this schedule: of the step's own gradients (immediate timing) or of the step before
                (pending timing). Needed if the schedule has any.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; the message says which weights were updated.
            StorageError: a transfer failed.
        """
        gradients = Gradients(self.plan, self.residency)
        self.updated = []
        self.residency.reset_peaks()
        seconds = dict.fromkeys((lane.value for lane in Lane), 0.0)
        lane_bytes = dict.fromkeys(LINK_LANES, 0)
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        start = time.perf_counter()
        try:
            with self._seeded_apart():
                for index, item in enumerate(schedule.ops):
                    assert all(wait < index for wait in item.waits), f"op {index} waits for a later op"
                    self.guard.look()
                    before = time.perf_counter()
                    with self._timed(item.op, events):
                        self._execute(item.op, micro_batches, context, gradients, updates)
                    seconds[item.lane.value] += time.perf_counter() - before
                    if isinstance(item.op, Fetch | Evict):
                        lane_bytes[item.lane.value] += item.op.num_bytes
        finally:
            self._leave_visit()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            seconds[Lane.COMPUTE.value] = sum(begin.elapsed_time(end) for begin, end in events) / 1e3
        figures = StepFigures(
            step_s=time.perf_counter() - start,
            lane_busy_s=seconds,
            lane_bytes=lane_bytes,
            num_ops=len(schedule.ops),
            device_resident_peak_bytes=self.residency.peak_bytes[Tier.DEVICE],
            host_resident_peak_bytes=self.residency.peak_bytes[Tier.HOST],
            ssd_resident_peak_bytes=self.residency.peak_bytes[Tier.SSD],
        )
        return figures, gradients

    # -- ops ---------------------------------------------------------------------------------------------------------

    def _execute(
        self,
        op: Op,
        micro_batches: Sequence[MicroBatch],
        context: StepContext,
        gradients: Gradients,
        updates: UpdateContext | None,
    ) -> None:
        match op:
            case Fetch() | Evict():
                self._move(op, micro_batches)
            case Free():
                if op.piece.role is Role.PARAMETER and op.tier is Tier.DEVICE:
                    self._leave_visit()
                self.residency.drop(op.piece, op.tier)
            case Compute():
                self._compute(op, micro_batches[op.micro_batch], context, gradients)
                if op.unit == self.plan.units[0].name and op.phase is Phase.FORWARD:
                    self._share_arguments(micro_batches[: op.micro_batch + 1])
            case Compress():
                self._leave_visit()
                check_losses(micro_batches, context.step)
                gradients.compress(op)
                if self.plan.timing is UpdateTiming.IMMEDIATE:
                    self._check_gradient(op, context, gradients)
            case Update():
                assert updates is not None, f"no scalars for the update of {op.bundle}"
                self.updater.run(op, updates)
                self.residency.drop(Piece(role=Role.GRADIENT, owner=op.bundle, index=op.chunk), op.tier)
                self.updated.append(op.bundle)

    def _move(self, op: Fetch | Evict, micro_batches: Sequence[MicroBatch]) -> None:
        """One hop. Serial: the buffer is the op's until the copy is done, which is before this returns."""
        piece, residency = op.piece, self.residency
        if piece.role is Role.PARAMETER and op.target is Tier.DEVICE:
            self._leave_visit()
        residency.create(piece, op.target, op.num_bytes)
        if op.target is Tier.SSD:
            residency.start_write(piece, residency.bytes_of(piece, Tier.HOST)).wait()
        elif op.source is Tier.SSD:
            residency.start_read(piece, residency.bytes_of(piece, Tier.HOST)).wait()
        else:
            residency.bytes_of(piece, op.target).copy_(residency.bytes_of(piece, op.source))
        if op.target is Tier.DEVICE and piece.role in (Role.BOUNDARY, Role.BOUNDARY_GRADIENT):
            residency.fill_boundary(piece, micro_batches[piece.index].shape, TORCH_DTYPES[self.plan.boundary_dtype(piece.owner)])

    def _compute(self, op: Compute, micro_batch: MicroBatch, context: StepContext, gradients: Gradients) -> None:
        for piece, size in op.produced:
            if piece.role is Role.PARTIAL_GRADIENT:
                self.residency.create(piece, Tier.DEVICE, size)
        visit = self._enter_visit(op.unit)
        added = gradients.num_added
        try:
            self.units.run(op, visit, micro_batch, context, gradients)
        except torch.OutOfMemoryError:
            if gradients.num_added != added:
                raise
            gc.collect()
            self.residency.trim()
            torch.cuda.empty_cache()
            self.units.run(op, visit, micro_batch, context, gradients)

    def _share_arguments(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Masks and tables that equal the first or the previous micro-batch's of the group are stored once (design 2)."""
        *earlier, newest = [micro_batch for micro_batch in micro_batches if micro_batch.arguments is not None]
        if earlier:
            newest.arguments = share_equal_tensors(newest.arguments, [earlier[0].arguments, earlier[-1].arguments])

    def _check_gradient(self, op: Compress, context: StepContext, gradients: Gradients) -> None:
        sums = {slot.tensor.name: gradients.sums_of_squares[slot.tensor.name] for slot in self.plan.bundles[op.bundle].slots}
        if bool(torch.isfinite(torch.stack(list(sums.values()))).all()):
            return
        name = next(name for name, value in sums.items() if not bool(torch.isfinite(value)))
        updated = ", ".join(dict.fromkeys(self.updated)) or "none"
        raise NonFiniteError(
            f"gradient of {name} is not finite in step {context.step}; already updated in this step: {updated}. "
            "Set --clip (updates then wait until all gradients are known finite), or lower --lr"
        )

    # -- visits and time ---------------------------------------------------------------------------------------------

    def _enter_visit(self, unit: str) -> Visit:
        if self._visit is None or self._visit.unit != unit:
            self._leave_visit()
            self._visit = Visit(self.plan, self.model, self.residency, unit).__enter__()
        return self._visit

    def _leave_visit(self) -> None:
        if self._visit is not None:
            visit, self._visit = self._visit, None
            visit.__exit__(None, None, None)

    def _seeded_apart(self) -> contextlib.AbstractContextManager[None]:
        """The user's random generators are as before when the step is over."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    @contextlib.contextmanager
    def _timed(self, op: Op, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]):  # type: ignore[no-untyped-def]
        """Compute runs asynchronously on CUDA: take its time from events, read when the step is over."""
        if self.device.type != "cuda" or not isinstance(op, Compute | Compress):
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        events.append((begin, end))
