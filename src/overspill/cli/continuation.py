"""What a run needs to be gone on with: where its checkpoints are, what they say about it, and the command that goes on.

A checkpoint of the command line holds, besides the model's state, the position in the data, the flags that decide the
weights, and what the summary at the end wants to know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from overspill.checkpoint import find_manifests, read_latest
from overspill.cli.finetune import FinetuneOptions
from overspill.errors import StorageError
from overspill.huggingface.data_position import DataPosition
from overspill.spec.checkpoint import CheckpointPolicy, Manifest

_POINTER = "checkpoints.json"
"""In the output folder: where the run's checkpoints are."""


def checkpoint_policy(options: FinetuneOptions) -> CheckpointPolicy | None:
    """What is reserved for checkpoints; None: nothing."""
    if options.checkpoint_every is None and not options.resume:
        return None
    return CheckpointPolicy(directory=str(checkpoint_directory(options)), keep=options.keep, discard=options.discard_checkpoints)


def checkpoint_directory(options: FinetuneOptions) -> Path:
    """The SSD directory, where state may rest already; without one, a folder in the output folder."""
    return options.ssd_dir if options.ssd_dir is not None else options.out / "checkpoints"


def note_directory(options: FinetuneOptions) -> None:
    """Write down where this run's checkpoints are, so that `--resume` finds them whatever the other flags say then."""
    path = options.out / _POINTER
    try:
        path.write_text(json.dumps({"directory": str(checkpoint_directory(options).resolve())}) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror} (errno {error.errno})") from error


def find_checkpoint(options: FinetuneOptions) -> tuple[Path, Manifest]:
    """The newest checkpoint of the run in `--out`.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    candidates = [checkpoint_directory(options), options.out / "checkpoints"]
    with contextlib.suppress(OSError, ValueError, KeyError):
        candidates.insert(0, Path(json.loads((options.out / _POINTER).read_text(encoding="utf-8"))["directory"]))
    candidates = list({path.resolve(): path for path in candidates}.values())
    found = [(path, read_latest(path)) for path in candidates if find_manifests(path)]
    if not found:
        raise StorageError(
            f"--resume: there is no checkpoint in {' or '.join(map(str, candidates))}; leave --resume out to start, or give the --out "
            "and --ssd-dir of the run that shall go on"
        )
    return max(found, key=lambda item: item[1].step)


def deciding_flags(options: FinetuneOptions, num_steps: int) -> dict[str, Any]:
    """The flags that decide the weights and are not in the plan or in the data's position."""
    return {
        "steps": num_steps,
        "lr": options.lr,
        "lr-schedule": options.lr_schedule,
        "warmup-steps": options.warmup_steps,
        "weight-decay": options.weight_decay,
        "seed": options.seed,
    }


def describe_position(position: DataPosition, flags: dict[str, Any], course: Any) -> dict[str, Any]:
    """The `data_position` of a checkpoint."""
    return {"data": position.to_plain(), "flags": flags, "course": dataclasses.asdict(course)}


def validate_same_flags(manifest: Manifest, flags: dict[str, Any]) -> None:
    """Refuse flags that would give other weights than the run that is gone on with.

    Raises:
        ValueError: with both values of each.
    """
    before = (manifest.data_position or {}).get("flags")
    if before is None:
        raise ValueError("the checkpoint was made by a program and not by `overspill finetune`; go on with overspill.resume(...)")
    differing = [f"--{name} {before.get(name)} there, {value} here" for name, value in flags.items() if before.get(name) != value]
    if differing:
        raise ValueError(f"cannot go on from step {manifest.step}: this run differs in {'; '.join(differing)}; give the same flags")


def command_to_go_on(options: FinetuneOptions) -> str:
    return f"overspill finetune --config {options.out / 'run.yaml'} --resume"
