"""Do bf16 and int8 states train as well as fp32 ones? Held-out loss curves of the formats over several seeds, and a verdict.

    python benchmarks/formats/finetune_spread.py MODEL DATA.jsonl --steps 300 --seeds 0,1,2 --out spread.jsonl
    ... --starts file,grid,off-grid --dtypes bfloat16,float32 --jobs 8 --threads 2 --deadline-s 180

Every run fine-tunes the same model on the same data with the same held-out samples; a seed changes the order of the samples
(and with narrow formats the rounding). The spread of fp32's final losses over seeds is what a format's error must drown in:

* `is_inside`: the mean of the format's final losses lies within `SIGMAS` standard errors of the difference of two such means,
  taken from fp32's spread alone. Fewer than 3 seeds give no spread and no verdict.
* `paired_difference`: mean over seeds of (format - fp32) for the same seed, and its standard error. Order of samples is the
  larger part of the spread, so this sees smaller differences; it is reported, not judged.
* `early_difference`: the same of the mean training loss of the first `EARLY_STEPS` steps, where a lag would show. Runs that were cut
  short count here.

What separates rounding from formats: `--starts` puts fp32's masters elsewhere in their bf16 cells (starts.py; narrow formats and fp32
parameters are run once, for them it changes nothing), and `--dtypes float32` rounds no parameter at all, so that only the moments are
narrow. A verdict compares each narrow format with fp32 of the same dtype and every start.

A run is a process; `--jobs` of them run side by side with `--threads` cores each (what runs beside changes no number). Each appends
one line to the JSON Lines file of `--out` and is not run again when the same command is given again. At the deadline runs stop after
their step and leave an incomplete line, which counts as not run. The verdicts go to `--out` with the suffix `.verdicts.json`.

The learning rate is constant by default, so that small updates stay small to the end. `--pad-to` gives all batches one length, so that
a GPU's graphs of blocks can be replayed; masked positions change the losses in their last digits only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from starts import STARTS, write_start
from transformers import AutoTokenizer
from verdicts import describe, judge

import overspill
from overspill.huggingface.data import Sample, build_micro_batches, iterate_steps, read_samples, split_held_out
from overspill.spec.update_rule import Optimizer

SETTINGS_OF_A_RUN = ("steps", "eval_every", "optimizer", "lr", "lr_schedule", "weight_decay", "batch", "seq_len", "pad_to", "held_out")
"""What must be the same in all lines of a file."""
POLL_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning; its key names it in files and on the command line."""

    dtype: str
    state_format: str
    start: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.dtype}:{self.state_format}:{self.start}:{self.seed}"


