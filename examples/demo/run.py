"""The demo: fine-tune every parameter of SmolLM2-135M while its weights and optimizer states rest on the SSD.

Five thousand WordNet definitions teach the model to answer "What does X mean?" in WordNet's manner. Parameters (float32,
4 bytes each) and the AdamW states (8 bytes each) live in files; host memory holds a unit at a time. It

1. fetches and converts the model once (`fetch_model`, cached in .cache/);
2. measures the loss on 64 held-out definitions and lets the model answer two of them;
3. trains `NUM_STEPS` steps;
4. measures and answers again, saves the model, and says what it took.

It fails unless the held-out loss fell by at least `REQUIRED_FALL`. On two CPU cores it takes under five minutes and under
3 GiB of memory; float32, because bfloat16 is emulated on most CPUs and about 20 times slower.

Run:  python examples/demo/run.py [--out DIR] [--ssd-dir DIR] [--cache DIR]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

# Before torch loads: its threads sleep at a barrier instead of spinning, which would starve the threads that move bytes (and
# anything else on two cores; steps of 5 s then took up to 16 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fetch_model import DEFAULT_CACHE, fetch_model
from rich.console import Console
from transformers import AutoTokenizer

import overspill
from overspill.huggingface.data import Sample, build_micro_batches, iterate_steps, read_samples, split_held_out
from overspill.report.memory import host_peak_bytes, reset_host_peak
from overspill.report.progress import LiveLine, MetricsFile
from overspill.report.tables import placement_table
from overspill.units import format_bytes, format_seconds

PAIRS = Path(__file__).with_name("wordnet.jsonl")
NUM_STEPS = 20
BATCH = 12
"""Samples of a step, as one micro-batch."""
LEARNING_RATE = 1e-4
"""Chosen, not tuned."""
NUM_HELD_OUT = 64
REQUIRED_FALL = 0.8
NEW_TOKENS = 12
EVALUATION_BATCH = 16


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    folder = fetch_model(arguments.cache)
    started_s = time.monotonic()
    reset_host_peak()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training, held_out = split_held_out(read_samples(PAIRS, tokenizer, seq_len=64), NUM_HELD_OUT, seed=0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.ssd_dir.mkdir(parents=True, exist_ok=True)

    with build_session(folder, arguments.ssd_dir, max(len(sample.input_ids) for sample in [*training, *held_out])) as session:
        console.print(placement_table(session.plan.table()))
        before = evaluate(session, held_out)
        console.print(f"loss on {NUM_HELD_OUT} held-out definitions before: {before:.3f}")
        answer(session, held_out[:2], tokenizer, console)
        train(session, training, arguments.out, console)
        after = evaluate(session, held_out)
        console.print(f"loss on {NUM_HELD_OUT} held-out definitions after:  {after:.3f} ({after - before:+.3f})")
        answer(session, held_out[:2], tokenizer, console)
        session.save_pretrained(arguments.out / "model", tokenizer=folder)

    took_s = time.monotonic() - started_s
    console.print(
        f"saved {arguments.out / 'model'} · peak RSS {format_bytes(host_peak_bytes())} · {format_seconds(took_s)}", soft_wrap=True
    )
    if before - after < REQUIRED_FALL:
        raise SystemExit(f"the held-out loss fell by {before - after:.3f}, expected at least {REQUIRED_FALL}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for model/ and metrics.jsonl")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for the downloaded and converted model")
    parser.add_argument("--ssd-dir", type=Path, default=DEFAULT_CACHE / "demo-ssd", help="folder on a local drive for weights and states")
    return parser.parse_args()


def build_session(folder: Path, ssd_dir: Path, seq_len: int) -> overspill.Session:
    return overspill.Session(
        folder,
        plan=overspill.PlanRequest(
            parameters="ssd",
            states="ssd",
            dtype="float32",
            ssd_dir=str(ssd_dir),
            seq_len=seq_len,
            micro_batch=EVALUATION_BATCH,
            device="cpu",
        ),
        optimizer=overspill.AdamW(lr=LEARNING_RATE),
        learning_rate=overspill.LearningRate(kind="linear", base=LEARNING_RATE, total_steps=NUM_STEPS),
    )


def evaluate(session: overspill.Session, samples: list[Sample]) -> float:
    return session.evaluate(list(build_micro_batches(samples, micro_batch=EVALUATION_BATCH, pad_token_id=0, seed=None))).loss


def train(session: overspill.Session, samples: list[Sample], out: Path, console: Console) -> None:
    steps = iterate_steps(samples, micro_batch=BATCH, accumulate=1, pad_token_id=0, seed=0)
    with MetricsFile(out / "metrics.jsonl") as metrics, LiveLine(console, num_steps=NUM_STEPS) as line:
        for _ in range(NUM_STEPS):
            report = session.step(next(steps))
            metrics.write(report)
            line.show(report)


def answer(session: overspill.Session, samples: list[Sample], tokenizer, console: Console) -> None:
    """Print each question, the model's greedy answer and WordNet's."""
    questions = [sample.input_ids[sample.labels < 0].tolist() for sample in samples]
    answers = session.generate(questions, max_new_tokens=NEW_TOKENS, eos_token_id=tokenizer.eos_token_id)
    for sample, question, given in zip(samples, questions, answers, strict=True):
        wanted = tokenizer.decode(sample.input_ids[sample.labels >= 0], skip_special_tokens=True)
        console.print(f"  {tokenizer.decode(question).strip()}", highlight=False, markup=False)
        console.print(f"    model:   {tokenizer.decode(given, skip_special_tokens=True).strip()!r}", highlight=False, markup=False)
        console.print(f"    WordNet: {wanted!r}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
