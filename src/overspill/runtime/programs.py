"""The programs of a session's plan: built for a batch's shapes, held against the rules, kept for the next batch like it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from overspill.planning import ArenaPlan, plan_arena, pool_events, resident_peaks
from overspill.scheduling import build_evaluation, build_flush, build_train_step, validate
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import Schedule
from overspill.spec.tensors import Tier

MOST_KEPT = 3
"""A step, its twin that starts with pending updates, an evaluation; each can take megabytes, so many shapes must not pile up."""


class Programs:
    """Schedules by what they are for; `tokens` are each micro-batch's samples times padded length."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict[tuple[str, tuple[int, ...], bool], _Program] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def train(self, tokens: tuple[int, ...], *, pending: bool) -> Schedule:
        return self._get(("train", tokens, pending), lambda: build_train_step(self.plan, tokens, starts_pending=pending))

    def whole_step(self) -> Schedule:
        """The training step over all that the plan was made for, as it is in a row of such steps."""
        return self.train(self.plan.longest_step, pending=self.plan.timing is UpdateTiming.PENDING)

    def evaluate(self, tokens: tuple[int, ...]) -> Schedule:
        return self._get(("evaluate", tokens, False), lambda: build_evaluation(self.plan, tokens))

    def flush(self) -> Schedule:
        return self._get(("flush", (), True), lambda: build_flush(self.plan))

    def _get(self, key: tuple[str, tuple[int, ...], bool], build: Callable[[], Schedule]) -> Schedule:
        if key not in self._kept:
            schedule = build()
            validate(schedule, self.plan)
            if len(self._kept) >= MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = _Program(schedule, self.plan)
        self._kept[key] = self._kept.pop(key)  # the one used last goes last: what runs now is not dropped for `_largest_arena_bytes`
        return self._kept[key].schedule

    def arena(self, schedule: Schedule) -> ArenaPlan | None:
        """Where one of these programs has its slots on the device; None if the device budget has no room for its arena, or for that of the
        whole step: gradients that wait in an arena would keep its memory from a program without one."""
        return self._of(schedule).arena if self._largest_arena_bytes is not None else None

    def slot_bytes(self, schedule: Schedule) -> int:
        """Memory of all slots on the device while one of these programs runs."""
        arena = self.arena(schedule)
        return self.least_pool_bytes(schedule) if arena is None else max(arena.num_bytes, self._largest_arena_bytes or 0)

    @functools.cached_property
    def _largest_arena_bytes(self) -> int | None:
        """Of the whole step: an arena of this size need not grow while gradients wait in it. None if the budget has no room for it."""
        arena = self._of(self.whole_step()).arena
        return arena.num_bytes if arena is not None else None

    def least_pool_bytes(self, schedule: Schedule) -> int:
        """The least that the device's pool must hold while one of these programs runs without an arena."""
        return self._of(schedule).arena_plan.least_bytes

    def _of(self, schedule: Schedule) -> _Program:
        return next(program for program in self._kept.values() if program.schedule is schedule)


class _Program:
    def __init__(self, schedule: Schedule, plan: Plan) -> None:
        self.schedule, self.plan = schedule, plan
        self.arena_plan = plan_arena(pool_events(schedule, plan), plan)

    @functools.cached_property
    def arena(self) -> ArenaPlan | None:
        """Walks the program once, and not at every step."""
        budget, extra_bytes = self.plan.device_budget_bytes, self.arena_plan.num_bytes - self.arena_plan.least_bytes
        if budget is not None and extra_bytes:
            peak = resident_peaks(self.schedule, self.plan)[Tier.DEVICE]
            if peak + extra_bytes > budget:
                return None
        return self.arena_plan
