"""The schedule's second interpreter: execute it for real.

How: this thread goes through the ops in the program's order. Work of the `compute` lane it does itself; every other op becomes a
job of its lane (`runtime/lanes`) with the completions it has to wait for: those of the op's `waits`, and those of whatever still
uses the buffer that the op fills (`runtime/residency`, rule 6). A `Free` is bookkeeping alone. So buffers change hands in the
program's order, peaks are those of the plan, and the lanes overlap as far as data and buffers allow.

Rules:

1. The executor takes no decisions: what moves, when and where to is in the schedule.
2. With `serial` every op is complete before the next begins. The results are the same bits; tests hold the two together.
3. An `Update` first looks at its gradient's verdict: all losses of the step and this bundle's gradient must be finite. The verdict
   is computed on the device by `Compress` and travels with the gradient, so no lane but the updating one waits for it. An update on the
   device looks at it there; whether it did anything is read when the step is over.
4. After a failure nothing more is begun, all that was begun is waited for, and the failure that comes first in the program is
   raised.

One retry: when the device is out of memory, an op that has not yet added to a gradient is run again after idle buffers were freed
(its inputs are still held), never the whole step.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from overspill.huggingface import StreamedModel, share_equal_tensors
from overspill.runtime.compute import MicroBatch, StepContext, UnitRunner, check_losses
from overspill.runtime.gradients import Gradients
from overspill.runtime.graphs import BlockGraphs, CudaRecorder
from overspill.runtime.lanes import Abandoned, Completion, Job, Lanes
from overspill.runtime.memory_guard import HostMemoryGuard
from overspill.runtime.residency import Residency, Work
from overspill.runtime.trace import LazyTrace, Recorder
from overspill.runtime.updating import UpdateContext, Updater
from overspill.runtime.verdicts import VerdictMemory, Verdicts
from overspill.runtime.visit import TORCH_DTYPES, Visit
from overspill.spec.plan import Plan
from overspill.spec.report import LINK_LANES, StepFigures
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Phase, Piece, Role, Schedule, ScheduledOp, Update
from overspill.spec.tensors import Tier
from overspill.spec.trace import Span, StepTrace


class Executor:
    """Runs schedules of one plan.

    Args:
        serial: one op after the other (rule 2).
        cuda_graphs: launch blocks as one whose launches take longer than their work (`runtime/graphs`); no effect on the CPU.
    """

    def __init__(
        self,
        plan: Plan,
        model: StreamedModel,
        residency: Residency,
        *,
        serial: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        self.plan, self.residency = plan, residency
        self.model = model
        self.serial = serial
        self.device = torch.device(plan.device)
        recorder = CudaRecorder(self.device) if cuda_graphs and self.device.type == "cuda" else None
        self.graphs = BlockGraphs(model, recorder, has_room=self._has_room)
        self.units = UnitRunner(plan, model, residency, self.graphs)
        self.updater = Updater(plan)
        self.lanes = Lanes(self.device)
        residency.device_work = self.lanes.compute_so_far
        self.verdict_memory = VerdictMemory(plan)
        self._visit: Visit | None = None
        self.guard = HostMemoryGuard(residency)
        self.updated: list[str] = []
        """Bundles of which the step that runs has begun to update a chunk, for the error that stops it half-way."""
        self.has_landed = False
        """Whether all updates of the last schedule, and all that they wrote back to homes, are complete, however it ended."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called in every schedule when all its ops are under way."""
        self.lazy_trace: LazyTrace | None = None
        """When each op of the last schedule ran."""

    @property
    def trace(self) -> StepTrace | None:
        """Of the last schedule."""
        return self.lazy_trace.get() if self.lazy_trace is not None else None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Of the last schedule."""
        return self.trace.spans if self.trace is not None else ()

    def run(
        self,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        context: StepContext,
        *,
        updates: UpdateContext | None = None,
    ) -> tuple[StepFigures, Gradients]:
        """Execute all ops; when it returns, all are complete.

        Args:
            updates: for the updates in this schedule: of the step's own gradients (immediate timing) or of the step before
                (pending timing). Needed if the schedule has any.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; the message says which weights were updated.
            StorageError: a transfer failed.
        """
        self.updated, self.has_landed = [], False
        self.residency.reset_peaks()
        base, base_s = self._mark(), time.perf_counter()
        step = _Step(self, schedule, micro_batches, context, updates, Recorder(base, base_s))
        try:
            with self._seeded_apart(), _uncollected():
                step.dispatch_all()
            self.while_waiting()
            _collect_young()
            failure = self._settle(schedule, step.completions, None)
        except BaseException as error:  # also Ctrl-C on the way into settling
            failure = self._settle(schedule, step.completions, error)
        refusal = step.judge_gated()
        failure = failure if failure is not None else refusal
        if failure is not None:
            raise failure
        check_losses(micro_batches, context.step)
        step_s = time.perf_counter() - base_s
        self.lazy_trace = LazyTrace(step.recorder, schedule, step.completions, step_s)
        self._judge_launches(schedule, step.completions, base, base_s)
        return self._figures(schedule, step_s), step.gradients

    def close(self) -> None:
        """End the lanes and drop the recordings."""
        self.lanes.close()
        self.graphs.close()

    def wait_on_device(self, work: Work) -> None:
        """Let the compute lane wait for `work`."""
        stream = self.lanes.stream(Lane.COMPUTE)
        for completion in work:
            completion.wait_on(stream)

    # -- ends --------------------------------------------------------------------------------------------------------

    def _settle(self, schedule: Schedule, completions: Sequence[Completion], failure: BaseException | None) -> BaseException | None:
        """Rule 4: nothing is under way when this returns; the failure to tell. Ctrl-C is told after that, however often it comes."""
        failures: list[BaseException] | None = None
        while failures is None:
            try:
                if failure is not None:
                    self.lanes.has_failed = True
                    self.residency.interrupt()
                self._leave_visit()
                if failure is not None:
                    self.model.unbind()
                self.lanes.drain()
                failures = [error for completion in completions if (error := completion.settle()) is not None]
            except Exception as error:  # of leaving the visit, which is left all the same
                failure = failure or error
            except BaseException as error:
                failure = error
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                failures.append(error)
        self.lanes.reset()
        self.residency.proceed()
        causes = [error for error in failures if not isinstance(error, Abandoned)]
        self.has_landed = failure is None and not causes or self._have_landed(schedule, completions)
        if failure is not None and (not isinstance(failure, Exception) or not causes):
            return failure  # Ctrl-C, or what this thread itself met
        return causes[0] if causes else None

    def _have_landed(self, schedule: Schedule, completions: Sequence[Completion]) -> bool:
        """Whether every op that changes a parameter or a state, or copies one home, has ended well; all have settled."""
        for index, item in enumerate(schedule.ops):
            match item.op:
                case Update():
                    changes = True
                case Fetch(piece=piece, target=target) | Evict(piece=piece, target=target):
                    changes = piece.role in (Role.PARAMETER, Role.STATE) and self.residency.home_tier(piece.owner, piece.role) is target
                case _:
                    changes = False
            if changes and (index >= len(completions) or completions[index].settle() is not None):
                return False
        return True

    def _has_room(self) -> bool:
        """Whether the device can hold the activations of one block beside all else."""
        budget = self.plan.device_budget_bytes
        return budget is None or self.residency.peak_bytes[Tier.DEVICE] + self.plan.device_working_bytes <= budget

    def _judge_launches(self, schedule: Schedule, completions: Sequence[Completion], base: torch.cuda.Event | None, base_s: float) -> None:
        """Tell `graphs` what bounded the blocks of the last schedule, until it knows enough."""
        if not self.graphs.wants_judgement():
            return
        blocks = {unit.name for unit in self.plan.units[1:-1]}
        ran = [completions[index] for index, item in enumerate(schedule.ops) if isinstance(item.op, Compute) and item.op.unit in blocks]
        spans_s = [completion.span_s(base, base_s) for completion in ran]
        self.graphs.judge(launch_s=sum(item.issue_s for item in ran), device_s=sum(end_s - begin_s for begin_s, end_s in spans_s))

    def _figures(self, schedule: Schedule, step_s: float) -> StepFigures:
        lane_bytes = dict.fromkeys(LINK_LANES, 0)
        for item in schedule.ops:
            if isinstance(item.op, Fetch | Evict):
                lane_bytes[item.lane.value] += item.op.num_bytes
        return StepFigures(
            step_s=step_s,
            lane_bytes=lane_bytes,
            num_ops=len(schedule.ops),
            device_resident_peak_bytes=self.residency.peak_bytes[Tier.DEVICE],
            host_resident_peak_bytes=self.residency.peak_bytes[Tier.HOST],
            ssd_resident_peak_bytes=self.residency.peak_bytes[Tier.SSD],
        )

    def _mark(self) -> torch.cuda.Event | None:
        """A point in the device's time."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seeded_apart(self) -> contextlib.AbstractContextManager[None]:
        """The user's random generators are as before when the step is over."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    # -- visits ------------------------------------------------------------------------------------------------------

    def enter_visit(self, unit: str) -> Visit:
        """The open visit of `unit`; another one is left first."""
        if self._visit is None or self._visit.unit != unit:
            self._leave_visit()
            self._visit = Visit(self.plan, self.model, self.residency, unit).__enter__()
        return self._visit

    def _leave_visit(self) -> None:
        if self._visit is not None:
            visit, self._visit = self._visit, None
            visit.__exit__(None, None, None)

    def leave_visit_of(self, bundle: str) -> None:
        """Leave the open visit if it reads `bundle`."""
        if self._visit is not None and bundle in self._visit.bundles:
            self._leave_visit()


class _Step:
    """One schedule while it runs."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        context: StepContext,
        updates: UpdateContext | None,
        recorder: Recorder,
    ) -> None:
        self.recorder = recorder
        self.executor, self.plan, self.residency, self.lanes = executor, executor.plan, executor.residency, executor.lanes
        self.schedule, self.micro_batches, self.context, self.updates = schedule, micro_batches, context, updates
        self.gradients = Gradients(self.plan, self.residency, self._wait_in_job)
        self.verdicts = Verdicts(self.plan, context, executor.verdict_memory)
        self.completions: list[Completion] = []
        """Of the ops dispatched so far; those of a `Free` are done at once."""
        self.gated: list[str] = []
        """Bundles with an update on the device, which their verdict may have stopped there."""

    def dispatch_all(self) -> None:
        """Go through the program."""
        for index, item in enumerate(self.schedule.ops):
            assert all(wait < index for wait in item.waits), f"op {index} waits for a later op"
            self.recorder.submitted_s.append(time.perf_counter())
            completion = self._dispatch(item)
            self.completions.append(completion)
            if self.executor.serial:
                completion.wait()
            if self.lanes.has_failed:
                raise Abandoned("another op of the step failed")

    def _waits(self, item: ScheduledOp) -> list[Completion]:
        return [self.completions[wait] for wait in item.waits]

    def _dispatch(self, item: ScheduledOp) -> Completion:
        op, waits = item.op, self._waits(item)
        self.recorder.waits.append(waits)
        match op:
            case Fetch() | Evict():
                return self._move(op, item.lane, waits)
            case Free():
                if op.piece.role is Role.PARAMETER and op.tier is Tier.DEVICE:
                    self.executor.leave_visit_of(op.piece.owner)
                self.residency.drop(op.piece, op.tier, waits)
                return self.lanes.done(item.lane)
            case Compute():
                self.executor.guard.look()
                return self.lanes.run_here(functools.partial(self._compute, op), waits)
            case Compress():
                return self.lanes.run_here(functools.partial(self._compress, op), waits)
            case Update():
                return self._update(op, item.lane, waits)

    def _wait_in_job(self, work: Work) -> None:
        """Let the compute lane wait for `work`, as a part of the op that is dispatched now."""
        self.recorder.waits[-1].extend(work)
        self.executor.wait_on_device(work)

    def _move(self, op: Fetch | Evict, lane: Lane, waits: list[Completion]) -> Completion:
        """One hop. Both buffers are the job's until it is complete."""
        piece, residency = op.piece, self.residency
        if lane in (Lane.SSD_READ, Lane.SSD_WRITE):
            self.executor.guard.look()
        waits.extend(residency.create(piece, op.target, op.num_bytes))
        job: Job
        if op.target is Tier.SSD:
            store, name = residency.record_of(piece)
            job = functools.partial(store.start_write, name, residency.bytes_of(piece, Tier.HOST))
        elif op.source is Tier.SSD:
            store, name = residency.record_of(piece)
            job = functools.partial(store.start_read, name, residency.bytes_of(piece, Tier.HOST))
        else:
            job = _copy(residency.bytes_of(piece, op.target), residency.bytes_of(piece, op.source))
        if op.target is Tier.DEVICE and piece.role in (Role.BOUNDARY, Role.BOUNDARY_GRADIENT):
            shape = self.micro_batches[piece.index].shape
            residency.fill_boundary(piece, shape, TORCH_DTYPES[self.plan.boundary_dtype(piece.owner)])
        return self.lanes.submit(lane, job, waits)

    def _compute(self, op: Compute) -> None:
        fresh = set()
        for piece, size in op.produced:
            if piece.role is Role.PARTIAL_GRADIENT:
                self._wait_in_job(self.residency.create(piece, Tier.DEVICE, size))
                fresh.add((piece.owner, piece.role, piece.reader))
        for key in fresh:
            self.residency.region(*key).zero_()
        visit = self.executor.enter_visit(op.unit)
        micro_batch, added = self.micro_batches[op.micro_batch], self.gradients.num_added
        run = functools.partial(self.executor.units.run, op, visit, micro_batch, self.context, self.gradients)
        try:
            run()
        except torch.OutOfMemoryError:
            if self.gradients.num_added != added:
                raise
            gc.collect()
            self.residency.trim()
            torch.cuda.empty_cache()
            run()
        if op.unit == self.plan.units[0].name and op.phase is Phase.FORWARD:
            self._share_arguments(self.micro_batches[: op.micro_batch + 1])

    def _share_arguments(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Masks and tables that equal the first or the previous micro-batch's of the group are stored once (design 2)."""
        *earlier, newest = [micro_batch for micro_batch in micro_batches if micro_batch.arguments is not None]
        if earlier:
            newest.arguments = share_equal_tensors(newest.arguments, [earlier[0].arguments, earlier[-1].arguments])

    def _compress(self, op: Compress) -> None:
        self.executor.leave_visit_of(op.bundle)
        self.gradients.compress(op)
        if self.updates is not None and not self.schedule.ends_pending:
            self.verdicts.start(op.bundle, self.gradients.sums_of_squares[op.bundle], [batch.loss for batch in self.micro_batches])

    def _update(self, op: Update, lane: Lane, waits: list[Completion]) -> Completion:
        assert self.updates is not None, f"no scalars for the update of {op.bundle}"
        roles = [Role.PARAMETER, Role.GRADIENT, *([Role.STATE] if self.plan.has_state(op.bundle) else [])]
        copies = {role: self.residency.bytes_of(Piece(role=role, owner=op.bundle, index=op.chunk), op.tier) for role in roles}
        run = functools.partial(self._run_update, op, self.updates, copies)
        completion = self.lanes.run_here(run, waits) if lane is Lane.COMPUTE else self.lanes.submit(lane, run, waits)
        self.residency.drop(Piece(role=Role.GRADIENT, owner=op.bundle, index=op.chunk), op.tier, [completion])
        return completion

    def _run_update(self, op: Update, updates: UpdateContext, copies: dict[Role, torch.Tensor]) -> None:
        """On the lane that updates."""
        gates = None
        if op.tier is Tier.DEVICE:
            self.gated.append(op.bundle)
            gates = self.verdicts.gates(op.bundle)
        else:
            self.verdicts.check(op.bundle, self.executor.updated)
        self.executor.updated.append(op.bundle)  # before: Ctrl-C is told as soon as the native call has returned
        self.executor.updater.run(op, updates, copies, gates=gates)

    def judge_gated(self) -> BaseException | None:
        """When all has settled: take updates on the device that were stopped there off the list of those made; why the first one was."""
        stopped = [bundle for bundle in dict.fromkeys(self.gated) if self.verdicts.find_refusal(bundle, ()) is not None]
        updated = [bundle for bundle in self.executor.updated if bundle not in stopped]
        self.executor.updated = updated
        return self.verdicts.find_refusal(stopped[0], updated) if stopped else None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python's cycle collector rests inside: with all of torch and transformers to look at, one pass holds every lane up for tens of
    milliseconds. What a step leaves behind is collected after it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _collect_young() -> None:
    """What `_uncollected` left for later, of this step alone and while its last work is under way."""
    if gc.isenabled():
        gc.collect(0)


def _copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        target.copy_(source, non_blocking=True)

    return run
