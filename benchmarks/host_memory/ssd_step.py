"""Is a step with everything on the SSD as fast as the drive, and is the drive's load level?

    python benchmarks/host_memory/ssd_step.py --ssd-dir DIRECTORY --out result.json [--shape 1.10B] [--steps 3]

What it compares, in one process:

* **raw**: four threads, each an O_DIRECT loop of 32 MiB calls over its own part of a file: two read and two write at the same time, as
  a step does. Measured right before and right after the steps, because a virtual drive changes its mind.
* **step**: bytes over step time, from a session with parameters and states on the SSD.

`step_over_bound` is step time over (bytes of the step / raw bytes per second). `busy_fraction` is the share of the time from the first
read to the last write in which the drive had at least one request. `peak_to_mean` is the busiest second over the mean one, between the
first and the last update of the step.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shapes import SHAPES, build_windowed_model

import overspill
from overspill.spec.schedule import Lane
from overspill.spec.trace import busy_s
from overspill.tiers import SsdStore
from overspill.tiers.load import load_profile, peak_to_mean
from overspill.units import GIB, MIB

CALL_BYTES = 32 * MIB


def raw_bytes_per_s(directory: Path, num_bytes: int) -> float:
    """Reading and writing at once, half of `num_bytes` each."""
    path = directory / "raw"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        share = num_bytes // 4 // CALL_BYTES * CALL_BYTES

        def move(number: int, *, writes: bool) -> None:
            buffer = memoryview(mmap.mmap(-1, CALL_BYTES))
            for offset in range(number * share, (number + 1) * share, CALL_BYTES):
                moved = os.pwritev(fd, [buffer], offset) if writes else os.preadv(fd, [buffer], offset)
                assert moved == CALL_BYTES

        for number in range(4):  # a preallocated block that was never written is not read from the drive
            move(number, writes=True)
        threads = [threading.Thread(target=move, args=(number,), kwargs={"writes": number % 2 == 1}) for number in range(4)]
        begun_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(fd)
        return 4 * share / (time.perf_counter() - begun_s)
    finally:
        os.close(fd)
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.10B")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3, help="the first is warm-up")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--state-format", default="fp32")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--raw-gib", type=float, default=8.0)
    parser.add_argument("--chunk-mib", type=float, default=32.0)
    parser.add_argument("--ssd-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.ssd_dir.mkdir(parents=True, exist_ok=True)
    raw = [raw_bytes_per_s(options.ssd_dir, int(options.raw_gib * GIB))]
    shape = SHAPES[options.shape]
    model = build_windowed_model(shape, dtype=getattr(torch, options.dtype), max_positions=options.seq_len)
    request = overspill.PlanRequest(
        parameters="ssd", states="ssd", boundaries="device", dtype=options.dtype, seq_len=options.seq_len, micro_batch=options.samples,
        clip=options.clip, state_format=options.state_format, ssd_dir=str(options.ssd_dir / "run"),
    )  # fmt: skip
    rows = []
    chunk_bytes = int(options.chunk_mib * MIB)
    with overspill.Session(model, plan=request, optimizer=overspill.AdamW(lr=1e-4), chunk_bytes=chunk_bytes) as session:
        assert session.residency.store is not None
        store = session.residency.store.store
        assert isinstance(store, SsdStore)
        for step in range(options.steps):
            ids = torch.randint(0, shape.vocab_size, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(step))
            if step == 0:  # writes the program, which is not the step's time: spans count from when it begins to run
                session.predict([{"input_ids": ids, "labels": ids}])
            store.start_trace()
            begun_s = time.perf_counter()
            report = session.step([{"input_ids": ids, "labels": ids}])
            session.flush()  # what the step has left under way is of its time
            step_s = time.perf_counter() - begun_s
            parts = store.take_trace()
            spans = session.executor.spans
            drive = [span for span in spans if span.lane in (Lane.SSD_READ, Lane.SSD_WRITE)]
            updates = [span for span in spans if span.lane is Lane.HOST_UPDATE]
            window_s = max(span.end_s for span in drive) - min(span.start_s for span in drive)
            first_s, last_s = min(span.start_s for span in updates), max(span.start_s for span in updates)
            interval_s = min(1.0, (last_s - first_s) / 8)  # of a small step there are several too, however long it takes to begin
            profile = load_profile(parts, interval_s=interval_s, start_s=begun_s + first_s, end_s=begun_s + last_s)
            rows.append(
                {
                    "step_s": step_s,
                    "bytes": report.ssd_read_bytes + report.ssd_written_bytes,
                    "busy_fraction": min(1.0, busy_s(spans, Lane.SSD_READ, Lane.SSD_WRITE) / window_s),  # a sum of parts may round up
                    "peak_to_mean": peak_to_mean(profile),
                    "lane_busy_s": dict(report.lane_busy_s),
                }
            )
            print(f"step {step + 1}: {step_s:.2f} s, {rows[-1]['bytes'] / step_s / 1e9:.2f} GB/s", flush=True)
    raw.append(raw_bytes_per_s(options.ssd_dir, int(options.raw_gib * GIB)))
    timed = rows[1:] or rows
    bound = statistics.mean(raw)
    result = {
        "command": " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "raw_gb_per_s": [value / 1e9 for value in raw],
        "step_over_bound": [row["step_s"] / (row["bytes"] / bound) for row in timed],
        "steps": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    busy = ", ".join(f"{row['busy_fraction']:.3f}" for row in timed)
    peaks = ", ".join(f"{row['peak_to_mean']:.2f}" for row in timed)
    bounds = ", ".join(f"{value:.2f}" for value in result["step_over_bound"])
    print(f"raw {raw[0] / 1e9:.2f} and {raw[1] / 1e9:.2f} GB/s; step over bound {bounds}; drive busy {busy}; peak to mean {peaks}")


if __name__ == "__main__":
    main()
