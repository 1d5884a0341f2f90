"""How fast is the host update? Parameters and bytes per second of every optimizer and state format, beside three yardsticks.

    PYTHONPATH=src python benchmarks/update/run.py --out update.json

What is measured, each `--repetitions` times after one that warms up (median, smallest and largest are reported):

* `update`: `optim.update_chunk` on bf16 parameters and gradients, in chunks of 32 MiB as a session has them. AdamW with one
  thread and with all, the other optimizers with all.
* `stream`: x = x * a + b in place on fp32 arrays by the same threads, over as many bytes as AdamW in format fp32 moves: what
  any in-place update is bounded by. Once through one array, and once through seven in step, as AdamW goes through its own.
  An update's `of_stream` is its bytes per second over those of the one array.
* `torch_fused`: torch.optim.AdamW(fused=True) on fp32 parameters, plus the casts that bf16 compute needs around it, chunk by
  chunk: gradient bf16 -> fp32, parameter fp32 -> bf16.
* `deepspeed`: DeepSpeed's CPU Adam on fp32 parameters and bf16 gradients cast chunk by chunk, where deepspeed can be imported.
* `check`: format fp32 with and without the look at the gradient (count of non-finite elements, sum of squares).
* `in_cache`: one thread, one piece that stays in the second-level cache: what the arithmetic alone costs.

Everything lies in huge pages where the system gives them (`in_huge_pages`), as a session's host states do, and the arrays
of a chunk start a page and eight lines further each, so that none compete for a cache set only because of a round length.
Bytes of an element are those that an update must move: each array read once, and written once where it changes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import mmap
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import overspill
from overspill import _native
from overspill.cores import usable_cores
from overspill.optim import SEGMENT_DTYPE, update_chunk
from overspill.spec.state_formats import STATE_FORMATS, resolve_state_format
from overspill.spec.tensors import CHUNK_BYTES
from overspill.spec.update_rule import Optimizer
from overspill.units import MIB

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": overspill.AdamW(lr=1e-4, weight_decay=0.01),
    "sgd_momentum": overspill.SGD(lr=1e-4, momentum=0.9),
    "sgd": overspill.SGD(lr=1e-4),
    "lion": overspill.Lion(lr=1e-5, weight_decay=0.01),
}
IN_CACHE_CALLS = 200
STAGGER_BYTES = 4096 + 512
"""Between two arrays of a chunk."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parameters", type=int, default=128 * 2**20, help="elements updated at a time")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", help="comma-separated; default 1 and all")
    options = parser.parse_args()
    everyone = usable_cores()
    threads = [int(item) for item in options.threads.split(",")] if options.threads else sorted({1, everyone})
    started = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "parameters": options.parameters, "repetitions": options.repetitions, "rows": []}
    rows = report["rows"]
    number = options.parameters // 4096 * 4096
    for count in threads:
        rows += measure_streams(number, count, options.repetitions)
    stream = {row["threads"]: row["gb_per_s"] for row in rows if row["arrays"] == 1}
    for name, optimizer in OPTIMIZERS.items():
        for state_format in STATE_FORMATS:
            # All thread counts for AdamW, the others only with every thread: that is what a session uses.
            counts = threads if name == "adamw" else threads[-1:]
            rows += measure_update(name, optimizer, state_format, number, counts, options.repetitions, stream)
    rows += [measure_in_cache(name, optimizer, state_format) for name, optimizer in OPTIMIZERS.items() for state_format in STATE_FORMATS]
    rows.append(measure_torch_fused(number, threads[-1], options.repetitions))
    rows.append(measure_deepspeed(number, threads[-1], options.repetitions))
    report["seconds"] = time.monotonic() - started
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(describe(row))


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "instruction_sets": _native.supported_isas(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def measured(run: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Seconds of `run`: median, smallest, largest, after one that warms up."""
    run()
    seconds = []
    for _ in range(repetitions):
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def rated(row: dict[str, Any], number: int, bytes_per_element: float) -> dict[str, Any]:
    seconds = row["median_s"]
    return row | {
        "g_parameters_per_s": number / seconds / 1e9,
        "gb_per_s": number * bytes_per_element / seconds / 1e9,
        "bytes_per_parameter": bytes_per_element,
    }


def in_huge_pages(num_bytes: int) -> torch.Tensor:
    """Zero bytes, in transparent huge pages where the system has them."""
    memory = mmap.mmap(-1, max(num_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: small pages it is
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def measure_streams(number: int, threads: int, repetitions: int) -> list[dict[str, Any]]:
    """In place over 3 fp32 arrays' worth of bytes: 12 read and 12 written an element, near AdamW's 14 and 12."""
    length = 3 * number // 7 // 256 * 256 - 256  # one block short of round, see the file's opening
    values = in_huge_pages(7 * length * 4).view(torch.float32)
    rows = []
    for arrays in (1, 7):

        def run(arrays: int = arrays) -> None:
            _native.scale_in_place(
                values.data_ptr(), num_elements=7 * length, factor=0.5, summand=0.5, num_arrays=arrays, num_threads=threads
            )

        row = rated({"what": "stream", "threads": threads, "arrays": arrays, **measured(run, repetitions)}, number, 56 * length / number)
        rows.append(row)
    return rows


def moved_bytes(optimizer: Optimizer, state_format: str) -> float:
    """Of one element: gradient read, parameter and state read and written."""
    return 2 + 2 * (2 + resolve_state_format(state_format, "bfloat16", optimizer.kind).bytes_per_element)


class Chunked:
    """Parameters, gradients and states of `number` elements in chunks of at most 32 MiB, as a session has them."""

    def __init__(self, optimizer: Optimizer, state_format: str, number: int) -> None:
        self.layout = resolve_state_format(state_format, "bfloat16", optimizer.kind)
        size = min(number, int(CHUNK_BYTES / (4 + self.layout.bytes_per_element)) // 4096 * 4096)
        self.scalars = [optimizer.scalars(step=100)]
        self.chunks = []
        noise = torch.randn(min(size, MIB)) * 1e-3
        num_chunks = -(-number // size)
        memory = in_huge_pages(num_chunks * (4 * size + self.layout.record_bytes(size) + 3 * STAGGER_BYTES))
        used = 0
        for start in range(0, number, size):
            length = min(size, number - start)
            parts = []
            for num_bytes in (2 * length, 2 * length, self.layout.record_bytes(length)):
                parts.append(memory[used : used + num_bytes])
                used += num_bytes + STAGGER_BYTES
            parameter, gradient, record = parts[0].view(torch.bfloat16), parts[1].view(torch.bfloat16), parts[2]
            parameter.fill_(0.02)
            gradient.copy_(noise.repeat(-(-length // noise.numel()))[:length])
            ranges = self.layout.field_ranges(length)
            states = {field.name: record[slice(*ranges[field.name])].view(getattr(torch, field.dtype)) for field in self.layout.fields}
            table = np.array([(0, length, 0x9E3779B97F4A7C15, start % 2**32, 0)], dtype=SEGMENT_DTYPE)
            self.chunks.append((parameter, gradient, states, table))

    def step(self, threads: int, *, with_stats: bool = True) -> None:
        for parameter, gradient, states, table in self.chunks:
            update_chunk(
                self.scalars,
                table,
                state_format=self.layout,
                parameter=parameter,
                gradient=gradient,
                states=states,
                num_threads=threads,
                with_stats=with_stats,
            )


def measure_update(
    name: str, optimizer: Optimizer, state_format: str, number: int, threads: list[int], repetitions: int, stream: dict[int, float]
) -> list[dict[str, Any]]:
    chunked = Chunked(optimizer, state_format, number)
    rows = []
    for count in threads:
        row = {"what": "update", "optimizer": name, "state_format": state_format, "threads": count}
        row |= measured(lambda count=count: chunked.step(count), repetitions)  # type: ignore[misc]
        row = rated(row, number, moved_bytes(optimizer, state_format))
        row["of_stream"] = row["gb_per_s"] / stream[count]
        rows.append(row)
    # Beside the last row, alternating, so that a slow minute of the machine hits both.
    pairs = [(timed(lambda: chunked.step(count)), timed(lambda: chunked.step(count, with_stats=False))) for _ in range(2 * repetitions)]
    rows[-1]["check_cost_fraction"] = statistics.median(on for on, _ in pairs) / statistics.median(off for _, off in pairs) - 1
    return rows


def timed(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def measure_in_cache(name: str, optimizer: Optimizer, state_format: str) -> dict[str, Any]:
    chunked = Chunked(optimizer, state_format, 32 * 1024)

    def run() -> None:
        for _ in range(IN_CACHE_CALLS):
            chunked.step(1)

    row = {"what": "in_cache", "optimizer": name, "state_format": state_format, "threads": 1, **measured(run, 3)}
    return rated(row, IN_CACHE_CALLS * 32 * 1024, moved_bytes(optimizer, state_format))


def measure_torch_fused(number: int, threads: int, repetitions: int) -> dict[str, Any]:
    """26 bytes an element inside the optimizer are 28 here, and the casts move 12 more."""
    torch.set_num_threads(threads)
    size = 8 * MIB
    parameters = [torch.full((min(size, number - start),), 0.02) for start in range(0, number, size)]
    halves = [parameter.to(torch.bfloat16) for parameter in parameters]
    gradients = [torch.full_like(half, 1e-3) for half in halves]
    optimizers = [torch.optim.AdamW([parameter], lr=1e-4, fused=True) for parameter in parameters]
    wide = torch.empty(size)

    def run() -> None:
        for parameter, half, gradient, optimizer in zip(parameters, halves, gradients, optimizers, strict=True):
            parameter.grad = wide[: parameter.numel()].copy_(gradient)
            optimizer.step()
            half.copy_(parameter)

    return rated({"what": "torch_fused", "threads": threads, **measured(run, repetitions)}, number, 28 + 12)


def measure_deepspeed(number: int, threads: int, repetitions: int) -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        return {"what": "deepspeed", "skipped": "deepspeed is not installed"}
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # type: ignore[import-not-found]

        torch.set_num_threads(threads)
        size = 8 * MIB
        parameters = [torch.nn.Parameter(torch.full((min(size, number - start),), 0.02)) for start in range(0, number, size)]
        halves = [parameter.detach().to(torch.bfloat16) for parameter in parameters]
        gradients = [torch.full_like(half, 1e-3) for half in halves]
        optimizers = [DeepSpeedCPUAdam([parameter], lr=1e-4) for parameter in parameters]
        wide = torch.empty(size)

        def run() -> None:
            for parameter, half, gradient, optimizer in zip(parameters, halves, gradients, optimizers, strict=True):
                parameter.grad = wide[: parameter.numel()].copy_(gradient)
                optimizer.step()
                half.copy_(parameter.detach())

        return rated({"what": "deepspeed", "threads": threads, **measured(run, repetitions)}, number, 28 + 12)
    except Exception as error:  # its extension is compiled on first use, which fails in many ways; the other rows stand
        return {"what": "deepspeed", "skipped": f"{type(error).__name__}: {error}"[:300]}


def describe(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['what']:12} skipped: {row['skipped']}"
    label = " ".join(str(row[key]) for key in ("optimizer", "state_format", "arrays") if key in row)
    spread = (row["max_s"] - row["min_s"]) / row["median_s"]
    extra = f"  {row['of_stream']:.2f} of stream" if "of_stream" in row else ""
    extra += f"  check {row['check_cost_fraction']:+.1%}" if "check_cost_fraction" in row else ""
    rates = f"{row['g_parameters_per_s']:7.3f} G parameters/s {row['gb_per_s']:7.1f} GB/s"
    return f"{row['what']:12} {label:18} {row['threads']:3} threads {rates}  spread {spread:.0%}{extra}"


if __name__ == "__main__":
    main()
