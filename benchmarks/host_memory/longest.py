"""The longest context (one sample) and the largest batch (samples of 2048 tokens) that a shape trains with on this machine.

    python benchmarks/host_memory/longest.py --shape 8B --state-format bf16 --ssd-dir DIRECTORY --seconds 480 --out results.jsonl
    python benchmarks/host_memory/longest.py --shape 8B --system deepspeed --ssd-dir DIRECTORY --out results.jsonl

A **trial** is one optimizer step of one micro-batch: forward, backward of every unit, and its updates.

How overspill is searched, in two stages, because a step of 8B at 256k tokens takes minutes:

1. **shallow**: the same widths with two blocks. Parameters, states and boundaries rest on the host, so what the device holds is
   one unit's working memory, whatever the depth: the device's limit is found in seconds a trial, by doubling and then halving the
   gap. The planner's own assumption of working memory is put aside (`DEVICE_BUDGET_BYTES`): the device itself refuses.
2. **whole**: the full depth at the largest size that was found, or at the largest whose time still fits, as one whole step. This one
   counts: `confirmed`. Boundaries go to the SSD where parameters, states and they do not fit the host together. The kind of search
   whose whole step is the shorter one is confirmed first; it may take the time that the other does not need by its estimate.

The host is used to the last: all that is free but `HOST_LEFT_BYTES`, which is less than a session leaves by itself.

Trials run in a worker process that draws weights and opens a session for each; if it hangs or is killed, the trial has failed and a
new worker goes on.

DeepSpeed: what its configuration needs by arithmetic is written down first, then it is tried all the same, at the smallest
size, under a time limit and a floor under the machine's memory; where that runs, the size is doubled.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attempt import run_attempt
from measure import HostWatch, append_result, meminfo, provenance, status_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))

PROBE_BLOCKS = 2
BATCH_SEQ_LEN = 2048
DEVICE_BUDGET_BYTES = 1 << 50
"""More than any device has: the planner then refuses nothing, and a trial shows what the device really takes."""
HOST_SHARE = 0.92
"""Of the memory that is free, what the planner uses when no budget is given (`planning.room.FREE_SHARE`)."""
FLOOR_BYTES = 3 << 30
"""MemAvailable at which a worker is ended, on machines of 32 GiB or more."""
HOST_LEFT_BYTES = FLOOR_BYTES + (1 << 30)
"""Of the memory that is free, what a trial leaves, on machines where that is less than the planner would leave."""
HOST_RESERVE_BYTES = 6 << 30
"""Process, CUDA context, pools and the weights' way in. Assumed."""
STATE_BYTES = {"fp32": 12.0, "bf16": 6.0, "int8": 4.03}
"""Parameters and states together, per parameter (bf16 compute)."""
DEEPSPEED_NEEDS = {
    "zero3-cpu": ("host", 28.0, "measured: parameters 2, master and moments 12, gradients and buffers"),
    "infinity-states": ("ssd", 12.0, "master and moments; parameters and gradients besides are in host memory"),
    "infinity-both": ("ssd", 14.0, "parameters, master and moments"),
}
"""Configuration -> scarce tier, least bytes a parameter there, of what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One size that is tried."""

    samples: int
    seq_len: int
    blocks: int | None = None
    """None: the whole depth."""
    boundaries: str = "host"

    @property
    def num_tokens(self) -> int:
        return self.samples * self.seq_len


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=["overspill", "deepspeed"], default="overspill")
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--state-format", default="bf16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--search", choices=["context", "batch", "both"], default="both")
    parser.add_argument("--configurations", nargs="+", default=list(DEEPSPEED_NEEDS), help="of DeepSpeed")
    parser.add_argument("--start-tokens", type=int, default=32768, help="tokens of the first trial")
    parser.add_argument("--most-tokens", type=int, default=1 << 20)
    parser.add_argument("--halvings", type=int, default=2, help="of the gap between what ran and what did not")
    parser.add_argument("--batch-seq-len", type=int, default=BATCH_SEQ_LEN)
    parser.add_argument("--seconds", type=float, default=360, help="of all trials together")
    parser.add_argument("--trial-seconds", type=float, default=90, help="of one shallow trial, or one of DeepSpeed's")
    parser.add_argument("--ssd-dir")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# -- searching -------------------------------------------------------------------------------------------------------


