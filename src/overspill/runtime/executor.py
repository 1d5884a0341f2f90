"""The schedule's second interpreter: execute it for real.

How: this thread goes through the ops in the program's order (`runtime/step`). Work of the `compute` lane it does itself; every other op
becomes a job of its lane (`runtime/lanes`) with the completions it has to wait for: those of the op's `waits`, and those of whatever
still uses the buffer that the op fills (`runtime/residency`, rule 6). A `Free` is bookkeeping alone. So buffers change hands in the
program's order, peaks are those of the plan, and the lanes overlap as far as data and buffers allow. Here is how a schedule begins and
ends; what each op does is in `runtime/step`.

Rules:

1. The executor takes no decisions: what moves, when and where to is in the schedule.
2. With `serial` every op is complete before the next begins. The results are the same bits; tests hold the two together.
3. An `Update` first looks at its gradient's verdict: all losses of the step and this bundle's gradient must be finite. The verdict
   is computed on the device by `Compress` and travels with the gradient, so no lane but the updating one waits for it. An update on the
   device looks at it there; whether it did anything is read when the step is over.
4. After a failure nothing more is begun, all that was begun is waited for, and the failure that comes first in the program is
   raised. Where gradients of the step before wait for their update and it was this thread that failed (an exception in a block, Ctrl-C),
   what lies in the lanes' queues is first done to its end: no chunk is then left between its update and its home, and whoever goes on
   knows which chunks have had theirs (`applied`). A second Ctrl-C ends that.
5. A training step with immediate updates returns when compute has ended and every loss and gradient is known to be finite. What other
   lanes have left to do lands under the next schedule (`runtime/landing`); `finish` waits for it. With `serial`, where gradients wait
   for the next step, and where something has failed or is not finite, nothing is left under way.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence

import torch

from overspill.huggingface import StreamedModel
from overspill.planning.graphs import has_room
from overspill.runtime.compute import MicroBatch, StepContext, UnitRunner, check_losses
from overspill.runtime.gradients import Gradients
from overspill.runtime.graphs import BlockGraphs, CudaRecorder, waited_for_s
from overspill.runtime.landing import Chunk, Landing, find_applied, find_late, have_homes_landed
from overspill.runtime.lanes import Abandoned, Completion, Lanes, settle_all
from overspill.runtime.machine import without_cycle_collection
from overspill.runtime.memory_guard import HostMemoryGuard
from overspill.runtime.residency import Residency, Work
from overspill.runtime.step import RunningStep
from overspill.runtime.trace import LazyTrace, Recorder
from overspill.runtime.updating import UpdateContext, Updater
from overspill.runtime.verdicts import VerdictMemory
from overspill.runtime.visit import Visit
from overspill.spec.plan import Plan
from overspill.spec.report import LINK_LANES, StepFigures
from overspill.spec.schedule import Compute, Evict, Fetch, Lane, Schedule
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
        residency.device_work, residency.before_home_access = self.lanes.compute_so_far, self.finish
        self.verdict_memory = VerdictMemory(plan)
        self._visit: Visit | None = None
        self._most_device_bytes = 0
        """That any schedule has held so far: of one that still runs the peak may be to come."""
        self.guard = HostMemoryGuard(residency)
        self.updated: list[str] = []
        """Bundles of which the last schedule has begun to update a chunk, for the error that stops it half-way."""
        self.has_landed = False
        """Whether all updates of the last schedule, and all that they wrote back to homes, were complete when it ended, however it did."""
        self.applied: frozenset[Chunk] | None = None
        """Chunks whose update by the last schedule, which stopped, is home; None: one is home in part, or nobody has looked."""
        self.landing: Landing | None = None
        """What the last step that returned has left under way; None: nothing (rule 5)."""
        self.landing_failure: BaseException | None = None
        """What a landing failed with: its step's updates are home in part."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called in every schedule when all its ops are under way."""
        self.num_replays = 0
        """Blocks' passes that the last schedule replayed as CUDA graphs."""
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
        """Execute all ops; when it returns, all are complete, but for those that land later (rule 5).

        Args:
            updates: for the updates in this schedule: of the step's own gradients (immediate timing) or of the step before
                (pending timing). Needed if the schedule has any.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; the message says which weights were updated.
            StorageError: a transfer failed, of this step or of the landing of the one before.
        """
        self.forget_step()
        self._most_device_bytes = max(self._most_device_bytes, self.residency.peak_bytes[Tier.DEVICE])
        self.residency.reset_peaks()
        base, base_s, replays_before = self._mark(), time.perf_counter(), self.graphs.num_replays
        step = RunningStep(self, schedule, micro_batches, context, updates, Recorder(base, base_s, self.landing))
        self.updated, lands_later = step.updated, False
        try:
            with self._seeded_apart(), without_cycle_collection():  # a pass holds every lane up for tens of ms
                step.dispatch_all()
                self.while_waiting()
            _collect_young()
            lands_later = self._leave_under_way(step)
            failure = None if lands_later else self._settle(step, None)
        except BaseException as error:  # also Ctrl-C on the way into settling
            failure = self._settle(step, error)
        refusal = None if lands_later else step.judge_gated()
        failure = failure if failure is not None else refusal
        if failure is not None:
            raise failure
        if not lands_later:
            check_losses(micro_batches, context.step)
        step_s, self.num_replays = time.perf_counter() - base_s, self.graphs.num_replays - replays_before
        self.lazy_trace = LazyTrace(step.recorder, schedule, step.completions, step_s, landing=self.landing)
        self._judge_launches(schedule, step.completions, base, base_s)
        return self._figures(schedule, step_s), step.gradients

    def forget_step(self) -> None:
        """No schedule that was run before has to do with what comes now."""
        self.units.retained.drop_all()
        self.updated, self.has_landed, self.applied = [], False, None

    def finish(self) -> None:
        """Wait until the last step has landed; does nothing where it has.

        Raises:
            BaseException: what its landing failed with, once; homes are half-way through its updates then.
            KeyboardInterrupt: it may not have landed; nothing is lost.
        """
        failed_before = self.landing_failure
        self._end_landing()
        if self.landing_failure is not failed_before and self.landing_failure is not None:
            raise self.landing_failure

    def close(self) -> None:
        """Land, end the lanes and drop the recordings.

        Raises:
            BaseException: what the landing failed with, or Ctrl-C meanwhile; all is ended nevertheless.
        """
        failure: BaseException | None = None
        while self.landing is not None:
            try:
                self.finish()
            except BaseException as error:
                failure = error
        self.lanes.close()
        self.graphs.close()
        if failure is not None:
            raise failure

    def wait_on_device(self, work: Work) -> None:
        """Let the compute lane wait for `work`."""
        stream = self.lanes.stream(Lane.COMPUTE)
        for completion in work:
            self.lanes.use_wait(completion)
            completion.wait_on(stream)

    # -- ends --------------------------------------------------------------------------------------------------------

    def _leave_under_way(self, step: RunningStep) -> bool:
        """Rule 5: end the step when its compute has ended, if the rest may land later; else nothing is done."""
        schedule, group = step.schedule, self.lanes.group
        if self.serial or schedule.name != "train" or schedule.starts_pending or schedule.ends_pending:
            return False
        self._leave_visit()
        self._wait_for_compute()
        losses = [float(batch.loss) for batch in step.micro_batches if batch.loss is not None]
        if group.has_failed or not all(map(math.isfinite, [*losses, *step.gradients.land_sums()])):
            return False
        late = find_late(schedule, step.completions)
        if late is None or group.has_failed:
            return False
        base, base_s = step.recorder.base, step.recorder.base_s
        waits = step.recorder.waits
        self.landing = Landing(self.plan, schedule, late, waits, step=step.context.step, group=group, base=base, base_s=base_s)
        self.lanes.begin()
        return True

    def _end_landing(self) -> None:
        """Wait for the end of what the last step that returned has left, whatever it is, and note a failure."""
        landing = self.landing
        if landing is None:
            return
        failure = landing.settle()
        if failure is not None and landing.group is not self.lanes.group:  # else it is this schedule's own, which tells it
            self.landing_failure = failure
        self.landing = None
        landing.group.taken.clear()

    def _settle(self, step: RunningStep, failure: BaseException | None) -> BaseException | None:
        """Rule 4: nothing is under way when this returns; the failure to tell. Ctrl-C is told after that, however often it comes."""
        schedule, completions = step.schedule, step.completions
        failures: list[BaseException] | None = None
        is_first = True
        while failures is None:
            try:
                if failure is not None:
                    is_first, ends_queues = False, is_first and schedule.starts_pending
                    self.lanes.group.has_failed |= not ends_queues
                    self.residency.interrupt()
                self._leave_visit()
                if failure is not None:
                    self.model.unbind()
                self.lanes.drain()
                self._end_landing()
                failures = settle_all(completions)
            except Exception as error:  # of leaving the visit, which is left all the same
                failure = failure or error
            except BaseException as error:
                failure = error
        try:
            if failure is None:
                self._wait_for_compute()
            elif self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            failures.append(error)
        self.units.retained.drop_all()
        self.lanes.reset()
        self.residency.proceed()
        causes = [error for error in failures if not isinstance(error, Abandoned)]
        if failure is not None or causes:
            self.applied = find_applied(schedule, completions, step.begun, self.plan)
        self.has_landed = failure is None and not causes or have_homes_landed(schedule, completions, self.plan)
        if self.landing_failure is not None:  # of the step before: whatever this one met may come from it
            if failure is None or isinstance(failure, Exception):
                return self.landing_failure
            failure.add_note(str(self.landing_failure))
        if failure is not None and (not isinstance(failure, Exception) or not causes):
            return failure  # Ctrl-C, or what this thread itself met
        return causes[0] if causes else None

    def _has_room(self) -> bool:
        """Whether the device can hold the activations of one block beside all else: a recording keeps them while any unit runs."""
        return has_room(self.plan, max(self._most_device_bytes, self.residency.peak_bytes[Tier.DEVICE]))

    def _judge_launches(self, schedule: Schedule, completions: Sequence[Completion], base: torch.cuda.Event | None, base_s: float) -> None:
        """Tell `graphs` what bounded the blocks of the last training step, until it knows enough."""
        if schedule.name != "train" or not self.graphs.wants_judgement():  # a short text's launches say nothing of training
            return
        blocks = {unit.name for unit in self.plan.blocks}
        ran = [completions[index] for index, item in enumerate(schedule.ops) if isinstance(item.op, Compute) and item.op.unit in blocks]
        launches_s, spans_s = [item.issue_span_s(base_s) for item in ran], [item.span_s(base, base_s) for item in ran]
        self.graphs.judge(waited_s=waited_for_s(launches_s, spans_s), device_s=sum(end_s - begin_s for begin_s, end_s in spans_s))

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

    def _wait_for_compute(self) -> None:
        """Other lanes may go on: a landing is not waited for."""
        stream = self.lanes.stream(Lane.COMPUTE)
        if stream is not None:
            stream.synchronize()

    def _mark(self) -> torch.cuda.Event | None:
        """A point in the time of the device, whose compute has ended."""
        if self.device.type != "cuda":
            return None
        self._wait_for_compute()
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


def _collect_young() -> None:
    """What `without_cycle_collection` left for later, of this step alone and while its last work is under way."""
    if gc.isenabled():
        gc.collect(0)
