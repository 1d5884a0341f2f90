"""One schedule while it runs: what each of its ops does, on which lane, and what it waits for.

The rules are the executor's (`runtime/executor`). This is the thread that dispatches; a job of another lane is a function and its waits.

Retries: when the device is out of memory, an op that has not yet added to a gradient is run again after idle buffers were freed
(its inputs are still held), never the whole step; and then again as long as there are recordings (`runtime/graphs`) or graphs of autograd
(`runtime/retained`) that can be given up. It is run again when the error is gone, and with it the frames that hold half a graph.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from overspill.huggingface import share_equal_tensors
from overspill.runtime.compute import MicroBatch, StepContext, forget_casts
from overspill.runtime.gradients import Gradients
from overspill.runtime.landing import Chunk, Landing
from overspill.runtime.lanes import Abandoned, Completion, Job
from overspill.runtime.residency import Work
from overspill.runtime.trace import Recorder
from overspill.runtime.updating import UpdateContext
from overspill.runtime.verdicts import Verdicts
from overspill.runtime.visit import TORCH_DTYPES
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Op, Phase, Piece, Role, Schedule, ScheduledOp, Update
from overspill.spec.tensors import Tier
from overspill.tiers import Transfer

if TYPE_CHECKING:
    from overspill.runtime.executor import Executor


class RunningStep:
    """One schedule of an executor while it runs."""

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
        self.retained = executor.units.retained
        self._wait_in_job = functools.partial(_wait_in_job, executor, recorder)  # no method: a cycle would hold the step's tensors
        self.gradients = Gradients(self.plan, self.residency, self._wait_in_job)
        self.verdicts = Verdicts(self.plan, context, executor.verdict_memory)
        self.completions: list[Completion] = []
        """Of the ops dispatched so far; those of a `Free` are done at once."""
        self.updated: list[str] = []
        """Bundles of which a chunk's update has begun, or has been given to the host's core, which makes it in any case."""
        self.begun: list[Chunk] = []
        """Those chunks."""
        self.gated: list[str] = []
        """Those with an update on the device, which their verdict may have stopped there."""

    def dispatch_all(self) -> None:
        """Go through the program."""
        for index, item in enumerate(self.schedule.ops):
            assert all(wait < index for wait in item.waits), f"op {index} waits for a later op"
            self.recorder.submitted_s.append(time.perf_counter())
            completion = self._dispatch(item)
            self.completions.append(completion)
            if self.executor.serial:
                completion.wait()
            if self.lanes.group.has_failed:
                raise Abandoned("another op of the step failed")
        self.executor.finish()

    def _waits(self, item: ScheduledOp) -> list[Completion]:
        return [self.completions[wait] for wait in item.waits]

    def _dispatch(self, item: ScheduledOp) -> Completion:
        op, waits = item.op, self._waits(item)
        self.recorder.waits.append(waits)
        landing = self.executor.landing
        if landing is not None:
            self._keep_clear(landing, op, waits)
        match op:
            case Fetch() | Evict():
                return self._move(op, item.lane, waits)
            case Free():
                if op.piece.role is Role.PARAMETER and op.tier is Tier.DEVICE:
                    self.executor.leave_visit_of(op.piece.owner)
                if op.tier is Tier.DEVICE and self.residency.is_of_allocator(op.piece):
                    self.executor.wait_on_device(waits)  # its memory is handed on in the order of compute
                if op.piece.role is Role.ACTIVATIONS and op.tier is Tier.DEVICE:
                    self.retained.let_go(op.piece)
                self.residency.drop(op.piece, op.tier, waits)
                return self.lanes.done(item.lane)
            case Compute():
                self.executor.guard.look()
                completion = self.lanes.run_here(functools.partial(self._compute, op), waits)
                for piece in op.consumed:
                    self.residency.drop(piece, Tier.DEVICE, [completion])
                return completion
            case Compress():
                return self.lanes.run_here(functools.partial(self._compress, op), waits)
            case Update():
                return self._update(op, item.lane, waits)

    def _keep_clear(self, landing: Landing, op: Op, waits: list[Completion]) -> None:
        """Of what the step before has left under way (`runtime/landing`, rules 1 and 2)."""
        if isinstance(op, Compress | Update):
            waits.extend(completion for completion in landing.late if not completion.is_done)
            self.executor.finish()
        elif landing.is_over:
            self.executor.finish()
        else:
            waits.extend(landing.before(op))

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
        elif piece.role is Role.ACTIVATIONS and op.source is Tier.DEVICE:
            job = self.retained.copier_out(piece, residency.bytes_of(piece, Tier.HOST))
        else:
            job = _copy(residency.bytes_of(piece, op.target), residency.bytes_of(piece, op.source))
        if piece.role is Role.ACTIVATIONS and op.target is Tier.DEVICE:
            self.retained.land(piece, residency.bytes_of(piece, Tier.DEVICE))
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
        num_tries = 0
        while not self._runs(run, is_last=num_tries > 0 and not self._can_give_up(), added=added):
            if num_tries:
                self._give_up_some()
            gc.collect()
            self.residency.trim()
            torch.cuda.empty_cache()
            num_tries += 1
        for piece, size in op.produced:
            if piece.role is Role.ACTIVATIONS:
                self.residency.put_activations(piece, size)
        if op.unit == self.plan.units[0].name and op.phase is Phase.FORWARD:
            self._share_arguments(self.micro_batches[: op.micro_batch + 1])

    def _can_give_up(self) -> bool:
        """Whether anything is on the device that makes the step quicker and is not needed for it."""
        return len(self.executor.graphs) + len(self.retained) > 0

    def _give_up_some(self) -> None:
        if len(self.executor.graphs):
            self.executor.graphs.give_up("the device has no memory left beside their recordings")
        else:
            self.retained.give_up_half()

    def _runs(self, run: Callable[[], None], *, is_last: bool, added: int) -> bool:
        """Whether an op ran; not if the device was out of memory, and it may be tried again."""
        try:
            run()
        except torch.OutOfMemoryError:
            if is_last or self.gradients.num_added != added:
                raise
            return False
        finally:
            forget_casts(self.executor.device)
        return True

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

    def _run_update(self, op: Update, updates: UpdateContext, copies: dict[Role, torch.Tensor]) -> Transfer | None:
        """On the lane that updates."""
        if (op.bundle, op.chunk) in updates.applied:
            return None
        gates = None
        if op.tier is Tier.DEVICE:
            self.gated.append(op.bundle)
            gates = self.verdicts.gates(op.bundle)
        else:
            self.verdicts.check(op.bundle, self.updated)
        self.begun.append((op.bundle, op.chunk))
        self.updated.append(op.bundle)  # before: Ctrl-C is told as soon as the native call has returned
        if op.tier is Tier.HOST:
            return self.executor.updater.start(op, updates, copies)
        self.executor.updater.run(op, updates, copies, gates=gates)
        return None

    def judge_gated(self) -> BaseException | None:
        """When all has settled: take updates on the device that were stopped there off the list of those made; why the first one was."""
        stopped = [bundle for bundle in dict.fromkeys(self.gated) if self.verdicts.find_refusal(bundle, ()) is not None]
        self.updated[:] = [bundle for bundle in self.updated if bundle not in stopped]
        return self.verdicts.find_refusal(stopped[0], self.updated) if stopped else None


def _wait_in_job(executor: Executor, recorder: Recorder, work: Work) -> None:
    """Let the compute lane wait for `work`, as a part of the op that is dispatched now."""
    recorder.waits[-1].extend(work)
    executor.wait_on_device(work)


def _copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        target.copy_(source, non_blocking=True)

    return run
