"""What a run needs to be gone on with: where its checkpoints are, what they say about it, and the command that goes on.

A checkpoint of the command line holds, besides the model's state, the position in the data, the flags that decide the
weights, and what the summary at the end wants to know.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from overspill.checkpoint import find_manifests, read_latest
from overspill.cli.config_file import write_config
from overspill.cli.finetune import FinetuneOptions
from overspill.errors import StorageError
from overspill.huggingface.data_position import DataPosition
from overspill.huggingface.model_folder import find_model_folder, find_shards
from overspill.report.progress import replace_text
from overspill.spec.checkpoint import CheckpointPolicy, Manifest

_POINTER = "checkpoints.json"
"""In the output folder: where the run's checkpoints are."""


def checkpoint_policy(options: FinetuneOptions) -> CheckpointPolicy | None:
    """What is reserved for checkpoints; None: nothing."""
    if options.checkpoint_every is None and not options.resume:
        return None
    return CheckpointPolicy(directory=str(checkpoint_directory(options)), keep=options.keep, discard=options.discard_checkpoints)


def checkpoint_directory(options: FinetuneOptions) -> Path:
    """The first SSD directory, where state may rest already; without one, a folder in the output folder."""
    folders = [place for place in options.ssd_dir or () if not place.is_block_device()]
    return folders[0] if folders else options.out / "checkpoints"


def note_directory(options: FinetuneOptions) -> None:
    """Write down where this run's checkpoints are, so that `--resume` finds them whatever the other flags say then.

    Only once there is one: until then, what the run was resumed from is all there is to go on with.
    """
    path = options.out / _POINTER
    try:
        replace_text(path, json.dumps({"directory": str(checkpoint_directory(options).resolve())}) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror} (errno {error.errno})") from error


def note_flags(options: FinetuneOptions) -> None:
    """Write `run.yaml`: the flags of this run, which hold from any working directory."""
    write_config(
        options.out / "run.yaml",
        dataclasses.replace(with_absolute_paths(options), resume=False, discard_checkpoints=False, ssd_overwrite=None),
    )


def with_absolute_paths(options: FinetuneOptions) -> FinetuneOptions:
    """The same run, asked for from anywhere; hub names stay."""
    return dataclasses.replace(
        options,
        model=_absolute_if_here(options.model),
        data=_absolute_if_here(options.data),
        out=options.out.absolute(),
        trace=options.trace.absolute() if options.trace is not None else None,
        machine=options.machine.absolute() if options.machine is not None else None,
        ssd_dir=[place.absolute() for place in options.ssd_dir] if options.ssd_dir else None,
    )


def _absolute_if_here(path_or_name: str) -> str:
    path = Path(path_or_name).expanduser()
    return str(path.absolute()) if path.exists() else path_or_name


def find_checkpoint(options: FinetuneOptions) -> tuple[Path, Manifest]:
    """The newest checkpoint of the run in `--out`.

    1. It is where the run wrote down that it is, whatever steps an older run in another directory has reached.
    2. If nothing is there any more, `--ssd-dir` may say where it was moved to.
    3. If nothing was written down: the highest step in `--ssd-dir` and in the output folder.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    noted = _noted_directory(options)
    places = [noted, *(options.ssd_dir or ())] if noted is not None else [checkpoint_directory(options), options.out / "checkpoints"]
    candidates = list({path.resolve(): path for path in places}.values())
    found = [path for path in candidates if find_manifests(path)]
    if not found:
        where = " or ".join(map(str, candidates))
        cure = (
            f"{options.out / _POINTER} says that they are in {noted}; mount it, or give the place they were moved to as --ssd-dir"
            if noted is not None
            else "give the --out and --ssd-dir of the run that shall go on"
        )
        raise StorageError(f"--resume: there is no checkpoint in {where}; leave --resume out to start anew, or {cure}")
    if noted is not None:
        return found[0], read_latest(found[0])
    return max(((path, read_latest(path)) for path in found), key=lambda item: item[1].step)


def _noted_directory(options: FinetuneOptions) -> Path | None:
    """What `note_directory` wrote; None if there is no such file, or nothing in it that can be read."""
    try:
        return Path(json.loads((options.out / _POINTER).read_text(encoding="utf-8"))["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.lru_cache
def fingerprint_weights(model: str) -> str:
    """What tells one model's weights from another's of the same shapes: sizes, and 64 samples of each file. Read once a process."""
    digest = hashlib.blake2b(digest_size=8)
    for path in find_shards(find_model_folder(model)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for sample in range(64):
                file.seek(size * sample // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def deciding_flags(options: FinetuneOptions, num_steps: int) -> dict[str, Any]:
    """The flags that decide the weights and are not in the plan or in the data's position."""
    return {
        "steps": num_steps,
        "lr": options.lr,
        "lr-schedule": options.lr_schedule,
        "warmup-steps": options.warmup_steps,
        "optimizer": options.optimizer,
        "beta1": options.beta1,
        "beta2": options.beta2,
        "momentum": options.momentum,
        "nesterov": options.nesterov,
        "weight-decay": options.weight_decay,
        "seed": options.seed,
        **({"compile": True} if options.compile else {}),
        "model (its weights)": fingerprint_weights(str(options.model)),
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
    differing = [
        f"--{name} {before.get(name)} there, {flags.get(name)} here" for name in {**before, **flags} if before.get(name) != flags.get(name)
    ]
    if differing:
        raise ValueError(f"cannot go on from step {manifest.step}: this run differs in {'; '.join(differing)}; give the same flags")


def command_to_go_on(options: FinetuneOptions) -> str:
    """To be pasted into a shell, in whatever directory."""
    return f"overspill finetune --config {shlex.quote(str(options.out.absolute() / 'run.yaml'))} --resume"
