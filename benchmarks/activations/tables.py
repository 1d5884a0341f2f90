"""Tables of results of `run.py`, and what the claims ask for.

    python benchmarks/activations/tables.py results.jsonl [more.jsonl] [--tbw 600]

The newest line of a mode counts. Columns:

* `of keep`: throughput beside the steps of keep next to it, and its interval (`turns.py`). Of lines without these: beside the keep
  of the same process; where that was run again at the end, beside the mean of both. `host waits`: the same, of a loop that waits for the
  end of every step; of lines without it all steps did. `peak`: of activations. `fell`: how much lower than
  keep's.
* `gone`: share of all saved bytes that does not stay on the device: moved, rebuilt, or of recomputed blocks (less their inputs). `moved`:
  bytes that leave.
* `allowed`: the link's bound for `host`; for a mix the linear program's optimum at the throughput of its name (`mix`: 97 %); for `ssd` the
  drive's bound at the rate that was measured, which stands behind the name. `reached`: gone over allowed; for `ssd` what the drive was
  written over allowed: what was wanted back while it still waited in host memory does not count.
* `Steps alone`: how much longer a mode's last steps took before keep came in between: mean of all shapes, least and most. That of
  `keep-again` is what the device's clocks do meanwhile; what others have beyond it they hide in `of keep`.
* A name with `!`: the mode left more than `LEAST_TOLD_RESIDUE_BYTES` on the device.

Claims: any row of a tier may meet one, if it has both figures; the line names it, or the one that comes nearest. For how far the peak
falls it also says how far it could: by all but the **least peak**, that of a backward to which every saved tensor comes back just in time,
measured (mode `least`) or on paper (`least_peak.py`). For others' tools: whether one of ours runs faster, of keep's speed, at no higher
peak.

SSD lifetime: what the mode writes in a step, all day without a pause, against the rated bytes of a drive (`--tbw`; 600 TB are what common
drives of 1 TB promise). No factor for shorter retention, and none for write amplification.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host_memory"))

sys.path.insert(0, str(Path(__file__).resolve().parent))

from least_peak import least_peak_bytes  # noqa: E402
from measure import read_lines  # noqa: E402
from net_shapes import NetShape  # noqa: E402

DAYS_A_YEAR, SECONDS_A_DAY = 365.25, 86400.0
DEFAULT_TBW = 600.0
HOSTS = ("host", "host-wide", "host-everything", "host-ssdtrain")
MIXES = ("mix", "mix-97", "mix-90", "mix-everything")
CLAIMS = (
    (HOSTS, 0.98, 0.90, "host tier: 0.9 of the bound at 0.98 of keep's throughput"),
    (MIXES, 0.97, 0.90, "mix: 0.9 of the optimum at 0.97"),
    (MIXES, 0.90, 0.90, "mix: 0.9 of the optimum at 0.90"),
    (("ssd",), 0.98, 0.90, "SSD: 0.9 of the drive's bound at 0.98"),
    (("ssd-7",), 0.98, 0.90, "paced to 7 GB/s: the same"),
    (("ssd-14",), 0.98, 0.90, "paced to 14 GB/s: the same"),
)
"""Modes, least share of keep's throughput, least share of what is allowed."""
FALLS = ((HOSTS, 0.98, 0.47, 12288), (MIXES, 0.97, 0.75, 8192))
"""Modes, least share of keep's throughput, least fall of the activation peak, from this hidden size on."""
PEERS = ("trl", "torchtune", "save_on_cpu-pinned", "save_on_cpu")
OURS = ("host", "mix")
"""How the names of our modes begin that are held against peers."""
OPTIMUM_OF = {"mix": "mix_97", "mix-97": "mix_97", "mix-90": "mix_90", "mix-everything": "mix_97"}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
LEAST_TOLD_RESIDUE_BYTES = 64 << 20


def newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each (shape, job, mode); one with figures before one with an error."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in lines:
        key = (line["shape"], line["job"], line["mode"])
        if "error" not in line or "error" in found.get(key, {"error": ""}):
            found[key] = line
    return list(found.values())


