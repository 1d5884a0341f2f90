"""A mode's steps and `keep`'s in turns, and what the one runs at beside the other: what is pure of it (`steps.py` runs them).

Why: an H100 that computes densely is held to its power. Its clock, and with it every step, goes up and down by several percent within
seconds, and more in the first second after a pause; so steps of two modes are compared where they lie next to each other in time.

Rules:

1. Steps come in groups: keep, mode, keep, mode, ..., keep. The first step of a group comes after another kind of step and is not counted
   (of long steps it is: `group_size`).
2. A group of the mode is held against the mean of the keep groups before and after it, median against median: what drifts steadily from
   one to the next cancels out. That is one **ratio**, of throughputs: above 1 the mode is faster.
3. `of_keep` is the mean of the ratios without the lowest and the highest; its interval comes from the same figure of ratios drawn again
   (bootstrap, 90 %). With three it reaches from the lowest to the highest.
4. There are `Plan.groups` at least, and more until half the interval is within `Plan.within`, as long as `Plan.limit_s` has room for
   another. So an interval that is near `within` is a little too small: it may have ended by chance. Of steps so long that this many would
   take more than `Plan.most_s` there are fewer, `LEAST_GROUPS` at least.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from typing import Any

PARTS = ("step_s", "forward_s", "backward_s", "update_s", "rest_s")
"""Of a step: by the wall; three by the device's events; what is left of the wall (launches, waiting for copies that outlast the step)."""
SHORT_S, MIDDLE_S, LONG_S = 0.16, 0.25, 0.6
LEAST_GROUPS = 2
NUM_DRAWS, COVERED = 400, 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How many groups (rule 4)."""

    groups: int
    limit_s: float
    """No further group is begun that would end later, once there are `groups`."""
    most_s: float
    """Where `groups` take more, there are fewer."""
    within: float
    """Half the interval, of the ratio."""

    def least_groups(self, pair_s: float) -> int:
        """Of a mode, if one of it and one of keep take so long together."""
        return min(self.groups, max(LEAST_GROUPS, int(self.most_s / max(pair_s, 1e-9))))

    def is_enough(self, groups: Sequence[Group], spent_s: float) -> bool:
        """Whether to end after these, which took so long."""
        found = ratios(groups)
        least = self.least_groups(spent_s / max(1, len(found)))
        if len(found) < least:
            return False
        low, high = interval(found)
        return (high - low) / 2 <= self.within or spent_s * (1 + 1 / len(found)) > self.limit_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Steps one after the other, all of keep or all of the mode."""

    is_keep: bool
    num_first: int
    """That are not counted."""
    steps: list[dict[str, Any]]
    """`PARTS`, and what else is noted of each."""

    @property
    def counted(self) -> list[dict[str, Any]]:
        return self.steps[self.num_first :]

    @property
    def num_device_allocs(self) -> int:
        """In counted steps."""
        return sum(step.get("device_allocs", 0) for step in self.counted)

    def middle_s(self) -> float:
        return statistics.median(step["step_s"] for step in self.counted)

    def to_plain(self) -> dict[str, Any]:
        """For a line: a list of each figure, all steps in order."""
        names = dict.fromkeys(name for step in self.steps for name in step)
        columns = {name: [_short(step.get(name)) for step in self.steps] for name in names}
        return {"is_keep": self.is_keep, "num_first": self.num_first, **columns}


def group_size(step_s: float) -> tuple[int, int]:
    """Steps of a group that are not counted, and that are."""
    if step_s >= LONG_S:
        return 0, 1
    return 1, 3 if step_s < SHORT_S else 2 if step_s < MIDDLE_S else 1


def ratios(groups: Sequence[Group]) -> list[float]:
    """Rule 2: of each group of the mode that has one of keep on both sides."""
    found = []
    for before, own, after in zip(groups, groups[1:], groups[2:], strict=False):
        if before.is_keep and after.is_keep and not own.is_keep:
            found.append((before.middle_s() + after.middle_s()) / 2 / own.middle_s())
    return found


def middle(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest; of two, the mean."""
    ordered = sorted(values)
    return statistics.mean(ordered[1:-1] if len(ordered) > 2 else ordered)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Rule 3; the same for the same values."""
    if len(values) < 4:
        return min(values), max(values)
    draw = random.Random(0)
    drawn = sorted(middle(draw.choices(values, k=len(values))) for _ in range(NUM_DRAWS))
    left_out = int((1 - COVERED) / 2 * NUM_DRAWS)
    return drawn[left_out], drawn[-1 - left_out]


def _short(value: Any) -> Any:
    """To the microsecond."""
    return round(value, 6) if isinstance(value, float) else value
