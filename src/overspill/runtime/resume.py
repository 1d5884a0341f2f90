"""Go on from a checkpoint: `overspill.resume(directory, model=...)`.

Optimizer, learning rate, loss scale, seed and step are the checkpoint's; the plan may place everything anew. The weights of
`model` are not looked at: only what it is, and its buffers. The continuation is equal to the last bit to the run that was
never stopped, on the same kind of device. So the call that opened the run may be repeated with what it was given: what the checkpoint
decides is compared, and another value is refused with both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from overspill.checkpoint import find_manifests, manifest_path, read_latest, read_manifest
from overspill.errors import StorageError
from overspill.runtime.session import Session
from overspill.spec.checkpoint import CheckpointPolicy, Manifest
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.update_rule import LearningRate, Optimizer
from overspill.tiers.calls import OS_CALLS, FileCalls

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resume(
    directory: str | Path,
    *,
    model: str | Path | PreTrainedModel,
    plan: PlanRequest | Plan | None = None,
    checkpoints: CheckpointPolicy | None = None,
    generation: int | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: LearningRate | None = None,
    seed: int | None = None,
    chunk_bytes: int | None = None,
    calls: FileCalls = OS_CALLS,
    **settings: Any,
) -> Session:
    """A session at the step of a checkpoint.

    Args:
        directory: where the checkpoints are.
        model: the model that was trained: a folder, a hub name, or a live model (taken over).
        plan: where everything rests from now on; None: as it did.
        checkpoints: how new checkpoints are made; None: in `directory`, as many kept as its file has room for. Elsewhere, the old
            ones stay untouched.
        generation: which checkpoint; None: the newest. Newer ones in the same directory stay until a checkpoint is saved.
        optimizer, learning_rate, seed, chunk_bytes: the checkpoint's, which need not be said; None: not said.
        settings: passed on to `Session`.

    Raises:
        StorageError: there is no checkpoint, or it is damaged; the message names what.
        ValueError: it is of another model, dtype, state format, batch, optimizer, schedule or seed; the message has both values.
    """
    folder = Path(directory)
    if generation is None:
        manifest = read_latest(folder, calls=calls)
    elif generation in find_manifests(folder):
        manifest = read_manifest(manifest_path(folder, generation), calls=calls)
    else:
        raise StorageError(f"{folder} has no checkpoint {generation}; it has {', '.join(map(str, find_manifests(folder))) or 'none'}")
    _refuse_other_values(manifest, optimizer=optimizer, learning_rate=learning_rate, seed=seed, chunk_bytes=chunk_bytes)
    return Session(
        model,
        plan=plan or manifest.plan,
        optimizer=manifest.optimizer,
        learning_rate=manifest.learning_rate,
        seed=manifest.seed,
        chunk_bytes=manifest.chunk_bytes,
        checkpoints=checkpoints or CheckpointPolicy(directory=str(folder), keep=_kept_before(manifest)),
        resume_from=(manifest, folder),
        calls=calls,
        **settings,
    )


def _refuse_other_values(manifest: Manifest, **given: object) -> None:
    """Raise ValueError if something is said otherwise than the checkpoint has it."""
    differing = [
        f"{name} was {getattr(manifest, name)!r}, now {value!r}"
        for name, value in given.items()
        if value is not None and value != getattr(manifest, name)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint of step {manifest.step} does not continue this run: {'; '.join(differing)}; leave out what the checkpoint "
            "decides, or begin a new run from its weights (save_pretrained, then overspill.Session)"
        )


def _kept_before(manifest: Manifest) -> int:
    """Checkpoints that the data file has room for beside the state."""
    return max(1, min(len(entry.slots) for entry in manifest.records) - 1)
