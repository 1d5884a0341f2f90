"""How far predictions are off, on runs that calibrated nothing.

    python benchmarks/prediction/run.py --out results.jsonl --ssd-dir DIRECTORY [--runs NAME...] [--deadline-s 470]
    python benchmarks/prediction/run.py --list
    python benchmarks/prediction/run.py --summarize results.jsonl

Protocol:

1. Calibration is `overspill probe` (a machine file), and what each run measures itself before its first step, as `overspill finetune`
   does: its lanes' rates, and templates. No step of any
   run in `CALIBRATION` or `HELD_OUT` is used to predict another. Constants of the code were chosen from the runs in `CALIBRATION`.
2. A held-out run is a process of its own with a limit (`one_run.py`; `workers.py` lets several load at a time, before anything is
   measured). Its prediction is made when the session has opened, before its first step, twice: with what was measured there, and from
   the machine file alone. Nothing else runs meanwhile.
3. Measured are the median of the counted steps' times, the most that allocator and driver had reserved, VmHWM from a fresh process to
   the last step, and the drive's bytes; of the drive also what the kernel counted, from before the first step until the last has landed,
   less reads of states that nobody has written yet. `missed_by` is measured less predicted, over measured.
4. A line a run, with the terms of both peaks; a run that fails is a line with its error. `--summarize` prints medians and the worst beside
   `TARGETS`, and what each shape, length, place and clip was off by; and how far apart the counted steps of one run were, and what others
   had of the cores meanwhile (`disturbance.py`).
5. The order is balanced: wherever a call ends, shapes, lengths, places and clip have been had about equally often. A run that is
   estimated not to end before the deadline is left for the next call with the same `--out`, and a shorter one taken.

Runs on the SSD are of at most 0.5B, with few steps, for the drive's sake; they launch kernel by kernel (`cuda_graphs=False`), since
recording would want two steps more, and the drive hides it. A name is SHAPE:SEQ_LEN:PLACE[:clip], as 0.5B:2048:ssd:clip; tokens of a step
are `--tokens`, in one micro-batch where that is small enough.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host_memory")]

from attempt import Outcome, read_json  # noqa: E402
from measure import append_result, provenance, read_lines  # noqa: E402
from workers import TAIL_BYTES, Crew, on_termination  # noqa: E402

TOKENS = 16384
CALIBRATION = ("1.10B:2048:host", "1.10B:2048:host:clip")
"""Their shapes gave the code its constants (context, fragmentation, launches), so they are in no result."""
_LENGTHS, _CLIPS = (512, 2048, 8192), ("", ":clip")
_SHAPES = {"160M": 0.162e9, "0.5B": 0.481e9, "1.10B": 1.104e9, "moe": 0.330e9, "tiny": 4e6, "tiny-moe": 1e5}
"""And their parameters, for estimates."""
_ON_HOST, _ON_SSD = ("160M", "0.5B", "1.10B", "moe"), ("160M", "0.5B", "moe")
BEFORE_CALIBRATION = 24
"""Held-out runs that come before those of calibration, whose figures serve the next version."""
TARGETS = {
    "device_peak_bytes": (0.03, 0.08),
    "host_peak_bytes": (0.05, 0.10),
    "ssd_read_bytes": (0.0, 0.0),
    "ssd_written_bytes": (0.0, 0.0),
    "step_s": (0.08, 0.20),
    "step_s_from_file": (0.20, None),
}
"""Figure -> median and worst miss that are wanted."""
CLOSING_S = 6.0
"""Left before the deadline for ending a run and writing its line."""
PROBE_LIMIT_S = 60.0
WARMUP = {("host", False): 5, ("host", True): 5, ("ssd", False): 1, ("ssd", True): 2}
"""By place and whether gradients are clipped. On the host CUDA graphs are recorded in the first two steps (where no templates were timed,
they are judged in the third and recorded in the fourth). On the SSD the first step has loaded all code, and the second one finds the
landing of the one before, as any later one; but clipping leaves the first one without updates, and the second one's writes find the drive
at rest (0.5B: 1.5, 4.0, 6.1 s)."""
STEPS, STEPS_S = 5, 8.0
OPENING_S, HOST_S_PER_PARAMETER, SSD_S_PER_PARAMETER = 8.0, 5e-9, 46 / 1.7e9
"""For estimates: of any run; of a run on the host; of a step on the SSD, by bytes a parameter and the slowest drive that was seen."""


def _balanced(names: list[str]) -> tuple[str, ...]:
    """The same names in an order of which any beginning has had everything about equally often (rule 5): next is always the run whose
    parts, and pairs of parts, have come least so far; runs on the SSD, which take longer, less often."""
    had: collections.Counter[tuple[str, ...]] = collections.Counter()
    ordered: list[str] = []

    def parts(name: str) -> list[tuple[str, ...]]:
        shape, length, place, *clip = name.split(":")
        kind = clip[0] if clip else "-"
        return [(shape,), (length,), (kind,), (place,), (shape, length), (shape, place), (length, place), (kind, place), (shape, kind)]

    def worn(name: str) -> float:
        factor = {"host": 1.0, "ssd": 2.5}[name.split(":")[2]]
        return sum(
            (factor if "host" in part or "ssd" in part else 1.0) * had[part] * (2.0 if len(part) == 1 else 1.0) for part in parts(name)
        )

    left = list(names)
    while left:
        best = min(left, key=worn)
        left.remove(best)
        had.update(parts(best))
        ordered.append(best)
    return tuple(ordered)


HELD_OUT = _balanced(
    [
        name
        for place, shapes in (("host", _ON_HOST), ("ssd", _ON_SSD))
        for shape in shapes
        for length in _LENGTHS
        for clip in _CLIPS
        if (name := f"{shape}:{length}:{place}{clip}") not in CALIBRATION
    ]
)


def parse_name(name: str) -> dict[str, Any]:
    """The run of that name.

    Raises:
        ValueError: it is none.
    """
    parts = name.split(":")
    is_run = (
        len(parts) in (3, 4) and parts[0] in _SHAPES and parts[1].isdigit() and parts[2] in ("host", "ssd") and parts[3:] in ([], ["clip"])
    )
    if not is_run:
        raise ValueError(
            f"{name!r} is not a run: it is SHAPE:SEQ_LEN:PLACE[:clip] with a shape of {', '.join(sorted(_SHAPES))}, on host or ssd"
        )
    return {"shape": parts[0], "seq_len": int(parts[1]), "place": parts[2], "clip": 1.0 if parts[3:] else None}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="names; without: all that are held out, and those of calibration among them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--summarize", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="a line a run is added here; runs that have one without an error are left out")
    parser.add_argument("--ssd-dir", type=Path)
    parser.add_argument("--machine", type=Path, help="a machine file; without: this machine's in the cache, probed if there is none")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument("--warmup", type=int, help="steps that are not counted; without: 5 on the host, 1 or 2 on the SSD")
    parser.add_argument("--steps", type=int, default=STEPS, help="most that are counted")
    parser.add_argument("--steps-s", type=float, default=STEPS_S, help="two steps are counted, and more while they take less")
    parser.add_argument("--limit-s", type=float, default=90.0, help="of a run")
    parser.add_argument("--templates-s", type=float, default=5.0, help="for timing templates")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--deadline-s", type=float, default=470.0, help="of the whole call")
    parser.add_argument("--spans", type=Path, help="file for the timelines of each run's last step, predicted and measured")
    parser.add_argument("--waiting", type=int, help="processes that load side by side; without: two cores stay free, 12 at most")
    options = parser.parse_args(arguments)
    if not (options.list or options.summarize) and (options.out is None or options.ssd_dir is None):
        parser.error("give --out and --ssd-dir; --list shows the runs")
    return options


def main() -> int:
    options = parse_arguments()
    names = list(options.runs or (*HELD_OUT[:BEFORE_CALIBRATION], *CALIBRATION, *HELD_OUT[BEFORE_CALIBRATION:]))
    if options.list:
        print("\n".join(names))
        return 0
    if options.summarize:
        print(summarize(read_lines(options.summarize)))
        return 0
    try:
        for name in names:
            parse_name(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return measure_all(names, options)


def measure_all(names: list[str], options: argparse.Namespace) -> int:
    """Every run that there is time for; 0 if the machine could be probed."""
    started = time.monotonic()
    done = {line["name"] for line in read_lines(options.out) if "error" not in line}
    names = [name for name in names if name not in done]
    options.ssd_dir.mkdir(parents=True, exist_ok=True)
    walls: dict[tuple[str, str], float] = {}

    def left_s() -> float:
        return options.deadline_s - (time.monotonic() - started) - CLOSING_S

    with Crew(HERE / "one_run.py", num_waiting=options.waiting) as crew:
        on_termination(crew.close)
        if names and not ensure_machine_file(crew, options, num_runs=len(names)):
            return 1
        for index, name in enumerate(names):
            run = parse_name(name)
            kind = run["shape"], run["place"]
            needed_s = walls.get(kind, estimate_s(run))
            if left_s() < needed_s:
                print(
                    f"{name}: not started, it would take about {needed_s:.0f} s of the {max(0, left_s()):.0f} s before the deadline",
                    flush=True,
                )
                continue
            result = run_one(name, options, crew, limit_s=min(options.limit_s, left_s()), num_runs=len(names) - index)
            walls[kind] = max(walls.get(kind, 0.0), result["wall_s"])
            if (spans := result.pop("spans", None)) is not None and options.spans is not None:
                append_result(options.spans, {"name": name, **spans})
            append_result(options.out, {"name": name, **provenance(), "is_held_out": name not in CALIBRATION, **result})
            missed = {key: round(value, 3) for key, value in result.get("missed_by", {}).items() if value is not None}
            print(f"{name} ({result['wall_s']:.0f} s): {result.get('error', missed)}", flush=True)
        print(f"{time.monotonic() - started:.0f} s, of which {crew.loading_s:.0f} s were loading", flush=True)
    print(summarize(read_lines(options.out)))
    return 0


def warmup_of(run: dict[str, Any]) -> int:
    """Steps of a run that are not counted, unless others are asked for."""
    return WARMUP[run["place"], run["clip"] is not None]


def estimate_s(run: dict[str, Any]) -> float:
    """Of a run that has loaded, before any of its kind was seen."""
    parameters = _SHAPES[run["shape"]]
    if run["place"] == "ssd":
        return OPENING_S + parameters * SSD_S_PER_PARAMETER * (warmup_of(run) + 2)
    return OPENING_S + parameters * HOST_S_PER_PARAMETER


def ensure_machine_file(crew: Crew, options: argparse.Namespace, *, num_runs: int) -> bool:
    """Probe the machine with the drive that the runs use, unless its file is named; whether there is one. What it says is kept beside the
    results, so that predictions from the file alone can be made again."""
    if options.machine is None:
        folder = options.out.parent
        folder.mkdir(parents=True, exist_ok=True)
        options.machine = folder / f"{options.out.stem}-machine-{time.strftime('%Y%m%d-%H%M%S')}.json"
        outcome = crew.take(num_runs + 1).run(
            {"probe": ["--ssd-dir", str(options.ssd_dir), "--out", str(options.machine)]}, limit_s=PROBE_LIMIT_S
        )
        print(outcome.output_tail[-3000:], flush=True)
        if outcome.return_code != 0 or not options.machine.exists():
            print(f"the machine could not be probed: {outcome.describe_failure(PROBE_LIMIT_S)}", file=sys.stderr)
            return False
    return True


def run_one(name: str, options: argparse.Namespace, crew: Crew, *, limit_s: float, num_runs: int = 1) -> dict[str, Any]:
    """The run's result, whatever became of its process."""
    run = parse_name(name)
    drive = options.ssd_dir / "run"
    shutil.rmtree(drive, ignore_errors=True)
    drive.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        order = {
            "run": run,
            "report": str(report),
            "folder": str(drive),
            "machine": str(options.machine) if options.machine is not None else None,
            "warmup": warmup_of(run) if options.warmup is None else options.warmup,
            "cuda_graphs": run["place"] == "host",
        }
        order |= {name: getattr(options, name) for name in ("tokens", "steps", "steps_s", "templates_s", "dtype")}
        try:
            outcome = crew.take(num_runs).run(order, limit_s=limit_s)
        except RuntimeError as error:
            outcome = Outcome(return_code=1, wall_s=0.0, output_tail=str(error))
        result = read_json(report) | {"wall_s": round(outcome.wall_s, 1)}
    shutil.rmtree(drive, ignore_errors=True)
    if "error" not in result and (outcome.return_code != 0 or "missed_by" not in result):
        result["error"] = outcome.describe_failure(limit_s)
    if "error" in result:
        tail_bytes = TAIL_BYTES if outcome.return_code is None else 2000
        result["output_tail"] = outcome.output_tail[-tail_bytes:].replace(f"{HERE.parents[1]}{os.sep}", "")
    return result


