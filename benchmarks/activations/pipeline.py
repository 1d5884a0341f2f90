"""What larger micro-batches do to a pipeline: simulated, with no device.

    python benchmarks/activations/pipeline.py --out bubbles.json

Who moves activations away can have larger micro-batches at the same peak. In a pipeline that has two ends: each kernel does more at a time,
and weights are read, gradients added, less often; but a batch of a given size is fewer micro-batches, and the bubble grows.

The schedule is 1F1B: stage p of P runs P - p - 1 forwards ahead, then one forward and one backward in turn, then the backwards that are
left. A forward of b sequences takes fixed_s + b · sequence_s, a backward twice that, a message nothing. It is simulated op by op; the
closed form, (P - 1) / (m + P - 1) of the time for m micro-batches, is what a test holds it against. Stage 0 has most activations alive:
those of min(P, m) micro-batches.

`--gone` is the share of activations that leaves the device: at the same peak, b may grow by 1 / (1 - gone). It counts what rests, not
what is in flight.

Assumed, not measured: `fixed_s` of a tenth of a sequence's time (`--fixed`), 64 sequences a batch. On an H100 take both from a line
through step times of two micro-batches (`run.py`, job `fit`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

BACKWARD_OVER_FORWARD = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bubbles:
    """One batch through a pipeline."""

    step_s: float
    bubble_fraction: float
    """Of all stages' time, in which they had nothing to do."""
    most_alive: int
    """Micro-batches whose activations stage 0 holds at one time."""


def orders(num_stages: int, num_micro: int) -> list[list[tuple[str, int]]]:
    """1F1B: what each stage does, in order; F and B of micro-batches."""
    found = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage - 1, num_micro)
        ops = [("F", index) for index in range(ahead)]
        for index in range(num_micro - ahead):
            ops += [("F", ahead + index), ("B", index)]
        found.append(ops + [("B", index) for index in range(num_micro - ahead, num_micro)])
    return found


def simulate(*, num_stages: int, num_micro: int, forward_s: float) -> Bubbles:
    """The schedule, op by op.

    Raises:
        ValueError: there is no stage, no micro-batch, or no time.
    """
    if num_stages < 1 or num_micro < 1 or forward_s <= 0:
        raise ValueError(f"a pipeline has stages, micro-batches and time, got {num_stages}, {num_micro} and {forward_s} s")
    lists, ended_s = orders(num_stages, num_micro), dict[tuple[str, int, int], float]()
    at, free_s = [0] * num_stages, [0.0] * num_stages
    while any(at[stage] < len(lists[stage]) for stage in range(num_stages)):
        for stage in range(num_stages):
            while at[stage] < len(lists[stage]):
                kind, index = lists[stage][at[stage]]
                before = ("F", stage - 1, index) if kind == "F" else ("B", stage + 1, index)
                is_first = before[1] in (-1, num_stages)
                if not is_first and before not in ended_s:
                    break
                begin_s = max(free_s[stage], 0.0 if is_first else ended_s[before])
                free_s[stage] = ended_s[kind, stage, index] = begin_s + forward_s * (1 if kind == "F" else BACKWARD_OVER_FORWARD)
                at[stage] += 1
    step_s, busy_s = max(free_s), num_micro * forward_s * (1 + BACKWARD_OVER_FORWARD)
    alive = most = 0
    for kind, _ in lists[0]:
        alive += 1 if kind == "F" else -1
        most = max(most, alive)
    return Bubbles(step_s=step_s, bubble_fraction=1 - busy_s / step_s, most_alive=most)


def table(*, sequences: int, stages: list[int], fixed_fraction: float, gone: list[float]) -> list[dict[str, float | int]]:
    """A line for each number of stages and sequences of a micro-batch; times in those of one sequence's forward."""
    lines: list[dict[str, float | int]] = []
    for num_stages in stages:
        for rows in (size for size in range(1, sequences + 1) if sequences % size == 0):
            done = simulate(num_stages=num_stages, num_micro=sequences // rows, forward_s=fixed_fraction + rows)
            lines.append(
                {
                    "stages": num_stages, "rows": rows, "micro_batches": sequences // rows, "step": done.step_s,
                    "sequences_per_time": sequences / done.step_s, "bubble_fraction": done.bubble_fraction,
                    "alive_rows": done.most_alive * rows,
                    **{f"resting_rows_{share:.0%}_gone": done.most_alive * rows * (1 - share) for share in gone},
                }
            )  # fmt: skip
    return lines


def best_at_a_peak(lines: list[dict[str, float | int]], *, gone: float, most_rows: float) -> dict[int, dict[str, float | int]]:
    """For each number of stages the fastest micro-batch whose resting activations are not more than so many sequences'."""
    best: dict[int, dict[str, float | int]] = {}
    for line in lines:
        stages = int(line["stages"])
        fits = line["alive_rows"] * (1 - gone) <= most_rows + 1e-9
        if fits and line["sequences_per_time"] > best.get(stages, {"sequences_per_time": 0})["sequences_per_time"]:
            best[stages] = line
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64, help="of a batch")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--fixed", type=float, nargs="+", default=[0.1, 0.5], help="fixed time of a forward, in times of a sequence")
    parser.add_argument("--gone", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"command": "benchmarks/activations/pipeline.py " + " ".join(sys.argv[1:]), "is_simulated": True, "cases": []}
    for fixed in options.fixed:
        lines = table(sequences=options.sequences, stages=options.stages, fixed_fraction=fixed, gone=options.gone)
        case = {"sequences": options.sequences, "fixed": fixed, "lines": lines, "at_the_same_peak": []}
        print(f"fixed time {fixed} of a sequence's; the peak is that of micro-batches of one sequence, all of it kept")
        for num_stages in options.stages:
            kept = best_at_a_peak(lines, gone=0.0, most_rows=num_stages)[num_stages]
            for share in options.gone:
                best = best_at_a_peak(lines, gone=share, most_rows=num_stages)[num_stages]
                gain = best["sequences_per_time"] / kept["sequences_per_time"]
                case["at_the_same_peak"].append({"stages": num_stages, "gone": share, "gain": gain, "rows": best["rows"]})
                print(
                    f"  {num_stages} stages, {share:.0%} gone: {best['rows']} sequences, bubble {best['bubble_fraction']:.1%}, "
                    f"{gain:.3f} of the throughput"
                )
        result["cases"].append(case)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