def between_keeps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, with the mean of a process's first and last `keep` for its keep where there are both: half of what drifts in between."""
    last = {(line["shape"], line.get("keep_step_s")): line["step_s"] for line in lines if line["mode"] == "keep-again" and "step_s" in line}
    found = []
    for line in lines:
        again_s = last.get((line["shape"], line.get("keep_step_s")))
        is_keep = line["mode"].startswith("keep")
        found.append(line if again_s is None or is_keep else {**line, "keep_step_s": (line["keep_step_s"] + again_s) / 2})
    return found


def figures(line: dict[str, Any], bounds: dict[str, Any] | None, *, optimum: str | None = None) -> dict[str, float | None]:
    """What the table says of a mode that has figures; None: not known.

    Args:
        optimum: of a mix, `mix_97` or `mix_90`; None: what its name says.
    """
    everything, mode = line.get("all_bytes"), line["mode"]
    kept, written = line.get("kept_bytes"), line.get("written_bytes")
    inputs = line.get("full_inputs_bytes", 0)
    gone = 1 - (kept + inputs) / everything if kept is not None and everything and mode != "keep" else None
    allowed = reached = None
    if bounds is not None:
        if mode in HOSTS:
            allowed = bounds["bound_fraction"]
        elif mode in OPTIMUM_OF:
            allowed = bounds.get(optimum or OPTIMUM_OF[mode], {}).get("gone_fraction")
        elif mode.startswith("ssd") and everything:
            rate = drive_rate(line)
            allowed = min(1.0, rate * bounds["terms"]["forward_s"] / everything) if rate else None
    if allowed:
        share = written / everything if mode.startswith("ssd") and written is not None and everything else gone
        reached = share / allowed if share is not None else None
    keep_s, keep_peak, peak = line.get("keep_step_s"), line.get("keep_activation_peak_bytes"), line.get("activation_peak_bytes")
    return {
        "of_keep": line.get("of_keep", keep_s / line["step_s"] if keep_s else None),
        "fell": 1 - peak / keep_peak if peak and keep_peak else None,
        "gone": gone,
        "allowed": allowed,
        "reached": reached,
        "tokens_per_s": line["tokens"] / line["step_s"],
    }


def drive_rate(line: dict[str, Any]) -> float | None:
    """Bytes per second that the mode wrote at, measured."""
    rate = (line.get("rates") or {}).get("ssd_write_bytes_per_s")
    return float(rate) if rate else None


def summarize(lines: list[dict[str, Any]], *, tbw: float = DEFAULT_TBW) -> str:
    """A table a shape, the largest micro-batches, the drive's life, and the claims."""
    found = between_keeps(newest(lines))
    text: list[str] = []
    claims: list[str] = []
    for shape in dict.fromkeys(line["shape"] for line in found):
        own = [line for line in found if line["shape"] == shape]
        bounds = next((line for line in own if line["mode"] == "bounds"), None)
        text += ["", f"## {shape}", *_bounds(bounds), *_least(own), *_table(own, bounds)]
        claims += _claims(shape, own, bounds)
    return "\n".join([*text, *_fits(found), *_lifetimes(found, tbw), *_alone(found), *(["", "## Claims", *claims] if claims else [])])


def _bounds(bounds: dict[str, Any] | None) -> list[str]:
    if bounds is None:
        return ["the bound is not known: keep and counted were not measured"]
    terms = bounds["terms"]
    found = {share: bounds[f"mix_{share}"]["gone_fraction"] for share in (98, 97, 90) if f"mix_{share}" in bounds}
    best = ", ".join(f"{gone:.1%} at 0.{share}" for share, gone in found.items()) or "not known: checkpoint or cheap was not measured"
    without = "" if bounds["is_keep_measured"] else " (keep does not fit: its step is checkpoint's less a forward)"
    return [
        f"A = {terms['all_bytes'] / 1e9:.2f} GB, forward {terms['forward_s'] * 1e3:.1f} ms, link {terms['d2h_bytes_per_s'] / 1e9:.1f} / "
        f"{terms['h2d_bytes_per_s'] / 1e9:.1f} GB/s: bound of the link {bounds['bound_fraction']:.1%}; optimum of the mix {best}{without}"
    ]


