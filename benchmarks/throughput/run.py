"""Tokens per second of resident training and of every way to train with less device memory, in one run.

    python benchmarks/throughput/run.py --part 16k --out results.jsonl [--ssd-dir DIRECTORY]
    python benchmarks/throughput/run.py --rows 1.10B:1x8x2048:resident 1.10B:1x8x2048:overspill-host --out results.jsonl
    python benchmarks/throughput/run.py --list

How it is made fair:

1. A row is a process of its own. A crash, a hang or an OOM is a line with its error.
2. The same shape, random weights, tokens, bf16 compute, fp32 Adam states (where a row differs its `precision` says so), and every block
   recomputed, for all systems and for resident training too; but for those whose name says what is kept.
3. A step's time is from before its tokens leave the host to an idle device. Warm-up steps are left out; the rest are kept one by one.
4. The device's peak is the driver's (`device_watch.py`) beside the allocator's; the host's as in `host_memory/measure.py`.
5. Lines of one call share `run`: ratios are taken within it.

This file supervises; a row runs in a child (`--child`), which writes what it has after every step, so that a row that is ended at its
limit keeps its steps. A row whose estimate does not fit before the deadline is a line that says so.

DeepSpeed must be importable, with its CPU Adam compiled (a first import compiles for minutes, and a row has a limit); torchao may lie in
a folder of its own, which `TORCHAO_SITE` names. What is not there is a row with that error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "host_memory")]

from attempt import read_json, run_attempt  # noqa: E402
from measure import HostWatch, append_result, provenance  # noqa: E402
from rows import GIB, PARTS, SYSTEMS, Row, parse_row  # noqa: E402

FLOOR_BYTES = 4 << 30
"""The row is ended when the machine has less host memory than this to give (on a machine of 32 GiB or more)."""
LEAST_SHARE = 0.7
"""A row is started if this share of its estimate is left: estimates are generous."""
CLOSING_S = 6.0
"""Left before the deadline for ending a row and writing its line."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows (rows.py)")
    parser.add_argument(
        "--part", choices=sorted(PARTS), help="rows that belong together; with --rows: those of it that contain a name given"
    )
    parser.add_argument("--list", action="store_true", help="print the parts with each row's estimate, and end")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=5, help="steps that are")
    parser.add_argument("--deadline-s", type=float, default=525, help="for the whole call; no row starts that would not end before")
    parser.add_argument("--ssd-dir", help="directory for what rests on the SSD; what the runs left there is removed")
    parser.add_argument("--dtype", default="bfloat16", help="what is computed in; another one for tests on a CPU")
    parser.add_argument("--out", type=Path, help="a line a row is added here")
    parser.add_argument("--spans", type=Path, help="file for the timelines of overspill's counted steps, a line each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.warmup < 0 or options.steps < 1:
        parser.error(f"--warmup must be at least 0 and --steps at least 1, got {options.warmup} and {options.steps}")
    if options.child is None and not options.list and (options.out is None or not (options.rows or options.part)):
        parser.error("give --out, and --rows or --part; --list shows what there is")
    return options


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """In the order given; with both --part and --rows, the part's rows that a given text occurs in."""
    if options.part is None:
        return [parse_row(name) for name in options.rows]
    names = [name for name in PARTS[options.part] if not options.rows or any(text in name for text in options.rows)]
    if not names:
        raise ValueError(f"no row of part {options.part} contains {' or '.join(options.rows)}; it has {', '.join(PARTS[options.part])}")
    return [parse_row(name) for name in names]


# -- the supervisor --------------------------------------------------------------------------------------------------


def main() -> int:
    options = parse_arguments()
    if options.child is not None:
        return run_child(options)
    if options.list:
        print_list(options)
        return 0
    started, run = time.monotonic(), f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{os.getpid()}"
    try:
        rows = chosen_rows(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        left_s = options.deadline_s - (time.monotonic() - started) - CLOSING_S
        estimate_s = row.estimate_s(warmup=options.warmup, steps=options.steps)
        head = {"run": run, **provenance(), **describe_row(row), "estimate_s": round(estimate_s, 1)}
        if left_s < LEAST_SHARE * estimate_s:
            result = {"error": f"not started: {left_s:.0f} s left before the deadline, {estimate_s:.0f} s estimated"}
        else:
            print(f"== {row.name} (about {estimate_s:.0f} s)", flush=True)
            limit_s = min(row.limit_s(warmup=options.warmup, steps=options.steps), left_s)
            result = run_row(row, options, limit_s=limit_s)
        append_result(options.out, head | result)
        print(summary_line(row, result), flush=True)
    return 0


def run_row(row: Row, options: argparse.Namespace, *, limit_s: float) -> dict[str, Any]:
    """The row's result, whatever became of its process."""
    with tempfile.TemporaryDirectory() as folder:
        report, last_words = Path(folder) / "report.json", Path(folder) / "last-words.json"
        command = [sys.executable, str(HERE / "run.py"), "--child", row.name, "--report", str(report), "--limit-s", f"{limit_s:.1f}"]
        command += ["--warmup", str(options.warmup), "--steps", str(options.steps), "--dtype", options.dtype]
        for option, value in (("--ssd-dir", options.ssd_dir), ("--spans", options.spans)):
            if value:
                command += [option, str(value)]
        environment = {"LAST_WORDS": str(last_words), **environment_of(row)}
        outcome = run_attempt(command, limit_s=limit_s, environment=environment)
        result = read_json(report) | {"wall_s": round(outcome.wall_s, 1)} | read_json(last_words)
    if "error" not in result and (outcome.return_code != 0 or "is_complete" not in result):
        result["error"] = outcome.describe_failure(limit_s)
    if "error" in result:
        result["output_tail"] = outcome.output_tail[-3000:].replace(f"{HERE.parents[1]}{os.sep}", "")
    if options.ssd_dir:
        shutil.rmtree(Path(options.ssd_dir) / "overspill", ignore_errors=True)
    return result


def environment_of(row: Row) -> dict[str, str]:
    """torchao is for its own rows alone: transformers imports it wherever it is installed, which costs every other row time and memory."""
    site = os.environ.get("TORCHAO_SITE")
    if not row.system.startswith("torchao") or not site:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), site])), "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}


