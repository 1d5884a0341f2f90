"""An unmodified transformers causal LM as units that a loop runs in any order.

A `StreamedModel` takes a model apart into `embedding`, one unit per decoder block, and `tail`. Nothing of the model's source is
changed or copied: its blocks run as they are, and what surrounds them is its own forward, entered with stand-ins in place of
the blocks (`stand_ins`), learnt by one inspection (`inspection`) and closed by its own head (`tail`).

    with streamed.bound("embedding", weights):
        embedded = streamed.embed(batch)                       # hidden states, and the arguments of every block
    for unit in streamed.block_names:
        with streamed.bound(unit, weights_of(unit)):           # once per visit; any number of micro-batches
            hidden = streamed.run_block(unit, hidden, embedded.arguments).hidden
    with streamed.bound("tail", weights):
        result = streamed.run_tail(batch, hidden, ...)         # loss, gradient of the hidden states

Rules:

1. A unit's weights are what `bound` was given, from its entry to its exit; outside, every parameter is a meta placeholder and
   running a unit fails.
2. A tied parameter has one name, belongs to the embedding and to the tail, and gets a gradient from each.
3. After construction the model's blocks hang on their stand-ins alone: `state_dict`, `parameters` and the like do not see them,
   `train` and `eval` do.
4. The model's configuration is not changed; `saved_config` is the one to save.
5. One thread at a time runs a StreamedModel. Blocks may be bound side by side, embedding and tail may not: they share modules.

Limits: the loss is that of predicting the next token (labels are shifted here, as `ForCausalLMLoss` does); the decoders of Bart and its
kin, whose own `labels` loss does not shift, train on shifted labels all the same. Read-only dictionaries as block arguments
(DeepSeek-V4's rotary tables) and KV states shared between layers (Gemma 3n, Gemma 4) are refused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overspill.errors import UnsupportedModelError
from overspill.huggingface import host_reads
from overspill.huggingface.blocks import find_blocks, find_kinds, validate_sharing
from overspill.huggingface.inspection import fixed_inputs, inspect_model
from overspill.huggingface.meta_model import swap_parameters_for_meta
from overspill.huggingface.model_object import build_saved_config, validate_model_class
from overspill.huggingface.rotary_state import RotaryStates
from overspill.huggingface.side_outputs import SideOutputTaps, has_router_loss
from overspill.huggingface.stand_ins import AllRecorded, BlockArguments, CallRecorder, RecordingVisitor, StandInStack
from overspill.huggingface.tail import Accumulate, Tail, TailOutput, last_hidden_state
from overspill.huggingface.templates import ParameterSlots, move_buffers
from overspill.huggingface.unneeded import UnneededProducts
from overspill.spec.tensors import TensorSpec

EMBEDDING = "embedding"
TAIL = "tail"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """What a micro-batch's way to the first block gives."""

    hidden: Tensor
    """[B, T, H]; with a graph if grad was enabled."""
    arguments: BlockArguments
    side_inputs: tuple[Tensor, ...]
    """Tensors that blocks read and that depend on the embedding's parameters; with a graph if grad was enabled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOutput:
    """What one block returns for one micro-batch."""

    hidden: Tensor
    side_outputs: tuple[Tensor, ...]
    """Router logits [B * T, experts], if the model's router loss is on."""