# -- the summary -------------------------------------------------------------------------------------------------------


def summarize(lines: list[dict[str, Any]]) -> str:
    """A table of medians and worst misses of the runs that are held out and ended well; the newest line of a run counts."""
    newest = {line["name"]: line for line in lines if line.get("is_held_out") and "error" not in line}
    failed = sorted({line["name"] for line in lines if "error" in line} - newest.keys())
    text = [f"{len(newest)} held-out runs", "figure | median | worst | wanted | the worst run | met", "--- | --- | --- | --- | --- | ---"]
    for figure, (median, worst) in TARGETS.items():
        known = {name: abs(line["missed_by"][figure]) for name, line in newest.items() if line["missed_by"].get(figure) is not None}
        if known:
            name = max(known, key=lambda item: known[item])
            middle = statistics.median(known.values())
            wanted = f"{median:.0%}" + (f" / {worst:.0%}" if worst is not None else "")
            is_met = middle <= median and (worst is None or known[name] <= worst)
            missing = "" if len(known) == len(newest) else f" (of {len(known)} runs)"
            text.append(f"{figure}{missing} | {middle:.2%} | {known[name]:.2%} | {wanted} | {name} | {'yes' if is_met else 'NO'}")
        elif newest:
            text.append(f"{figure} | not predicted in any run | | | | NO")
    more = [*_groups(newest), *_kernel_bytes(newest), *_steadiness(newest)]
    return "\n".join([*text, *more, *(f"failed: {name}" for name in failed)])


