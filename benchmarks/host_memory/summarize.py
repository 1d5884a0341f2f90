"""One table (markdown and JSON) from the results of `run_gpu.sh`, with the ratios that are claimed.

    python benchmarks/host_memory/summarize.py RESULTS_DIR

Host peak of a run: the larger of VmHWM and the machine's fall of MemAvailable while it trained, for every system alike; VmHWM alone
where a line says that other work ran beside it (`beside`, written by hand).
SSD bytes: what the process moved past the page cache in its last step. Writes `host-memory.md` and `host-memory.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GIB = 1 << 30
OWN_BYTES = 3 * GIB // 2
"""A process's own share in the bounds below: Python, torch, CUDA context."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every line of every part; a run that was repeated counts by its last line."""
    last: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("host-memory-*.jsonl")):
        for line in path.read_text().splitlines():
            result = json.loads(line)
            result["part"] = path.stem.removeprefix("host-memory-")
            key = ("part", "system", "name", "shape", "clip", "live", "state_format", "search")
            last[tuple(str(result.get(item)) for item in key)] = result
    return list(last.values())


def host_peak_bytes(result: dict[str, Any]) -> int:
    training = result["host"]["training"]
    if "beside" in result:
        return int(training["vm_hwm_bytes"])
    return max(training["vm_hwm_bytes"], training["available_fall_bytes"])


def ssd_bytes(result: dict[str, Any]) -> int:
    io = result["steps"][-1]["io"]
    return int(io["process_read_bytes"] + io["process_written_bytes"])


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| part | system | run | shape | tokens/s | VmHWM GiB | fall of MemAvailable | fall of MemFree | opening's VmHWM | device GiB "
        "| SSD read GiB/step | written | drive read | drive written |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        head = f"| {result['part']} | {result['system']} | {label(result)} | {result.get('shape', '')} |"
        if "steps" not in result:
            if "search" not in result:
                lines.append(f"{head} {str(result.get('error'))[:200].replace('|', '/')} |" + " |" * 9)
            continue
        training, opening, io = result["host"]["training"], result["host"]["opening"], result["steps"][-1]["io"]
        sizes = [
            *(training[key] for key in ("vm_hwm_bytes", "available_fall_bytes", "free_fall_bytes")),
            opening["vm_hwm_bytes"],
            result["device_peak_bytes"],
            *(io[key] for key in ("process_read_bytes", "process_written_bytes", "drive_read_bytes", "drive_written_bytes")),
        ]
        lines.append(f"{head} {result['tokens_per_s']:.0f} | " + " | ".join(f"{size / GIB:.2f}" for size in sizes) + " |")
    return lines


def label(result: dict[str, Any]) -> str:
    clip = " clip" if result.get("clip") else ""
    live = f" live {result['live']}" if result.get("live") else ""
    return f"{result['name']}{clip if 'clip' not in result['name'] else ''}{live}"


def ratios(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is claimed, from the runs that are there."""
    good = [result for result in results if "steps" in result]

    def find(system: str, name: str, **others: Any) -> dict[str, Any] | None:
        matching = [r for r in good if (r["system"], r["name"]) == (system, name) and all(r.get(k) == v for k, v in others.items())]
        return matching[-1] if matching else None

    found: dict[str, Any] = {}
    ours = find("overspill", "ssd", part="deepspeed") or find("overspill", "ssd")
    clipped = find("overspill", "ssd-clip")
    for name in ("infinity-both", "infinity-states"):
        theirs = find("deepspeed", name, clip=None)
        theirs_clipped = find("deepspeed", name, clip=1.0) or theirs
        if ours and theirs:
            found[f"host peak, parameters and states on SSD, of {name}'s"] = host_peak_bytes(ours) / host_peak_bytes(theirs)
            resident = [result["host"]["training"]["vm_hwm_bytes"] for result in (ours, theirs)]
            found[f"host peak, parameters and states on SSD, of {name}'s, VmHWM alone"] = resident[0] / resident[1]
            found[f"SSD bytes a step, no clip, of {name}'s"] = ssd_bytes(ours) / max(1, ssd_bytes(theirs))
        if clipped and theirs_clipped:
            found[f"SSD bytes a step, clip, of {name}'s"] = ssd_bytes(clipped) / max(1, ssd_bytes(theirs_clipped))
    if ours:
        bound = OWN_BYTES + 2 * ours["block_bytes"] + GIB
        found["host peak, parameters and states on SSD, of 1.5 GiB + two blocks + 1 GiB"] = host_peak_bytes(ours) / bound
    deep, half = find("overspill", "whole-depth"), find("overspill", "half-depth")
    if deep and half:
        found["host peak, whole depth of half depth"] = host_peak_bytes(deep) / host_peak_bytes(half)
        resident = [result["host"]["training"]["vm_hwm_bytes"] for result in (deep, half)]
        found["host peak, whole depth of half depth, VmHWM alone"] = resident[0] / resident[1]
    for name, bound in (("host", 12.6), ("host-clip", 14.6)):
        result = find("overspill", name)
        if result:
            per_parameter = (host_peak_bytes(result) - OWN_BYTES) / result["num_parameters"]
            found[f"{name}: host bytes a parameter beyond 1.5 GiB (at most {bound})"] = per_parameter
    theirs = find("deepspeed", "zero3-cpu")
    if theirs:
        found["zero3-cpu: host bytes a parameter beyond 1.5 GiB"] = (host_peak_bytes(theirs) - OWN_BYTES) / theirs["num_parameters"]
    for result in good:
        stem, _, off = result["name"].partition("-no-")
        base = find("overspill", f"{stem}-as-is")
        if off and base:
            found[f"{result['name']}: host GiB more"] = (host_peak_bytes(result) - host_peak_bytes(base)) / GIB
            if "beside" in result or "beside" in base:
                continue
            with_cache = result["host"]["training"]["free_fall_bytes"] - base["host"]["training"]["free_fall_bytes"]
            found[f"{result['name']}: with page cache, GiB more"] = with_cache / GIB
    for result in results:
        if "search" in result:
            key = f"{result['system']} {result['name']} {result['shape']}: {result['search']}"
            found[key] = result["confirmed"]
            if "longest_shallow" in result:
                found[f"{key}, two blocks"] = result["longest_shallow"]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    results = read_results(folder)
    found = ratios(results)
    lines = ["# Host memory", "", *table(results), "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in found.items()]
    (folder / "host-memory.md").write_text("\n".join(lines) + "\n")
    (folder / "host-memory.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
