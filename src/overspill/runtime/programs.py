"""The programs of a session's plan: built for a batch's shapes, held against the rules, kept for the next batch like it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from overspill.planning import ArenaPlan, plan_arenas, pool_demand, pool_events, resident_peaks
from overspill.planning.space import host_room_bytes, pinned_room_bytes
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
        self._kept[key] = self._kept.pop(key)  # the one used last goes last: what runs now is not dropped for the whole step's arenas
        return self._kept[key].schedule

    def arena(self, schedule: Schedule, tier: Tier) -> ArenaPlan | None:
        """Where one of these programs has its slots on a tier; None if the budget there has no room for its arena, or for that of the whole
        step: gradients that wait in an arena would keep its memory from a program without one."""
        if not self._whole_step_fits[tier] or not self._fits(schedule, tier):
            return None
        return self.arena_plans(schedule)[tier]

    def slot_bytes(self, schedule: Schedule, tier: Tier) -> int:
        """Memory of all slots on a tier while one of these programs runs."""
        arena = self.arena(schedule, tier)
        return self.limit_bytes(schedule, tier) if arena is None else max(arena.num_bytes, self._whole_step_bytes[tier])

    def device_peak_bytes(self, schedule: Schedule) -> int:
        """Most bytes of pieces on the device while one of these programs runs."""
        return self._of(schedule).device_peak_bytes

    def limit_bytes(self, schedule: Schedule, tier: Tier) -> int:
        """What the pool of a tier may hold while one of these programs runs without an arena: on the device the least; in host memory,
        where pinning a slot anew takes longer than a copy, each size at its own most if the budget has room for it."""
        least_bytes = self.arena_plans(schedule)[tier].least_bytes
        if tier is Tier.DEVICE:
            return least_bytes
        steady_bytes, room_bytes = self._of(schedule).steady_host_bytes, self._host_room_bytes
        return max(least_bytes, steady_bytes if room_bytes is None else min(steady_bytes, room_bytes))

    def arena_plans(self, schedule: Schedule) -> Mapping[Tier, ArenaPlan]:
        """Where one of these programs would have its slots if there were room for arenas; worked out when it is first asked for."""
        program = self._of(schedule)
        if program.arena_plans is None:
            most_bytes = None if schedule is self.whole_step() else self._whole_step_bytes[Tier.HOST]
            program.arena_plans = plan_arenas(pool_events(schedule, self.plan), self.plan, most_host_bytes=most_bytes)
        return program.arena_plans

    @functools.cached_property
    def _whole_step_bytes(self) -> Mapping[Tier, int]:
        """Arenas of this size need not grow while gradients wait in them."""
        return {tier: arena.num_bytes for tier, arena in self.arena_plans(self.whole_step()).items()}

    @functools.cached_property
    def _whole_step_fits(self) -> Mapping[Tier, bool]:
        whole = self.whole_step()
        return {tier: self._fits(whole, tier) for tier in (Tier.DEVICE, Tier.HOST)}

    def _fits(self, schedule: Schedule, tier: Tier) -> bool:
        """Whether the budgets have room for an arena. One that can be pinned in part alone is none: slots by size can."""
        arena, plan = self.arena_plans(schedule)[tier], self.plan
        if tier is Tier.HOST:
            return all(room is None or arena.num_bytes <= room for room in (self._host_room_bytes, self._pinned_room_bytes))
        extra_bytes = arena.num_bytes - arena.least_bytes
        if plan.device_budget_bytes is None or not extra_bytes:
            return True
        return self._of(schedule).device_peak_bytes + extra_bytes <= plan.device_budget_bytes

    @functools.cached_property
    def _host_room_bytes(self) -> int | None:
        """Walks all homes once, and not at every step."""
        return host_room_bytes(self.plan)

    @functools.cached_property
    def _pinned_room_bytes(self) -> int | None:
        return pinned_room_bytes(self.plan)

    def _of(self, schedule: Schedule) -> _Program:
        return next(program for program in self._kept.values() if program.schedule is schedule)


class _Program:
    def __init__(self, schedule: Schedule, plan: Plan) -> None:
        self.schedule, self.plan = schedule, plan
        self.arena_plans: Mapping[Tier, ArenaPlan] | None = None

    @functools.cached_property
    def device_peak_bytes(self) -> int:
        """Of the pieces there. Walks the program once, and not at every step."""
        return resident_peaks(self.schedule, self.plan)[Tier.DEVICE]

    @functools.cached_property
    def steady_host_bytes(self) -> int:
        """Of slots by size, each size at its own most."""
        return pool_demand(pool_events(self.schedule, self.plan))[Tier.HOST].steady_bytes
