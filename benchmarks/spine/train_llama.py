"""A Llama shape trained through a session for a few steps, its figures written as JSON: the spine's record, serial, not its speed.

    python benchmarks/spine/train_llama.py --shape 1.10B --states host --parameters host --out benchmarks/results/spine-host.json

Random weights: for bytes and memory the architecture is what counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import overspill
from overspill.report.memory import host_peak_bytes, reset_host_peak
from overspill.units import GIB, format_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes import SHAPES, build_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.10B")
    for role in ("parameters", "states", "boundaries"):
        parser.add_argument(f"--{role}", default="host")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--steps", type=int, default=4, help="the first is warm-up")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--ssd-dir")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(SHAPES[options.shape], device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    request = overspill.PlanRequest(
        parameters=options.parameters, states=options.states, boundaries=options.boundaries, dtype=options.dtype,
        seq_len=options.seq_len, micro_batch=options.samples, clip=options.clip, ssd_dir=options.ssd_dir,
    )  # fmt: skip
    opened = time.perf_counter()
    with overspill.Session(model, plan=request, optimizer=overspill.AdamW(lr=1e-4)) as session:
        del model
        open_s = time.perf_counter() - opened
        reset_host_peak()
        reports = []
        for step in range(options.steps):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 32000, (options.samples, options.seq_len), generator=generator)
            batch = [{"input_ids": ids, "labels": ids}]
            prediction = session.predict(batch)
            report = session.step(batch)
            assert set((report - prediction).lane_bytes.values()) == {0}, "predicted and moved bytes differ"
            reports.append(report)
            print(f"step {report.step}: loss {report.loss:.4f} {report.tokens_per_s:.0f} tokens/s {report.step_s:.2f} s", flush=True)
        flush_started = time.perf_counter()
        session.flush()
        flush_s = time.perf_counter() - flush_started
        plan = session.plan
    speeds = [report.tokens_per_s for report in reports[1:]]
    last = {field.name: getattr(reports[-1], field.name) for field in dataclasses.fields(reports[-1]) if field.name != "read_times"}
    last |= dataclasses.asdict(reports[-1].times)
    result = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "hardware": _hardware(device),
        "torch": torch.__version__,
        "shape": options.shape,
        "num_parameters": plan.num_parameters,
        "repetitions": len(speeds),
        "tokens_per_s": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)},
        "losses": [report.loss for report in reports],
        "open_s": open_s,
        "flush_s": flush_s,
        "host_peak_bytes": host_peak_bytes(),
        "host_bytes_per_parameter": sum(plan.home_bytes(overspill.Tier.HOST).values()) / plan.num_parameters,
        "device_peak_bytes": max(report.device_peak_bytes for report in reports),
        "last_step": last,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{options.shape} parameters on {options.parameters}, states on {options.states}: {result['tokens_per_s']['median']:.0f} tokens/s, "
        f"device peak {format_bytes(result['device_peak_bytes'])}, host peak {result['host_peak_bytes'] / GIB:.2f} GiB, "
        f"SSD read {format_bytes(last['lane_bytes']['ssd_read'])} written {format_bytes(last['lane_bytes']['ssd_write'])} a step"
    )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
