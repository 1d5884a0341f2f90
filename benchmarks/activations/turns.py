"""A mode's steps and `keep`'s in turns, and what the one runs at beside the other: what is pure of it (`steps.py` runs them).

Why: an H100 that computes densely is held to its power. Its clock, and with it every step, goes up and down by several percent within a
second, and more after a pause; so steps of two modes are compared where they lie next to each other in time.

Rules:

1. Steps take turns one by one: keep, mode, keep, mode, ..., keep.
2. A step of the mode is held against the mean of keep's before and after it: what drifts from one to the next cancels out. That is one
   **ratio**, of throughputs: above 1 the mode is faster.
3. `of_keep` is the mean of the ratios without the lowest and the highest sixth (one each at least). Its interval has 95 % of what the same
   figure of ratios drawn again says (bootstrap), which is some 90 %, because neighbours share a step of keep.
4. There are `Plan.turns` ratios at least, and more until two standard errors are within `Plan.within`, as long as `Plan.limit_s` has room
   for another. So an interval that is near `within` is a little too small: it may have ended by chance. Of steps so long that this many
   would take more than `Plan.most_s` there are fewer, `LEAST_TURNS` at least.
5. The device waits as long before a step of the one as of the other: what is done in between is the same, and done at once.

Why one by one and not in longer groups: simulated for six seconds with steps of 0.21 s and noise of 3 to 4 % a step, the error of `of_keep`
is 0.2 % where clocks swing with periods of 0.7 to 1.6 s, 0.5 % where they wander within half a second, and 1.0 % where steps have nothing
to do with each other. In groups of three, the first not counted, it is 2.7, 1.1 and 1.2 %; of seven 0.5, 1.6 and 1.0 %.

What one by one cannot see: where clocks follow more slowly than a step, a mode that makes the device draw more power has keep's steps
beside it pay as well. So a line also has the mode's last steps before keep came in between (`alone_step_s`), and `tables.py` says how much
more they took on average.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

PARTS = ("step_s", "forward_s", "backward_s", "update_s", "rest_s")
"""Of a step: all of it; three parts by the device's events; what is left (where the device had nothing to do before it)."""
LEAST_TURNS = 2
LEFT_OUT = 6
NUM_DRAWS, COVERED = 400, 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How many turns (rule 4)."""

    turns: int
    limit_s: float
    """No further one is begun that would end later, once there are `turns`."""
    most_s: float
    """Where `turns` take more, there are fewer."""
    within: float
    """Of the ratio."""

    def least_turns(self, pair_s: float) -> int:
        """If a step of the mode and one of keep take so long together."""
        return min(self.turns, max(LEAST_TURNS, int(self.most_s / max(pair_s, 1e-9))))

    def is_enough(self, found: Sequence[float], spent_s: float) -> bool:
        """Whether to end with these ratios, which took so long."""
        if not found or len(found) < self.least_turns(spent_s / len(found)):
            return False
        half = 2 * statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else math.inf  # at once: the device waits for it
        return half <= self.within or spent_s * (1 + 1 / len(found)) > self.limit_s


def ratios(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Rule 2: of each step of the mode that has one of keep on both sides (`is_keep`, `step_s`), once all three have ended."""
    found = []
    for before, own, after in zip(steps, steps[1:], steps[2:], strict=False):
        if before["is_keep"] and after["is_keep"] and not own["is_keep"] and all("step_s" in step for step in (before, own, after)):
            found.append((before["step_s"] + after["step_s"]) / 2 / own["step_s"])
    return found


def middle(values: Sequence[float]) -> float:
    """The mean without what lies outside (rule 3); of two, the mean."""
    ordered = sorted(values)
    num_out = max(1, len(ordered) // LEFT_OUT) if len(ordered) > 2 else 0
    return statistics.fmean(ordered[num_out : len(ordered) - num_out])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Rule 3; the same for the same values. Of three and fewer, from the lowest to the highest."""
    if len(values) < 4:
        return min(values), max(values)
    draw = random.Random(0)
    drawn = sorted(middle(draw.choices(values, k=len(values))) for _ in range(NUM_DRAWS))
    left_out = round((1 - COVERED) / 2 * NUM_DRAWS)
    return drawn[left_out], drawn[-1 - left_out]


def columns(steps: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """For a line: a list of each figure, all steps in order."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: [_short(step.get(name)) for step in steps] for name in names}


def _short(value: Any) -> Any:
    """To the microsecond."""
    return round(value, 6) if isinstance(value, float) else value
