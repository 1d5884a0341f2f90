"""Hold a schedule against its rules before anything runs (the rules: `spec.schedule`).

Deadlock. Every wait points to an earlier op of one total order (rule 2), lanes are in-order queues of that same order, and
the order itself stays within the budgets (rule 4): the earliest op that is not done can always run, so an executor that
lends a buffer to ops in this order cannot be stuck.
"""

from __future__ import annotations

from overspill.errors import ScheduleError
from overspill.scheduling.walk import Walk
from overspill.spec.plan import Plan
from overspill.spec.schedule import Piece, Schedule, effects
from overspill.spec.tensors import Tier


def validate(schedule: Schedule, plan: Plan) -> None:
    """Check all rules.

    Raises:
        ScheduleError: the first rule that is broken, with the op's index and the piece.
    """
    walk = Walk(plan, schedule)
    writers: dict[tuple[Piece, Tier], int] = {}
    for index, scheduled in enumerate(schedule.ops):
        late = [wait for wait in scheduled.waits if not 0 <= wait < index]
        if late:
            raise ScheduleError(f"op {index} waits for op {late[0]}, which is not earlier (rule 2)")
        effect = effects(scheduled.op, plan)
        for key in effect.reads:
            writer = writers.get(key)
            if writer is not None and writer not in scheduled.waits:
                raise ScheduleError(f"op {index} reads {key[0]} on {key[1]} but does not wait for op {writer}, which made it (rule 2)")
        walk.apply(index, scheduled)
        for key in effect.changes:
            writers[key] = index
        for key in effect.drops:
            writers.pop(key, None)
        for piece, tier, _ in effect.creates:
            writers[piece, tier] = index
    walk.finish()
    walk.check_budgets()
