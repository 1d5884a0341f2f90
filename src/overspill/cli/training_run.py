"""A fine-tuning run from options to a saved model: read, plan, show, evaluate, step, evaluate, save.

What can fail is tried in the order of its cost: flags, data, output folder, model, placement; then training starts.
In the output folder are then `run.yaml` (the flags, for `--config`) and `plan.json` (before the first step), `metrics.jsonl`
(one object a step) and `model/`.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from overspill.cli.continuation import (
    checkpoint_directory,
    checkpoint_policy,
    deciding_flags,
    describe_position,
    find_checkpoint,
    fingerprint_weights,
    note_directory,
    note_flags,
    validate_same_flags,
)
from overspill.cli.finetune import FinetuneOptions
from overspill.cli.forecast import show_forecast
from overspill.cli.optimizer_flags import build_optimizer
from overspill.cli.outcome import (
    Course,
    Predicted,
    describe_resources,
    farewell,
    farewell_while_paused,
    show_last_step,
    summarize,
)
from overspill.cli.stopping import PauseUntilStopped, StopRequest
from overspill.cli.tracing import export_if_chosen, validate_trace_options, validate_trace_step
from overspill.cli.training_data import TrainingData, open_data, validate_data_options
from overspill.errors import HostMemoryError, ModelFolderError, NonFiniteError, StorageError
from overspill.huggingface.data_position import DataPosition
from overspill.huggingface.export import validate_target
from overspill.huggingface.model_folder import find_model_folder
from overspill.report.memory import reset_host_peak
from overspill.report.progress import LiveLine, MetricsFile, replace_text
from overspill.report.tables import placement_table
from overspill.runtime.resume import resume
from overspill.runtime.session import Session
from overspill.spec.checkpoint import Manifest
from overspill.spec.plan import Plan, PlanRequest, validate_clip
from overspill.spec.report import StepReport
from overspill.spec.tensors import DTYPE_BYTES
from overspill.spec.update_rule import LearningRate
from overspill.tiers.calls import SpacePolicy
from overspill.units import format_bytes, parse_bytes


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
    data = open_data(options, folder, load_tokenizer(folder))
    num_steps = count_steps(options, data)
    validate_trace_step(options, num_steps)
    fingerprint_weights(str(options.model))  # while the folder is surely there
    _prepare_out(options.out)

    source = find_checkpoint(options) if options.resume else None
    if source is not None:
        validate_same_flags(source[1], deciding_flags(options, num_steps))
        data.feed.seek(DataPosition.from_plain(source[1].data_position["data"]))

    stop = StopRequest(lambda text: console.print(text, highlight=False))
    pause = PauseUntilStopped(stop)
    with build_session(options, folder, data.seq_len, num_steps, source, space=pause.policy) as session:
        _announce(options, console, session.plan, data, num_steps)
        for sentence in session.wear.announce(num_steps) if session.wear is not None else ():
            console.print(f"· {sentence}", highlight=False)
        show_forecast(session, options, console)
        if source is None or source[0].resolve() == checkpoint_directory(options).resolve():
            note_flags(options)  # else at the first checkpoint: until then the run goes on from where it came
        course = Course.from_checkpoint(source[1].data_position["course"]) if source is not None else Course()
        if source is not None:
            console.print(f"going on after step {course.step}", highlight=False)
            if options.trace_step is not None and options.trace_step <= course.step:
                console.print(f"· --trace-step {options.trace_step} is done: this run writes no trace", highlight=False)
        else:
            _evaluate(session, data, course)
        if course.held_out:
            console.print(f"held-out loss before: {course.held_out[0]:.4f}")
        try:
            last = _train(session, data, options, num_steps, console, course, stop)
        except StorageError as error:
            if not pause.was_ended:
                raise
            raise KeyboardInterrupt(farewell_while_paused(options, course.step, num_steps)) from error
        if num_steps not in course.held_out:
            _evaluate(session, data, course)
        session.save_pretrained(options.out / "model", tokenizer=folder)
        resources = describe_resources(session)
    if last is not None:
        resources = show_last_step(console, *last, resources)
    summarize(options, console, course, num_steps, time.monotonic() - started_s, resources)


def validate_options(options: FinetuneOptions) -> None:
    """Refuse flags that contradict each other.

    Raises:
        ValueError: with the flags and the cure.
    """
    if options.steps is not None and options.epochs is not None:
        raise ValueError(f"--steps {options.steps} and --epochs {options.epochs} both say how long to train; give one")
    validate_trace_options(options)
    validate_data_options(options)
    build_optimizer(options)
    validate_clip(options.clip)
    if "ssd" in (options.parameters, options.states, options.boundaries, options.activations) and not options.ssd_dir:
        raise ValueError("something is to rest on the SSD; name a folder on a local drive with --ssd-dir")
    for device in options.ssd_overwrite or ():
        if device not in (options.ssd_dir or ()):
            raise ValueError(f"--ssd-overwrite {device} has no effect: it is no --ssd-dir of this run; name the same device in both")
    sizes = {f"{tier}-budget": getattr(options, f"{tier}_budget") for tier in ("device", "host", "pinned", "ssd")}
    for flag, text in {**sizes, "ssd-tbw": options.ssd_tbw}.items():
        try:
            parse_bytes(text or "0")
        except ValueError as error:
            raise ValueError(f"--{flag}: {error}") from error


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


def count_steps(options: FinetuneOptions, data: TrainingData) -> int:
    """Optimizer steps of the run."""
    if options.steps is not None:
        return options.steps
    assert data.steps_per_epoch is not None  # `validate_data_options`: a stream needs --steps
    return (options.epochs or 1) * data.steps_per_epoch


def resolve_dtype(options: FinetuneOptions) -> str:
    """The compute dtype: as asked, or float32 on a CPU (bfloat16 is emulated on most and slow) and bfloat16 elsewhere."""
    if options.dtype != "auto":
        return options.dtype
    import torch

    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    return "float32" if on_cpu else "bfloat16"


def build_request(options: FinetuneOptions, seq_len: int) -> PlanRequest:
    """What is asked of the planner, for rows of at most `seq_len` positions."""
    return PlanRequest(
        parameters=options.parameters,
        states=options.states,
        boundaries=options.boundaries,
        activations=options.activations,
        state_format=options.state_format,
        optimizer=build_optimizer(options).kind,
        dtype=resolve_dtype(options),
        device_states_bytes=_optional_bytes(options.device_states),
        deferred_updates=options.deferred_updates,
        device_budget_bytes=_optional_bytes(options.device_budget),
        host_budget_bytes=_optional_bytes(options.host_budget),
        pinned_budget_bytes=_optional_bytes(options.pinned_budget),
        ssd_budget_bytes=_optional_bytes(options.ssd_budget),
        ssd_dir=tuple(map(str, options.ssd_dir or ())),
        ssd_rated_bytes=_optional_bytes(options.ssd_tbw),
        ssd_min_years=options.ssd_years,
        seq_len=seq_len,
        micro_batch=options.micro_batch,
        accumulate=options.accumulate,
        is_masked=options.packing or (options.micro_batch > 1 and not options.blocks),
        clip=options.clip,
        device=options.device,
    )


def build_session(
    options: FinetuneOptions,
    folder: Path,
    seq_len: int,
    num_steps: int,
    source: tuple[Path, Manifest] | None = None,
    *,
    space: SpacePolicy | None = None,
) -> Session:
    """The session of these options, for rows of at most `seq_len` positions; at the checkpoint `source` if there is one.

    Args:
        space: what it does on a full drive.
    """
    policy, request = checkpoint_policy(options), build_request(options, seq_len)
    overwrite = [str(device) for device in options.ssd_overwrite or ()]
    how: dict[str, Any] = {
        "serial": options.serial,
        "compile": options.compile,
        "cuda_graphs": options.cuda_graphs,
        "machine": options.machine,
    }
    if source is not None:
        return resume(
            source[0],
            model=folder,
            plan=request,
            checkpoints=policy,
            generation=source[1].generation,
            space=space,
            ssd_overwrite=overwrite,
            **how,
        )
    return Session(
        folder,
        plan=request,
        optimizer=build_optimizer(options),
        learning_rate=LearningRate(kind=options.lr_schedule, base=options.lr, warmup_steps=options.warmup_steps, total_steps=num_steps),
        seed=options.seed,
        checkpoints=policy,
        space=space,
        ssd_overwrite=overwrite,
        **how,
    )


def _optional_bytes(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


def _prepare_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create the folder {out}: {error.strerror} (errno {error.errno}); choose another --out") from error
    validate_target(out / "model")


def _announce(options: FinetuneOptions, console: Console, plan: Plan, data: TrainingData, num_steps: int) -> None:
    """Show and record the plan, and refuse a run whose result would not fit on the drive."""
    console.print(placement_table(plan.table()))
    for note in (*plan.notes, *data.notes):
        console.print(f"· {note}", highlight=False)
    needed = plan.num_parameters * DTYPE_BYTES[plan.dtype]
    free = shutil.disk_usage(options.out).free
    if needed > free:
        raise StorageError(f"the trained model needs {format_bytes(needed)} in {options.out}, {format_bytes(free)} are free; make room")
    try:
        replace_text(options.out / "plan.json", plan.to_json() + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {options.out / 'plan.json'}: {error.strerror} (errno {error.errno})") from error
    console.print(
        f"{plan.num_parameters / 1e6:.1f} M parameters on {plan.device} in {plan.dtype} · {data.description} · "
        f"{num_steps} steps of {options.accumulate} × {options.micro_batch} {'rows' if options.packing else 'samples'}",
        soft_wrap=True,
        highlight=False,
    )


def _evaluate(session: Session, data: TrainingData, course: Course) -> None:
    """Write down the mean loss over the held-out targets; nothing when nothing is held out."""
    batches = data.held_out_batches()
    if batches:
        course.held_out[course.step] = session.evaluate(batches).loss


def _train(
    session: Session,
    data: TrainingData,
    options: FinetuneOptions,
    num_steps: int,
    console: Console,
    course: Course,
    stop: StopRequest,
) -> tuple[StepReport, Predicted | None] | None:
    """All steps that are left; the last one's report, and the last that was predicted; None if none was left."""
    is_noted, last = False, None
    predicted: Predicted | None = None

    def warn(text: str) -> None:
        console.print(text, style="yellow", soft_wrap=True, highlight=False)

    def save() -> None:
        nonlocal is_noted
        session.save_checkpoint(describe_position(data.feed.position, deciding_flags(options, num_steps), course))
        if not is_noted:
            note_flags(options)
            note_directory(options)
            is_noted = True

    is_saving = checkpoint_policy(options) is not None
    resume_after = course.step if options.resume else None
    with (
        stop,
        MetricsFile(options.out / "metrics.jsonl", resume_after=resume_after, warn=warn) as metrics,
        LiveLine(console, num_steps=num_steps) as line,
    ):
        while course.step < num_steps:
            batches = next(data.feed)
            prediction = session.predict_if_cheap(batches, trained_s=course.training_s)
            report = session.step(batches)
            predicted = (report, prediction) if prediction is not None else predicted
            last = report, predicted
            course.add(report)
            try:
                is_evaluated = options.eval_every is not None and report.step % options.eval_every == 0 and not report.skipped
                if is_evaluated and math.isfinite(report.loss):
                    _evaluate(session, data, course)
            finally:  # the step was made, whatever became of the evaluation
                metrics.write(report, held_out_loss=course.held_out.get(report.step), prediction=prediction, can_wait=True)
            line.show(report, held_out_loss=course.held_out.get(report.step))
            export_if_chosen(session, options, console, report, num_steps, will_stop=stop.is_requested)
            if not math.isfinite(report.loss):
                raise NonFiniteError(
                    f"the loss of step {report.step} is {report.loss}; nothing was saved. "
                    f"Lower --lr (now {report.lr:.2e}), add --warmup-steps or --clip, or compute in --dtype float32"
                )
            is_due = options.checkpoint_every is not None and course.step % options.checkpoint_every == 0
            warning = session.memory_warning
            if is_saving and (is_due or stop.is_requested or warning is not None or course.step == num_steps):
                metrics.write_due()
                save()
            if warning is not None and course.step < num_steps:
                raise HostMemoryError(f"{warning}. {farewell(options, course.step, num_steps, is_saving)}")
            if stop.is_requested and course.step < num_steps:
                raise KeyboardInterrupt(farewell(options, course.step, num_steps, is_saving))
        session.flush()  # a drive that is full for the last updates too ends the training as such
    return last
