"""Plots of results of `run.py`: throughput against activation peak for every shape, SSDTrain's recompute-offload-keep plot with all modes.

    python benchmarks/activations/plot.py FOLDER results.jsonl [more.jsonl]

Writes FOLDER/activations-SHAPE.svg, FOLDER/activations-reached.svg (what was reached beside what the links allow) and, where the largest
micro-batches were looked for, FOLDER/activations-fit.svg. Needs matplotlib. The newest line of a mode counts. Where no peak was measured
(a CPU), the bytes that stay are on that axis.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from tables import figures, newest, read_lines  # noqa: E402

COLOURS = {"keep": "#8a8a8a", "checkpoint": "#8a8a8a", "cheap": "#5b8bd0", "host": "#1b7f5c", "mix": "#0b4f3a", "ssd": "#b08a00"}
PEER = "#c0703a"
LEFT_OUT = ("counted", "bounds", "keep-again")


def colour(mode: str) -> str:
    return COLOURS.get(mode.split("-")[0], PEER) if not mode.startswith("save") else PEER


def plot_shape(shape: str, lines: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s over the activation peak; one point a mode, its range as a bar."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for line in lines:
        known = figures(line, None)
        is_measured = line.get("activation_peak_bytes") is not None
        size = line["activation_peak_bytes"] if is_measured else line.get("kept_bytes", line.get("all_bytes") or 0)
        low, high = (line["tokens"] / value for value in reversed(line["step_s_spread"]))
        middle = known["tokens_per_s"] or 0.0
        axes.errorbar(size / 1e9, middle, yerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color=colour(line["mode"]))
        axes.annotate(line["mode"], (size / 1e9, middle), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel("activation peak, GB" if any(line.get("activation_peak_bytes") for line in lines) else "bytes that stay, GB")
    axes.set_ylabel("tokens/s, median and range")
    axes.set_title(shape)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_reached(lines: list[dict[str, Any]], bounds: dict[str, dict[str, Any]], path: Path) -> None:
    """For every shape what is gone in `host` and `mix`, beside what is allowed."""
    pyplot = _pyplot()
    shapes = list(bounds)
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.5 * len(shapes)))
    for offset, mode in ((0.2, "host"), (-0.2, "mix")):
        for place, shape in enumerate(shapes):
            line = next((line for line in lines if (line["shape"], line["mode"]) == (shape, mode)), None)
            known = figures(line, bounds[shape]) if line is not None else {}
            axes.barh(place + offset, known.get("gone") or 0.0, height=0.35, color=COLOURS[mode], label=mode if place == 0 else None)
            if known.get("allowed"):
                axes.plot([known["allowed"]] * 2, [place + offset - 0.18, place + offset + 0.18], color="black", linewidth=2)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_xlabel("share of saved bytes that does not stay on the device; black: what the links allow")
    axes.set_xlim(0, 1)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_fit(lines: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s over tokens of the largest micro-batch."""
    pyplot = _pyplot()
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False)
    for axes, shape in zip(panels[0], shapes, strict=True):
        for line in (line for line in lines if line["shape"] == shape):
            at = line["rows"] * line["net"]["length"], line["tokens_per_s"]
            axes.plot(*at, "o", color=colour(line["mode"]))
            axes.annotate(line["mode"], at, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_title(f"{shape}, {lines[0]['share_bytes'] / 2**30:.0f} GiB")
        axes.set_xlabel("tokens of the largest micro-batch")
        axes.set_ylabel("tokens/s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    found = newest([line for path in options.results for line in read_lines(path)])
    bounds = {line["shape"]: line for line in found if line["mode"] == "bounds"}
    measured = [line for line in found if "step_s" in line and line["job"] != "fit" and line["mode"] not in LEFT_OUT]
    measured = [line for line in measured if line["mode"] != "keep" or line["job"] == "core"]
    fits = [line for line in found if line["job"] == "fit" and "rows" in line]
    options.folder.mkdir(parents=True, exist_ok=True)
    for shape in dict.fromkeys(line["shape"] for line in measured):
        path = options.folder / f"activations-{shape}.svg"
        plot_shape(shape, [line for line in measured if line["shape"] == shape], path)
        print(path)
    if bounds:
        plot_reached(measured, bounds, options.folder / "activations-reached.svg")
    if fits:
        plot_fit(fits, options.folder / "activations-fit.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
