"""Worker pool or io_uring? Both orders of `run.py` in turn, and the winner of every case.

    python benchmarks/io/orders.py /nvme/x /dev/shm/x:4 --seconds 55 --out io-orders.json

A drive's rate may drift by more than the two differ, and whoever comes first may get the faster half. So `run.py` runs forwards
(threads, io_uring, io_uring with registered buffers) and backwards, each a process of its own, round after round until the time of a
directory is over (an equal share of --seconds each; at least one round of both). `DIRECTORY:4` stripes over four files.

For each chunk size and direction, `gain` is the mean over both orders of io_uring's bandwidth over the threads', less one; `cpu_gain`
is the CPU time that it saves, as a share. The order's own effect (the same backend, first over last) is beside it. io_uring wins a case
with 5 % of bandwidth or 30 % of CPU time, and in both orders; it loses one with -5 %, and else nothing is decided. Registered buffers
are reported and not judged: training does not register any. `of_plain` is the threads' bandwidth over the better of the plain loops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from overspill.units import GIB

LEAST_BANDWIDTH_GAIN, LEAST_CPU_GAIN = 0.05, 0.30
"""What io_uring must win to be kept."""
DIRECTIONS = ("write", "read")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("directories", nargs="+", help="DIRECTORY or DIRECTORY:STRIPES")
    parser.add_argument("--seconds", type=float, default=55, help="for everything")
    parser.add_argument("--size-gib", type=float, default=1.0)
    parser.add_argument("--chunks-mib", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    begun_s = time.monotonic()
    report: dict[str, Any] = {"command": " ".join(sys.argv), "directories": {}}
    for index, text in enumerate(options.directories):
        left_s = options.seconds - (time.monotonic() - begun_s)
        directory, _, stripes = text.partition(":")
        runs = alternate(Path(directory), int(stripes or 1), options, left_s / (len(options.directories) - index))
        cases = judge(runs)
        report["directories"][text] = {"cases": cases, "runs": runs}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for case in cases:
            print(f"{text:24} {describe(case)}", flush=True)
        if not cases:
            print(f"{text:24} threads only: this kernel does not permit io_uring")


def alternate(directory: Path, stripes: int, options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """`run.py` in both orders, as often as they fit; which comes first changes from round to round."""
    runs: list[dict[str, Any]] = []
    begun_s = time.monotonic()
    longest_s = 0.0
    while len(runs) < 2 or time.monotonic() - begun_s + 2 * longest_s < seconds:
        backwards_first = len(runs) // 2 % 2 == 1
        for is_backwards in (backwards_first, not backwards_first):
            started_s = time.monotonic()
            runs.append({"is_backwards": is_backwards, **run_once(directory, stripes, options, is_backwards=is_backwards)})
            longest_s = max(longest_s, time.monotonic() - started_s)
    return runs


def run_once(directory: Path, stripes: int, options: argparse.Namespace, *, is_backwards: bool) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), str(directory), "--stripes", str(stripes)]
    command += ["--size-gib", str(options.size_gib), "--threads", str(options.threads), "--in-flight-mib", str(in_flight_mib(options))]
    command += ["--chunks-mib", *map(str, options.chunks_mib), *(["--reverse"] if is_backwards else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def in_flight_mib(options: argparse.Namespace) -> int:
    return min(128, int(options.size_gib * GIB / 2**20))


def judge(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One case for each chunk size and direction; none where io_uring did not run."""
    cases: list[dict[str, Any]] = []
    if any("io_uring" not in run["results"] for run in runs):
        return cases
    for chunk in runs[0]["results"]["threads"]:
        for direction in DIRECTIONS:
            cases.append({"chunk": chunk, "direction": direction, **judge_case(runs, chunk, direction)})
    return cases


def judge_case(runs: list[dict[str, Any]], chunk: str, direction: str) -> dict[str, Any]:
    def figures(name: str, key: str, is_backwards: bool) -> float:
        found = [run["results"][name][chunk][direction][key] for run in runs if run["is_backwards"] is is_backwards]
        return statistics.median(found)

    def gains(name: str, key: str) -> list[float]:
        """Forwards, backwards: more bandwidth, or less CPU time, than the threads; as a share."""
        ratios = [figures(name, key, order) / figures("threads", key, order) for order in (False, True)]
        return [ratio - 1 if key == "gb_per_s" else 1 - ratio for ratio in ratios]

    bandwidth, cpu = gains("io_uring", "gb_per_s"), gains("io_uring", "cpu_s_per_gb")
    wins = min(bandwidth) >= LEAST_BANDWIDTH_GAIN or (min(cpu) >= LEAST_CPU_GAIN and min(bandwidth) > -LEAST_BANDWIDTH_GAIN)
    plain = max(run["results"][name][direction]["gb_per_s"] for run in runs for name in ("plain", "plain-4"))
    threads = [figures("threads", "gb_per_s", order) for order in (False, True)]
    return {
        "threads_gb_per_s": threads,
        "gain": statistics.mean(bandwidth),
        "gain_by_order": bandwidth,
        "cpu_gain": statistics.mean(cpu),
        "cpu_gain_by_order": cpu,
        "registered_gain_by_order": gains("io_uring, registered", "gb_per_s"),
        "registered_cpu_gain_by_order": gains("io_uring, registered", "cpu_s_per_gb"),
        "threads_first_over_last": threads[0] / threads[1],
        "of_plain": max(threads) / plain,
        "rounds": len(runs) // 2,
        "winner": "io_uring" if wins else "threads" if max(bandwidth) <= -LEAST_BANDWIDTH_GAIN else "undecided",
    }


def describe(case: dict[str, Any]) -> str:
    first, last = case["threads_gb_per_s"]
    forwards, backwards = case["gain_by_order"]
    registered = " and ".join(f"{gain:+.0%}" for gain in case["registered_gain_by_order"])
    return (
        f"{case['chunk']:>6} {case['direction']:5}  threads {first:5.2f} GB/s first, {last:5.2f} last, {case['of_plain']:.2f} of plain;  "
        f"io_uring {forwards:+.0%} after them, {backwards:+.0%} before, CPU saved {case['cpu_gain']:+.0%} (registered {registered})"
        f"  -> {case['winner']}"
    )


if __name__ == "__main__":
    main()
