"""Tables of results of `run.py`, and what the claims ask for.

    python benchmarks/activations/tables.py results.jsonl [more.jsonl] [--tbw 600]

The newest line of a mode counts. Columns:

* `of keep`: throughput beside the keep of the same process. `peak`: of activations. `fell`: how much lower than keep's.
* `gone`: share of all saved bytes that does not stay on the device: moved, rebuilt, or of recomputed blocks. `moved`: bytes that leave.
* `allowed`: the link's bound for `host`; for a mix the linear program's optimum at the throughput of its name (`mix`: 97 %); for `ssd` the
  drive's bound at the rate that was measured. `reached`: gone over allowed; for `ssd` moved over allowed.

SSD lifetime: what the mode writes in a step, all day without a pause, against the rated bytes of a drive (`--tbw`; 600 TB are what common
drives of 1 TB promise). No factor for shorter retention, and none for write amplification.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host_memory"))

from measure import read_lines  # noqa: E402

DAYS_A_YEAR, SECONDS_A_DAY = 365.25, 86400.0
DEFAULT_TBW = 600.0
CLAIMS = (
    ("host", 0.98, 0.90, "host tier: 0.9 of the bound at 0.98 of keep's throughput"),
    ("mix", 0.97, 0.90, "mix: 0.9 of the optimum at 0.97"),
    ("mix-90", 0.90, 0.90, "mix: 0.9 of the optimum at 0.90"),
    ("ssd", 0.98, 0.90, "SSD: 0.9 of the drive's bound at 0.98"),
    ("ssd-7", 0.98, 0.90, "paced to 7 GB/s: the same"),
    ("ssd-14", 0.98, 0.90, "paced to 14 GB/s: the same"),
)
"""Mode, least share of keep's throughput, least share of what is allowed."""
FALLS = (("host", 0.98, 0.47, 12288), ("mix", 0.97, 0.75, 8192))
"""Mode, least share of keep's throughput, least fall of the activation peak, from this hidden size on."""


def newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each (shape, job, mode); one with figures before one with an error."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in lines:
        key = (line["shape"], line["job"], line["mode"])
        if "error" not in line or "error" in found.get(key, {"error": ""}):
            found[key] = line
    return list(found.values())


def figures(line: dict[str, Any], bounds: dict[str, Any] | None) -> dict[str, float | None]:
    """What the table says of a mode that has figures; None: not known."""
    everything, mode = line.get("all_bytes"), line["mode"]
    kept, moved = line.get("kept_bytes"), line.get("moved_bytes")
    gone = 1 - kept / everything if kept is not None and everything and mode != "keep" else None
    allowed = reached = None
    if bounds is not None:
        if mode.startswith("host"):
            allowed = bounds["bound_fraction"]
        elif mode.startswith("mix"):
            allowed = bounds["mix_90" if mode == "mix-90" else "mix_97"]["gone_fraction"]
        elif mode.startswith("ssd") and everything:
            rate = (line.get("rates") or {}).get("ssd_write_bytes_per_s")
            allowed = min(1.0, rate * bounds["terms"]["forward_s"] / everything) if rate else None
    if allowed:
        share = moved / everything if mode.startswith("ssd") and moved is not None and everything else gone
        reached = share / allowed if share is not None else None
    keep_s, keep_peak, peak = line.get("keep_step_s"), line.get("keep_activation_peak_bytes"), line.get("activation_peak_bytes")
    return {
        "of_keep": keep_s / line["step_s"] if keep_s else None,
        "fell": 1 - peak / keep_peak if peak and keep_peak else None,
        "gone": gone,
        "allowed": allowed,
        "reached": reached,
        "tokens_per_s": line["tokens"] / line["step_s"],
    }


def summarize(lines: list[dict[str, Any]], *, tbw: float = DEFAULT_TBW) -> str:
    """A table a shape, the largest micro-batches, the drive's life, and the claims."""
    found = newest(lines)
    text: list[str] = []
    claims: list[str] = []
    for shape in dict.fromkeys(line["shape"] for line in found):
        own = [line for line in found if line["shape"] == shape]
        bounds = next((line for line in own if line["mode"] == "bounds"), None)
        text += ["", f"## {shape}", *_bounds(bounds), *_table(own, bounds)]
        claims += _claims(shape, own, bounds)
    return "\n".join([*text, *_fits(found), *_lifetimes(found, tbw), *(["", "## Claims", *claims] if claims else [])])


def _bounds(bounds: dict[str, Any] | None) -> list[str]:
    if bounds is None:
        return ["the bound is not known: core is not complete"]
    terms = bounds["terms"]
    best = ", ".join(f"{bounds[f'mix_{share}']['gone_fraction']:.1%} at 0.{share}" for share in (98, 97, 90))
    without = "" if bounds["is_keep_measured"] else " (keep does not fit: its step is checkpoint's less a forward)"
    return [
        f"A = {terms['all_bytes'] / 1e9:.2f} GB, forward {terms['forward_s'] * 1e3:.1f} ms, link {terms['d2h_bytes_per_s'] / 1e9:.1f} / "
        f"{terms['h2d_bytes_per_s'] / 1e9:.1f} GB/s: bound of the link {bounds['bound_fraction']:.1%}; optimum of the mix {best}{without}"
    ]


