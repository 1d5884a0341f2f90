"""How fast is the update on the GPU? The fused kernel beside plain torch operations and torch's own fused AdamW; and the gradient norm.

    PYTHONPATH=src python benchmarks/update/device.py --out update-device.json

What is measured with CUDA events, each `--repetitions` times after two that warm up and compile (median, smallest and largest):

* `copy`: a copy from one half of an array to the other, as many bytes as AdamW in format fp32 moves: the yardstick of `of_copy`.
* `fused`: `optim.update_chunk` on bf16 parameters and gradients, in chunks of `--chunk` elements with two segments each; and for
  AdamW in format fp32 with other block sizes and warps. `host_us` is what the calling thread needs for a chunk.
* `reference`: `optim.update_reference` on the same, for AdamW.
* `torch_fused`: torch.optim.AdamW(fused=True) on fp32 parameters, and with the casts that bf16 compute needs around it.
* `squares`: `optim.sums_of_squares` of nine tensors of a block in bf16, and `torch.linalg.vector_norm` in float64 of each.

Under 20 s on an H100; takes 6 GiB of its memory. Bytes of an element are those that must move: each array read once, and written
once where it changes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import overspill
from overspill.optim import SEGMENT_DTYPE, Rounding, sums_of_squares, update_backend, update_chunk, update_reference
from overspill.spec.state_formats import STATE_FORMATS, resolve_state_format
from overspill.spec.update_rule import Optimizer

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": overspill.AdamW(lr=1e-4, weight_decay=0.01),
    "sgd_momentum": overspill.SGD(lr=1e-4, momentum=0.9),
    "sgd": overspill.SGD(lr=1e-4),
    "lion": overspill.Lion(lr=1e-5, weight_decay=0.01),
}
VARIANTS = [(512, 4), (1024, 8), (2048, 8), (2048, 4)]
"""(BLOCK_ELEMENTS, NUM_WARPS) beside the defaults."""
BLOCK_SHAPES = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632), (2048,), (2048,)]
"""Tensors of a block of the 1.10B shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parameters", type=int, default=96 * 2**20, help="elements updated at a time")
    parser.add_argument("--chunk", type=int, default=8 * 2**20, help="elements of a chunk")
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA device, and there is none; benchmarks/update/run.py measures the host")
    if update_backend("cuda") != "fused":
        parser.error("the fused kernels cannot be used here; the warning above says why")
    number, chunk, repetitions = options.parameters, min(options.chunk, options.parameters), options.repetitions
    rows = [measure_copy(number, repetitions)]
    for name, optimizer in OPTIMIZERS.items():
        rows += [measure_update("fused", name, optimizer, state_format, number, chunk, repetitions) for state_format in STATE_FORMATS]
    fused = fused_module()
    defaults = fused.BLOCK_ELEMENTS, fused.NUM_WARPS
    for fused.BLOCK_ELEMENTS, fused.NUM_WARPS in VARIANTS:
        rows.append(measure_update("fused", "adamw", OPTIMIZERS["adamw"], "fp32", number, chunk, repetitions))
    fused.BLOCK_ELEMENTS, fused.NUM_WARPS = defaults
    for state_format in STATE_FORMATS:
        rows.append(measure_update("reference", "adamw", OPTIMIZERS["adamw"], state_format, number, chunk, min(repetitions, 3)))
    rows += measure_torch_fused(number, chunk, repetitions)
    rows += measure_squares(repetitions)
    for row in rows:
        row["of_copy"] = row["gb_per_s"] / rows[0]["gb_per_s"]
        print(describe(row))
    report = {"machine": machine(), "parameters": number, "chunk": chunk, "repetitions": repetitions, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def fused_module() -> Any:
    """`overspill.optim.fused`, which needs Triton."""
    return importlib.import_module("overspill.optim.fused")


def machine() -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def measured(run: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Seconds of `run` on the device: median, smallest, largest, after two that warm up; and those of the calling thread, median."""
    run()
    run()
    seconds, host_seconds = [], []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before = time.perf_counter()
        begin.record()
        run()
        end.record()
        host_seconds.append(time.perf_counter() - before)
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    host_s = statistics.median(host_seconds)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "host_s": host_s}


def rated(row: dict[str, Any], number: int, bytes_per_element: float) -> dict[str, Any]:
    seconds = row["median_s"]
    return row | {
        "g_parameters_per_s": number / seconds / 1e9,
        "gb_per_s": number * bytes_per_element / seconds / 1e9,
        "bytes_per_parameter": bytes_per_element,
    }


def measure_copy(number: int, repetitions: int) -> dict[str, Any]:
    source = torch.zeros(number * 26 // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return rated({"what": "copy", **measured(lambda: target.copy_(source), repetitions)}, number, 26)


def measure_update(
    what: str, name: str, optimizer: Optimizer, state_format: str, number: int, chunk: int, repetitions: int
) -> dict[str, Any]:
    layout = resolve_state_format(state_format, "bfloat16", optimizer.kind)
    sets = [optimizer.scalars(step=100), optimizer.scalars(step=100, weight_decay=0.0)]
    chunks = []
    for start in range(0, number, chunk):
        length = min(chunk, number - start)
        parameter = torch.full((length,), 0.02, dtype=torch.bfloat16, device="cuda")
        gradient = torch.randn(length, device="cuda").mul_(1e-3).to(torch.bfloat16)
        states = {
            field.name: torch.zeros(field.num_values(length), dtype=getattr(torch, field.dtype), device="cuda") for field in layout.fields
        }
        edge = (length - length // 16) // 256 * 256
        table = np.array([(0, edge, 7, 0, 0), (edge, length - edge, 8, 0, 1)], dtype=SEGMENT_DTYPE)
        chunks.append({"parameter": parameter, "gradient": gradient, "states": states, "table": table})
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        for arrays in chunks:
            rest = {key: arrays[key] for key in ("parameter", "gradient", "states")}
            if what == "fused":
                table = arrays["table"].copy()
                table["key"] += np.uint64(step)  # as in a session: new in every step
                update_chunk(sets, table, state_format=layout, **rest, with_stats=False)
            else:
                update_reference(sets[0], **rest, state_format=state_format, rounding=Rounding(key=step), with_stats=False)

    row = {"what": what, "optimizer": name, "state_format": state_format, **measured(run, repetitions)}
    row["host_us"] = row["host_s"] / len(chunks) * 1e6
    if what == "fused":
        row |= {"block": fused_module().BLOCK_ELEMENTS, "warps": fused_module().NUM_WARPS}
    return rated(row, number, 2 + 2 * (2 + layout.bytes_per_element))


def measure_torch_fused(number: int, chunk: int, repetitions: int) -> list[dict[str, Any]]:
    """28 bytes an element inside the optimizer; the casts move 12 more."""
    parameters = [torch.full((min(chunk, number - start),), 0.02, device="cuda") for start in range(0, number, chunk)]
    halves = [parameter.to(torch.bfloat16) for parameter in parameters]
    gradients = [torch.full_like(half, 1e-3) for half in halves]
    optimizers = [torch.optim.AdamW([parameter], lr=1e-4, fused=True) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)

    def run_alone() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def run_with_casts() -> None:
        for parameter, half, gradient, optimizer in zip(parameters, halves, gradients, optimizers, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
            optimizer.step()
            half.copy_(parameter)

    return [
        rated({"what": "torch_fused", **measured(run_alone, repetitions)}, number, 28),
        rated({"what": "torch_fused and casts", **measured(run_with_casts, repetitions)}, number, 28 + 12),
    ]


def measure_squares(repetitions: int) -> list[dict[str, Any]]:
    sizes = [int(np.prod(shape)) for shape in BLOCK_SHAPES]
    blocks = [torch.randn(sum(sizes), device="cuda").to(torch.bfloat16).split(sizes) for _ in range(4)]  # more than the cache holds

    def run() -> None:
        for tensors in blocks:
            sums_of_squares(tensors)

    def run_norms() -> None:
        for tensors in blocks:
            for tensor in tensors:
                torch.linalg.vector_norm(tensor, dtype=torch.float64).square_()

    number = 4 * sum(sizes)
    rows = [rated({"what": "squares", **measured(run, repetitions)}, number, 2)]
    rows.append(rated({"what": "squares by vector_norm", **measured(run_norms, repetitions)}, number, 2))
    for row in rows:
        row["host_us"] = row["host_s"] / len(blocks) * 1e6
    return rows


def describe(row: dict[str, Any]) -> str:
    label = " ".join(str(row[key]) for key in ("optimizer", "state_format", "block", "warps") if key in row)
    spread = (row["max_s"] - row["min_s"]) / row["median_s"]
    host = f"  host {row['host_us']:.0f} us a call" if "host_us" in row else ""
    rates = f"{row['g_parameters_per_s']:8.2f} G parameters/s {row['gb_per_s']:8.1f} GB/s  {row['of_copy']:.2f} of copy"
    return f"{row['what']:22} {label:28} {rates}  spread {spread:.0%}{host}"


if __name__ == "__main__":
    main()