def search(first: int, most: int, halvings: int, granule: int, runs: Callable[[int], bool]) -> tuple[int, list[int]]:
    """The largest size that ran (0: none), and all that ran; doubling from `first`, then halving the gap to the first that did not.

    Args:
        granule: sizes are multiples of it.
        runs: tries a size.
    """
    good: list[int] = []
    size, failed = first, None
    while size <= most:
        if not runs(size):
            failed = size
            break
        good.append(size)
        size *= 2
    if failed is None or not good:
        return (good[-1] if good else 0), good
    low, high = good[-1], failed
    for _ in range(halvings):
        middle = (low + high) // 2 // granule * granule
        if middle in (low, high):
            break
        if runs(middle):
            good.append(middle)
            low = middle
        else:
            high = middle
    return low, sorted(good)


# -- overspill -------------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs trials one after the other; replaced when it dies or takes too long."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--shape", options.shape]
        self._command += ["--state-format", options.state_format, "--dtype", options.dtype]
        self._command += ["--ssd-dir", options.ssd_dir] if options.ssd_dir else []
        self._child: subprocess.Popen[str] | None = None

    def run(self, trial: Trial, limit_s: float) -> dict[str, Any]:
        if self._child is None:
            signal.signal(signal.SIGTERM, lambda number, frame: self._stop(number))
            environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._child.stdin is not None and self._child.stdout is not None
        started = time.monotonic()
        print(json.dumps(dataclasses.asdict(trial)), file=self._child.stdin, flush=True)
        ready, _, _ = select.select([self._child.stdout], [], [], limit_s)
        line = self._child.stdout.readline() if ready else ""
        wall_s = time.monotonic() - started
        if line:
            return {**json.loads(line), "wall_s": wall_s}
        self.close()
        return {"runs": False, "error": "the worker died" if ready else f"ran past its limit of {limit_s:.0f} s", "wall_s": wall_s}

    def _stop(self, number: int) -> None:
        """Told to end from outside: the worker first."""
        self.close()
        raise SystemExit(128 + number)

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