class StreamedModel:
    """See the module's docstring."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: with parameters and buffers anywhere (parameters are replaced by meta ones, buffers go to the CPU). It belongs to
                the StreamedModel from here on.

        Raises:
            UnsupportedModelError: it does something that streaming cannot reproduce exactly; model and reason are named.
        """
        validate_model_class(model)
        found = find_blocks(model)
        validate_sharing(model, found.blocks)
        self.saved_config = build_saved_config(model)
        """What `save_pretrained` writes: the model's own configuration, with the parameters' dtype and its class."""
        swap_parameters_for_meta(model)
        _turn_off_checkpointing(model)
        self.model = model
        self.config = model.config
        self.block_names = tuple(found.blocks)
        self.unit_names = (EMBEDDING, *self.block_names, TAIL)
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        self.parameters = {name: _tensor_spec(model, name, parameter) for name, parameter in model.named_parameters()}
        persistent = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.persistent_buffers = {name: self._buffer_place(name) for name, _ in model.named_buffers() if name in persistent}
        self._modules = list(model.modules())
        _bring_buffers(model)
        self._block_slots = {name: ParameterSlots((m, canonical) for m in block.modules()) for name, block in found.blocks.items()}
        self._blocks = dict(found.blocks)
        self._block_buffers = {name: tuple(module._buffers for module in block.modules()) for name, block in found.blocks.items()}
        self._stack = StandInStack(type(model).__name__, found.blocks, found.container)
        self._rotary = RotaryStates(model.modules())
        self._outer_slots = ParameterSlots((module, canonical) for module in model.modules())
        kinds = find_kinds(found.blocks)
        self._taps = SideOutputTaps(found.owner, found.blocks)
        self.has_router_loss = has_router_loss(self.config)
        self.inspection = inspect_model(
            model, found.owner, self._stack, self._taps, kinds=kinds, outer=self._outer_slots, slots=self._block_slots, rotary=self._rotary
        )
        if self.has_router_loss and not any(self.inspection.num_side_outputs.values()):
            self._stack.refuse("its router loss is on, but none of its blocks has router logits; turn config.output_router_logits off")
        self.unit_parameters = self._unit_parameters()
        used = {name for names in self.unit_parameters.values() for name in names}
        self.unused_parameters = tuple(name for name in self.parameters if name not in used)
        self._tail = Tail(
            model,
            found.owner,
            self._stack,
            self.inspection.returns,
            body_names=self._in_module_order(self.inspection.body_names),
            head_names=self._in_module_order(self.inspection.head_names),
            has_router_loss=self.has_router_loss,
        )
        self._fixed_inputs = fixed_inputs(model)
        self._forward_names = frozenset(inspect.signature(model.forward).parameters)
        self.device = torch.device("cpu")
        self.buffer_bytes = self.to(self.device)
        self._bound: dict[str, Mapping[str, Tensor]] = {}
        self._call: Callable[..., Any] = _call_block
        self.unneeded: UnneededProducts | None = UnneededProducts(self._blocks, self.kinds)
        """Products that recomputations leave out; None: nothing is (compiled code is one piece)."""

    @property
    def kinds(self) -> Mapping[str, str]:
        """Block -> the first block of the same structure (templates, rules 1 to 3): what to time or compile once."""
        return self.inspection.kinds

    @property
    def hidden_dtypes(self) -> Mapping[str, torch.dtype]:
        """Embedding and blocks -> dtype of the hidden states they return (Mamba-2 keeps them in fp32 in a bf16 model)."""
        return self.inspection.hidden_dtypes

    @property
    def tail(self) -> Tail:
        """The model's own code behind the blocks, for who runs it piece by piece."""
        return self._tail

    def block(self, unit: str) -> nn.Module:
        """The module of a block; it has weights only inside `bound`."""
        return self._blocks[unit]

    def block_buffers(self, unit: str) -> list[Tensor]:
        """The buffers that a block has now; asked for at every visit, so no walk over its modules."""
        return [buffer for owned in self._block_buffers[unit] for buffer in owned.values() if buffer is not None]

    def reset_rotary(self) -> None:
        """Self-writing rotary embeddings are as they were built (`rotary_state`)."""
        self._rotary.reset()

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that fits the model's tables of position embeddings before the blocks (GPT-2, OPT); None: no such table."""
        return self.inspection.max_positions

    def to(self, device: torch.device | str) -> int:
        """Move all buffers to `device`, equal ones once; returns the bytes they take there (also in `buffer_bytes`)."""
        self.device = torch.device(device)
        shared = move_buffers((module for module in self._modules if module not in self._rotary.modules), self.device)
        self.buffer_bytes = shared + self._rotary.to(self.device)
        return self.buffer_bytes

    def compile(self, backend: str = "inductor") -> None:
        """Let torch compile the blocks' code, as each kind of block first runs: fewer passes over memory, other roundings.

        Args:
            backend: of `torch.compile`.

        Raises:
            UnsupportedModelError: its blocks have side outputs, which hooks take out of the code that would be compiled.
        """
        if any(self.inspection.num_side_outputs.values()):
            self._stack.refuse("its blocks have router logits, which cannot be taken out of compiled blocks; leave --compile out")
        self.unneeded = None
        self._call = torch.compile(_call_block, dynamic=False, backend=backend)

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Set persistent buffers (those that a file of weights holds), by name; call `to` afterwards.

        Raises:
            ValueError: an unknown name or another shape.
        """
        for name, value in buffers.items():
            if name not in self.persistent_buffers:
                raise ValueError(f"{name} is no persistent buffer of {type(self.model).__name__}; it has {sorted(self.persistent_buffers)}")
            module, attribute = self.persistent_buffers[name]
            old = module._buffers[attribute]
            assert old is not None
            if old.shape != value.shape:
                raise ValueError(f"the buffer {name} has shape {tuple(old.shape)}, got {tuple(value.shape)}")
            module._buffers[attribute] = value.to(device=old.device, dtype=old.dtype, copy=True)

    def train(self, mode: bool = True) -> StreamedModel:
        """Training or evaluation mode, blocks included."""
        self.model.train(mode)
        return self

    def eval(self) -> StreamedModel:
        return self.train(False)

    @contextmanager
    def bound(self, unit: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """`unit` reads `tensors` inside.

        Args:
            tensors: exactly `unit_parameters[unit]`; shapes and dtypes as in `parameters`, on the device of the buffers.

        Raises:
            ValueError: a name is missing or unknown, a shape or dtype differs.
            UnsupportedModelError: the block wrote to one of its buffers.
        """
        wanted = set(self.unit_parameters[unit])
        if wanted != set(tensors):
            raise ValueError(
                f"{unit} reads other parameters: missing {sorted(wanted - set(tensors))}, unknown {sorted(set(tensors) - wanted)}"
            )
        clashing = {EMBEDDING, TAIL} if unit in (EMBEDDING, TAIL) else {unit}
        assert not clashing & self._bound.keys(), f"{unit} cannot be bound while {clashing & self._bound.keys()} is"
        if unit in self._blocks:
            slots, filled = self._block_slots[unit], dict(tensors)
        else:
            slots, filled = self._outer_slots, {**self._zeros_for(unit), **tensors}
        buffers = self.block_buffers(unit) if unit in self._blocks else []  # held, so that no other has their ids
        before = [(id(buffer), buffer._version) for buffer in buffers]
        with slots.filled(filled):
            self._bound[unit] = tensors
            try:
                yield
            finally:
                if self._bound.get(unit) is tensors:  # `unbind` may have been there first
                    del self._bound[unit]
        if unit in self._blocks and [(id(buffer), buffer._version) for buffer in self.block_buffers(unit)] != before:
            self._stack.refuse(f"{unit} writes to a buffer")

    def unbind(self) -> None:
        """After an interruption, which may come between any two lines of `bound` or of a run: nothing is bound, every place holds its
        placeholder, and the model's own code is entered by nobody. What was interrupted and is collected later changes nothing."""
        for slots in (self._outer_slots, *self._block_slots.values()):
            slots.empty()
        self._bound.clear()
        self._tail.leave()
        host_reads.leave()
        if self.unneeded is not None:
            self.unneeded.reset()

    def embed(self, batch: Mapping[str, Tensor], *, reading: AbstractContextManager[None] | None = None) -> Embedded:
        """The micro-batch's way to the first block, and every block's arguments; inside `bound("embedding", ...)`.

        With grad enabled the hidden states and side inputs carry the graph of the embedding.

        Args:
            batch: `input_ids` [B, T]; `attention_mask` [B, T] and `position_ids` [B, T] if wanted; `labels` are not looked at.
            reading: around the model's own code (`host_reads`).
        """
        self._validate_bound(EMBEDDING)
        self._rotary.reset()
        recorder = CallRecorder(self._stack, self.inspection.side_paths)
        with self._stack.visited_by(RecordingVisitor(recorder, self.inspection.returns)), reading or nullcontext():
            try:
                self.model(**self.inputs(batch))
            except AllRecorded:
                pass
            else:
                self._stack.refuse(f"it ran {len(recorder.calls)} of its {len(self.block_names)} blocks")
        assert recorder.first_hidden is not None
        return Embedded(hidden=recorder.first_hidden, arguments=recorder.block_arguments(), side_inputs=tuple(recorder.side_inputs))

    def run_block(
        self, unit: str, hidden: Tensor, arguments: BlockArguments, *, side_inputs: Sequence[Tensor] | None = None
    ) -> BlockOutput:
        """One block on one micro-batch; inside `bound(unit, ...)`.

        Args:
            hidden: [B, T, H], what the unit before returned.
            side_inputs: leaves to read in place of `arguments.side_inputs`, all of them (`arguments.calls[unit].side_inputs` says which
                ones this block reads).
        """
        self._validate_bound(unit)
        args, kwargs = arguments.rebuilt(unit, hidden, side_inputs)
        with self._taps.listening() as side_outputs:
            output = self._call(self._blocks[unit], args, kwargs)
        num_expected = self.inspection.num_side_outputs[unit]
        assert len(side_outputs) == num_expected, f"{unit} has {num_expected} side outputs, got {len(side_outputs)}"
        return BlockOutput(
            hidden=output if self.inspection.returns[unit].extras is None else output[0],
            side_outputs=tuple(side_outputs) if self.has_router_loss else (),
        )

    def run_tail(
        self,
        batch: Mapping[str, Tensor],
        hidden: Tensor,
        *,
        side_outputs: Mapping[str, tuple[Tensor, ...]],
        parameters: Mapping[str, Tensor],
        num_targets: int,
        loss_scale: float = 1.0,
        chunk_rows: int,
        accumulate: Accumulate | None,
        before_tail: Callable[[], None] | None = None,
        reading: AbstractContextManager[None] | None = None,
    ) -> TailOutput:
        """From the last block's hidden states to the loss and, unless in evaluation, back; inside `bound("tail", parameters)`.

        Args:
            batch: as for `embed`, and `labels` [B, T], unshifted, -100 where none (best on the CPU: they are needed there).
            hidden: what the last block returned; its graph, if any, is left alone.
            side_outputs: unit -> its `BlockOutput.side_outputs`; their graphs are left alone.
            parameters: what the tail is bound to: leaves, requiring grad where trainable.
            num_targets: targets of the whole optimizer step, over micro-batches and ranks.
            loss_scale: every gradient is of loss x loss_scale.
            chunk_rows: most rows of logits at a time.
            accumulate: gets every contribution to a parameter's gradient: the head's per chunk, then the norm's. None: evaluation.
            before_tail: called right before the tail's own code runs (to seed its dropout).
            reading: as for `embed`.
        """
        self._validate_bound(TAIL)
        self._rotary.reset()
        return self._tail.run(
            self.inputs(batch),
            batch["labels"],
            hidden,
            side_outputs=side_outputs,
            parameters=parameters,
            num_targets=num_targets,
            loss_scale=loss_scale,
            chunk_rows=chunk_rows,
            accumulate=accumulate,
            before_tail=before_tail,
            reading=reading,
        )

    def logits(self, batch: Mapping[str, Tensor], hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, V] at one position of each sequence, or [B, T, V] at all; without grad, inside `bound("tail", ...)`.

        Args:
            positions: int64 [B]; None for all positions.
        """
        self._validate_bound(TAIL)
        self._rotary.reset()
        inputs = self.inputs(batch)
        with torch.no_grad():
            output = self._tail.run_body(inputs, hidden.detach())
            last_BTH = last_hidden_state(output)
            if positions is None:
                return self._tail.run_head(inputs, output, last_BTH)
            rows_1BH = last_BTH[torch.arange(len(positions), device=last_BTH.device), positions.to(last_BTH.device)].unsqueeze(0)
            return self._tail.run_head(inputs, output, rows_1BH).squeeze(0)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model's forward for `batch`; copies where it writes to them."""
        inputs = dict(self._fixed_inputs)
        for name in ("input_ids", "attention_mask", "position_ids"):
            if batch.get(name) is not None:
                if name not in self._forward_names:
                    raise ValueError(f"{type(self.model).__name__} takes no {name}; leave it out of the batch")
                inputs[name] = batch[name].clone() if self.inspection.writes_inputs else batch[name]
        return inputs

    def _zeros_for(self, unit: str) -> dict[str, Tensor]:
        """The tail re-enters the model at its start: what only the embedding reads is zero there, and takes no memory."""
        if unit != TAIL:
            return {}
        zeros = {}
        for name in self.unit_parameters[EMBEDDING]:
            placeholder = self._outer_slots.placeholder(name)
            zeros[name] = torch.zeros(1, dtype=placeholder.dtype, device=self.device).expand(placeholder.shape)
        return zeros

    def _unit_parameters(self) -> dict[str, tuple[str, ...]]:
        seen = self.inspection
        return {
            EMBEDDING: self._in_module_order(seen.embedding_names),
            **{name: tuple(slots.places) for name, slots in self._block_slots.items()},
            TAIL: self._in_module_order(seen.body_names | seen.head_names),
        }

    def _in_module_order(self, names: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.parameters if name in names)

    def _buffer_place(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self.model.get_submodule(path), attribute

    def _validate_bound(self, unit: str) -> None:
        if unit not in self._bound:
            raise RuntimeError(f'{unit} has no weights here; call this inside `with bound("{unit}", ...)`')


def _turn_off_checkpointing(model: PreTrainedModel) -> None:
    """Streaming recomputes by itself."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            vars(module)["gradient_checkpointing"] = False


def _bring_buffers(model: PreTrainedModel) -> None:
    """All buffers to the CPU, where the model is inspected."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be streamed: its buffer {path}.{name} has no values (meta device); load it without "
                    "a device_map, or build it with build_meta_model"
                )
            if buffer is not None and buffer.device.type != "cpu":
                module._buffers[name] = buffer.to("cpu")


def _call_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled: one function for all blocks, so that blocks of one kind share their code."""
    return block(*args, **kwargs)


def _tensor_spec(model: nn.Module, name: str, parameter: nn.Parameter) -> TensorSpec:
    path, _, attribute = name.rpartition(".")
    is_norm = "norm" in type(model.get_submodule(path)).__name__.lower()
    return TensorSpec(
        name=name,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        trainable=parameter.requires_grad,
        decay=parameter.dim() > 1 and not is_norm and not attribute.endswith("bias"),
    )
