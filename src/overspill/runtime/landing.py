"""What a step has left under way when it returned, and how whoever comes next keeps clear of it.

Without clip a step has done its part when its last gradient is computed and all its losses and gradients are known to be finite. The
last gradients may then still be on their way to the host, chunks wait for their update, and what was updated is written home. Nothing
of that can be refused any more; it can run under the next step's forward, which needs each bundle only when it comes to it.

Words:

* **landing**: the ops of one schedule that had not ended when its step returned. A step **has landed** when they have.

Rules:

1. An op of the next schedule that reads a home which the landing still writes, or writes one that it still reads or writes, waits for
   those ops (`Landing.before`). All other memory changes hands with the work that uses it (`runtime/residency`, rule 6).
2. The landing has ended when the next schedule's first `Compress` or `Update` is dispatched. So verdicts, and whatever else a backward
   has, are of one step at a time.
3. Everybody else waits for it before he looks at a home (`Executor.finish`).
4. A landing's jobs are a group of their own (`runtime/lanes`): a failure of the next step, or Ctrl-C in it, stops none of them.
5. A landing fails by storage, or by a mistake of ours. That is told once, as of its step, by the next call of the session; homes are
   then half-way through an update, and the session cannot go on.
6. It holds nothing of the landing before it: the memory of steps gone by is given back.

Costs: one look at each op that had not ended, on its lane, when the step returned.

A bundle's update comes when its gradient does, so the first blocks are updated last and read first. What can hide under the next forward
is what lies before the first unit whose update is not on the device (`PlanRequest.device_states_bytes`), and what the plan has put off to
the step's end (`Plan.deferred`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import torch

from overspill.errors import StorageError
from overspill.runtime.lanes import Abandoned, Completion, JobGroup, settle_all
from overspill.spec.plan import Plan
from overspill.spec.schedule import Compute, Evict, Fetch, Free, Lane, Op, Piece, Role, Schedule, Update, effects, home_tier
from overspill.spec.tensors import Tier
from overspill.spec.trace import Span

UNORDERED = (Lane.SSD_READ, Lane.SSD_WRITE)
"""Lanes whose transfers may overtake each other."""

Chunk = tuple[str, int]
"""Bundle, and number of the chunk in it."""


class Landing:
    """The end of one step; made by the executor, and belongs to it.

    Args:
        late: op and completion of all that had not ended, in program order.
        waits: of every op of the schedule, what it waited for, buffers that it filled included.
        group: of the step's jobs.
        base, base_s: the step's begin, by the device and by `time.perf_counter`.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        late: Sequence[tuple[int, Completion]],
        waits: Sequence[Sequence[Completion]],
        *,
        step: int,
        group: JobGroup,
        base: torch.cuda.Event | None,
        base_s: float,
    ) -> None:
        self.schedule, self.step, self.group = schedule, step, group
        self._late = tuple(late)
        self._left = collections.deque(completion for _, completion in late)
        numbers = {id(completion): index for index, completion in late}
        self._waits = {index: [numbers[id(wait)] for wait in waits[index] if id(wait) in numbers] for index, _ in late}
        """Of its ops, for one another."""
        self._base, self._base_s = base, base_s
        self._plan = plan
        self._failure: BaseException | None = None
        self._readers: dict[tuple[Piece, Tier], list[Completion]] = {}
        self._writers: dict[tuple[Piece, Tier], list[Completion]] = {}
        for index, completion in late:
            effect = effects(schedule.ops[index].op, plan)
            written = set(effect.written)
            for keys, users in ((written, self._writers), (set(effect.reads) - written, self._readers)):
                for piece, tier in keys:
                    if _is_home(piece, tier, plan):
                        users.setdefault((piece, tier), []).append(completion)
        self._writes_device = any(tier is Tier.DEVICE for _, tier in self._writers)

    @property
    def late(self) -> tuple[Completion, ...]:
        """Of the ops that had not ended when the step returned."""
        return tuple(completion for _, completion in self._late)

    @property
    def is_over(self) -> bool:
        """Whether all have ended, well or not."""
        while self._left and self._left[0].is_done:
            self._left.popleft()
        return not self._left

    def before(self, op: Op) -> list[Completion]:
        """What `op` of the next schedule has to wait for (rule 1)."""
        if isinstance(op, Free) or (isinstance(op, Compute) and not self._writes_device):
            return []
        effect = effects(op, self._plan)
        found: list[Completion] = []
        for key in effect.reads:
            found += self._writers.get(key, ())
        for key in effect.written:
            found += [*self._writers.get(key, ()), *self._readers.get(key, ())]
        return [completion for completion in dict.fromkeys(found) if not completion.is_done]

    def settle(self) -> BaseException | None:
        """Wait for the end of all; the failure to tell (rule 5) if there was one.

        Raises:
            KeyboardInterrupt: this thread was told to stop waiting; settle again.
        """
        failures = settle_all(self.late)
        cause = next((error for error in failures if not isinstance(error, Abandoned)), None)
        if self._failure is None and cause is not None:
            self._failure = as_of_step(cause, self.step)
        return self._failure

    def spans(self, base_s: float) -> Iterator[tuple[Span, Completion]]:
        """Those of its ops that were under way at `base_s`, in seconds after it, numbered below -1; all have ended."""
        shift_s, behind = self._base_s - base_s, len(self.schedule.ops) + 1
        for index, completion in self._late:
            item = self.schedule.ops[index]
            begin_s, end_s = completion.span_s(self._base, self._base_s)
            begin_s, end_s = begin_s + shift_s, end_s + shift_s
            if end_s <= 0:
                continue
            num_bytes = item.op.num_bytes if isinstance(item.op, Fetch | Evict) else 0
            waits = tuple(wait - behind for wait in self._waits[index])
            yield Span(index - behind, item.lane, begin_s, end_s, begin_s, begin_s, num_bytes, waits), completion


