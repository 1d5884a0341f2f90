"""A prediction for people: what it is made of before a run, and how far off it was after one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from overspill.spec.prediction import Comparison, MemoryTerm
from overspill.spec.report import Prediction, StepReport
from overspill.units import format_bytes, format_seconds

_NAMES = {
    "step_s": "step time",
    "device_peak_bytes": "device peak",
    "host_peak_bytes": "host peak",
    "ssd_read_bytes": "SSD read",
    "ssd_written_bytes": "SSD written",
}


def prediction_table(prediction: Prediction) -> Table:
    """The parts of both peaks, largest first; what is assumed says so."""
    table = Table(title="What memory is for, at its peak", title_justify="left")
    table.add_column("part")
    table.add_column("device", justify="right")
    table.add_column("host", justify="right")
    names = dict.fromkeys(term.name for term in (*prediction.device_terms, *prediction.host_terms))
    on = [{term.name: term for term in terms} for terms in (prediction.device_terms, prediction.host_terms)]
    for name in sorted(names, key=lambda name: -max(terms[name].num_bytes if name in terms else 0 for terms in on)):
        assumed = any(name in terms and terms[name].is_assumed for terms in on)
        cells = (format_bytes(terms[name].num_bytes) if name in terms else "–" for terms in on)
        table.add_row(f"{name} (assumed)" if assumed else name, *cells)
    table.add_row("peak", format_bytes(prediction.device_peak_bytes), format_bytes(prediction.host_peak_bytes), style="bold")
    return table


def comparison_table(comparison: Comparison, *, step: int) -> Table:
    """A row a figure that was predicted."""
    table = Table(title=f"Predicted and measured: step {step}", title_justify="left")
    table.add_column("figure")
    for name in ("predicted", "measured", "missed by"):
        table.add_column(name, justify="right")
    for name, predicted in comparison.predicted.items():
        measured = comparison.measured[name]
        if predicted is not None and (predicted or measured):
            missed = comparison.missed_by[name]
            table.add_row(_NAMES[name], _shown(name, predicted), _shown(name, measured), "–" if missed is None else f"{missed:+.1%}")
    return table


def describe_largest_miss(comparison: Comparison, prediction: Prediction) -> str:
    """The parts of the figure that was missed by most; empty where nothing was, or it has no parts."""
    name = comparison.largest_miss
    missed = comparison.missed_by[name] if name is not None else None
    if name is None or not missed:
        return ""
    if name == "step_s":
        parts = {"compute": prediction.lane_busy_s.get("compute", 0.0), **prediction.exposed_s}
        text = ", ".join(f"{lane} {format_seconds(value)}" for lane, value in parts.items() if value)
        return f"step time was predicted as {text} ({prediction.source})"
    terms = {"device_peak_bytes": prediction.device_terms, "host_peak_bytes": prediction.host_terms}.get(name, ())
    return f"{_NAMES[name]} was predicted as {describe_terms(terms)}" if terms else ""


def describe_other_replays(prediction: Prediction, report: StepReport) -> str:
    """Whether blocks were replayed as CUDA graphs otherwise than predicted, and which parts are wrong by it; empty if as predicted.

    Where nobody has timed templates, what was predicted before a run had judged its first steps is by paper.
    """
    if bool(prediction.num_replays) == bool(report.num_replays):
        return ""
    if report.num_replays:
        size = f", about {format_bytes(prediction.replays_bytes)}," if prediction.replays_bytes else ""
        return (
            f"{report.num_replays} passes of blocks were replayed as CUDA graphs in step {report.step}, which was not predicted: the part "
            f"replayed graphs{size} is missing from the device peak, and compute takes less than was predicted"
        )
    return (
        f"{prediction.num_replays} passes of blocks were predicted to be replayed as CUDA graphs, and none was in step {report.step}: the "
        f"part replayed graphs, {format_bytes(prediction.replays_bytes)}, is too much in the device peak, and compute takes longer"
    )


def describe_terms(terms: Sequence[MemoryTerm]) -> str:
    """Largest first, in one line."""
    ordered = sorted(terms, key=lambda term: -term.num_bytes)
    return ", ".join(f"{term.name} {format_bytes(term.num_bytes)}" + (" (assumed)" if term.is_assumed else "") for term in ordered)


def _shown(name: str, value: float) -> str:
    return format_seconds(value) if name.endswith("_s") else format_bytes(int(value))
