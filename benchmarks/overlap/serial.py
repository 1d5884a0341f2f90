"""Are a real fine-tune's losses, norms and weights the same bits when nothing overlaps?

    python benchmarks/overlap/serial.py MODEL DATA.jsonl --steps 300 --out serial.json

The same fine-tuning runs in two processes side by side, one with every overlap on and one with `serial=True`, each step's loss and
gradient norm and a digest of all weights at the end are compared. Deterministic algorithms are on: on a GPU attention's backward adds
its parts in any order without them, overlapped or not. Side by side the step times are those of a shared machine and say nothing.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import overspill
from overspill.huggingface.data import iterate_steps, read_samples

MODES = ("overlapping", "serial")


def main() -> None:
    options = parse_arguments()
    if options.mode:
        options.out.write_text(json.dumps(fine_tune(options)))
        return
    parts = {mode: options.out.with_suffix(f".{mode}.json") for mode in MODES}
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    children = [
        subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--mode", mode, "--out", str(part)], env=environment)
        for mode, part in parts.items()
    ]
    if any([child.wait() for child in children]):
        raise SystemExit("a run failed; its message is above")
    found = {mode: json.loads(part.read_text()) for mode, part in parts.items()}
    result = compare(options, found)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for part in parts.values():
        part.unlink()
    print(f"{result['equal_steps']} of {result['steps']} steps equal, weights {'equal' if result['weights_equal'] else 'DIFFERENT'}")
    raise SystemExit(0 if result["is_equal"] else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="samples a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


def fine_tune(options: argparse.Namespace) -> dict[str, Any]:
    """Losses, norms, seconds of each step, and a digest of the weights."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = read_samples(options.data, tokenizer, seq_len=options.seq_len, truncate=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    request = overspill.PlanRequest(
        parameters="host", states="host", dtype=options.dtype, clip=options.clip, accumulate=options.accumulate,
        seq_len=max(len(sample.input_ids) for sample in samples), micro_batch=options.batch,
    )  # fmt: skip
    rate = overspill.LearningRate(kind="constant", base=options.lr, total_steps=options.steps)
    feed = iterate_steps(samples, accumulate=options.accumulate, micro_batch=options.batch, pad_token_id=pad, seed=0)
    losses, norms, seconds = [], [], []
    optimizer, is_serial = overspill.AdamW(lr=options.lr), options.mode == "serial"
    with overspill.Session(options.model, plan=request, optimizer=optimizer, learning_rate=rate, serial=is_serial) as session:
        device, overlaps = str(session.device), not is_serial
        for _ in range(options.steps):
            begun_s = time.perf_counter()
            report = session.step(next(feed))
            seconds.append(time.perf_counter() - begun_s)
            losses.append(report.loss)
            norms.append(report.grad_norm)
        session.flush()
        digest = hashlib.sha256()
        for name in session.homes.names:
            digest.update(session.homes.read(name).contiguous().view(torch.uint8).numpy().tobytes())
    return {"device": device, "overlaps": overlaps, "losses": losses, "norms": norms, "seconds": seconds, "digest": digest.hexdigest()}


def compare(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first, second = (list(zip(found[mode]["losses"], found[mode]["norms"], strict=True)) for mode in MODES)
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    weights_equal = found["overlapping"]["digest"] == found["serial"]["digest"]
    return {
        "command": " ".join(["benchmarks/overlap/serial.py", options.model.name, options.data.name, f"--steps {options.steps}"]),
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores",
        "torch": torch.__version__,
        "settings": {name: getattr(options, name) for name in ("batch", "accumulate", "seq_len", "dtype", "clip", "lr")},
        "steps": options.steps,
        "equal_steps": equal,
        "weights_equal": weights_equal,
        "is_equal": equal == options.steps and weights_equal,
        "median_step_s": {mode: statistics.median(found[mode]["seconds"]) for mode in MODES},
        "digest": found["overlapping"]["digest"],
        "losses": found["overlapping"]["losses"],
        "norms": found["overlapping"]["norms"],
    }


if __name__ == "__main__":
    main()
