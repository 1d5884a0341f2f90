"""What does the look at the gradient cost? Every optimizer and state format with and without it, in interleaved pairs.

    PYTHONPATH=src python benchmarks/update/check.py --out update-check.json

The look (`with_stats`) counts elements that are not finite and sums squares, inside the one pass of the update. A pair is the
same `optim.update_chunk` calls with it and without it, one right after the other and the order turned from pair to pair, so
that a slow moment of the machine hits both. A row's `cost_fraction` is the median over pairs of (with / without - 1), and
`low`, `high` are the quartiles of the same; `standard_error` is that of the median, from the quartiles (1.253 * 1.349^-1 *
(high - low) / sqrt(pairs), as of a normal distribution).

* `memory`: bf16 parameters and gradients in chunks of 32 MiB as a session has them, every thread: what a session pays.
* `cache`: one thread, one chunk that stays in the second-level cache: what the arithmetic alone costs, where no memory hides it.
* `peak_growth_bytes`: by how much the process's peak of resident memory rises over the calls with the look, all rows after
  the calls without it have run: what the look takes.

Takes under 40 s on 16 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run import IN_CACHE_CALLS, OPTIMIZERS, Chunked, machine, timed

from overspill.cores import usable_cores
from overspill.spec.state_formats import STATE_FORMATS

IN_CACHE_ELEMENTS = 32 * 1024
TARGET_FRACTION = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parameters", type=int, default=128 * 2**20, help="elements updated at a time from memory")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--optimizers", type=lambda text: text.split(","), default=list(OPTIMIZERS))
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(STATE_FORMATS))
    parser.add_argument("--where", type=lambda text: text.split(","), default=["memory", "cache"])
    options = parser.parse_args()
    if options.pairs < 3:
        parser.error(f"--pairs must be at least 3 for quartiles, got {options.pairs}")
    started = time.monotonic()
    rows = []
    for where in options.where:
        for optimizer in options.optimizers:
            for state_format in options.formats:
                rows.append(measure(where, optimizer, state_format, options))
                print(describe(rows[-1]), flush=True)
    report = {"machine": machine(), "threads": options.threads, "seconds": time.monotonic() - started, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    memory = [row for row in rows if row["where"] == "memory"]
    if memory:
        worst = max(memory, key=lambda row: row["cost_fraction"])
        name, cost = f"{worst['optimizer']} {worst['state_format']}", worst["cost_fraction"]
        print(f"from memory at most {cost:+.1%} ({name}); {TARGET_FRACTION:.0%} {'reached' if cost <= TARGET_FRACTION else 'MISSED'}")


def measure(where: str, optimizer: str, state_format: str, options: argparse.Namespace) -> dict[str, Any]:
    is_cached = where == "cache"
    number = IN_CACHE_ELEMENTS if is_cached else options.parameters // 4096 * 4096
    threads, calls = (1, IN_CACHE_CALLS) if is_cached else (options.threads, 1)
    chunked = Chunked(OPTIMIZERS[optimizer], state_format, number)

    def run(*, with_stats: bool) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(calls):
                chunked.step(threads, with_stats=with_stats)

        return repeat

    looking, blind = run(with_stats=True), run(with_stats=False)
    blind()
    before_bytes = peak_resident_bytes()
    looking()
    grown_bytes = peak_resident_bytes() - before_bytes
    ratios, with_s, without_s = [], [], []
    for pair in range(options.pairs):
        first, second = (looking, blind) if pair % 2 == 0 else (blind, looking)
        first_s, second_s = timed(first), timed(second)
        on_s, off_s = (first_s, second_s) if pair % 2 == 0 else (second_s, first_s)
        ratios.append(on_s / off_s - 1)
        with_s.append(on_s)
        without_s.append(off_s)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "where": where,
        "optimizer": optimizer,
        "state_format": state_format,
        "threads": threads,
        "pairs": options.pairs,
        "cost_fraction": middle,
        "low": low,
        "high": high,
        "standard_error": 1.253 / 1.349 * (high - low) / math.sqrt(options.pairs),
        "with_g_parameters_per_s": calls * number / statistics.median(with_s) / 1e9,
        "without_g_parameters_per_s": calls * number / statistics.median(without_s) / 1e9,
        "peak_growth_bytes": grown_bytes,
    }


def peak_resident_bytes() -> int:
    """VmHWM of this process; 0 where the kernel does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")), 0)


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['where']:6} {row['optimizer']:12} {row['state_format']:4} {row['threads']:3} threads "
        f"{row['with_g_parameters_per_s']:7.3f} G parameters/s  check {row['cost_fraction']:+.1%} ± {row['standard_error']:.1%} "
        f"(quartiles {row['low']:+.1%} to {row['high']:+.1%}, {row['pairs']} pairs)  peak {row['peak_growth_bytes']:+d} B"
    )


if __name__ == "__main__":
    main()