def work(options: argparse.Namespace) -> int:
    """The worker: a trial a line in, its result a line out. What libraries print goes to the other stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        trial = Trial(**json.loads(line))
        try:
            result = {"runs": True, **run_trial(trial, options)}
        except Exception as error:
            result = {"runs": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}
        gc.collect()
        print(json.dumps(result), file=answers, flush=True)
    return 0


def run_trial(trial: Trial, options: argparse.Namespace) -> dict[str, Any]:
    """One optimizer step."""
    import torch
    from shapes import SHAPES, build_windowed_model, random_batch

    import overspill

    shape = SHAPES[options.shape].with_blocks(trial.blocks)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    watch = HostWatch(floor_bytes=FLOOR_BYTES if available_on("host", None) >= 32 << 30 else None)
    started = time.perf_counter()
    model = build_windowed_model(shape, dtype=getattr(torch, options.dtype), max_positions=max(4096, trial.seq_len))
    request = overspill.PlanRequest(
        parameters="host", states="host", boundaries=trial.boundaries, state_format=options.state_format, dtype=options.dtype,
        seq_len=trial.seq_len, micro_batch=trial.samples, ssd_dir=options.ssd_dir, device_budget_bytes=DEVICE_BUDGET_BYTES,
        host_budget_bytes=usable_host_bytes() + status_bytes("VmRSS"),  # a budget is the process's, with what it has already
    )  # fmt: skip
    try:
        with overspill.Session(model, plan=request, optimizer=overspill.AdamW(lr=1e-5)) as session:
            del model
            open_s = time.perf_counter() - started
            report = session.step([random_batch(shape, samples=trial.samples, seq_len=trial.seq_len, seed=0)])
            seen = watch.read()
    finally:
        watch.close()
    return {
        "open_s": open_s,
        "step_s": report.step_s,
        "loss": report.loss,
        "tokens_per_s": report.tokens_per_s,
        "device_peak_bytes": report.device_peak_bytes,
        "host": seen,
    }


def search_overspill(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result for each kind of search."""
    from shapes import SHAPES

    shape = SHAPES[options.shape]
    worker = Worker(options)
    deadline = time.monotonic() + options.seconds
    kinds = ("context", "batch") if options.search == "both" else (options.search,)
    found: list[tuple[dict[str, Any], dict[int, float]]] = []
    for kind in kinds:
        trials: list[dict[str, Any]] = []
        whole_s: dict[int, float] = {}

        def runs(size: int, kind: str = kind, trials: list[dict[str, Any]] = trials, whole_s: dict[int, float] = whole_s) -> bool:
            trial = sized_trial(kind, size, options, blocks=PROBE_BLOCKS)
            left_s = deadline - time.monotonic()
            result = worker.run(trial, min(options.trial_seconds, left_s)) if left_s > 5 else {"runs": False, "error": "no time left"}
            trials.append({**dataclasses.asdict(trial), **result})
            print(f"{kind} {size}: {'runs, ' + str(round(result['step_s'], 2)) + ' s' if result['runs'] else result['error']}", flush=True)
            if result["runs"]:
                whole_s[size] = estimate_whole_s(result, shape)
            return bool(result["runs"])

        unit = 1 if kind == "context" else options.batch_seq_len
        granule = max(1, options.start_tokens // 8 // unit)
        size, _ = search(max(1, options.start_tokens // unit), options.most_tokens // unit, options.halvings, granule, runs)
        found.append(({"search": kind, "longest_shallow": size, "trials": trials}, whole_s))
    # Both are searched before either is confirmed: confirming is what takes the time.
    found.sort(key=lambda item: max(item[1].values(), default=0.0))
    for index, (result, whole_s) in enumerate(found):
        others_s = [max(later.values(), default=0.0) for _, later in found[index + 1 :]]
        yield {**result, **confirm(result["search"], whole_s, shape, worker, options, share_of_time(deadline - time.monotonic(), others_s))}
    worker.close()


def estimate_whole_s(shallow: dict[str, Any], shape: Any) -> float:
    """A whole trial's time from a shallow one's. Embedding, head and loss are counted once a block and not once, so it is too long."""
    parameters = shape.num_parameters / shape.with_blocks(PROBE_BLOCKS).num_parameters
    return float(shallow["open_s"] * parameters + shallow["step_s"] * shape.num_blocks / PROBE_BLOCKS)


def share_of_time(left_s: float, others_s: list[float]) -> float:
    """Seconds for one whole trial: what those that follow will not need, but never less than an equal share."""
    return max(left_s - sum(others_s), left_s / (1 + len(others_s)))


def sized_trial(kind: str, size: int, options: argparse.Namespace, *, blocks: int | None, boundaries: str = "host") -> Trial:
    if kind == "context":
        return Trial(samples=1, seq_len=size, blocks=blocks, boundaries=boundaries)
    return Trial(samples=size, seq_len=options.batch_seq_len, blocks=blocks, boundaries=boundaries)


def confirm(
    kind: str, whole_s: dict[int, float], shape: Any, worker: Worker, options: argparse.Namespace, share_s: float
) -> dict[str, Any]:
    """The whole depth, from the largest size down, as long as there is time; `whole_s`: size -> its estimated time."""
    deadline = time.monotonic() + share_s
    tried: list[dict[str, Any]] = []
    for size, estimate_s in sorted(whole_s.items(), reverse=True):
        for boundaries in boundary_tiers(kind, size, shape, options):
            left_s = deadline - time.monotonic()
            if estimate_s > left_s:
                tried.append({"size": size, "skipped": f"about {estimate_s:.0f} s of {left_s:.0f} s left"})
                continue
            result = worker.run(sized_trial(kind, size, options, blocks=None, boundaries=boundaries), left_s)
            tried.append({"size": size, "boundaries": boundaries, "estimate_s": estimate_s, **result})
            print(f"{kind} {size} whole: {'runs' if result['runs'] else result['error']}, {result['wall_s']:.0f} s", flush=True)
            if result["runs"]:
                return {"confirmed": size, "whole": tried}
    return {"confirmed": 0, "whole": tried}


def boundary_tiers(kind: str, size: int, shape: Any, options: argparse.Namespace) -> list[str]:
    """Where the hidden states of a whole trial may rest, the faster one first."""
    # The input of each block and of the tail.
    tokens = sized_trial(kind, size, options, blocks=None).num_tokens
    boundary_bytes = tokens * shape.hidden_size * 2 * (shape.num_blocks + 1)
    state_bytes = STATE_BYTES.get(options.state_format, STATE_BYTES["fp32"]) * shape.num_parameters
    fits = state_bytes + boundary_bytes + HOST_RESERVE_BYTES <= usable_host_bytes()
    return [*(["host"] if fits else []), *(["ssd"] if options.ssd_dir else [])] or ["host"]


def usable_host_bytes() -> int:
    """What a trial may take of the memory that is free now."""
    available = available_on("host", None)
    return max(int(HOST_SHARE * available), available - HOST_LEFT_BYTES)


# -- DeepSpeed -------------------------------------------------------------------------------------------------------


def search_deepspeed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result for each configuration and kind of search."""
    from shapes import SHAPES

    shape = SHAPES[options.shape]
    deadline = time.monotonic() + options.seconds
    for name in options.configurations:
        tier, per_parameter, what = DEEPSPEED_NEEDS[name]
        needs = {"tier": tier, "needed_bytes": int(per_parameter * shape.num_parameters), "what": what}
        needs["available_bytes"] = available_on(tier, options.ssd_dir)
        for kind in ("context", "batch") if options.search == "both" else (options.search,):
            trials: list[dict[str, Any]] = []

            def runs(size: int, name: str = name, kind: str = kind, trials: list[dict[str, Any]] = trials) -> bool:
                limit_s = min(options.trial_seconds, deadline - time.monotonic())
                if limit_s < 5:
                    trials.append({"size": size, "runs": False, "error": "no time left"})
                    return False
                trials.append({"size": size, **try_deepspeed(name, sized_trial(kind, size, options, blocks=None), options, limit_s)})
                return bool(trials[-1]["runs"])

            unit = 1 if kind == "context" else options.batch_seq_len
            granule = max(1, options.start_tokens // 8 // unit)
            size, _ = search(max(1, options.start_tokens // unit), options.most_tokens // unit, options.halvings, granule, runs)
            yield {"search": kind, "name": name, "needs": needs, "confirmed": size, "trials": trials}
            if size == 0:
                break  # it does not run at all; the other kind starts with as many tokens


def try_deepspeed(name: str, trial: Trial, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """One step in a process of its own; `run_deepspeed.py` guards it and always leaves a result."""
    assert options.out is not None
    report = options.out.with_suffix(".trial")
    report.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("run_deepspeed.py")), "--name", name, "--shape", options.shape, "--steps", "1"]
    command += ["--samples", str(trial.samples), "--seq-len", str(trial.seq_len), "--limit-s", str(max(5.0, limit_s - 5))]
    command += ["--out", str(report), *(["--ssd-dir", options.ssd_dir] if options.ssd_dir else [])]
    run_attempt(command, limit_s=limit_s + 20)
    lines = report.read_text().splitlines() if report.exists() else []
    report.unlink(missing_ok=True)
    result = json.loads(lines[-1]) if lines else {"error": "no result"}
    kept = {key: result[key] for key in ("error", "wall_s", "host", "device_peak_bytes", "tokens_per_s") if key in result}
    return {"runs": "error" not in result, **kept}


def available_on(tier: str, ssd_dir: str | None) -> int:
    """Bytes free now."""
    if tier == "host":
        return meminfo()["MemAvailable"]
    folder = Path(ssd_dir or ".").absolute()
    stats = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    return stats.f_bavail * stats.f_frsize


def main() -> int:
    options = parse_arguments()
    if options.worker:
        return work(options)
    if options.out is None:
        raise SystemExit("--out is needed")
    results = search_overspill(options) if options.system == "overspill" else search_deepspeed(options)
    for result in results:
        head = {"system": options.system, "name": "longest", **provenance(), "shape": options.shape}
        append_result(options.out, {**head, "state_format": options.state_format, **result})
        print(f"{options.system} {result.get('name', '')} {result['search']}: {result['confirmed']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