def _table(own: list[dict[str, Any]], bounds: dict[str, Any] | None) -> list[str]:
    rows = [
        "mode | step, ms | range | tokens/s | of keep | peak, GB | fell | gone | moved, GB | allowed | reached",
        " | ".join(["---"] * 11),
    ]
    for line in own:
        if line["job"] == "fit" or line["mode"] == "bounds" or (line["mode"] == "keep" and line["job"] != "core"):
            continue
        if "step_s" not in line:
            rows.append(f"{line['mode']} | {line.get('missing') or line.get('error', '')[:140]}" + " |" * 9)
            continue
        known = figures(line, bounds)
        low, high = line["step_s_spread"]
        peak, moved = line.get("activation_peak_bytes"), line.get("moved_bytes")
        cells = [
            line["mode"] + (f" ({line['num_full_blocks']} blocks whole)" if line["mode"].startswith("mix-") else ""),
            f"{line['step_s'] * 1e3:.1f}", f"{low * 1e3:.1f} to {high * 1e3:.1f} ({line['num_steps']})", f"{known['tokens_per_s']:.0f}",
            _share(known["of_keep"], 3), f"{peak / 1e9:.2f}" if peak else "", _percent(known["fell"]), _percent(known["gone"]),
            f"{moved / 1e9:.2f}" if moved else "", _percent(known["allowed"]), _share(known["reached"], 2),
        ]  # fmt: skip
        rows.append(" | ".join(cells))
    return rows


def _claims(shape: str, own: list[dict[str, Any]], bounds: dict[str, Any] | None) -> list[str]:
    said = []
    for mode, least_speed, least_share, words in CLAIMS:
        line = next((line for line in own if line["mode"] == mode and "step_s" in line and line["job"] != "fit"), None)
        known = figures(line, bounds) if line is not None else None
        if line is None or known is None or known["of_keep"] is None or known["reached"] is None:
            continue
        is_met = known["of_keep"] >= least_speed and known["reached"] >= least_share
        said.append(f"{'yes' if is_met else 'NO '} {shape}: {words}: {known['reached']:.2f} at {known['of_keep']:.3f}")
        for fall_mode, fall_speed, least_fall, least_hidden in FALLS:
            if fall_mode == mode and known["fell"] is not None and line["net"]["hidden"] >= least_hidden:
                is_met = known["fell"] >= least_fall and known["of_keep"] >= fall_speed
                said.append(
                    f"{'yes' if is_met else 'NO '} {shape}: {mode}: the peak falls by {least_fall:.0%} at {fall_speed} of keep's speed: "
                    f"{known['fell']:.1%} at {known['of_keep']:.3f}"
                )
    return said


def _fits(found: list[dict[str, Any]]) -> list[str]:
    own = [line for line in found if line["job"] == "fit"]
    if not own:
        return []
    rows = ["", "## Largest micro-batch", "shape | mode | share, GiB | rows | tokens/s | ", "--- | --- | --- | --- | --- | ---"]
    for line in own:
        share = f"{line.get('share_bytes', 0) / 2**30:.0f}"
        if "rows" not in line:
            rows.append(f"{line['shape']} | {line['mode']} | {share} | | | {line.get('missing') or line.get('error', '')[:120]}")
            continue
        words = [] if line["is_largest_known"] else ["larger ones were not tried"]
        words += ["host memory is the limit"] if line["host_limited"] else []
        rows.append(f"{line['shape']} | {line['mode']} | {share} | {line['rows']} | {line['tokens_per_s']:.0f} | {', '.join(words)}")
    return rows


def _lifetimes(found: list[dict[str, Any]], tbw: float) -> list[str]:
    rows = []
    for line in found:
        if line["job"] == "ssd" and line["mode"].startswith("ssd") and line.get("ssd_bytes"):
            per_day = line["ssd_bytes"] / line["step_s"] * SECONDS_A_DAY
            years = tbw * 1e12 / per_day / DAYS_A_YEAR
            rows.append(
                f"{line['shape']} {line['mode']}: {line['ssd_bytes'] / 1e9:.2f} GB a step, {per_day / 1e12:.0f} TB a day: "
                f"{years * DAYS_A_YEAR:.1f} days ({years:.2f} years) of a drive rated for {tbw:.0f} TB"
            )
    return ["", "## SSD lifetime", *rows] if rows else []


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _share(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--tbw", type=float, default=DEFAULT_TBW, help="rated terabytes of the drive")
    parser.add_argument("--out", type=Path, help="also to this file")
    options = parser.parse_args()
    text = summarize([line for path in options.results for line in read_lines(path)], tbw=options.tbw).lstrip()
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