def main() -> None:
    options = parse_arguments()
    if options.only:
        dtype, state_format, start, seed = options.only.split(":")
        run_and_append(options, Run(dtype=dtype, state_format=state_format, start=start, seed=int(seed)))
        return
    runs = plan_runs(options)
    failed = run_all(options, runs)
    curves = read_curves(options)
    verdicts = judge(curves)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"settings": settings, "torch": torch.__version__, "verdicts": verdicts, "failed": failed}
    options.out.with_suffix(".verdicts.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for verdict in verdicts:
        print(describe(verdict))
    done = {curve["key"] for curve in curves if curve["is_complete"]}
    missing = [run.key for run in runs if run.key not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are complete" + (f"; missing {', '.join(missing)}" if missing else ""))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("model", type=Path, help="model folder with fp32 weights")
    parser.add_argument("data", help="JSONL")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file, a line a run; appended to")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--formats", type=words, default=["fp32", "bf16", "int8"])
    parser.add_argument("--dtypes", type=words, default=["bfloat16"], help="bfloat16, float32 or both")
    parser.add_argument("--starts", type=words, default=["file"], help=f"of fp32's masters: {', '.join(STARTS)}")
    parser.add_argument("--seeds", type=lambda text: [int(item) for item in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--optimizer", choices=["adamw", "lion", "sgd"], default="adamw")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--lr-schedule", choices=["constant", "linear", "cosine"], default="constant")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, as one micro-batch")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--pad-to", type=int, default=1, help="pad batches to a multiple of this many positions")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--states", default="host", help="tier of the states: device, host or ssd; no effect on numbers")
    parser.add_argument("--ssd-dir")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=2, help="cores of each run")
    parser.add_argument("--deadline-s", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--work", type=Path, help="where models with other starts are written; default: beside --out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wrong = [start for start in options.starts if start not in STARTS]
    if wrong:
        parser.error(f"--starts: {', '.join(wrong)} is none of {', '.join(STARTS)}")
    if options.jobs < 1 or options.threads < 1:
        parser.error(f"--jobs and --threads must be at least 1, got {options.jobs} and {options.threads}")
    return options


def plan_runs(options: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that what is there at the deadline can be compared; first the dtypes that come first."""
    runs = []
    for dtype in options.dtypes:
        for seed in options.seeds:
            for state_format in options.formats:
                starts = options.starts if state_format == "fp32" and dtype == "bfloat16" else ["file"]
                runs += [Run(dtype=dtype, state_format=state_format, start=start, seed=seed) for start in starts]
    return runs


def folder_of(options: argparse.Namespace, start: str) -> Path:
    return (options.work or options.out.parent) / f"start-{start}"


def read_curves(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The file's lines, the last of each run. Lines of other settings are an error: they are no curves of the same thing."""
    found: dict[str, dict[str, Any]] = {}
    wanted = {name: getattr(options, name) for name in SETTINGS_OF_A_RUN}
    for line in options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []:
        curve = json.loads(line)
        different = {name: (curve["settings"][name], wanted[name]) for name in wanted if curve["settings"][name] != wanted[name]}
        if different:
            raise SystemExit(f"{options.out} has runs with other settings (there, here): {different}; give another --out")
        found[curve["key"]] = curve
    return list(found.values())


def run_all(options: argparse.Namespace, runs: list[Run]) -> list[str]:
    """Starts what is missing, --jobs at a time; the keys of the runs that failed."""
    until = time.time() + options.deadline_s
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = {curve["key"] for curve in read_curves(options) if curve["is_complete"]}
    waiting = [run for run in runs if run.key not in done]
    for start in sorted({run.start for run in waiting}):
        write_start(options.model, folder_of(options, start), start)
    available = sorted(os.sched_getaffinity(0))
    is_pinned = options.jobs * options.threads <= len(available)
    running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
    failed = []
    try:
        while waiting or running:
            for slot in range(options.jobs):
                if slot not in running and waiting and time.time() < until:
                    cores = available[slot * options.threads : (slot + 1) * options.threads] if is_pinned else []
                    run = waiting.pop(0)
                    running[slot] = (run, start_run(options, run, until, cores))
            if not running:
                break
            time.sleep(POLL_S)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    failed += [run.key] if process.returncode != 0 else []
    finally:
        for _, process in running.values():
            process.terminate()
    return failed


def start_run(options: argparse.Namespace, run: Run, until: float, cores: list[int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, *sys.argv, "--only", run.key, "--until", repr(until)]
    command += ["--cores", ",".join(map(str, cores))] if cores else []
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})


def run_and_append(options: argparse.Namespace, run: Run) -> None:
    """In a process of its own: one fine-tuning, one line."""
    if options.cores:
        os.sched_setaffinity(0, [int(core) for core in options.cores.split(",")])
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = read_samples(options.data, tokenizer, seq_len=options.seq_len, truncate=True)
    training, held_out = split_held_out(samples, options.held_out, seed=0)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    curve = fine_tune(options, run, training, held_out, pad)
    settings = {name: getattr(options, name) for name in SETTINGS_OF_A_RUN}
    line = json.dumps({"key": run.key, **dataclasses.asdict(run), **curve, "settings": settings}) + "\n"
    with options.out.open("ab", buffering=0) as file:
        file.write(line.encode())  # one write to the end: lines of several processes do not mix
    marks = f"{curve['losses'][0]:.4f} -> {curve['losses'][-1]:.4f}" if curve["losses"] else "no loss"
    print(f"{run.key}: {marks} after {len(curve['training_losses'])} of {options.steps} steps, {curve['seconds']:.0f} s", flush=True)


def build_optimizer(options: argparse.Namespace) -> Optimizer:
    if options.optimizer == "sgd":
        return overspill.SGD(lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)
    kind = {"adamw": overspill.AdamW, "lion": overspill.Lion}[options.optimizer]
    return kind(lr=options.lr, weight_decay=options.weight_decay)


def fine_tune(options: argparse.Namespace, run: Run, training: list[Sample], held_out: list[Sample], pad: int) -> dict[str, Any]:
    """Held-out losses after 0, eval_every, ... and the last step; until the time is over."""
    request = overspill.PlanRequest(
        states=options.states,
        state_format=run.state_format,
        dtype=run.dtype,
        seq_len=max(len(sample.input_ids) for sample in [*training, *held_out]) + options.pad_to - 1,
        micro_batch=options.batch,
        device=options.device,
        ssd_dir=options.ssd_dir,
    )
    rate = overspill.LearningRate(kind=options.lr_schedule, base=options.lr, total_steps=options.steps)
    shape: dict[str, int] = {"micro_batch": options.batch, "pad_token_id": pad, "pad_to_multiple": options.pad_to}
    feed = iterate_steps(training, accumulate=1, seed=run.seed, **shape)
    test = list(build_micro_batches(held_out, seed=None, **shape))
    folder = options.model if run.start == "file" else folder_of(options, run.start)
    started_s = time.monotonic()
    steps, losses, training_losses = [], [], []
    with overspill.Session(folder, plan=request, optimizer=build_optimizer(options), learning_rate=rate, seed=run.seed) as session:
        for step in range(options.steps + 1):
            if step > 0:
                training_losses.append(session.step(next(feed)).loss)
            if step % options.eval_every == 0 or step == options.steps:
                steps.append(step)
                losses.append(session.evaluate(test).loss)
            if time.time() > options.until:
                break
        state_bytes = sum(session.plan.state_bytes(name) for name in session.plan.bundles)
    return {
        "is_complete": len(training_losses) == options.steps,
        "steps": steps,
        "losses": losses,
        "training_losses": training_losses,
        "state_bytes": state_bytes,
        "seconds": time.monotonic() - started_s,
    }


if __name__ == "__main__":
    main()
