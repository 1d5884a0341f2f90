"""The programs of a session's plan: built for a batch's shapes, held against the rules, kept for the next batch like it."""

from __future__ import annotations

from collections.abc import Callable

from overspill.planning import pool_demand, pool_events
from overspill.scheduling import build_evaluation, build_flush, build_train_step, validate
from overspill.spec.plan import Plan
from overspill.spec.schedule import Schedule
from overspill.spec.tensors import Tier

MOST_KEPT = 3
"""A step, its twin that starts with pending updates, an evaluation; each can take megabytes, so many shapes must not pile up."""


class Programs:
    """Schedules by what they are for; `tokens` are each micro-batch's samples times padded length."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict[tuple[str, tuple[int, ...], bool], tuple[Schedule, int]] = {}
        """With each, the most bytes of slots that it lends on the device."""

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
            self._kept[key] = (schedule, pool_demand(pool_events(schedule, self.plan))[Tier.DEVICE])
        return self._kept[key][0]

    def device_pool_bytes(self, schedule: Schedule) -> int:
        """The most bytes of slots that one of these programs lends on the device."""
        return next(size for kept, size in self._kept.values() if kept is schedule)
