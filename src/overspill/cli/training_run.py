"""A fine-tuning run from options to a saved model: read, plan, show, evaluate, step, evaluate, save.

What can fail is tried in the order of its cost: flags, data, output folder, model, placement; then training starts.
In the output folder are then `plan.json` (before the first step), `metrics.jsonl` (one object a step) and `model/`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from overspill.cli.finetune import FinetuneOptions
from overspill.errors import DataError, ModelFolderError, NonFiniteError, StorageError
from overspill.huggingface.data import Sample, build_micro_batches, iterate_steps, read_samples, split_held_out, steps_per_epoch
from overspill.huggingface.model_folder import find_model_folder
from overspill.report.memory import host_peak_bytes, reset_host_peak
from overspill.report.progress import LiveLine, MetricsFile
from overspill.report.tables import placement_table
from overspill.runtime.session import Session
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.tensors import DTYPE_BYTES
from overspill.spec.update_rule import AdamW, LearningRate
from overspill.units import format_bytes, format_seconds, parse_bytes


def run_finetune(options: FinetuneOptions, console: Console) -> None:
    """Carry `options` out.

    Raises:
        ValueError: wrong input, before training.
        OverspillError: a drive or file failed, or the loss is not finite; nothing is saved then.
    """
    started_s = time.monotonic()
    reset_host_peak()
    validate_options(options)
    folder = find_model_folder(options.model)
    tokenizer = load_tokenizer(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    samples = read_samples(options.data, tokenizer, seq_len=options.seq_len, truncate=options.truncate)
    training, held_out = split_held_out(samples, options.held_out, seed=options.seed)
    num_steps = count_steps(options, len(training))
    _prepare_out(options.out)

    with build_session(options, folder, samples, num_steps) as session:
        _announce(options, console, session.plan, training, held_out, num_steps)
        before = _evaluate(session, held_out, options, pad)
        if before is not None:
            console.print(f"held-out loss before: {before:.4f}")
        _train(session, training, options, pad, num_steps, console)
        after = _evaluate(session, held_out, options, pad)
        if before is not None and after is not None:
            console.print(f"held-out loss after:  {after:.4f} ({after - before:+.4f})")
        session.save_pretrained(options.out / "model", tokenizer=folder)
    console.print(
        f"saved {options.out / 'model'} · {format_seconds(time.monotonic() - started_s)} · host peak {format_bytes(host_peak_bytes())}",
        soft_wrap=True,
        highlight=False,
    )


def validate_options(options: FinetuneOptions) -> None:
    """Refuse flags that contradict each other.

    Raises:
        ValueError: with the flags and the cure.
    """
    if options.steps is not None and options.epochs is not None:
        raise ValueError(f"--steps {options.steps} and --epochs {options.epochs} both say how long to train; give one")
    if "ssd" in (options.parameters, options.states, options.boundaries) and options.ssd_dir is None:
        raise ValueError("something is to rest on the SSD; name a folder on a local drive with --ssd-dir")
    budgets = {"device": options.device_budget, "host": options.host_budget, "ssd": options.ssd_budget}
    for tier, text in budgets.items():
        try:
            parse_bytes(text or "0")
        except ValueError as error:
            raise ValueError(f"--{tier}-budget: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelFolderError: the folder has none that transformers can load.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{folder} has no tokenizer that can be loaded ({error}); copy tokenizer.json beside the weights") from error


def count_steps(options: FinetuneOptions, num_samples: int) -> int:
    """Optimizer steps of the run."""
    if options.steps is not None:
        return options.steps
    return (options.epochs or 1) * steps_per_epoch(num_samples, micro_batch=options.micro_batch, accumulate=options.accumulate)


def resolve_dtype(options: FinetuneOptions) -> str:
    """The compute dtype: as asked, or float32 on a CPU (bfloat16 is emulated on most and slow) and bfloat16 elsewhere."""
    if options.dtype != "auto":
        return options.dtype
    import torch

    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    return "float32" if on_cpu else "bfloat16"


def build_session(options: FinetuneOptions, folder: Path, samples: Sequence[Sample], num_steps: int) -> Session:
    """The session of these options; the plan is made for the longest sample there is, not for the longest allowed."""
    request = PlanRequest(
        parameters=options.parameters,
        states=options.states,
        boundaries=options.boundaries,
        state_format=options.state_format,
        dtype=resolve_dtype(options),
        device_budget_bytes=_optional_bytes(options.device_budget),
        host_budget_bytes=_optional_bytes(options.host_budget),
        ssd_budget_bytes=_optional_bytes(options.ssd_budget),
        ssd_dir=str(options.ssd_dir) if options.ssd_dir is not None else None,
        seq_len=max(len(sample.input_ids) for sample in samples),
        micro_batch=options.micro_batch,
        accumulate=options.accumulate,
        clip=options.clip,
        device=options.device,
    )
    return Session(
        folder,
        plan=request,
        optimizer=AdamW(lr=options.lr, weight_decay=options.weight_decay),
        learning_rate=LearningRate(kind=options.lr_schedule, base=options.lr, warmup_steps=options.warmup_steps, total_steps=num_steps),
        seed=options.seed,
    )


def _optional_bytes(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


def _prepare_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create the folder {out}: {error.strerror} (errno {error.errno}); choose another --out") from error


def _announce(
    options: FinetuneOptions, console: Console, plan: Plan, training: Sequence[Sample], held_out: Sequence[Sample], num_steps: int
) -> None:
    """Show and record the plan, and refuse a run whose result would not fit on the drive."""
    console.print(placement_table(plan.table()))
    for note in plan.notes:
        console.print(f"· {note}", highlight=False)
    needed = plan.num_parameters * DTYPE_BYTES[plan.dtype]
    free = shutil.disk_usage(options.out).free
    if needed > free:
        raise StorageError(f"the trained model needs {format_bytes(needed)} in {options.out}, {format_bytes(free)} are free; make room")
    try:
        (options.out / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {options.out / 'plan.json'}: {error.strerror} (errno {error.errno})") from error
    targets = sum(sample.num_targets for sample in training)
    console.print(
        f"{plan.num_parameters / 1e6:.1f} M parameters on {plan.device} in {plan.dtype} · {len(training)} samples ({targets} targets) to "
        f"train, {len(held_out)} held out · {num_steps} steps of {options.accumulate} × {options.micro_batch} samples",
        soft_wrap=True,
        highlight=False,
    )


def _evaluate(session: Session, held_out: Sequence[Sample], options: FinetuneOptions, pad: int) -> float | None:
    """Mean loss over the held-out targets; None when nothing is held out."""
    if not held_out:
        return None
    return session.evaluate(list(build_micro_batches(held_out, micro_batch=options.micro_batch, pad_token_id=pad, seed=None))).loss


def _train(session: Session, training: Sequence[Sample], options: FinetuneOptions, pad: int, num_steps: int, console: Console) -> None:
    if not training:
        raise DataError("no sample is left to train on; lower --held-out")
    steps = iterate_steps(training, micro_batch=options.micro_batch, accumulate=options.accumulate, pad_token_id=pad, seed=options.seed)
    with MetricsFile(options.out / "metrics.jsonl") as metrics, LiveLine(console, num_steps=num_steps) as line:
        for _ in range(num_steps):
            report = session.step(next(steps))
            metrics.write(report)
            line.show(report)
            if not math.isfinite(report.loss):
                raise NonFiniteError(
                    f"the loss of step {report.step} is {report.loss}; nothing was saved. "
                    f"Lower --lr (now {report.lr:.2e}), add --warmup-steps or --clip, or compute in --dtype float32"
                )
