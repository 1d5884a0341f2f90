"""The comparison as tables: every row beside resident training of the same run, and the claims with their targets.

    python benchmarks/throughput/summarize.py results.jsonl [more.jsonl] [--targets targets.json] [--out throughput.md]

1. Ratios are of median tokens/s, between rows of one workload (shape, cap, layout), from the same run where it has both; a ratio over two
   runs is marked `*`. A row with a cap that has no such row beside it is held against the one without a cap, marked `u`. Of a row that was
   repeated, the last whole one counts.
2. Resident is the faster of plain transformers and overspill with everything on the device, with the clipping of the row; without such
   a row the unclipped one, marked `c`.
3. Host peak: the larger of VmHWM and the fall of MemAvailable. Device: the most that the driver had given away, while it trained.
4. A target is `met` or `missed` with its figure; `not measured` without the rows that it needs, `no target` where none is set.

Standard library only.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from rows import GIB, parse_row  # noqa: E402

RESIDENT = ("resident", "resident-overspill")
Result = dict[str, Any]


def read_results(paths: list[Path]) -> list[Result]:
    """Every run's rows; of a row that a run has twice, the last that has figures, else the last."""
    last: dict[tuple[str, str], Result] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                result = json.loads(line)
                key = result["run"], parse_row(result["row"]).name
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no line of run.py: {type(error).__name__} {error}") from error
            if key not in last or is_measured(result) or not is_measured(last[key]):
                last.pop(key, None)
                last[key] = result
    return list(last.values())


def is_measured(result: Result) -> bool:
    return "tokens_per_s" in result


def speed(result: Result) -> float:
    return float(result["tokens_per_s"]["median"])


def host_gib(result: Result) -> float:
    training = result["host"]["training"]
    return float(max(training["vm_hwm_bytes"], training["available_fall_bytes"]) / GIB)


def device_gib(result: Result) -> float:
    return float(result["device"]["training"]["driver_peak_bytes"] / GIB)


def dispatch_fraction(result: Result) -> float | None:
    seconds = result.get("dispatch_s")
    return None if seconds is None else float(seconds / result["report_step_s"])


def baseline(results: list[Result], result: Result, system: str) -> tuple[Result, str] | None:
    """The row that `result` is compared with, and the marks of rules 1 and 2: rather of the same clipping, run and cap, in this order.

    Args:
        system: a system, or `resident` for the faster of the two resident ones.
    """
    systems = RESIDENT if system == "resident" else (system,)
    alike = [other for other in results if is_measured(other) and other["system"] in systems and _is_alike(other, result)]
    for clip_mark, clip in (("", result["clip"]), ("c", None)):
        for run_mark, is_allowed in (("", lambda other: other["run"] == result["run"]), ("*", lambda other: True)):
            for cap_mark, cap in (("", result["cap_gib"]), ("u", None)):
                candidates = [other for other in alike if (other["clip"], other["cap_gib"]) == (clip, cap) and is_allowed(other)]
                if candidates and run_mark:
                    candidates = [other for other in candidates if other["run"] == candidates[-1]["run"]]
                if candidates and (system == "resident" or not clip_mark):
                    return max(candidates, key=speed), run_mark + clip_mark + cap_mark
    return None


def _is_alike(one: Result, other: Result) -> bool:
    """Caps aside."""
    return (one["shape"], one["layout"]) == (other["shape"], other["layout"])


def ratio(results: list[Result], result: Result, system: str) -> tuple[float, str] | None:
    found = baseline(results, result, system)
    return None if found is None else (speed(result) / speed(found[0]), found[1])