def describe_row(row: Row) -> dict[str, Any]:
    return {
        "row": row.name,
        "workload": row.workload,
        "system": row.system,
        "meaning": SYSTEMS[row.system].meaning,
        "shape": row.shape,
        "layout": row.layout,
        "clip": row.clip,
        "cap_gib": row.cap_gib,
        "tokens_per_step": row.tokens_per_step,
    }


def summary_line(row: Row, result: dict[str, Any]) -> str:
    if "tokens_per_s" not in result:
        return f"{row.name}: {result['error'][:300]}"
    speed, step = result["tokens_per_s"], result["step_s"]
    device = result["device"]["training"]["driver_peak_bytes"] / GIB
    host = result["host"]["training"]["vm_hwm_bytes"] / GIB
    note = f"; {result['error'][:200]}" if "error" in result else ""
    return (
        f"{row.name}: {speed['median']:.0f} tokens/s ({speed['min']:.0f}-{speed['max']:.0f}), step {step['median']:.3f} s, "
        f"device {device:.2f} GiB, host {host:.2f} GiB, {result['wall_s']:.0f} s in all{note}"
    )


def print_list(options: argparse.Namespace) -> None:
    for part, names in PARTS.items():
        estimates = [parse_row(name).estimate_s(warmup=options.warmup, steps=options.steps) for name in names]
        print(f"{part}: {len(names)} rows, about {sum(estimates):.0f} s")
        for name, estimate_s in zip(names, estimates, strict=True):
            print(f"  {name:48} {estimate_s:4.0f} s  {SYSTEMS[parse_row(name).system].meaning}")


# -- a row -----------------------------------------------------------------------------------------------------------


def run_child(options: argparse.Namespace) -> int:
    """The row itself; its result, or its failure, goes to the file that the supervisor named."""
    begun = time.monotonic()
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    floor_bytes = FLOOR_BYTES if memory_bytes >= 32 * GIB else None
    watch = HostWatch(floor_bytes=floor_bytes, last_words=Path(os.environ["LAST_WORDS"]))
    progress: dict[str, Any] = {}
    until = begun + 0.9 * options.limit_s

    def save(found: dict[str, Any]) -> None:
        progress.update(found)
        partial = options.report.with_suffix(".partial")
        partial.write_text(json.dumps(progress))
        partial.replace(options.report)

    try:
        measure_row(
            parse_row(options.child), watch, save, warmup=options.warmup, steps=options.steps, dtype_name=options.dtype,
            ssd_dir=options.ssd_dir, spans=options.spans, until=until,
        )  # fmt: skip
    except BaseException as error:
        traceback.print_exc()
        save({"error": f"{type(error).__name__}: {error}"[:2000], "host_at_failure": watch.read()})
    watch.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads and atexit hooks of some systems have kept processes from ending; the result is written.
    os._exit(1 if "error" in progress else 0)