def _least(own: list[dict[str, Any]]) -> list[str]:
    found = least(own)
    if found is None:
        return []
    least_bytes, words = found
    keep_bytes = _keep_peak(own)
    fell = f", {1 - least_bytes / keep_bytes:.1%} below keep's" if keep_bytes else ""
    return [f"least peak of a backward to which everything comes back just in time: {least_bytes / 1e9:.2f} GB{fell} ({words})"]


def least(own: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The least peak of these lines' shape, and where it is from; None: not known."""
    measured = next((line["least_peak_bytes"] for line in own if line.get("least_peak_bytes")), None)
    if measured is not None:
        return measured, "measured"
    told = next((line for line in own if set(line.get("net", ())) == set(NetShape.__dataclass_fields__)), None)
    paper = least_peak_bytes(NetShape(**told["net"]), ITEMSIZE.get(told.get("dtype", ""), 2)) if told is not None else None
    return (paper, "on paper") if paper is not None else None


def _keep_peak(own: list[dict[str, Any]]) -> int | None:
    return next((line["keep_activation_peak_bytes"] for line in own if line.get("keep_activation_peak_bytes")), None)


def _table(own: list[dict[str, Any]], bounds: dict[str, Any] | None) -> list[str]:
    rows = [
        "mode | step, ms | range | tokens/s | of keep | host waits | peak, GB | fell | gone | moved, GB | allowed | reached",
        " | ".join(["---"] * 12),
    ]
    for line in own:
        is_told_elsewhere = line["job"] == "fit" or line["mode"] == "bounds" or "least_peak_bytes" in line
        if is_told_elsewhere or (line["mode"] == "keep" and line["job"] != "core"):
            continue
        if "step_s" not in line:
            rows.append(f"{line['mode']} | {line.get('missing') or line.get('error', '')[:140]}" + " |" * 10)
            continue
        known = figures(line, bounds)
        low, high = line["step_s_spread"]
        peak, moved = line.get("activation_peak_bytes"), line.get("moved_bytes")
        rate = drive_rate(line) if line["mode"].startswith("ssd") else None
        words = f" ({line['num_run_again']} run again)" if line.get("num_run_again") else ""
        words += f" ({rate / 1e9:.1f} GB/s)" if rate else ""
        words += " !" if line.get("residue_bytes", 0) > LEAST_TOLD_RESIDUE_BYTES else ""
        cells = [
            line["mode"] + words,
            f"{line['step_s'] * 1e3:.1f}", f"{low * 1e3:.1f} to {high * 1e3:.1f} ({line['num_steps']})", f"{known['tokens_per_s']:.0f}",
            _of_keep(line, known["of_keep"]), _share(line.get("of_keep_waiting"), 3),
            f"{peak / 1e9:.2f}" if peak else "", _percent(known["fell"]), _percent(known["gone"]),
            f"{moved / 1e9:.2f}" if moved else "", _percent(known["allowed"]), _share(known["reached"], 2),
        ]  # fmt: skip
        rows.append(" | ".join(cells))
    return rows


def _claims(shape: str, own: list[dict[str, Any]], bounds: dict[str, Any] | None) -> list[str]:
    measured = {line["mode"]: line for line in own if "step_s" in line and line["job"] != "fit"}
    said, known_least, keep_bytes = [], least(own), _keep_peak(own)
    limit = f"; {1 - known_least[0] / keep_bytes:.2f} is the most that can ({known_least[1]})" if known_least and keep_bytes else ""
    for modes, least_speed, least_share, words in CLAIMS:
        optimum = f"mix_{round(least_speed * 100)}"
        tried = {mode: figures(measured[mode], bounds, optimum=optimum) for mode in modes if mode in measured}
        said += _claim(f"{shape}: {words}", measured, tried, least_speed, "reached", least_share)
    for modes, least_speed, least_fall, least_hidden in FALLS:
        tried = {
            mode: figures(measured[mode], bounds) for mode in modes if mode in measured and measured[mode]["net"]["hidden"] >= least_hidden
        }
        words = f"{shape}: the peak falls by {least_fall:.0%} at {least_speed} of keep's speed"
        said += [line + limit for line in _claim(words, measured, tried, least_speed, "fell", least_fall)]
    return said + _claims_beside_peers(shape, measured)


def _claim(
    words: str,
    measured: dict[str, dict[str, Any]],
    tried: dict[str, dict[str, float | None]],
    least_speed: float,
    figure: str,
    least: float,
) -> list[str]:
    """Whether one of these modes has the speed and the figure; of those that have not, what comes nearest."""
    known = {mode: (item["of_keep"], item[figure]) for mode, item in tried.items()}
    given = {mode: (speed, value) for mode, (speed, value) in known.items() if speed is not None and value is not None}
    if not given:
        return []
    mode = max(given, key=lambda item: (min(given[item][0] / least_speed, 1.0) * min(given[item][1] / least, 1.0), given[item][1]))
    speed, value = given[mode]
    is_met = speed >= least_speed and value >= least
    return [f"{'yes' if is_met else 'NO '} {words}: {mode}: {value:.2f} at {_of_keep(measured[mode], speed)}"]


def _claims_beside_peers(shape: str, measured: dict[str, dict[str, Any]]) -> list[str]:
    """Whether one of our modes is faster than a peer at no higher peak."""
    said = []
    for peer in (measured[name] for name in PEERS if name in measured):
        peak, speed = peer.get("activation_peak_bytes"), figures(peer, None)["of_keep"]
        ours = [line for mode, line in measured.items() if mode.startswith(OURS) and line.get("activation_peak_bytes")]
        if not peak or not speed or not ours:
            continue
        low = [line for line in ours if line["activation_peak_bytes"] <= peak]
        best = (
            max(low, key=lambda line: figures(line, None)["of_keep"] or 0.0)
            if low
            else min(ours, key=lambda line: line["activation_peak_bytes"])
        )
        own_peak, own_speed = best["activation_peak_bytes"], figures(best, None)["of_keep"] or 0.0
        is_met = bool(low) and own_speed > speed
        said.append(
            f"{'yes' if is_met else 'NO '} {shape}: faster than {peer['mode']} at no higher peak: {best['mode']} {own_speed:.3f} of keep "
            f"at {own_peak / 1e9:.2f} GB, {peer['mode']} {speed:.3f} at {peak / 1e9:.2f} GB"
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
        if line["job"] == "ssd" and line["mode"].startswith("ssd") and line.get("written_bytes"):
            per_day = line["written_bytes"] / line["step_s"] * SECONDS_A_DAY
            years = tbw * 1e12 / per_day / DAYS_A_YEAR
            rows.append(
                f"{line['shape']} {line['mode']}: {line['written_bytes'] / 1e9:.2f} GB a step, {per_day / 1e12:.0f} TB a day: "
                f"{years * DAYS_A_YEAR:.1f} days ({years:.2f} years) of a drive rated for {tbw:.0f} TB"
            )
    return ["", "## SSD lifetime", *rows] if rows else []


def _of_keep(line: dict[str, Any], of_keep: float | None) -> str:
    """With its interval, where it has one."""
    low, high = line.get("of_keep_interval", (None, None))
    return _share(of_keep, 3) + (f" ({low:.3f} to {high:.3f})" if low is not None else "")


def _alone(found: list[dict[str, Any]]) -> list[str]:
    """What a mode's steps took when they were alone, just before they took turns with keep's (`turns.py`)."""
    more: dict[str, list[float]] = {}
    for line in found:
        if "alone_step_s" in line:
            more.setdefault(line["mode"], []).append(line["alone_step_s"] / line["step_s"] - 1)
    rows = [
        f"{mode}: {statistics.fmean(values):+.1%} ({min(values):+.1%} to {max(values):+.1%}, {len(values)})"
        for mode, values in more.items()
    ]
    return ["", "## Steps alone, against those beside keep", *rows] if rows else []


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
