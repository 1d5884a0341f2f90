"""Which way of cutting and fetching the host update's work is fastest on this machine? AdamW, all state formats, all threads.

    PYTHONPATH=src python benchmarks/update/variants.py --out variants.json

A variant is how the work is split (a run of neighbouring pieces for each thread, or the next free piece), how many elements a
piece has, and how far ahead memory is asked for (`UpdateTuning` in csrc/include/overspill/update.hpp, whose defaults are the
variant marked `*`). Variants take turns, round after round, so that a slow minute of the machine hits all of them. Beside them
`chunked`, the defaults through `optim.update_chunk` in chunks of 32 MiB: what starting threads for every chunk costs.
All other variants update everything in one call. Takes 20 s on 16 cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import OPTIMIZERS, STAGGER_BYTES, Chunked, in_huge_pages, machine, moved_bytes, timed

from overspill import _native
from overspill.cores import usable_cores
from overspill.optim import SEGMENT_DTYPE
from overspill.optim.native import pack_scalars
from overspill.spec.state_formats import STATE_FORMATS, exponents_of, resolve_state_format

PIECE_ELEMENTS = (4 * 1024, 8 * 1024, 32 * 1024)
PREFETCH_ELEMENTS = (0, 512, 1024, 2048)
DEFAULTS = (True, 8 * 1024, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parameters", type=int, default=64 * 2**20, help="elements updated at a time")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for state_format in STATE_FORMATS:
        rows += measure_variants(state_format, options.parameters // 4096 * 4096, options.threads, options.repetitions)
    report = {"machine": machine(), "threads": options.threads, "seconds": time.monotonic() - started, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['state_format']:5} {row['variant']:44} {row['g_parameters_per_s']:6.2f} G/s {row['gb_per_s']:6.1f} GB/s", end="")
        print(f"  spread {row['spread']:.0%}")


def measure_variants(state_format: str, number: int, threads: int, repetitions: int) -> list[dict[str, Any]]:
    call = whole_update(state_format, number, threads)
    chunked = Chunked(OPTIMIZERS["adamw"], state_format, number)
    runs: dict[str, Callable[[], object]] = {"chunked": lambda: chunked.step(threads)}
    for variant in itertools.product((True, False), PIECE_ELEMENTS, PREFETCH_ELEMENTS):
        is_contiguous, piece, prefetch = variant
        split = "contiguous" if is_contiguous else "next free"
        name = f"{'*' if variant == DEFAULTS else ' '} {split}, pieces {piece}, prefetch {prefetch}"
        runs[name] = lambda variant=variant: call(*variant)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number_of_round in range(repetitions + 1):
        for name, run in runs.items():
            elapsed = timed(run)
            if number_of_round > 0:  # the first one warms up
                seconds[name].append(elapsed)
    moved = moved_bytes(OPTIMIZERS["adamw"], state_format)
    rows = []
    for name, all_s in seconds.items():
        median = statistics.median(all_s)
        rates = {"g_parameters_per_s": number / median / 1e9, "gb_per_s": number * moved / median / 1e9}
        rows.append(
            {"state_format": state_format, "variant": name, "median_s": median, "spread": (max(all_s) - min(all_s)) / median, **rates}
        )
    return rows


def whole_update(state_format: str, number: int, threads: int) -> Callable[[bool, int, int], object]:
    """All `number` elements as one chunk, every array by itself in huge pages."""
    optimizer = OPTIMIZERS["adamw"]
    layout = resolve_state_format(state_format, "bfloat16", optimizer.kind)
    sizes = {"parameter": 2 * number, "gradient": 2 * number} | {f.name: f.num_values(number) * f.itemsize for f in layout.fields}
    memory = in_huge_pages(sum(sizes.values()) + len(sizes) * STAGGER_BYTES)
    arrays, used = {}, 0
    for name, num_bytes in sizes.items():
        arrays[name] = memory[used : used + num_bytes]
        used += num_bytes + STAGGER_BYTES
    arrays["parameter"].view(torch.bfloat16).fill_(0.02)
    arrays["gradient"].view(torch.bfloat16).fill_(1e-3)
    table = torch.zeros(SEGMENT_DTYPE.itemsize, dtype=torch.uint8)
    table.numpy().view(SEGMENT_DTYPE)[0] = (0, number, 0x9E3779B97F4A7C15, 0, 0)
    addresses = {name: array.data_ptr() for name, array in arrays.items()}
    scalars = pack_scalars([optimizer.scalars(step=100)])

    def call(is_contiguous: bool, piece_elements: int, prefetch_elements: int) -> object:
        assert table.numel() and memory.numel()  # both stay alive as long as this function
        return _native.update_ranges(
            rule=layout.optimizer,
            state_format=layout.name,
            parameter_dtype="bfloat16",
            gradient_dtype="bfloat16",
            num_elements=number,
            parameter=addresses["parameter"],
            gradient=addresses["gradient"],
            master=addresses.get("remainder", 0),
            moments=[addresses[name] for name in layout.moments],
            exponents=[addresses.get(exponents_of(name), 0) for name in layout.moments],
            ranges=table.data_ptr(),
            num_ranges=1,
            scalars=scalars,
            num_threads=threads,
            with_stats=True,
            piece_elements=piece_elements,
            prefetch_elements=prefetch_elements,
            is_contiguous=is_contiguous,
        )

    return call


if __name__ == "__main__":
    main()