def table(results: list[Result]) -> list[str]:
    lines = [
        "| row | tokens/s (min-max) | n | of resident | step s | over floor | device GiB | allocator | host GiB | first loss | open s "
        "| precision |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda result: (result["workload"], result["run"])):
        if not is_measured(result):
            lines.append(f"| {result['row']} | {str(result.get('error'))[:220].replace('|', '/').replace(chr(10), ' ')} |" + " |" * 10)
            continue
        speeds, found = result["tokens_per_s"], ratio(results, result, "resident")
        cells = [
            result["row"],
            f"{speeds['median']:.0f} ({speeds['min']:.0f}-{speeds['max']:.0f})",
            f"{result['repetitions']}" + ("" if "error" not in result else ", then failed"),
            "" if found is None else f"{found[0]:.3f}{found[1]}",
            f"{result['step_s']['median']:.3f}",
            _number(result.get("step_over_floor")),
            f"{device_gib(result):.2f}",
            f"{result['device']['training']['reserved_peak_bytes'] / GIB:.2f}",
            f"{host_gib(result):.2f}",
            f"{result['losses'][0]:.3f}",
            f"{result['open_s']:.0f}",
            str(result["precision"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# -- claims ----------------------------------------------------------------------------------------------------------


def read_targets(path: Path) -> list[dict[str, Any]]:
    """The claims: each a row, and what of it is compared with which bound.

    Raises:
        ValueError: a claim names no row, no figure, or has bounds on both sides.
    """
    targets = json.loads(path.read_text())
    for target in targets:
        parse_row(target["row"])
        if ("of" in target) == ("figure" in target):
            raise ValueError(f"{path}: the claim {target.get('claim')!r} needs either `of` (a system) or `figure`")
        if ("at_least" in target) == ("at_most" in target):
            raise ValueError(f"{path}: the claim {target.get('claim')!r} needs either `at_least` or `at_most`; null where no target is set")
    return list(targets)


def figure_of(results: list[Result], target: dict[str, Any]) -> tuple[float, str] | None:
    """The figure of a claim with its marks, from the last run that measured it."""
    for result in reversed(results):
        if parse_row(result["row"]) != parse_row(target["row"]) or not is_measured(result):
            continue
        if "of" in target:
            found = ratio(results, result, target["of"])
        else:
            computed = {"device_gib": device_gib, "host_gib": host_gib, "dispatch_fraction": dispatch_fraction, "tokens_per_s": speed}
            value = computed[target["figure"]](result) if target["figure"] in computed else result.get(target["figure"])
            found = None if value is None else (float(value), "")
        if found is not None:
            return found
    return None


def verdict(found: tuple[float, str] | None, target: dict[str, Any]) -> str:
    side = "at_least" if "at_least" in target else "at_most"
    if found is None:
        return "not measured"
    if target[side] is None:
        return "no target"
    holds = operator.ge if side == "at_least" else operator.le
    return "met" if holds(found[0], target[side]) else "missed"


def claims(results: list[Result], targets: list[dict[str, Any]]) -> list[str]:
    lines = ["| claim | row | figure | target | |", "|---|---|---|---|---|"]
    for target in targets:
        found, side = figure_of(results, target), "at_least" if "at_least" in target else "at_most"
        what = f"of {target['of']}" if "of" in target else str(target["figure"])
        bound = "" if target[side] is None else f"{'>=' if side == 'at_least' else '<='} {target[side]:g}"
        value = "" if found is None else f"{found[0]:.3f}{found[1]} {what}"
        lines.append(f"| {target['claim']} | {target['row']} | {value} | {bound} | {verdict(found, target)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--targets", type=Path, default=HERE / "targets.json")
    parser.add_argument("--out", type=Path, help="a markdown file")
    options = parser.parse_args(arguments)
    results = read_results(options.results)
    if not results:
        print(f"no result in {', '.join(map(str, options.results))}", file=sys.stderr)
        return 2
    hardware = sorted({str(result["hardware"]) for result in results if "hardware" in result})
    lines = ["# Throughput", "", *(f"{name}  " for name in hardware), "", *table(results), ""]
    lines += ["`*` the other row is from another run; `c` resident without clipping.", "", *claims(results, read_targets(options.targets))]
    text = "\n".join(lines) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
