"""The model and the batch as the planner sees them: sizes, work and what autograd keeps; no weights.

`ModelLayout` is sizes alone. `WorkloadSpec` says for one sequence length and micro-batch what each class of units costs: FLOPs and moved
bytes of a forward, of a recomputation and of the gradients, the tensors that autograd saves for backward, and the peaks while a unit
runs. `huggingface.workload` traces it without weights; `runtime.template_timing` measures `TemplateTimes` of the same classes.

Words:

* **class**: units of equal structure; one of them is traced and stands for all.
* **FLOPs**: two per multiplication and addition of matrix products, convolutions and attention, and of nothing else. Attention counts
  all T x T pairs, as `torch.utils.flop_counter` does; `causal_flops` are the part of it whose kernel skips the masked half.
* **moved bytes**: what an operation reads and writes if no cache keeps anything, each tensor once. A fused kernel counts as one.
* **saved tensor**: what autograd packed for backward. Its *storage* is what takes memory, so of several views one has the bytes.

Assumed, and said in `WorkloadSpec.notes` where it matters: which attention kernel a device takes; that routers send every expert
equally many tokens. Not counted: what a kernel or a library allocates inside one operation (cuBLAS workspaces, attention's own scratch).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from overspill.spec.documents import from_json, to_json
from overspill.spec.launches import LAUNCH_BESIDE_LANES, is_worth_replaying
from overspill.spec.retention import ActivationMode
from overspill.spec.tensors import CHUNK_BYTES, Bundle, Unit
from overspill.units import MIB

LOGITS_CHUNK_BYTES = 256 * MIB
"""Most bytes of fp32 logits at a time. Chosen, not tuned."""


def default_loss_chunk_rows(vocab_size: int) -> int:
    """Rows of hidden states whose logits exist at a time."""
    return max(64, min(4096, LOGITS_CHUNK_BYTES // (4 * vocab_size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """A model's units and bundles, and the two sizes that decide its working memory."""

    model: str
    """Class name."""
    units: tuple[Unit, ...]
    bundles: Mapping[str, Bundle]
    hidden_size: int
    vocab_size: int
    hidden_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Unit -> dtype of the hidden states that it returns, where it is not the plan's dtype (Mamba-2 keeps them in fp32)."""
    buffer_bytes: int = 0
    """Buffers (rotary tables, masks) that stay on the device."""
    chunk_bytes: int = CHUNK_BYTES
    """Bound on the bytes of all roles of one chunk, by which the bundles are cut."""

    @property
    def blocks(self) -> tuple[Unit, ...]:
        """The units between the embedding and the tail."""
        return self.units[1:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What running some operations costs."""

    flops: int = 0
    """Of matrix products, convolutions and attention; attention over all T x T pairs."""
    attention_flops: int = 0
    """The part of `flops` in attention kernels."""
    causal_flops: int = 0
    """The part of `attention_flops` in kernels told that the mask is causal: they do about half of it."""
    grouped_flops: int = 0
    """The part of `flops` in the products of routed experts, one matrix for each group of rows."""
    moved_bytes: int = 0
    """Read and written by all operations."""
    elementwise_bytes: int = 0
    """The part of `moved_bytes` in operations without FLOPs: they take this over the device's memory bandwidth."""
    scattered_bytes: int = 0
    """The part of `elementwise_bytes` in operations that add rows into rows which an index names: far slower than the memory."""
    num_ops: int = 0
    """Operations that run a kernel: each costs a launch."""

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Work)})

    def __sub__(self, other: Work) -> Work:
        return self + other.times(-1)

    def times(self, count: int) -> Work:
        """`count` repetitions."""
        return Work(**{f.name: count * getattr(self, f.name) for f in dataclasses.fields(Work)})