def measure_row(
    row: Row, watch: HostWatch, save: Any, *, warmup: int, steps: int, dtype_name: str, ssd_dir: str | None, spans: Path | None = None,
    until: float = float("inf"),
) -> None:  # fmt: skip
    """Open the row's system, train, close it.

    Args:
        save: takes what is known so far, after opening and after every step.
        spans: file for the timelines of counted steps.
        until: of time.monotonic; no further step is begun that would end later, once one has been counted.
    """
    import torch
    from device_watch import DeviceWatch, cap_device
    from shapes import SHAPES, random_batch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    if row.cap_gib is not None:
        cap_device(device, int(row.cap_gib * GIB))
    device_watch, started = DeviceWatch(device), time.perf_counter()
    trainer = system_of(row)(row, dtype=getattr(torch, dtype_name), device=device, ssd_dir=ssd_dir)
    try:
        save({
            "hardware": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "precision": trainer.precision,
            "num_parameters": SHAPES[row.shape].num_parameters,
            "open_s": time.perf_counter() - started,
        })  # fmt: skip
        opening = {"host": watch.read(), "device": device_watch.read()}
        losses: list[float] = []
        times_s: list[float] = []
        peaks: dict[str, dict[str, int]] = {"host": {}, "device": {}}
        for step in range(warmup + steps):
            batches = [
                random_batch(SHAPES[row.shape], samples=row.samples, seq_len=row.seq_len, seed=step * row.micro_batches + index)
                for index in range(row.micro_batches)
            ]
            loss, step_s = timed_step(trainer, batches, device)
            losses.append(loss)
            times_s.append(step_s)
            print(f"step {step + 1}: {times_s[-1]:.3f} s, loss {loss:.4f}", flush=True)
            for name, seen in (("device", device_watch.read()), ("host", watch.read())):
                peaks[name] = {key: max(value, peaks[name].get(key, 0)) for key, value in seen.items()}
            found = {"losses": losses, "all_step_s": times_s}
            found |= {name: {"opening": opening[name], "training": peaks[name]} for name in peaks}
            if step >= warmup:
                found |= spread(times_s[warmup:], row.tokens_per_step) | trainer.figures(counted=step + 1 - warmup)
            save(found)
            if spans is not None and step >= warmup and hasattr(trainer, "timeline"):
                append_result(spans, {"row": row.name, "step": step + 1, "step_s": step_s, **trainer.timeline()})
            if step == 0:
                trainer.between_steps()
                watch.read(), device_watch.read()  # what that took belongs to no step
            if step >= warmup and time.monotonic() + 1.2 * times_s[-1] > until:
                break
        save({"is_complete": True})
    finally:
        device_watch.close()
        trainer.close()


def timed_step(trainer: Any, batches: list[Any], device: Any) -> tuple[float, float]:
    """Loss and seconds of one step, from an idle device to an idle device; the allocator's peak begins anew with it."""
    import torch

    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    loss = trainer.step(batches)
    if is_cuda:
        torch.cuda.synchronize(device)
    return float(loss), time.perf_counter() - begun


def spread(times_s: list[float], tokens: int) -> dict[str, Any]:
    """Median and range of the counted steps, as seconds and as tokens a second."""
    speeds = [tokens / seconds for seconds in times_s]
    return {
        "repetitions": len(times_s),
        "step_s": {"median": statistics.median(times_s), "min": min(times_s), "max": max(times_s)},
        "tokens_per_s": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)},
    }


def system_of(row: Row) -> Any:
    """The class that trains the row; what it needs is imported only now, so that a missing package is that row's error."""
    if row.system in ("zero2", "zero3", "superoffload"):
        from deepspeed_systems import DeepSpeed

        return DeepSpeed
    if "overspill" in row.system:
        from overspill_systems import Overspill

        return Overspill
    import plain_systems

    resident = plain_systems.Resident
    return {"resident": resident, "resident-keep": resident, "fsdp2": plain_systems.Fsdp2}.get(row.system, plain_systems.TorchAo)


if __name__ == "__main__":
    sys.exit(main())
