"""What a checkpoint says about itself: the manifest, and how many checkpoints a run keeps.

A checkpoint is a set of records that lie in a data file (`tiers/records.py`) and this document, which is written last. The
file format is described in docs/checkpoint-format.md; a change of it raises `VERSION`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from overspill.spec.plan import Plan
from overspill.spec.update_rule import LearningRate, LossScale, Optimizer

FORMAT = "overspill-checkpoint"
VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """Whether a session can make checkpoints, and what it reserves for them."""

    directory: str | None = None
    """Where the data file and the manifests are; None: the plan's SSD directory, which it must be if anything rests there."""
    keep: int = 1
    """Checkpoints kept; the data file has room for `keep + 1` times the state."""
    discard: bool = False
    """Delete the checkpoints of an earlier run that are in the directory, instead of refusing to start."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"--keep must be at least 1, got {self.keep}")
        if self.directory == "":
            raise ValueError(
                "the directory of checkpoints has an empty name, ''; name one, or leave it out to use the plan's SSD directory"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripeSet:
    """Several files, or block devices, that together are one data file; addresses are dealt out to them in turn."""

    set_id: str
    """Made when the files were made; each of them says it too."""
    places: tuple[str, ...]
    """Directories with a data file each, or block devices, in order."""
    stripe_bytes: int
    """No effect with one place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordEntry:
    """One record of a checkpoint."""

    name: str
    """`{bundle}.{role}[{chunk}]`"""
    num_bytes: int
    slots: tuple[str, ...]
    """Names of the places that versions of this record can have in the data file."""
    positions: tuple[int, ...]
    """First byte of each slot in the data file; with stripes, in all of them together."""
    slot: int
    """Which of them holds this checkpoint's version."""
    checksums: str
    """Eight hex digits for each block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraTensor:
    """A tensor of the model that is not trained and rests in no tier: a buffer, or a weight that no unit reads."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One checkpoint."""

    format: str = FORMAT
    version: int = VERSION
    generation: int
    """Counts the checkpoints of a directory from 1."""
    step: int
    """Optimizer steps that are in the weights."""
    created: str
    plan: Plan
    """With which the state was laid out: bundles, dtype, state format, batch. Placements and budgets may differ at resume."""
    config: Any
    """The model's configuration, as transformers writes it."""
    chunk_bytes: int
    """Bound that the chunks of the plan were made with."""
    optimizer: Optimizer
    learning_rate: LearningRate
    loss_scale: LossScale | None
    seed: int
    """Of all randomness, which depends on nothing but this, the step, the micro-batch and the unit."""
    data_position: Any
    """JSON that the caller gave; tells it where its data goes on."""
    data_file: str
    data_file_bytes: int
    block_bytes: int
    checksum: str
    """Algorithm of the records' checksums."""
    records: tuple[RecordEntry, ...]
    extras: tuple[ExtraTensor, ...] = ()
    stripes: StripeSet | None = None
    """None: the data file is one file beside the manifest."""