def _groups(newest: dict[str, dict[str, Any]]) -> list[str]:
    """Signed medians of each shape, length, place and clip: which way and where predictions err."""
    figures = [figure for figure in TARGETS if not figure.startswith("ssd_")]
    text = []
    for key in ("shape", "seq_len", "place", "clip"):
        for value in sorted({line.get(key) for line in newest.values() if key in line}, key=str):
            mine = [line["missed_by"] for line in newest.values() if line.get(key) == value]
            middles = {figure: [miss[figure] for miss in mine if miss.get(figure) is not None] for figure in figures}
            shown = (f"{statistics.median(misses):+.1%}" if misses else "-" for misses in middles.values())
            text.append(f"{key} {value if value is not None else 'off'} ({len(mine)}) | " + " | ".join(shown))
    return ["", "measured less predicted, medians | " + " | ".join(figures), *text] if text else []


def _kernel_bytes(newest: dict[str, dict[str, Any]]) -> list[str]:
    """How much more than the lanes say the kernel counted at the drive."""
    text = []
    for way in ("read", "written"):
        ratios = {}
        for name, line in newest.items():
            drive = line.get("drive", {})
            lanes, kernel = (drive.get(f"{who}_{way}_bytes", 0) for who in ("lanes", "kernel"))
            lanes -= drive.get("unwritten_read_bytes", 0) if way == "read" else 0
            if lanes and kernel:
                ratios[name] = kernel / lanes - 1
        if ratios:
            worst = max(ratios, key=lambda name: abs(ratios[name]))
            text.append(
                f"bytes {way} as the kernel counted them | {statistics.median(ratios.values()):+.3%} | {ratios[worst]:+.3%} | {worst}"
            )
    return ["", *text] if text else []


def _steadiness(newest: dict[str, dict[str, Any]]) -> list[str]:
    """How far the counted steps of a run were apart, and what others had of the cores meanwhile: no prediction is closer than that."""
    ranges, taken = {}, {}
    for name, line in newest.items():
        steps = line.get("all_step_s", [])[-line.get("num_counted", 0) :]
        if len(steps) > 1:
            ranges[name] = (max(steps) - min(steps)) / statistics.median(steps)
        counted = line.get("disturbance", {}).get("counted", {})
        if counted.get("wall_s"):
            taken[name] = (counted["stolen_s"] + counted["busy_s"] - counted["own_s"]) / (counted["wall_s"] * (line.get("num_cpus") or 1))
    text = []
    for what, shares in (("counted steps of a run are apart by", ranges), ("of the cores others had meanwhile", taken)):
        if shares:
            worst = max(shares, key=lambda name: shares[name])
            text.append(f"{what} | {statistics.median(shares.values()):.1%} | {shares[worst]:.1%} | {worst}")
    return ["", *text] if text else []


if __name__ == "__main__":
    sys.exit(main())
