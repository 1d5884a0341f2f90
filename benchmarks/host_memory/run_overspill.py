"""One configuration of overspill, trained for a few steps: what it takes of host, device and SSD, as one line of a file.

    python benchmarks/host_memory/run_overspill.py --name all-ssd --shape 1.10B --parameters ssd --states ssd --boundaries ssd \\
        --ssd-dir DIRECTORY --out results.jsonl

One process is one configuration: peaks of a process cannot be taken apart afterwards. Opening (weights into their homes) and
training are measured apart. A run that fails is a line too, with what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import HostWatch, IoCounters, append_result, provenance, status_bytes

if TYPE_CHECKING:
    from overspill.spec.report import PoolReport

sys.path.insert(0, str(Path(__file__).parents[1]))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the configuration, in the result")
    parser.add_argument("--shape", default="1.10B")
    parser.add_argument("--blocks", type=int, help="another depth than the shape's")
    for role in ("parameters", "states", "boundaries"):
        parser.add_argument(f"--{role}", default="host", choices=["auto", "device", "host", "ssd"])
    parser.add_argument("--state-format", default="fp32")
    parser.add_argument("--optimizer", default="AdamW", help="a public name of overspill")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3, help="the first warms up; bytes are those of the last")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ssd-dir")
    parser.add_argument("--off", help="switch off one part of MemAscend: pool, pinned, check, check-flat or engine")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    watch = HostWatch()  # before torch: its own memory belongs to the process
    configuration = {key: value for key, value in vars(options).items() if key not in ("out", "steps")}
    result = {"system": "overspill", **provenance(), **configuration}
    try:
        result |= measure_run(options, watch)
    except Exception as error:
        traceback.print_exc()
        result |= {"error": f"{type(error).__name__}: {error}", "host": {"failed": watch.read()}}
    watch.close()
    append_result(options.out, result)
    print(describe(result), flush=True)
    return 1 if "error" in result else 0


def measure_run(options: argparse.Namespace, watch: HostWatch) -> dict[str, Any]:
    """Open, train, close."""
    import switched_off
    import torch
    from shapes import SHAPES, build_windowed_model, random_batch

    import overspill

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    own_bytes = status_bytes("VmRSS")
    shape = SHAPES[options.shape].with_blocks(options.blocks)
    dtype = getattr(torch, options.dtype)
    counters = IoCounters(Path(options.ssd_dir or "."))
    request = overspill.PlanRequest(
        parameters=options.parameters, states=options.states, boundaries=options.boundaries, state_format=options.state_format,
        dtype=options.dtype, seq_len=options.seq_len, micro_batch=options.samples, clip=options.clip, ssd_dir=options.ssd_dir,
    )  # fmt: skip
    largest_bytes = shape.largest_tensor_elements * dtype.itemsize
    with contextlib.ExitStack() as stack:
        arguments = stack.enter_context(
            switched_off.without(options.off, largest_tensor_bytes=largest_bytes, num_parameters=shape.num_parameters)
        )
        started = time.perf_counter()
        model = build_windowed_model(shape, dtype=dtype, max_positions=max(4096, options.seq_len))
        optimizer = getattr(overspill, options.optimizer)(lr=1e-4)
        session = stack.enter_context(overspill.Session(model, plan=request, optimizer=optimizer, **arguments))
        del model
        open_s = time.perf_counter() - started
        opening = watch.read()
        steps = []
        for step in range(options.steps):
            batch = [random_batch(shape, samples=options.samples, seq_len=options.seq_len, seed=step)]
            before = counters.read()
            report = session.step(batch)
            session.flush()  # what the step has left under way is of its bytes
            io = counters.read() - before
            figures = {"step_s": report.step_s, "loss": report.loss, "tokens_per_s": report.tokens_per_s, "io": dataclasses.asdict(io)}
            steps.append(figures | {"lane_bytes": dict(report.lane_bytes), "device_peak_bytes": report.device_peak_bytes})
            print(f"step {step + 1}: {report.step_s:.2f} s, loss {report.loss:.4f}", flush=True)
        training = watch.read()
        plan, pinned_bytes = session.plan, session.residency.host.pinned_bytes
        pools = [describe_pool(pool) for pool in session.pool_reports()]
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "num_parameters": plan.num_parameters,
        "tokens_per_step": options.samples * options.seq_len,
        "largest_unit_bytes": max(sum(plan.bundles[name].parameter_bytes for name in unit.bundles) for unit in plan.units),
        "block_bytes": shape.num_block_parameters * dtype.itemsize,
        "home_bytes": {tier.value: plan.home_bytes(tier) for tier in overspill.Tier},
        "process_own_bytes": own_bytes,
        "pinned_bytes": pinned_bytes,
        "pools": pools,
        "open_s": open_s,
        "host": {"opening": opening, "training": training},
        "is_peak_resettable": watch.is_resettable,
        "drive": counters.drive,
        "steps": steps,
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps[1:] or steps),
        "device_peak_bytes": max(step["device_peak_bytes"] for step in steps),
    }


def describe_pool(pool: PoolReport) -> dict[str, Any]:
    """Slots of exact size at their fullest, and what slots of one size would have taken."""
    return {
        "name": pool.name,
        "peak_bytes": pool.peak_bytes,
        "waste_fraction": pool.waste_fraction,
        "one_size_bytes": pool.one_size_bytes,
        "one_size_waste_fraction": pool.one_size_waste_fraction,
    }


def describe(result: dict[str, Any]) -> str:
    """One line for the screen."""
    head = f"{result['system']} {result['name']} {result['shape']}"
    if "error" in result:
        return f"{head}: {result['error'][:300]}"
    gib, training, io = 1 << 30, result["host"]["training"], result["steps"][-1]["io"]
    return (
        f"{head}: {result['tokens_per_s']:.0f} tokens/s, host peak {training['vm_hwm_bytes'] / gib:.2f} GiB (machine's fall "
        f"{training['available_fall_bytes'] / gib:.2f}), device peak {result['device_peak_bytes'] / gib:.2f} GiB, SSD read "
        f"{io['process_read_bytes'] / gib:.2f} written {io['process_written_bytes'] / gib:.2f} GiB a step; waste of "
        + ", ".join(f"{pool['name']} pool {pool['waste_fraction']:.1%}" for pool in result["pools"])
    )


if __name__ == "__main__":
    sys.exit(main())
