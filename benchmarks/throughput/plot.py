"""Plots of the comparison: for every workload a bar a row with its range, and speed against device memory.

    python benchmarks/throughput/plot.py FOLDER results.jsonl [more.jsonl]

Writes FOLDER/throughput-SHAPE-LAYOUT.svg. Needs matplotlib. A row that was measured in several runs shows its last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from summarize import RESIDENT, Result, device_gib, is_measured, read_results, speed  # noqa: E402

COLOURS = {"overspill": "#1b7f5c", "resident": "#8a8a8a", "peer": "#c0703a"}


def colour(result: Result) -> str:
    if result["system"] in RESIDENT:
        return COLOURS["resident"]
    return COLOURS["overspill"] if result["system"].startswith("overspill") else COLOURS["peer"]


def label(result: Result) -> str:
    return str(result["system"]) + (" (clip)" if result["clip"] is not None else "")


def plot_workload(results: list[Result], path: Path) -> None:
    """One figure: tokens/s on the left, device memory against tokens/s on the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    results = sorted(results, key=speed)
    figure, (bars, points) = pyplot.subplots(1, 2, figsize=(13, 0.9 + 0.42 * max(6, len(results))), width_ratios=(3, 2))
    speeds = [speed(result) / 1000 for result in results]
    ranges = [result["tokens_per_s"] for result in results]
    below = [value - span["min"] / 1000 for value, span in zip(speeds, ranges, strict=True)]
    above = [span["max"] / 1000 - value for value, span in zip(speeds, ranges, strict=True)]
    bars.barh([label(result) for result in results], speeds, xerr=[below, above], color=[colour(result) for result in results], capsize=3)
    bars.set_xlabel("thousand tokens/s, median and range")
    bars.set_title(results[0]["workload"])
    for result, value in zip(results, speeds, strict=True):
        points.plot(device_gib(result), value, "o", color=colour(result))
        points.annotate(label(result), (device_gib(result), value), textcoords="offset points", xytext=(5, 3), fontsize=7)
    points.set_xlabel("device memory as the driver sees it, GiB")
    points.set_ylabel("thousand tokens/s")
    points.set_xlim(left=0)
    points.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    newest = {result["row"]: result for result in read_results(options.results) if is_measured(result)}
    options.folder.mkdir(parents=True, exist_ok=True)
    for workload in sorted({result["workload"] for result in newest.values()}):
        path = options.folder / f"throughput-{workload.replace('@', '-').replace(':', '-')}.svg"
        plot_workload([result for result in newest.values() if result["workload"] == workload], path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
