"""The programs of a session's plan: built for a batch's shapes, held against the rules, kept for the next batch like it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from overspill.planning import pool_demand, pool_events, simulate
from overspill.scheduling import build_evaluation, build_flush, build_train_step, validate
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan
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
        return self._kept[key].schedule

    def device_pool_bytes(self, schedule: Schedule, *, steady: bool) -> int:
        """How much the device's pool may hold while one of these programs runs: the least there is.

        Args:
            steady: as much as finds every slot of the step before in its place, as far as the device budget has room.
        """
        program = next(program for program in self._kept.values() if program.schedule is schedule)
        return program.steady_pool_bytes if steady else program.demand.least_bytes


class _Program:
    def __init__(self, schedule: Schedule, plan: Plan) -> None:
        self.schedule, self.plan = schedule, plan
        self.demand = pool_demand(pool_events(schedule, plan))[Tier.DEVICE]
        """What it asks of the device's pool."""

    @functools.cached_property
    def steady_pool_bytes(self) -> int:
        """Walks the program once, and not at every step."""
        budget = self.plan.device_budget_bytes
        if budget is None:
            return self.demand.steady_bytes
        peak = simulate(self.schedule, self.plan, HardwareSpec()).device_resident_peak_bytes
        return min(self.demand.steady_bytes, self.demand.least_bytes + max(0, budget - peak))
