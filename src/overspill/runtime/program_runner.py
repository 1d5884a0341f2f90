"""A session's programs, one after the other: where their slots lie, which updates wait between them, and whether there may be a next one.

`Executor` runs one program; here is what one leaves for the next.

Rules:

1. A program's slots have their places before it runs: an arena where the budget has room for one, else slots lent by size.
2. `pending` are the updates that wait for the next program (`UpdateTiming.PENDING`). One that starts with them has made them all when it
   returns; one that does not is run after `flush`.
3. After a program that stopped there is a next one if weights are all from before its updates or all from after them, or if it is known
   of each chunk which it is, and those from before have their gradient still. Else `failure` says why there is none, and `check_usable`
   raises it.
4. A step that was made and is not counted yet is such a failure, too: Ctrl-C may come in between, and nobody would know its number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from overspill.errors import BudgetError, NonFiniteError
from overspill.runtime.compute import MicroBatch, StepContext
from overspill.runtime.executor import Executor
from overspill.runtime.gradients import Gradients
from overspill.runtime.programs import Programs
from overspill.runtime.updating import UpdateContext
from overspill.spec.report import StepFigures
from overspill.spec.schedule import Schedule
from overspill.spec.tensors import Tier


class ProgramRunner:
    """Runs `programs` by `executor`, in whose residency they leave what the next one finds."""

    def __init__(self, executor: Executor, programs: Programs) -> None:
        self.executor, self.residency, self.programs = executor, executor.residency, programs
        self.pending: UpdateContext | None = None
        """The updates that wait (rule 2); None: none do."""
        self.failure: str | None = None
        """Why no program may run any more (rule 3)."""
        self.is_closed = False
        """No program may run any more, from the moment on in which closing begins."""

    def train_program(self, tokens: tuple[int, ...]) -> Schedule:
        """The next step's program over micro-batches of these lengths. Where its slots would find no room beside gradients that wait in an
        arena, which was made for the whole step and cannot grow now, it is the one that begins after a flush."""
        if self.pending is not None:
            schedule = self.programs.train(tokens, pending=True)
            if all(pool.has_room_beside_lent(self._block_bytes(schedule, tier)) for tier, pool in self.residency.pools.items()):
                return schedule
        return self.programs.train(tokens, pending=False)

    def run(
        self,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        context: StepContext,
        updates: UpdateContext | None = None,
        *,
        number: int | None = None,
    ) -> tuple[StepFigures, Gradients]:
        """Execute a program.

        Args:
            updates: those that it makes (`Executor.run`).
            number: of the step that it makes: nothing may run from here until the caller has counted it (rule 4).
        """
        self.executor.forget_step()
        try:
            self._place_slots(schedule)
            result = self.executor.run(schedule, micro_batches, context, updates=updates)
            if schedule.starts_pending:
                self.pending = None
            if number is not None:
                self.failure = f"step {number} was made but not counted"
        except BaseException as error:
            self._recover(schedule, error)
            raise
        return result

    @contextlib.contextmanager
    def counting(self, number: int) -> Iterator[None]:
        """Inside, the caller counts the step that `run` has made (rule 4)."""
        try:
            yield
            self.failure = None
        except NonFiniteError:
            self.failure = None  # no weight was changed, and none waits
            raise
        except BaseException as error:
            self.failure = f"step {number} was made but not counted: {type(error).__name__}: {error}"
            raise

    def flush(self) -> None:
        """Run the updates that wait for the next step, or wait for those under way, so that the homes hold the newest weights."""
        self.check_usable()
        self.executor.finish()
        if self.pending is not None:
            context = StepContext(step=self.pending.step, seed=self.pending.seed, num_targets=1)
            self.run(self.programs.flush(), [], context, self.pending)

    def check_usable(self) -> None:
        """Raise RuntimeError unless a next program may run."""
        if self.is_closed:
            raise RuntimeError("this session is closed; its memory and files were given back")
        late = self.executor.landing_failure
        failure = self.failure if late is None else f"{type(late).__name__}: {late}"
        if failure is not None:
            raise RuntimeError(f"this session stopped half-way through an update and cannot go on: {failure}")

    def close(self) -> None:
        """Land what is under way and end the lanes.

        Raises:
            BaseException: as `Executor.close`.
        """
        self.is_closed = True
        self.residency.interrupt()  # nobody waits any more for room on a drive
        self.executor.close()

    # -- slots -------------------------------------------------------------------------------------------------------

    def _place_slots(self, schedule: Schedule) -> None:
        """Give the schedule's slots their places, or on a tier without room for an arena room to be lent by size."""
        for tier, pool in self.residency.pools.items():
            arena = self.programs.arena(schedule, tier)
            if arena is not None and pool.follow(arena.places, num_bytes=self.programs.slot_bytes(schedule, tier)):
                pool.unplanned.limit_bytes = None
            else:
                pool.leave()
                pool.free_block()
                pool.unplanned.limit_bytes = self.programs.limit_bytes(schedule, tier)

    def _block_bytes(self, schedule: Schedule, tier: Tier) -> int | None:
        """Of the arena that a schedule has on a tier; None: its slots are lent by size."""
        return None if self.programs.arena(schedule, tier) is None else self.programs.slot_bytes(schedule, tier)

    # -- after a program that stopped --------------------------------------------------------------------------------

    def _recover(self, schedule: Schedule, error: BaseException) -> None:
        """Go on if rule 3 allows it."""
        self.failure = f"{type(error).__name__}: {error}"  # until all is in order again: Ctrl-C may come once more
        with contextlib.suppress(Exception):  # `check_usable` tells it
            self.executor.finish()  # it stopped on the way into the schedule, or out of it
        untouched = not self.executor.updated
        if not untouched and schedule.starts_pending and self.executor.has_landed:
            # The step before is applied in full; only this one's gradients are lost.
            self.pending = None
            self.residency.drop_all_but_homes()
            self.failure = None
        elif untouched and not schedule.starts_pending and self.residency.drop_all_but_homes():
            self.failure = None
        elif schedule.starts_pending and self.pending is not None and (untouched or self.executor.applied is not None):
            # Chunk for chunk the step before is applied, or its gradient still waits.
            applied = self.pending.applied | (self.executor.applied or frozenset())
            with contextlib.suppress(BudgetError):
                if self.residency.drop_all_but_homes(pending=True, applied=applied):
                    self.pending.applied, self.failure = applied, None
