"""The plan: where every byte rests, decided once before anything is allocated.

`PlanRequest` is what the user says: budgets, batch, and a tier or `auto` for each kind of data. `Plan` is what
`planning.build_plan` makes of it: a tier for every role of every bundle, the size of a group of micro-batches, when updates
run. Scheduling turns a plan into the ops of one step; nobody else decides.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import os
from collections.abc import Mapping

from overspill.spec.documents import to_json
from overspill.spec.lifetime import DEFAULT_MIN_YEARS
from overspill.spec.retention import ACTIVATION_CHOICES, DEFAULT_ACTIVATIONS, ON_DEVICE, STORED_ALIGNMENT_BYTES, ActivationMode
from overspill.spec.state_formats import StateFormat, resolve_state_format
from overspill.spec.tensors import CHUNK_BYTES, DTYPE_BYTES, Bundle, Tier, Unit
from overspill.spec.update_rule import FP32_MAX, round_fp32
from overspill.units import align_up

AUTO = "auto"
TIER_CHOICES = (AUTO, *(tier.value for tier in Tier))
MOST_EVALUATED_TOGETHER = 32
"""Chosen, not tuned."""
DTYPES = ("bfloat16", "float16", "float32")
WHOLE_NUMBERS = (
    *("seq_len", "micro_batch", "accumulate", "group_size", "device_states_bytes", "device_budget_bytes", "host_budget_bytes"),
    *("pinned_budget_bytes", "ssd_budget_bytes", "ssd_rated_bytes", "deferred_updates"),
)
"""Fields of a request; None may stand in all but the first three."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the user asks for. A tier is `auto`, `device`, `host` or `ssd`; a budget of None means what the machine has free."""

    parameters: str = AUTO
    """Tier of the parameters (and of the high half of the master weights, which they are)."""
    states: str = AUTO
    """Tier of the optimizer states."""
    boundaries: str = AUTO
    """Tier of the hidden states between units, kept from forward to backward."""
    activations: str = DEFAULT_ACTIVATIONS
    """What becomes of what a block's forward saves for its backward: an `ActivationMode` for all blocks, or `auto`: the planner's choice
    for each."""
    state_format: str = "fp32"
    """Numbers of the optimizer states: `fp32`, `bf16` or `int8` (`spec.state_formats`)."""
    optimizer: str | None = None
    """An `OptimizerKind`, which decides what states there are; None: that of the session's optimizer (without one, `adamw`)."""
    dtype: str = "bfloat16"
    """What the model computes in."""
    device_states_bytes: int | None = None
    """Most bytes of optimizer states that rest on the device with their parameters, first units first: nothing hides the update of
    the embedding and the first blocks. Units for whose `states` another tier was asked are lifted as well. None: what is `auto`, as
    far as the budgets leave room."""
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    """Bound on the whole process's host memory, what it held before included."""
    pinned_budget_bytes: int | None = None
    """Most page-locked host memory, where there is a GPU; beyond it memory is pageable. None: no limit."""
    ssd_budget_bytes: int | None = None
    ssd_dir: str | tuple[str, ...] | None = None
    """Directory, or block device, for what rests on the SSD; needed as soon as something does. Several: striped over all of them."""
    ssd_rated_bytes: int | None = None
    """What the drive, or each of several, is rated to have written to it over its life (TBW of its data sheet); None: ask the drive."""
    ssd_min_years: float = DEFAULT_MIN_YEARS
    """A warning says if training without a pause would use up the rated life sooner; no effect if the rating is unknown."""
    seq_len: int = 1024
    """Most tokens of a sample."""
    micro_batch: int = 1
    """Samples of one forward and backward."""
    accumulate: int = 1
    """Micro-batches of one optimizer step."""
    is_masked: bool = False
    """Micro-batches bring a padding mask, or are packed: blocks store more then. No effect where activations are recomputed."""
    clip: float | None = None
    """Bound on the global gradient norm; None: no clipping, and updates run under the backward."""
    group_size: int | None = None
    """Micro-batches that go through a unit before the next unit; None: as many as the budgets hold."""
    deferred_updates: int | None = None
    """Blocks whose update is put off to the end of the step, so that it runs under the next one's forward; their gradients wait in host
    memory. None: as many as the rates call for and host memory has room for. No effect with `clip`: all updates wait then."""
    device: str = AUTO
    """`cpu`, `cuda`, `cuda:1` or `auto`."""

    def __post_init__(self) -> None:
        if self.ssd_dir is not None and not isinstance(self.ssd_dir, str):  # one place is a string, none is None, whoever asks
            given = [self.ssd_dir] if isinstance(self.ssd_dir, os.PathLike) else self.ssd_dir
            places = tuple(str(place) for place in given)
            object.__setattr__(self, "ssd_dir", places if len(places) > 1 else next(iter(places), None))
        if not all(self.ssd_places):
            raise ValueError(
                f"--ssd-dir {self.ssd_dir!r} has an empty name; name a directory on a local drive, or a block device, or leave it out"
            )
        for field in ("parameters", "states", "boundaries"):
            if getattr(self, field) not in TIER_CHOICES:
                raise ValueError(f"--{field} {getattr(self, field)!r} is not a tier; choose one of {', '.join(TIER_CHOICES)}")
        if self.activations not in ACTIVATION_CHOICES:
            raise ValueError(f"--activations {self.activations!r} is not known; choose one of {', '.join(ACTIVATION_CHOICES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
        resolve_state_format(self.state_format, self.dtype, self.optimizer or "adamw")  # refuses what is unknown or has no layout
        for field in WHOLE_NUMBERS:
            value = getattr(self, field)
            if (value is not None or field in WHOLE_NUMBERS[:3]) and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
                raise ValueError(f"{field} must be a whole number, got {value!r}")
        for field in ("seq_len", "micro_batch", "accumulate"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} must be at least 1, got {getattr(self, field)}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.device_states_bytes is not None and self.device_states_bytes < 0:
            raise ValueError(f"--device-states cannot be negative, got {self.device_states_bytes} B; 0 keeps all states elsewhere")
        if self.deferred_updates is not None and self.deferred_updates < 0:
            raise ValueError(
                f"--deferred-updates cannot be negative, got {self.deferred_updates}; 0 makes each update as its gradient arrives"
            )
        for field in ("device_budget_bytes", "host_budget_bytes", "pinned_budget_bytes", "ssd_budget_bytes"):
            num_bytes = getattr(self, field)
            if num_bytes is not None and num_bytes < 0:
                flag = field.removesuffix("_bytes").replace("_", "-")
                raise ValueError(f"--{flag} cannot be negative, got {num_bytes} B; leave it out for what the machine has")
        if self.ssd_rated_bytes is not None and self.ssd_rated_bytes < 1:
            raise ValueError(f"--ssd-tbw must be positive, got {self.ssd_rated_bytes} B; leave it out if it is unknown")
        if not self.ssd_min_years >= 0:
            raise ValueError(f"--ssd-years cannot be negative, got {self.ssd_min_years}; 0 never warns")
        validate_clip(self.clip)

    @property
    def ssd_places(self) -> tuple[str, ...]:
        """The directories and block devices, in order; empty if there is none."""
        if self.ssd_dir is None:
            return ()
        return (self.ssd_dir,) if isinstance(self.ssd_dir, str) else self.ssd_dir


def validate_clip(clip: float | None) -> None:
    """Raise ValueError unless `clip` is a bound on the gradient norm, or None."""
    if clip is not None and not 0 < round_fp32(clip) < math.inf:
        raise ValueError(f"--clip must be positive and finite in fp32 (at most {FP32_MAX:.3g}), got {clip}; leave it out for no clipping")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The home tier of each role of one bundle."""

    parameters: Tier
    states: Tier
    gradients: Tier
    """Where a finished gradient waits for its update; no effect when updates do not wait."""

    @property
    def update_tier(self) -> Tier:
        """Where the update's arithmetic runs: on the device when the states rest there, else on the host."""
        return Tier.DEVICE if self.states is Tier.DEVICE else Tier.HOST


class UpdateTiming(enum.StrEnum):
    """When a unit's update runs, and what memory that keeps."""

    IMMEDIATE = "immediate"
    """As its gradient arrives, under the remaining backward: no gradient outlives its unit. A non-finite gradient stops the run."""
    PENDING = "pending"
    """In the next step's forward, once all gradients are finite and their norm is known (clip, loss scaling): one gradient a unit waits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything rests and in which portions it moves."""

    model: str
    """Class name of the model, for people and for the check at resume."""
    device: str
    dtype: str
    state_format: str
    optimizer: str
    """An `OptimizerKind` of `spec.update_rule`."""
    units: tuple[Unit, ...]
    """In forward order: the embedding, the blocks, the tail."""
    bundles: Mapping[str, Bundle]
    placements: Mapping[str, Placement]
    boundaries: Tier
    group_size: int
    """Micro-batches that go through a unit before the next unit."""
    prefetch_units: int
    """1: a unit's parameters are fetched while the unit before it computes, and host copies stay for the update that follows. 0: one
    after the other, with the least memory."""
    timing: UpdateTiming
    seq_len: int
    micro_batch: int
    accumulate: int
    hidden_size: int
    hidden_dtypes: Mapping[str, str]
    """Unit -> dtype of the hidden states that it returns, where it is not `dtype`."""
    clip: float | None
    loss_chunk_rows: int
    """Rows of hidden states whose logits exist at a time."""
    ssd_dir: str | None
    device_budget_bytes: int | None
    """What pieces may take of the device at their most: the request's budget less the context and all else that is there at a step's
    fullest op (`planning/room.py`, rule 7), or, where that is not known, less context and working memory. None: unbounded."""
    host_budget_bytes: int | None
    """What the tiers may hold in host memory; the request's budget less the process's own. None: unbounded."""
    ssd_budget_bytes: int | None
    device_working_bytes: int
    """Most device memory of activations and logits while a unit computes: of a GPU as traced, with what the allocator loses beside it,
    else assumed."""
    recordings_bytes: int | None = None
    """What recordings of the blocks as CUDA graphs would take of the device, with a budget there beside the most that pieces take; None:
    not known."""
    ssd_stripes: tuple[str, ...] = ()
    """More places beside `ssd_dir`, over which all that rests on the SSD is striped."""
    pinned_budget_bytes: int | None = None
    """As in the request."""
    ssd_rated_bytes: int | None = None
    ssd_min_years: float = DEFAULT_MIN_YEARS
    chunk_bytes: int = CHUNK_BYTES
    """Bound on the bytes of all roles of one chunk, by which the bundles were cut."""
    activations: Mapping[str, ActivationMode] = dataclasses.field(default_factory=dict)
    """Unit -> what becomes of what its forward saves; a unit that is not named is recomputed."""
    stored_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Retained unit -> what its graph stores of one micro-batch at its longest."""
    deferred: tuple[str, ...] = ()
    """Bundles, in forward order, that are updated when the step's backward is over, and not as their gradients arrive. They rest in host
    memory, and one unit reads each."""
    notes: tuple[str, ...] = ()
    """Why the plan is as it is, one sentence each."""

    @property
    def ssd_places(self) -> tuple[str, ...]:
        """The directories and block devices, in order; empty if there is none."""
        return () if self.ssd_dir is None else (self.ssd_dir, *self.ssd_stripes)

    @property
    def blocks(self) -> tuple[Unit, ...]:
        """The units between the embedding and the tail."""
        return self.units[1:-1]

    def boundary_dtype(self, unit: str) -> str:
        """Dtype of the hidden states that enter `unit`, and of their gradient."""
        names = [item.name for item in self.units]
        return self.hidden_dtypes.get(names[names.index(unit) - 1], self.dtype)

    @property
    def longest_step(self) -> tuple[int, ...]:
        """Tokens of each micro-batch of the step that the plan is made for, at its longest."""
        return (self.micro_batch * self.seq_len,) * self.accumulate

    def boundary_bytes(self, unit: str, num_tokens: int | None = None) -> int:
        """Hidden states [num_tokens, hidden_size] that enter `unit`; without a number, of one micro-batch at its longest."""
        tokens = self.micro_batch * self.seq_len if num_tokens is None else num_tokens
        return tokens * self.hidden_size * DTYPE_BYTES[self.boundary_dtype(unit)]

    def activation_mode(self, unit: str) -> ActivationMode:
        """What becomes of what the forward of `unit` saves."""
        return self.activations.get(unit, ActivationMode.RECOMPUTE)

    def activation_bytes(self, unit: str, num_tokens: int | None = None) -> int:
        """Counted for what the graph of a retained unit stores of `num_tokens`; without a number, of one micro-batch at its longest."""
        stored, longest = self.stored_bytes[unit], self.micro_batch * self.seq_len
        return stored if num_tokens is None else align_up(-(-stored * num_tokens // longest), STORED_ALIGNMENT_BYTES)

    @property
    def num_groups(self) -> int:
        """Groups of micro-batches in a step; with more than one, partial gradients wait in fp32 between groups."""
        return -(-self.accumulate // self.group_size)

    @property
    def evaluation_group_size(self) -> int:
        """Micro-batches that an evaluation takes through a unit together.

        An evaluation keeps one hidden state a micro-batch, training one a micro-batch and block beside the parameters of a block, so
        it takes as many more as there are blocks; at most `MOST_EVALUATED_TOGETHER`, because each brings its attention mask along.
        """
        return max(self.group_size, min((len(self.units) - 2) * self.group_size, MOST_EVALUATED_TOGETHER))

    @property
    def num_parameters(self) -> int:
        return sum(bundle.num_parameters for bundle in self.bundles.values())

    def state_layout(self, bundle: str) -> StateFormat:
        """What is kept beside the parameters of a trainable bundle."""
        return resolve_state_format(self.state_format, self.bundles[bundle].dtype, self.optimizer)

    def has_state(self, bundle: str) -> bool:
        """Whether anything is kept beside the parameters: not of a frozen bundle, nor by plain SGD in fp32."""
        return self.bundles[bundle].trainable and bool(self.state_layout(bundle).fields)

    def state_record_bytes(self, bundle: str, chunk: int) -> int:
        """Bytes of the state record of a chunk; 0 where there is no state."""
        return self.state_layout(bundle).record_bytes(self.bundles[bundle].chunks[chunk].num_elements) if self.has_state(bundle) else 0

    def state_record_start(self, bundle: str, chunk: int) -> int:
        """First byte of a chunk's record where the records of a bundle lie one after the other."""
        return chunk * self.state_record_bytes(bundle, 0)

    def state_bytes(self, bundle: str) -> int:
        """Bytes of all state records of a bundle; the last chunk may be shorter than the others."""
        last = len(self.bundles[bundle].chunks) - 1
        return self.state_record_start(bundle, last) + self.state_record_bytes(bundle, last)

    def home_bytes(self, tier: Tier) -> dict[str, int]:
        """Bytes that rest on `tier` between steps, by role."""
        totals = {"parameters": 0, "states": 0, "gradients": 0}
        for name, bundle in self.bundles.items():
            placement = self.placements[name]
            totals["parameters"] += bundle.parameter_bytes if placement.parameters is tier else 0
            if bundle.trainable:
                totals["states"] += self.state_bytes(name) if placement.states is tier else 0
                if placement.gradients is tier:
                    totals["gradients"] += bundle.parameter_bytes if self.timing is UpdateTiming.PENDING else 0
                    readers = sum(name in unit.bundles for unit in self.units)
                    totals["gradients"] += readers * bundle.num_elements * 4 if self.num_groups > 1 else 0
        entered = sum(self.boundary_bytes(unit.name) for unit in self.units[1:])
        totals["boundaries"] = entered * self.group_size if self.boundaries is tier else 0
        rest = dict.fromkeys(ON_DEVICE, Tier.DEVICE) | {ActivationMode.HOST: Tier.HOST, ActivationMode.SSD: Tier.SSD}
        stored = sum(self.stored_bytes[unit] for unit, mode in self.activations.items() if rest.get(mode) is tier)
        return totals | ({"activations": stored * self.group_size} if self.activations else {})

    def table(self) -> list[tuple[str, dict[str, int]]]:
        """(role, tier -> bytes) rows for the placement table."""
        per_tier = {tier.value: self.home_bytes(tier) for tier in Tier}
        return [(role, {tier: per_tier[tier][role] for tier in per_tier}) for role in per_tier[Tier.DEVICE.value]]

    def to_json(self) -> str:
        return to_json(self)
