"""Finds races without a GPU and without luck: what touches a buffer must come after what touched it before, by waits alone.

On the CPU compute is done when it is dispatched, so a wait that is missing changes nothing there; on a GPU the kernels run later and
the bits are wrong, sometimes. `watch` therefore looks at waits instead of results. While a schedule is dispatched it writes down, op
by op, which bytes each reads and writes (from `effects` and the residency's buffers) and what it waits for (the schedule's waits and
those that came with buffers), as if nothing ever ended before the step does. Then two ops that touch the same bytes, one of them
writing, must be ordered: by a chain of waits, or by a lane whose work ends in order (all but the SSD's, whose transfers overtake
each other). The host's updates end in order, but one may begin before the one before it has ended (`runtime/lanes`, rule 6).

Steps that overlap are looked at in pairs: where a step has returned with work under way, as if that were all of its ops but compute, its
ops and those of the next schedule are one list. What orders them are the waits for homes and buffers, the lanes, and the place in the
next schedule at which the step before has landed.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any

import pytest

import overspill
from overspill.runtime.executor import Executor
from overspill.runtime.lanes import Completion
from overspill.runtime.step import RunningStep
from overspill.spec.schedule import MOST_UNDER_WAY, Compress, Compute, Evict, Fetch, Free, Lane, Piece, Role, Update, effects
from overspill.spec.tensors import Tier

UNORDERED = (Lane.SSD_READ, Lane.SSD_WRITE)


class SoFar:
    """Stands for all compute that was dispatched until now, the op that is dispatched included."""

    lane = Lane.COMPUTE
    is_done = False
    is_issued = True

    def __init__(self, index: int) -> None:
        self.index = index

    def wait(self) -> None: ...

    def wait_on(self, stream: object) -> None: ...

    def settle(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Access:
    op: int
    space: Hashable
    """Memory, or one record on the SSD."""
    start: int
    end: int
    writes: bool


@dataclasses.dataclass
class Races:
    """What `watch` saw."""

    found: list[str] = dataclasses.field(default_factory=list)
    num_ops: int = 0
    num_pairs: int = 0
    """Of accesses that were held against each other."""
    num_across: int = 0
    """Of these, of two schedules."""


@contextlib.contextmanager
def watch(session: overspill.Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Races]:
    """Look at every schedule that the session runs inside."""
    races = Races()
    steps: dict[int, _StepWatch] = {}
    dispatch, dispatch_all, finish = RunningStep._dispatch, RunningStep.dispatch_all, Executor.finish
    last: list[_StepWatch] = []

    def watched(self: Any, item: Any) -> Completion:
        return steps[id(self)].dispatch(dispatch, item)

    def all_watched(self: Any) -> None:
        before = last.pop() if last and self.executor.landing is not None else None
        steps[id(self)] = watch = _StepWatch(self, before)
        dispatch_all(self)
        del steps[id(self)]
        watch.judge(races)
        last[:] = [watch]

    def finish_watched(self: Executor) -> None:
        if self.landing is not None:
            for watch in steps.values():
                watch.landed_at = _StepWatch.index
            if not steps:  # between two schedules
                last.clear()
        finish(self)

    with monkeypatch.context() as patch:
        # Whatever has ended on this machine may be under way on another: no wait is left out because it is over.
        patch.setattr(Completion, "is_done", property(lambda self: False))
        patch.setattr(RunningStep, "_dispatch", watched)
        patch.setattr(RunningStep, "dispatch_all", all_watched)
        patch.setattr(Executor, "finish", finish_watched)
        patch.setattr(session.residency, "before_home_access", session.executor.finish)
        patch.setattr(session.residency, "device_work", lambda: (SoFar(_StepWatch.index),))
        yield races


class _StepWatch:
    """One schedule. Ops are numbered on from schedule to schedule.

    Args:
        before: the schedule whose work was under way when this one began.
    """

    index = -1
    """Of the op that is dispatched now; one step runs at a time."""

    def __init__(self, step: Any, before: _StepWatch | None) -> None:
        self.step = step
        self.accesses: list[Access] = []
        self.alive: list[object] = []
        """Every tensor that was seen: its address must not be used again for another one within the step."""
        self.before = before
        if before is not None:
            before.before = None
        self.first = _StepWatch.index + 1
        self.landed_at: int | None = None
        """Op before whose work the step before had landed."""

    def dispatch(self, original: Any, item: Any) -> Completion:
        _StepWatch.index += 1
        op = item.op
        effect = effects(op, self.step.plan)
        if not isinstance(op, Free):
            for piece, tier in effect.reads:
                self.note(piece, tier, writes=(piece, tier) in effect.changes)
            if isinstance(op, Update):
                self.note(Piece(role=Role.GRADIENT, owner=op.bundle, index=op.chunk), op.tier, writes=False)
        existed = {key for key in ((piece, tier) for piece, tier, _ in effect.creates) if self.step.residency.has(*key)}
        for piece, tier in existed if not isinstance(op, Free) else ():
            self.note(piece, tier, writes=True)
        completion = original(self.step, item)
        for piece, tier, _ in effect.creates:
            if (piece, tier) not in existed and not (isinstance(op, Compress) and op.is_in_place):
                self.note(piece, tier, writes=True)
        return completion

    def note(self, piece: Piece, tier: Tier, *, writes: bool) -> None:
        residency = self.step.residency
        if tier is Tier.SSD:
            store, name = residency.record_of(piece)
            self.accesses.append(Access(_StepWatch.index, (id(store), name), 0, 1, writes))
            return
        tensor = residency.bytes_of(piece, tier)
        self.alive.append(tensor)
        self.accesses.append(Access(_StepWatch.index, "memory", tensor.data_ptr(), tensor.data_ptr() + tensor.numel(), writes))

    def judge(self, races: Races) -> None:
        watches = [self.before, self] if self.before is not None else [self]
        first = watches[0].first
        ops = [item for watch in watches for item in watch.step.schedule.ops]
        before = self.ancestors(watches)
        races.num_ops += len(self.step.schedule.ops)
        by_space: dict[Hashable, list[Access]] = {}
        for access in (access for watch in watches for access in watch.accesses):
            by_space.setdefault(access.space, []).append(access)
        for accesses in by_space.values():
            for one, other in _overlapping(accesses):
                early, late = sorted((one, other), key=lambda access: access.op)
                if early.op == late.op or not (early.writes or late.writes) or late.op < self.first:  # judged before
                    continue
                races.num_pairs += 1
                races.num_across += early.op < self.first
                if not before[late.op - first] >> (early.op - first) & 1:
                    names = [_name(ops[access.op - first]) for access in (early, late)]
                    where = "of the step before" if early.op < self.first else f"op {early.op - self.first}"
                    what = f"{where} ({names[0]}) and op {late.op - self.first} ({names[1]})"
                    races.found.append(f"{what} touch {late.space} {late.start:#x} and nothing orders them")

    def ancestors(self, watches: list[_StepWatch]) -> list[int]:
        """For every op of the watches the set of ops that have ended when it begins, as bits."""
        completions = [completion for watch in watches for completion in watch.step.completions]
        numbers = {id(completion): index for index, completion in enumerate(completions)}
        first, start = watches[0].first, self.first - watches[0].first
        compute_before = 0
        before: list[int] = []
        ended: list[int] = []
        """What has ended when an op has."""
        last_of_lane: dict[Lane, list[int]] = {}
        last_compute: list[int] = []
        items = [(item, waits) for watch in watches for item, waits in zip(watch.step.schedule.ops, watch.step.recorder.waits, strict=True)]
        for index, (item, waits) in enumerate(items):
            if index == start:  # the step before returned when its compute had ended
                for number in last_compute:
                    compute_before |= ended[number]
            earlier = compute_before
            if index >= start > 0 and self.landed_at is not None and index + first >= self.landed_at:
                earlier |= (1 << start) - 1
            for wait in waits:
                if isinstance(wait, SoFar):  # the last compute op up to it, and so all before that
                    position = bisect.bisect_right(last_compute, wait.index - first) - 1
                    number = last_compute[position] if position >= 0 else None
                else:
                    number = numbers.get(id(wait))
                if number is not None and number < index:
                    earlier |= ended[number]
            in_order = 0
            if item.lane not in UNORDERED and not isinstance(item.op, Free):
                lane = last_of_lane.setdefault(item.lane, [])
                for number in lane[-1:]:
                    earlier |= before[number]
                for number in lane[: len(lane) + 1 - MOST_UNDER_WAY.get(item.lane, 1)][-1:]:
                    earlier |= ended[number]
                in_order = ended[lane[-1]] if lane else 0
                lane.append(index)
            before.append(earlier)
            ended.append(earlier | in_order | 1 << index)
            if item.lane is Lane.COMPUTE and not isinstance(item.op, Free):
                last_compute.append(index)
        return before


def _overlapping(accesses: list[Access]) -> Iterator[tuple[Access, Access]]:
    """Pairs that share a byte."""
    open_now: list[Access] = []
    for access in sorted(accesses, key=lambda item: (item.start, item.end)):
        open_now = [other for other in open_now if other.end > access.start]
        for other in open_now:
            yield other, access
        open_now.append(access)


def _name(item: Any) -> str:
    op = item.op
    if isinstance(op, Fetch | Evict):
        return f"{item.lane.value} {op.piece}"
    if isinstance(op, Compute):
        return f"{op.phase.value} {op.unit} {op.micro_batch}"
    return f"{type(op).__name__.lower()} {getattr(op, 'bundle', '')}"
