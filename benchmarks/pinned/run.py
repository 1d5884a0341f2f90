"""Resident memory and time of pinned allocations: overspill's `pinned_empty` beside torch's `pin_memory`.

    python benchmarks/pinned/run.py --out benchmarks/results/pinned.json        # with a GPU: 40 sizes from 1 MiB to 8 GiB
    python benchmarks/pinned/run.py --most 64MiB --out pinned.json              # without: pages are touched, nothing is locked

How: every size is allocated in a process of its own, forked before CUDA is initialised, which first allocates and drops a few small
blocks so that code and CUDA's context are loaded. Resident bytes are counted twice (`resident.py`):

* `ratio`: present pages of the mapping itself, over the request. Of overspill only: torch's allocator rounds up beyond the tensor.
* `process_ratio`: growth of the whole process over the request, and `elsewhere`, what of it is not the mapping, by name. Without CUDA
  there is nothing; with it, a page or two that the driver keeps about a registered range; and from 64 MiB on, where several threads
  touch the pages, their stacks and the code of libraries that they are the first to run in this process (some 0.3 MiB, once).

The time is that of the allocation with all pages resident. torch's allocator keeps what it frees, which is why a process is needed for
each. `first_touch` are the pages of --threads touched by 1, 2, 4 ... threads, the registration apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that asking for CUDA does not initialise it, which a fork would not survive

import torch  # noqa: E402
from resident import Reading, grown_elsewhere, own_bytes  # noqa: E402

import overspill  # noqa: E402
from overspill.tiers.mapped import map_anonymous, populate  # noqa: E402
from overspill.tiers.pinned import cuda_register, cuda_unregister  # noqa: E402
from overspill.units import MIB, format_bytes, parse_bytes  # noqa: E402

TARGET_RATIO = 1.01


def sizes(least: int, most: int, count: int) -> list[int]:
    """`count` sizes evenly spaced in their logarithm, odd in their bytes, among them every exact power of two that fits the spacing."""
    powers = [1 << exponent for exponent in range(least.bit_length() - 1, most.bit_length()) if least <= 1 << exponent <= most]
    powers = powers[:: max(1, -(-2 * len(powers) // count))]
    others = count - len(powers)
    ratio = (most / least) ** (1 / max(1, others))
    return sorted([*powers, *(int(least * ratio ** (index + 0.5)) | 1 for index in range(others))])


def allocate(how: str, num_bytes: int) -> torch.Tensor:
    if how == "torch":
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    tensor = overspill.pinned_empty(num_bytes, torch.uint8)
    if not tensor.is_pinned():
        populate(tensor.data_ptr() // 4096 * 4096, -(-num_bytes // 4096) * 4096)
    return tensor


def measure(how: str, num_bytes: int) -> dict[str, Any]:
    """In this process, which then ends."""
    warnings.simplefilter("ignore")
    before, after = Reading(), Reading()
    for size in (3 * MIB, MIB + 1, MIB + 1, num_bytes):
        if how == "torch":  # its cache must not serve the size that is measured
            torch._C._host_emptyCache()
        gc.collect()
        before.take()
        start = time.perf_counter()
        tensor = allocate(how, size)
        seconds = time.perf_counter() - start
        after.take()
        own = own_bytes(tensor.data_ptr(), size) if how == "overspill" else 0
        is_pinned = torch.cuda.is_available() and tensor.is_pinned()
        del tensor
    elsewhere = grown_elsewhere(before, after, own)
    grown = own + sum(elsewhere.values())
    return {
        "allocator": how,
        "num_bytes": num_bytes,
        **({"own_bytes": own, "ratio": own / num_bytes} if how == "overspill" else {}),
        "grown_bytes": grown,
        "process_ratio": grown / num_bytes,
        "elsewhere": elsewhere,
        "allocate_s": seconds,
        "is_pinned": is_pinned,
    }


def measure_threads(num_bytes: int) -> list[dict[str, float]]:
    """First touch with more and more threads, and the registration of the touched range."""
    rows = []
    threads = 1
    while threads <= len(os.sched_getaffinity(0)):
        block = map_anonymous(num_bytes)
        start = time.perf_counter()
        populate(block.address, block.num_bytes, num_threads=threads)
        touched = time.perf_counter()
        row = {"threads": threads, "num_bytes": num_bytes, "touch_s": touched - start}
        if torch.cuda.is_available():
            assert cuda_register(block.address, block.num_bytes) is None
            row["register_s"] = time.perf_counter() - touched
            cuda_unregister(block.address)
        rows.append(row)
        threads *= 2
    return rows


def measure_apart(how: str, num_bytes: int) -> dict[str, Any]:
    """The same in a forked child, which sends its row back as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            row = measure(how, num_bytes)
        except BaseException as error:
            row = {"allocator": how, "num_bytes": num_bytes, "error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(row).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"allocator": how, "num_bytes": num_bytes, "error": f"the child ended with status {status}"}


def describe(row: dict[str, Any]) -> str:
    mapping = f"mapping {row['ratio']:.4f}  " if "ratio" in row else ""
    elsewhere = ", ".join(f"{name} {num_bytes:+d} B" for name, num_bytes in row["elsewhere"].items())
    return f"{mapping}process {row['process_ratio']:.4f}  {row['allocate_s'] * 1e3:9.2f} ms  elsewhere {elsewhere or '-'}"


def spread(rows: list[dict[str, Any]], how: str, key: str) -> dict[str, float] | None:
    ratios = [row[key] for row in rows if row["allocator"] == how and key in row]
    if not ratios:
        return None
    over = sum(ratio > TARGET_RATIO for ratio in ratios)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"sizes": len(ratios), "min": min(ratios), "max": max(ratios), "geometric_mean": mean, f"above_{TARGET_RATIO}": over}


def main() -> None:
    parser = argparse.ArgumentParser(description="Resident memory and time of pinned allocations.")
    parser.add_argument("--least", default="1MiB")
    parser.add_argument("--most", default="8GiB")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--torch-most", default="4GiB", help="largest request to torch, which may take twice as much")
    parser.add_argument("--threads", default=None, help="size for the first touch by more and more threads; default: --most")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for size in sizes(parse_bytes(options.least), parse_bytes(options.most), options.count):
        ways = ["overspill"]
        if torch.cuda.is_available() and size <= parse_bytes(options.torch_most):
            ways.append("torch")
        for how in ways:
            row = measure_apart(how, size)
            rows.append(row)
            text = row.get("error") or describe(row)
            print(f"{how:9} {format_bytes(size):>10}  {text}", flush=True)
    threads = measure_threads(parse_bytes(options.threads or options.most))
    for row in threads:
        print(row)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "hardware": f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, {len(os.sched_getaffinity(0))} CPU cores",
        "kernel": platform.release(),
        "torch": torch.__version__,
        "repetitions": 1,
        "ratio": {"overspill": spread(rows, "overspill", "ratio")},
        "process_ratio": {how: spread(rows, how, "process_ratio") for how in ("overspill", "torch")},
        "first_touch": threads,
        "allocations": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print("of the mapping:", result["ratio"])
    print("of the process:", result["process_ratio"])


if __name__ == "__main__":
    main()
