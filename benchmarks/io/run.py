"""How fast the SSD tier moves bytes, and what that costs the CPU.

    python benchmarks/io/run.py DIRECTORY [--size-gib 4] [--chunks-mib 1 4 32] [--threads 4] [--stripes 1] [--out result.json]

In one file of DIRECTORY, or in --stripes files (a file of tmpfs, and of some others, takes one writer at a time), writes and then
reads `--size-gib` in chunks of each size, `--in-flight-mib` of them started at a time:

* `plain`: one thread, one `pread`/`pwrite` of 32 MiB after the other through O_DIRECT (page cache where that is refused), no checksums,
  no engine: what a program in C would do with the drive. `plain-4`: four threads that do it.
* `threads`, `io_uring`: the engine with each backend, checksums on, through `SsdStore` as training uses it. io_uring runs without and
  with registered buffers, where this kernel permits it.

Writes end with an fsync that counts. CPU seconds are the process's, user and system, so they hold all threads; kernel threads that move
data for us are not seen, which flatters io_uring a little. Each figure is the best of `--repeat` runs (a shared machine disturbs in
one direction only); the spread is on file. `start_us` is the time of a call that starts a transfer.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from overspill import _native
from overspill.tiers import SsdStore, ssd
from overspill.tiers.memory import HostMemory
from overspill.tiers.protocol import Transfer
from overspill.tiers.ssd import PART_BYTES
from overspill.units import GIB, MIB

PLAIN_BYTES = 32 * MIB


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(work: Callable[[], None], num_bytes: int) -> dict[str, float]:
    begun_s, begun_cpu_s = time.perf_counter(), cpu_s()
    work()
    wall_s, used_s = time.perf_counter() - begun_s, cpu_s() - begun_cpu_s
    return {"gb_per_s": num_bytes / wall_s / 1e9, "cpu_s_per_gb": used_s / (num_bytes / 1e9)}


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    top = max(runs, key=lambda run: run["gb_per_s"])
    worst = min(run["gb_per_s"] for run in runs)
    figures = {**top, "lowest_gb_per_s": worst, "lowest_cpu_s_per_gb": min(run["cpu_s_per_gb"] for run in runs)}
    return {name: round(value, 4) for name, value in figures.items()}


def plain_loop(path: Path, num_bytes: int, num_threads: int, repeat: int) -> dict[str, dict[str, float]]:
    """The baseline: a file of its own, preallocated, and threads that each take every so many-th piece."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        try:
            direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            os.preadv(direct, [mmap.mmap(-1, 4096)], 0)
        except OSError:
            direct = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        buffers = [mmap.mmap(-1, PLAIN_BYTES) for _ in range(num_threads)]
        for buffer in buffers:
            buffer[:] = os.urandom(MIB) * (PLAIN_BYTES // MIB)

        def run(move: Any) -> None:
            def serve(index: int) -> None:
                for start in range(index * PLAIN_BYTES, num_bytes, num_threads * PLAIN_BYTES):
                    view = memoryview(buffers[index])[: min(PLAIN_BYTES, num_bytes - start)]
                    done = 0
                    while done < len(view):
                        done += move(direct, [view[done:]], start + done)

            threads = [threading.Thread(target=serve, args=(index,)) for index in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if move is os.pwritev:
                os.fsync(direct)

        run(os.pwritev)  # the first write of a preallocated block costs the file system more
        writes = [measure(lambda: run(os.pwritev), num_bytes) for _ in range(repeat)]
        reads = [measure(lambda: run(os.preadv), num_bytes) for _ in range(repeat)]
        os.close(direct)
        return {"write": best(writes), "read": best(reads)}
    finally:
        os.close(fd)
        path.unlink()


def engine_loops(
    directory: Path, backend: str, options: argparse.Namespace, *, registered: bool
) -> tuple[dict[str, dict[str, dict[str, float]]], float]:
    """Chunk size -> direction -> figures; and the median time of a start, in microseconds."""
    num_bytes = int(options.size_gib * GIB)
    results, starts_us = {}, []
    depth_bytes = options.in_flight_mib * MIB
    places = [directory / str(index) for index in range(options.stripes)] if options.stripes > 1 else [directory]
    memory = HostMemory(pin=False, budget_bytes=None)
    buffer = memory.allocate("buffer", depth_bytes)
    buffer.copy_(torch.randint(0, 256, (depth_bytes,), dtype=torch.uint8))
    with SsdStore(places, capacity_bytes=num_bytes, num_threads=options.threads, backend=backend, unlink=True) as store:
        store.allocate("all", num_bytes)
        if registered:
            store._engine.register_memory(buffer.data_ptr(), buffer.numel())

        def run(chunk_bytes: int, *, is_write: bool) -> None:
            pending: deque[Transfer] = deque()
            for start in range(0, num_bytes // chunk_bytes * chunk_bytes, chunk_bytes):
                if len(pending) * chunk_bytes >= depth_bytes:
                    pending.popleft().wait()
                place = start % depth_bytes
                piece = buffer[place : place + chunk_bytes]
                begun_s = time.perf_counter()
                pending.append(
                    store.start_write("all", start, piece, with_checksums=True)
                    if is_write
                    else store.start_read("all", start, piece, expected=expected[chunk_bytes][start // chunk_bytes])
                )
                starts_us.append((time.perf_counter() - begun_s) * 1e6)
            for transfer in pending:
                transfer.wait()
            if is_write:
                store.flush()

        run(PLAIN_BYTES, is_write=True)  # as above, not counted
        sums = [_native.crc32c_blocks(buffer.data_ptr() + at, MIB, block_bytes=MIB)[0] for at in range(0, depth_bytes, MIB)]
        expected = {}
        for chunk_mib in options.chunks_mib:
            blocks = [sums[(at % depth_bytes) // MIB] for at in range(0, num_bytes, MIB)]
            expected[chunk_mib * MIB] = [blocks[at : at + chunk_mib] for at in range(0, len(blocks), chunk_mib)]
        for chunk_mib in options.chunks_mib:
            size = num_bytes // (chunk_mib * MIB) * chunk_mib * MIB
            results[f"{chunk_mib} MiB"] = {
                direction: best([measure(lambda: run(chunk_mib * MIB, is_write=is_write), size) for _ in range(options.repeat)])  # noqa: B023
                for direction, is_write in (("write", True), ("read", False))
            }
    memory.close()
    return results, round(statistics.median(starts_us), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size-gib", type=float, default=4.0)
    parser.add_argument("--chunks-mib", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--in-flight-mib", type=int, default=128)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--part-mib", type=int, default=PART_BYTES // MIB, help="most bytes of one request of the engine")
    parser.add_argument(
        "--stripes", type=int, default=1, help="the engine's files, one in a folder of DIRECTORY each; the plain loop has one"
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--reverse", action="store_true", help="the engine's backends in the opposite order; a drive's rate may drift")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ssd.PART_BYTES = options.part_mib * MIB
    options.directory.mkdir(parents=True, exist_ok=True)
    num_bytes = int(options.size_gib * GIB)
    results: dict[str, Any] = {}
    for name, num_threads in (("plain", 1), ("plain-4", 4)):
        results[name] = plain_loop(options.directory / "plain.tmp", num_bytes, num_threads, options.repeat)
    starts = {}
    variants = [("threads", "threads", False)]
    if _native.has_io_uring():
        variants += [("io_uring", "io_uring", False), ("io_uring, registered", "io_uring", True)]
    for name, backend, registered in variants[::-1] if options.reverse else variants:
        results[name], starts[name] = engine_loops(options.directory, backend, options, registered=registered)
    document = {
        "results": results,
        "start_us": starts,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name != "out"},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