class Alias(enum.StrEnum):
    """Whose memory a saved tensor is a view of."""

    OWN = "own"
    """Nobody else's: it takes `kept_bytes` from forward to backward."""
    PARAMETER = "parameter"
    """A parameter or buffer, which is there anyway."""
    INPUT = "input"
    """The boundary that the unit reads, or an argument of its call: there anyway."""
    OUTPUT = "output"
    """The hidden states that the unit returns: the next unit's boundary."""
    SAVED = "saved"
    """Another saved tensor, which has the bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor that autograd keeps from a unit's forward to its backward."""

    module: str
    """Submodule of the unit that made it, as a path; empty for the unit itself."""
    op: str
    """Operation that made it (`aten.silu`); empty for parameters and inputs."""
    saved_by: tuple[str, ...]
    """What backward reads it as: autograd node and slot (`MmBackward0.mat2`)."""
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    """Of its elements."""
    kept_bytes: int
    """Of the storage that lives because of it, which a view may use in part; 0 unless `alias` is `own`."""
    alias: Alias
    alias_of: str = ""
    """Name of the parameter or argument, or number of the saved tensor; empty for `own` and `output`."""
    recompute: Work = Work()
    """To make it again while every other saved tensor, the unit's inputs and its parameters are kept. Zero unless `own`."""
    recompute_reads: tuple[int, ...] = ()
    """Numbers of the saved tensors that this reads. If one of them is dropped as well, its own `recompute` comes first."""
    is_random: bool = False
    """A random draw is among the operations: the generator must be where it was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """Work of one pass over a unit, and the memory while it runs."""

    work: Work
    peak_bytes: int
    """Most bytes that the pass's own tensors take at a time, beside parameters, boundary and arguments. The result is among them, and
    in a backward all that the recomputation saved and the gradients of the parameters, which end together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """A mixture-of-experts layer, and what is assumed of its router."""

    module: str
    num_experts: int
    experts_per_token: int
    expected_tokens_per_expert: float
    """Assumed: every expert gets the same share. FLOPs and bytes of all experts together do not depend on it; times do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a unit's graph takes that lives from forward to backward, in one mode."""

    stored_bytes: int
    """Of one micro-batch: what is neither there anyway nor rebuilt."""
    rebuilt: Work
    """Of rebuilding in backward what is not stored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """What keeping a unit's graph from forward to backward takes (`spec.retention`)."""

    kept: Mapping[ActivationMode, Kept]
    """Of each mode that keeps it on the device."""

    def of(self, mode: ActivationMode) -> Kept:
        """Of any mode that keeps a graph; what leaves the device is what `keep` stores."""
        return self.kept.get(mode, self.kept[ActivationMode.KEEP])


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitWork:
    """One class of units.

    The tail runs forward and backward at once: its `forward` is that of an evaluation, `recompute` and `backward` are training's two
    parts. A step costs a block forward + recompute + backward, the tail recompute + backward, the embedding all three.
    """

    name: str
    """The first unit of the class, which was traced."""
    units: tuple[str, ...]
    """All units of the class, in forward order."""
    num_parameters: int
    parameter_bytes: int
    trainable_bytes: int
    """The part of `parameter_bytes` that gets a gradient."""
    boundary_bytes: int
    """Hidden states of a micro-batch that the unit returns; 0 for the tail."""
    boundary_dtype: str
    """Empty for the tail."""
    forward: Pass | None
    """Without a graph. None: it could not be traced, and `notes` say why."""
    recompute: Pass | None
    """The forward again with a graph, as the first part of backward."""
    backward: Pass | None
    """The gradients. Its `peak_bytes` are those of recomputation and gradients together."""
    saved: tuple[SavedTensor, ...] = ()
    side_input_bytes: int = 0
    """Of arguments that depend on the embedding's parameters: each has a gradient of that size."""
    side_output_bytes: int = 0
    """Of router logits that the loss reads."""
    routing: tuple[Routing, ...] = ()
    retention: Retention | None = None
    """None: nobody asked for it, or its graph cannot be kept."""
    notes: tuple[str, ...] = ()

    @property
    def num_units(self) -> int:
        return len(self.units)

    @property
    def saved_bytes(self) -> int:
        """What keeping everything that autograd saved takes from forward to backward."""
        return sum(tensor.kept_bytes for tensor in self.saved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWork:
    """How the tail goes through the loss: chunk by chunk of rows, each forward and backward at once."""

    num_targets: int
    """Rows with a target: all positions but the last of every sample."""
    chunk_rows: int
    """Most rows at a time."""
    num_chunks: int
    logits_chunk_bytes: int
    """Of one full chunk of logits, in their own dtype."""
    chunk_peak_bytes: int
    """Most bytes that one chunk takes, logits and their gradient among them."""
    head: Work
    """Forward of the output projection, over all chunks."""
    loss: Work
    """Cross entropy and its gradient by the logits, over all chunks."""
    is_fused: bool
    """One kernel without fp32 logits (CUDA with Triton); else plain torch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """What one micro-batch costs each class of units."""

    model: str
    """Class name."""
    dtype: str
    device: str
    """Whose kernels were assumed: `cuda` or `cpu`."""
    seq_len: int
    micro_batch: int
    is_masked: bool
    """Whether micro-batches bring a padding mask (or are packed): attention then reads a mask of T x T and its kernel may be another."""
    hidden_size: int
    vocab_size: int
    argument_bytes: int
    """What a micro-batch's arguments of all blocks take beside the hidden states: masks, rotary tables."""
    classes: tuple[UnitWork, ...]
    """The embedding, the classes of blocks in order of their first block, the tail."""
    loss: LossWork | None
    """None: the tail could not be traced."""
    attention_kernels: tuple[str, ...] = ()
    """Kernels of `scaled_dot_product_attention` that the blocks take, first met first; empty without such calls."""
    notes: tuple[str, ...] = ()
    """What was assumed, and what could not be found out, one sentence each."""

    def class_of(self, unit: str) -> UnitWork:
        """The class that `unit` belongs to."""
        for item in self.classes:
            if unit in item.units:
                return item
        raise ValueError(f"{self.model} has no unit {unit}; it has {', '.join(name for item in self.classes for name in item.units)}")

    @property
    def num_tokens(self) -> int:
        return self.seq_len * self.micro_batch

    @property
    def is_complete(self) -> bool:
        """Whether every class was traced."""
        return self.loss is not None and all(item.backward is not None for item in self.classes)

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> WorkloadSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is unknown or missing; the message names it.
        """
        return from_json(cls, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Repetitions of one measurement."""

    median_s: float
    spread_s: float
    """Upper quartile less the lower one, so that one disturbed repetition does not make it; 0 with one."""
    num_repetitions: int
    issue_s: float = 0.0
    """The host's time to launch it, from before the first call to after the last: in the mean, where one repetition that was held up for
    long counts little. 0: not measured, or the host computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """How long one unit of a class takes with its parameters on the device."""

    name: str
    """The unit that stands for the class, as in `UnitWork`."""
    seq_len: int
    micro_batch: int
    """What was measured: less than what was asked for if that did not fit the time or the memory; `note` says so."""
    forward: Timing | None
    """Without a graph. None for the tail, which runs forward and backward at once, and where nothing could be measured."""
    backward: Timing | None
    """Recomputation, gradients, and their addition to fp32 sums, as the runtime does them. None: `note` says why."""
    note: str = ""
    replayed_forward: Timing | None = None
    """Replayed as a CUDA graph, what a block takes that is worth it (`is_worth_replaying`). None: it is not, or was not recorded."""
    replayed_backward: Timing | None = None
    is_replayable: bool = True
    """False: it has side inputs or outputs, draws random numbers, or could not be recorded; its kernels are launched one by one."""

    @property
    def launch_s(self) -> float:
        """Of the host, for forward and backward. 0: not measured."""
        return sum(timing.issue_s for timing in (self.forward, self.backward) if timing is not None)

    @property
    def is_worth_replaying(self) -> bool:
        """Whether launching will bound it in a session, or nearly; False too where it was not measured."""
        launch_s = LAUNCH_BESIDE_LANES * self.launch_s
        return launch_s > 0 and is_worth_replaying(launch_s=launch_s, device_s=self.forward_backward_s)

    @property
    def forward_s(self) -> float:
        return self.forward.median_s if self.forward is not None else 0.0

    @property
    def forward_backward_s(self) -> float:
        """Of a whole step: forward, recomputation, gradients."""
        return self.forward_s + (self.backward.median_s if self.backward is not None else 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateTimes:
    """Measured times of one unit of every class of blocks, and of the tail."""

    model: str
    dtype: str
    device: str
    """Its name, as the driver has it."""
    seq_len: int
    micro_batch: int
    """Asked for."""
    blocks: tuple[UnitTimes, ...]
    tail: UnitTimes
    elapsed_s: float
    """What measuring took."""

    def to_json(self) -> str:
        return to_json(self)