def find_late(schedule: Schedule, completions: Sequence[Completion]) -> list[tuple[int, Completion]] | None:
    """The ops of a schedule that are still under way, in program order; None if one of those that have ended has failed.

    All of lane `compute` have ended.
    """
    late: list[tuple[int, Completion]] = []
    ended = {Lane.COMPUTE}
    for index in range(len(completions) - 1, -1, -1):
        item, completion = schedule.ops[index], completions[index]
        if item.lane in ended or isinstance(item.op, Free):
            continue
        if not completion.is_done:
            late.append((index, completion))
        elif completion.settle() is not None:
            return None
        elif item.lane not in UNORDERED:
            ended.add(item.lane)
    late.reverse()
    return late


def have_homes_landed(schedule: Schedule, completions: Sequence[Completion], plan: Plan) -> bool:
    """Whether every op that changes a parameter or a state, or copies one home, has ended well; all that were begun have settled."""
    for index, item in enumerate(schedule.ops):
        match item.op:
            case Update():
                changes = True
            case Fetch(piece=piece, target=target) | Evict(piece=piece, target=target):
                changes = _is_home(piece, target, plan)
            case _:
                changes = False
        if changes and (index >= len(completions) or completions[index].settle() is not None):
            return False
    return True


def find_applied(schedule: Schedule, completions: Sequence[Completion], begun: Sequence[Chunk], plan: Plan) -> frozenset[Chunk] | None:
    """The chunks of `begun`, if all of their updates have ended well and all that these changed is home; None if not. All have settled."""
    homeward: dict[Chunk, bool] = {}
    for index, item in enumerate(schedule.ops):
        match item.op:
            case Update(bundle=bundle, chunk=chunk):
                pass
            case Fetch(piece=piece, target=target) | Evict(piece=piece, target=target) if _is_home(piece, target, plan):
                bundle, chunk = piece.owner, piece.index
            case _:
                continue
        is_good = index < len(completions) and completions[index].settle() is None
        homeward[bundle, chunk] = homeward.get((bundle, chunk), True) and is_good
    return frozenset(begun) if all(homeward[chunk] for chunk in begun) else None


def _is_home(piece: Piece, tier: Tier, plan: Plan) -> bool:
    """Of a parameter or a state: what is at home between steps."""
    return piece.role in (Role.PARAMETER, Role.STATE) and home_tier(plan, piece.owner, piece.role) is tier


def as_of_step(error: BaseException, step: int) -> BaseException:
    """A landing's failure, told later than its step returned (rule 5)."""
    text = f"step {step} had returned, and failed while its last updates were written home"
    if isinstance(error, StorageError):
        told = StorageError(f"{text}: {error}")
        told.__cause__ = error
        return told
    error.add_note(text)
    return error
