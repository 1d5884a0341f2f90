"""Do bf16 and int8 states train as well as fp32 ones? Held-out loss curves of the formats over several seeds, and a verdict.

    python benchmarks/formats/finetune_spread.py MODEL DATA.jsonl --steps 300 --seeds 0,1,2,3,4 --out spread.json

Every run fine-tunes the same model on the same data with the same held-out samples; a seed changes the order of the samples
(and with narrow formats the rounding). The spread of fp32's final losses over seeds is what a format's error must drown in:

* `is_inside`: the mean of the format's final losses lies within `SIGMAS` standard errors of the difference of two such means,
  taken from fp32's spread alone. Fewer than 3 seeds give no spread and no verdict.
* `paired_difference`: mean over seeds of (format - fp32) for the same seed, and its standard error. Order of samples is the
  larger part of the spread, so this sees smaller differences; it is reported, not judged.

The learning rate is constant by default, so that small updates stay small to the end; bf16 compute, all states where the
budgets let them rest. Each run is a session of its own; a format's curve is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import overspill
from overspill.huggingface.data import Sample, build_micro_batches, iterate_steps, read_samples, split_held_out
from overspill.spec.update_rule import Optimizer

SIGMAS = 2.0
"""Chosen: an honest format is found outside once in 20 times."""


def main() -> None:
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = read_samples(options.data, tokenizer, seq_len=options.seq_len, truncate=True)
    training, held_out = split_held_out(samples, options.held_out, seed=0)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "curves": []}
    for state_format in options.formats:
        for seed in options.seeds:
            report["curves"].append(run_once(options, state_format, seed, training, held_out, pad))
            report["verdicts"] = judge(report["curves"])
            options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            curve = report["curves"][-1]
            print(
                f"{state_format} seed {seed}: {curve['losses'][0]:.4f} -> {curve['losses'][-1]:.4f} in {curve['seconds']:.0f} s", flush=True
            )
    for verdict in report["verdicts"]:
        print(describe(verdict))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="JSONL")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["fp32", "bf16", "int8"])
    parser.add_argument("--seeds", type=lambda text: [int(item) for item in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--optimizer", choices=["adamw", "lion", "sgd"], default="adamw")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--lr-schedule", choices=["constant", "linear", "cosine"], default="constant")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, as one micro-batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--states", default="host", help="tier of the states: device, host or ssd")
    parser.add_argument("--ssd-dir")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def build_optimizer(options: argparse.Namespace) -> Optimizer:
    if options.optimizer == "sgd":
        return overspill.SGD(lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)
    kind = {"adamw": overspill.AdamW, "lion": overspill.Lion}[options.optimizer]
    return kind(lr=options.lr, weight_decay=options.weight_decay)


def run_once(
    options: argparse.Namespace, state_format: str, seed: int, training: list[Sample], held_out: list[Sample], pad: int
) -> dict[str, Any]:
    """One fine-tuning; held-out losses after 0, eval_every, ... and the last step."""
    request = overspill.PlanRequest(
        states=options.states,
        state_format=state_format,
        dtype=options.dtype,
        seq_len=max(len(sample.input_ids) for sample in [*training, *held_out]),
        micro_batch=options.batch,
        device=options.device,
        ssd_dir=options.ssd_dir,
    )
    rate = overspill.LearningRate(kind=options.lr_schedule, base=options.lr, total_steps=options.steps)
    feed = iterate_steps(training, micro_batch=options.batch, accumulate=1, pad_token_id=pad, seed=seed)
    test = list(build_micro_batches(held_out, micro_batch=options.batch, pad_token_id=pad, seed=None))
    started_s = time.monotonic()
    with overspill.Session(options.model, plan=request, optimizer=build_optimizer(options), learning_rate=rate, seed=seed) as session:
        steps, losses, training_losses = [0], [session.evaluate(test).loss], []
        for step in range(1, options.steps + 1):
            training_losses.append(session.step(next(feed)).loss)
            if step % options.eval_every == 0 or step == options.steps:
                steps.append(step)
                losses.append(session.evaluate(test).loss)
        state_bytes = sum(session.plan.state_bytes(name) for name in session.plan.bundles)
    return {
        "state_format": state_format,
        "seed": seed,
        "steps": steps,
        "losses": losses,
        "training_losses": training_losses,
        "state_bytes": state_bytes,
        "seconds": time.monotonic() - started_s,
    }


def judge(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each narrow format that has runs: is its mean final loss inside fp32's spread over seeds?"""
    finals: dict[str, dict[int, float]] = {}
    for curve in curves:
        finals.setdefault(curve["state_format"], {})[curve["seed"]] = curve["losses"][-1]
    exact = finals.get("fp32", {})
    verdicts = []
    for state_format, losses in finals.items():
        if state_format == "fp32" or len(exact) < 3:
            continue
        spread = statistics.stdev(exact.values())
        difference = statistics.mean(losses.values()) - statistics.mean(exact.values())
        allowed = SIGMAS * spread * math.sqrt(1 / len(losses) + 1 / len(exact))
        pairs = [losses[seed] - exact[seed] for seed in losses if seed in exact]
        verdicts.append(
            {
                "state_format": state_format,
                "num_seeds": len(losses),
                "fp32_mean": statistics.mean(exact.values()),
                "fp32_standard_deviation": spread,
                "mean": statistics.mean(losses.values()),
                "difference": difference,
                "allowed": allowed,
                "is_inside": abs(difference) <= allowed,
                "paired_difference": statistics.mean(pairs) if pairs else None,
                "paired_standard_error": statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None,
            }
        )
    return verdicts


def describe(verdict: dict[str, Any]) -> str:
    word = "inside" if verdict["is_inside"] else "OUTSIDE"
    return (
        f"{verdict['state_format']}: final loss {verdict['mean']:.4f} against fp32's {verdict['fp32_mean']:.4f} "
        f"(spread over seeds {verdict['fp32_standard_deviation']:.4f}): {verdict['difference']:+.4f}, {word} ±{verdict['allowed']:.4f}"
    )


if __name__ == "__main__":
    main()
