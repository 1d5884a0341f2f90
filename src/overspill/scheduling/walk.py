"""Walk a schedule on paper: which copies exist, how new they are, how many bytes each tier holds.

The validator and the simulator share this walk; it enforces rules 1 and 3 to 6 of `spec.schedule` as it goes.
"""

from __future__ import annotations

from overspill.errors import ScheduleError
from overspill.spec.plan import Plan
from overspill.spec.schedule import Evict, Fetch, Free, Op, Piece, Schedule, ScheduledOp, effects, initial_copies, link_lane
from overspill.spec.tensors import Tier
from overspill.units import format_bytes

_HEIGHT = {Tier.SSD: 0, Tier.HOST: 1, Tier.DEVICE: 2}
_BUDGET_FLAG = {Tier.DEVICE: "--device-budget", Tier.HOST: "--host-budget", Tier.SSD: "--ssd-budget"}


class Walk:
    """The copies of all pieces while ops are applied one by one."""

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        self.plan = plan
        self.schedule = schedule
        self.sizes = initial_copies(plan, pending=schedule.starts_pending)
        self.homes = set(self.sizes)
        self.newest: dict[Piece, int] = {piece: 0 for piece, _ in self.sizes}
        self.versions: dict[tuple[Piece, Tier], int] = dict.fromkeys(self.sizes, 0)
        self.resident_bytes = dict.fromkeys(Tier, 0)
        for (_, tier), size in self.sizes.items():
            self.resident_bytes[tier] += size
        self.peak_bytes = dict(self.resident_bytes)

    def apply(self, index: int, scheduled: ScheduledOp) -> None:
        """Check op `index` and take its effects.

        Raises:
            ScheduleError: a rule is broken; the message has the op's index and the piece.
        """
        op = scheduled.op
        effect = effects(op, self.plan)
        for piece, tier in effect.reads:
            self._check_readable(index, op, piece, tier)
        if isinstance(op, Fetch | Evict):
            self._check_hop(index, scheduled)
        if isinstance(op, Free) and (op.piece, op.tier) in self.homes and op.piece.role.value != "gradient":
            raise ScheduleError(f"op {index} frees the home of {op.piece} on {op.tier} (rule 5)")
        for piece, tier in effect.changes:
            self.newest[piece] += 1
            self.versions[piece, tier] = self.newest[piece]
        if effect.in_place:
            self._drop(index, effect.drops)
        for piece, tier, size in effect.creates:
            self._create(piece, tier, size, source=op.source if isinstance(op, Fetch | Evict) else None)
        if not effect.in_place:
            self._drop(index, effect.drops)

    def finish(self) -> None:
        """Rule 6.

        Raises:
            ScheduleError: a home is stale, or a copy is left that is none.
        """
        homes = set(initial_copies(self.plan, pending=self.schedule.ends_pending))
        left = sorted(f"{piece} on {tier}" for piece, tier in set(self.sizes) - homes)
        if left:
            raise ScheduleError(f"{len(left)} copies are left at the end of {self.schedule.name} (rule 6): {', '.join(left[:5])}")
        missing = sorted(f"{piece} on {tier}" for piece, tier in homes - set(self.sizes))
        if missing:
            raise ScheduleError(f"{len(missing)} homes are empty at the end of {self.schedule.name} (rule 6): {', '.join(missing[:5])}")
        stale = sorted(f"{piece} on {tier}" for piece, tier in homes if self.versions[piece, tier] != self.newest[piece])
        if stale:
            raise ScheduleError(f"{len(stale)} homes are stale at the end of {self.schedule.name} (rule 6): {', '.join(stale[:5])}")

    def _check_readable(self, index: int, op: Op, piece: Piece, tier: Tier) -> None:
        if (piece, tier) not in self.sizes:
            raise ScheduleError(f"op {index} ({type(op).__name__}) reads {piece} on {tier}, where it is not resident (rule 1)")
        if self.versions[piece, tier] != self.newest[piece]:
            raise ScheduleError(f"op {index} ({type(op).__name__}) reads a stale copy of {piece} on {tier} (rule 1)")

    def _check_hop(self, index: int, scheduled: ScheduledOp) -> None:
        op = scheduled.op
        assert isinstance(op, Fetch | Evict)
        step = _HEIGHT[op.target] - _HEIGHT[op.source]
        if step != (1 if isinstance(op, Fetch) else -1):
            raise ScheduleError(f"op {index} is a {type(op).__name__} of {op.piece} from {op.source} to {op.target} (rule 3)")
        if scheduled.lane is not link_lane(op.source, op.target):
            raise ScheduleError(f"op {index} moves {op.piece} on lane {scheduled.lane}, not its link's (rule 3)")
        if op.num_bytes != self.sizes[op.piece, op.source]:
            held = self.sizes[op.piece, op.source]
            raise ScheduleError(f"op {index} moves {op.num_bytes} B of {op.piece}, but the copy on {op.source} has {held} B (rule 3)")

    def _create(self, piece: Piece, tier: Tier, size: int, source: Tier | None) -> None:
        if (piece, tier) in self.sizes:
            self.resident_bytes[tier] -= self.sizes[piece, tier]
        self.sizes[piece, tier] = size
        self.resident_bytes[tier] += size
        self.peak_bytes[tier] = max(self.peak_bytes[tier], self.resident_bytes[tier])
        if source is None:
            self.newest[piece] = self.newest.get(piece, -1) + 1
            self.versions[piece, tier] = self.newest[piece]
        else:
            self.versions[piece, tier] = self.versions[piece, source]

    def _drop(self, index: int, drops: tuple[tuple[Piece, Tier], ...]) -> None:
        for key in drops:
            if key not in self.sizes:
                raise ScheduleError(f"op {index} drops {key[0]} on {key[1]}, where it is not resident (rule 5)")
            self.resident_bytes[key[1]] -= self.sizes.pop(key)
            del self.versions[key]

    def check_budgets(self) -> None:
        """Rule 4, for the peaks so far.

        Raises:
            ScheduleError: a tier's peak exceeds what the plan allows it.
        """
        for tier, budget in budgets(self.plan).items():
            if budget is not None and (peak := self.peak_bytes[tier]) > budget:
                needed, allowed = format_bytes(peak), format_bytes(budget)
                if needed == allowed:
                    needed, allowed = f"{peak:,} B", f"{budget:,} B"
                raise ScheduleError(
                    f"{self.schedule.name} needs {needed} on {tier}, the plan allows {allowed} "
                    f"(rule 4); raise {_BUDGET_FLAG[tier]} by {format_bytes(peak - budget)}"
                )


def budgets(plan: Plan) -> dict[Tier, int | None]:
    """What each tier may hold."""
    return {Tier.DEVICE: plan.device_budget_bytes, Tier.HOST: plan.host_budget_bytes, Tier.SSD: plan.ssd_budget_bytes}
