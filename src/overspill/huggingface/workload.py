"""What one micro-batch costs each class of units, found without weights and without a device.

    spec = describe_workload("path/to/model", seq_len=2048, micro_batch=4)
    print(spec.class_of("model.layers.0").saved_bytes)

One block of every kind, the embedding and the tail run as the runtime runs them (`runtime/compute.py`): forward without a graph, then
again with one, then the gradients of the boundary, of side inputs and of the trainable parameters. They run at the sizes asked for on
fake tensors (shapes and dtypes, no values, no memory), while `op_trace` watches. What blocks do otherwise on a GPU, attention above
all, is put right by `device_kernels`.

Limits:

1. What a block does must not depend on values. Experts that loop over the tokens they got do; they are traced in their grouped form, if
   they have one. A class that cannot be traced has no passes, and its note says why: there is never a guess in place of a number.
2. A loss chunk is traced for one and two chunks of rows; the rest is multiplication.
3. Nothing inside a kernel is seen: neither its scratch memory nor what libraries keep.
4. Adding gradients up (`runtime/gradients.py`) is not part of a unit's work.
5. One thread at a time: transformers is told something else meanwhile (`valueless`).

Shapes: B sequences of T tokens, H hidden, R rows with a target, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from overspill.errors import OverspillError
from overspill.huggingface.device_kernels import DeviceKernels
from overspill.huggingface.inspection import NUM_TOKENS
from overspill.huggingface.meta_model import build_meta_model
from overspill.huggingface.op_trace import OpTrace
from overspill.huggingface.retention_book import OpenBook, RetentionBook
from overspill.huggingface.skeleton import copy_without_weights
from overspill.huggingface.streamed_model import EMBEDDING, TAIL, Embedded, StreamedModel
from overspill.huggingface.tail_trace import TailTrace
from overspill.huggingface.valueless import build_batch, described_arguments, find_classes, shapes_of, without_values
from overspill.huggingface.weights import open_config
from overspill.spec.plan import DTYPES
from overspill.spec.retention import ON_DEVICE, most_passes
from overspill.spec.workload import (
    Kept,
    LossWork,
    Pass,
    Retention,
    Routing,
    SavedTensor,
    UnitWork,
    Work,
    WorkloadSpec,
    default_loss_chunk_rows,
)

DEVICES = ("cuda", "cpu")
_VALUES_PER_TOKEN, _LEAST_VALUES, _MOST_VALUES = 4, 4096, 1 << 23
"""Bounds on what is computed beside a trace: a few numbers a token, no mask of T x T, at most 64 MiB a tensor. Chosen, not tuned."""

UNDESCRIBABLE = (OverspillError, ValueError, NotImplementedError, RuntimeError)
"""What `describe_workload` may raise of a model that cannot be described without weights."""


def describe_workload(
    model: str | Path | PreTrainedConfig | PreTrainedModel | StreamedModel,
    *,
    seq_len: int,
    micro_batch: int,
    dtype: str = "bfloat16",
    device: str = "cuda",
    is_masked: bool = False,
    loss_chunk_rows: int | None = None,
    open_book: OpenBook | None = None,
) -> WorkloadSpec:
    """Bytes, FLOPs and saved tensors of every class of units, for one micro-batch.

    Args:
        model: a folder, a hub name, a configuration, or a model object (which is not touched). No weights are read. A streamed model is
            put into training mode.
        seq_len: T, tokens of every sample.
        micro_batch: B, samples.
        dtype: what the model computes in.
        device: whose kernels are assumed, `cuda` or `cpu`; it need not be here.
        is_masked: micro-batches bring a padding mask, or are packed.
        loss_chunk_rows: rows of logits at a time; None: as the planner has it.
        open_book: says what a block's graph stores that lives from forward to backward, for `UnitWork.retention`; None: nobody asks.

    Raises:
        ValueError: a size below 1, an unknown dtype or device, more tokens than the model has positions.
        UnsupportedModelError: the model cannot be streamed.
        ModelFolderError: the folder is missing or broken.
    """
    for name, value in (("seq_len", seq_len), ("micro_batch", micro_batch), ("loss_chunk_rows", loss_chunk_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    if device not in DEVICES:
        raise ValueError(f"there are kernels for {' and '.join(DEVICES)}, not for {device!r}")
    streamed = model if isinstance(model, StreamedModel) else build_streamed(model, dtype)
    if streamed.max_positions is not None and seq_len > streamed.max_positions:
        raise ValueError(
            f"{seq_len} tokens were asked for, but {type(streamed.model).__name__} has learned positions for {streamed.max_positions}; "
            f"lower the sequence length to {streamed.max_positions}"
        )
    tracer = _Tracer(streamed.train(), seq_len, micro_batch, is_cuda=device == "cuda", is_masked=is_masked, open_book=open_book)
    return tracer.trace(dtype, loss_chunk_rows or default_loss_chunk_rows(streamed.config.get_text_config().vocab_size))


def build_streamed(model: str | Path | PreTrainedConfig | PreTrainedModel, dtype: str) -> StreamedModel:
    """The model without its weights, for looking at; a model object stays as it is."""
    kind = getattr(torch, dtype)
    if isinstance(model, PreTrainedModel):
        return StreamedModel(copy_without_weights(model, dtype=kind))
    config = model if isinstance(model, PreTrainedConfig) else open_config(model)
    return StreamedModel(build_meta_model(config, dtype=kind))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Traced:
    """One unit's passes and what its backward keeps."""

    forward: Pass
    recompute: Pass
    backward: Pass
    saved: tuple[SavedTensor, ...]
    side_outputs: tuple[Tensor, ...] = ()
    loss: LossWork | None = None
    retention: Retention | None = None


class _Tracer:
    def __init__(
        self, streamed: StreamedModel, seq_len: int, micro_batch: int, *, is_cuda: bool, is_masked: bool, open_book: OpenBook | None
    ) -> None:
        self.streamed, self.open_book = streamed, open_book
        self.seq_len, self.micro_batch = seq_len, micro_batch
        self.is_cuda, self.is_masked = is_cuda, is_masked
        self.kernels = DeviceKernels() if is_cuda else None
        self.notes: list[str] = []
        self.embedded: Embedded | None = None
        self.side_outputs: dict[str, tuple[Tensor, ...]] = {}
        self.refusal = ""
        """Why nothing of the model can be traced."""

    def trace(self, dtype: str, chunk_rows: int) -> WorkloadSpec:
        streamed = self.streamed
        self._note_other_packages()
        expected = described_arguments(streamed, is_masked=self.is_masked)
        with torch.random.fork_rng(devices=[]), without_values(streamed, self.notes):
            self._refuse_other_arguments(expected)
            outcomes = {EMBEDDING: self._try(EMBEDDING, chunk_rows)}
            classes = find_classes(streamed, self.embedded.arguments if self.embedded is not None else None)
            outcomes |= {first: self._try(first, chunk_rows) for first in classes}
            for first, names in classes.items():
                block, _ = outcomes[first]
                self.side_outputs |= dict.fromkeys(names, block.side_outputs if block is not None else ())
            outcomes[TAIL] = self._try(TAIL, chunk_rows)
            units = {EMBEDDING: (EMBEDDING,), **classes, TAIL: (TAIL,)}
            described = tuple(self._describe(first, units[first], *outcomes[first]) for first in units)
        tail, _ = outcomes[TAIL]
        config = streamed.config.get_text_config()
        return WorkloadSpec(
            model=type(streamed.model).__name__,
            dtype=dtype,
            device="cuda" if self.is_cuda else "cpu",
            seq_len=self.seq_len,
            micro_batch=self.micro_batch,
            is_masked=self.is_masked,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            argument_bytes=self._argument_bytes(),
            classes=described,
            loss=tail.loss if tail is not None else None,
            attention_kernels=tuple(self.kernels.attention) if self.kernels is not None else (),
            notes=tuple([*self.notes, *self._attention_notes()]),
        )

    def _try(self, unit: str, chunk_rows: int) -> tuple[_Traced | None, tuple[str, ...]]:
        """Trace one unit; what cannot be traced is said, not guessed (limit 1)."""
        if self.refusal:
            return None, (self.refusal,)
        if unit not in (EMBEDDING, TAIL) and self.embedded is None:
            return None, ("its arguments are unknown, because the embedding could not be traced",)
        trace = self._new_trace()
        try:
            with self.kernels or contextlib.nullcontext(), trace:
                if unit == EMBEDDING:
                    traced = self._trace_embedding(trace)
                elif unit == TAIL:
                    traced = self._trace_tail(trace, chunk_rows)
                else:
                    traced = self._trace_block(trace, unit)
        except MemoryError:
            raise
        except Exception as error:  # whatever a model's code does on tensors without values
            return None, (f"could not be traced without values: {_first_line(error)}",)
        if trace.unknown:
            return None, (f"the cost of {', '.join(trace.unknown)} is not known",)
        return traced, ()

    def _new_trace(self) -> OpTrace:
        wanted = _VALUES_PER_TOKEN * self.micro_batch * self.seq_len
        return OpTrace(is_cuda=self.is_cuda, most_values=min(max(_LEAST_VALUES, wanted), _MOST_VALUES))

    def _refuse_other_arguments(self, expected: object) -> None:
        """Rule 4 of `valueless`."""
        trace = self._new_trace()
        try:
            with trace, self._bound(trace, EMBEDDING), torch.no_grad():
                found = shapes_of(self.streamed.embed(build_batch(self.streamed, 1, NUM_TOKENS, is_masked=self.is_masked)).arguments)
        except Exception as error:
            self.refusal = f"the model does not run on tensors without values: {_first_line(error)}"
            return
        if found != expected:
            self.refusal = "without values, the model calls its blocks with other arguments than it does with them"

    # -- one unit -----------------------------------------------------------------------------------------------------

    def _trace_embedding(self, trace: OpTrace) -> _Traced:
        batch = self._batch()
        with self._bound(trace, EMBEDDING) as leaves, trace.inside(self.streamed.model):
            start = _start(trace)
            with torch.no_grad():
                self.embedded = self.streamed.embed(batch)
            forward = trace.pass_of(is_gradient=False, start=start)
            arguments = self.embedded.arguments
            kept = [self.embedded.hidden, *arguments.tensors, *arguments.side_inputs]
            trace.give("input", {str(number): tensor for number, tensor in enumerate(kept)})
            start = _start(trace)
            with torch.enable_grad(), trace.saving():
                again = self.streamed.embed(batch)
            outputs = [tensor for tensor in (again.hidden, *again.side_inputs) if tensor.requires_grad]
            return self._differentiate(trace, start, forward, outputs, [t for t in leaves if t.requires_grad], again.hidden)

    def _trace_block(self, trace: OpTrace, unit: str) -> _Traced:
        assert self.embedded is not None
        arguments = self.embedded.arguments
        dtype = self.streamed.hidden_dtypes[self._before(unit)]
        hidden = torch.empty(self.embedded.hidden.shape, dtype=dtype)
        trace.give("input", {"hidden_states": hidden})
        named = {f"argument {number}": tensor for number, tensor in enumerate((*arguments.tensors, *arguments.side_inputs))}
        trace.give("input", named)
        with self._bound(trace, unit) as leaves, trace.inside(self.streamed.block(unit)):
            start = _start(trace)
            with torch.no_grad():
                output = self.streamed.run_block(unit, hidden, arguments)
            forward = trace.pass_of(is_gradient=False, start=start)
            del output
            start = _start(trace)
            boundary = hidden.detach().requires_grad_()
            sides = [tensor.detach().requires_grad_() for tensor in arguments.side_inputs]
            with torch.enable_grad(), trace.saving():
                output = self.streamed.run_block(unit, boundary, arguments, side_inputs=sides or None)
            side_outputs = tuple(tensor.detach() for tensor in output.side_outputs)
            outputs = [tensor for tensor in (output.hidden, *output.side_outputs) if tensor.requires_grad]
            wanted = [boundary, *sides, *(leaf for leaf in leaves if leaf.requires_grad)]
            hidden = output.hidden
            del output
            traced = self._differentiate(trace, start, forward, outputs, wanted, hidden)
            retention = self._retain(unit, boundary) if self.open_book is not None else None
        return dataclasses.replace(traced, side_outputs=side_outputs, retention=retention)

    def _retain(self, unit: str, boundary: Tensor) -> Retention | None:
        """The block's forward once more for each mode, as it runs when its graph is kept."""
        kept = {}
        for mode in ON_DEVICE:
            book = self._book(unit, boundary, most_passes=most_passes(mode))
            if book.refusal is not None:
                return None
            rebuilt = Work(moved_bytes=book.moved_bytes, elementwise_bytes=book.moved_bytes, num_ops=book.num_rebuilt)
            kept[mode] = Kept(stored_bytes=book.stored_bytes, rebuilt=rebuilt)
        return Retention(kept=kept)

    def _book(self, unit: str, boundary: Tensor, *, most_passes: float) -> RetentionBook:
        assert self.embedded is not None and self.open_book is not None
        arguments = self.embedded.arguments
        leaf = boundary.detach().requires_grad_()
        sides = [tensor.detach().requires_grad_() for tensor in arguments.side_inputs]
        fixed = (*arguments.tensors, *arguments.side_inputs)
        book = self.open_book(self.streamed.block(unit), leaf, self.leaves, fixed, most_passes=most_passes)
        with torch.enable_grad(), book.saving():
            self.streamed.run_block(unit, leaf, arguments, side_inputs=sides or None)
        return book

    def _differentiate(
        self, trace: OpTrace, start: int, forward: Pass, outputs: list[Tensor], wanted: Sequence[Tensor], hidden: Tensor
    ) -> _Traced:
        """The gradients of `wanted`, after a forward with a graph that began at operation `start`."""
        saved = trace.saved_tensors(outputs, hidden)
        recompute = trace.pass_of(is_gradient=False, start=start)
        del hidden
        gradients: Any = None
        if outputs and wanted:
            above = [torch.empty_like(output) for output in outputs]
            trace.give("input", {f"gradient {number}": tensor for number, tensor in enumerate(above)})
            gradients = torch.autograd.grad(outputs, wanted, above, allow_unused=True)
        backward = trace.pass_of(is_gradient=True, start=start)
        del gradients
        return _Traced(forward=forward, recompute=recompute, backward=backward, saved=saved)

    def _trace_tail(self, trace: OpTrace, chunk_rows: int) -> _Traced:
        inputs = self.streamed.inputs(self._batch())
        rows = self.micro_batch * (self.seq_len - 1)
        is_fused = self._has_fused_loss()
        sides = {
            unit: tuple(torch.empty_like(tensor, requires_grad=False) for tensor in tensors) for unit, tensors in self.side_outputs.items()
        }
        trace.give("input", {f"router logits {unit}": tensor for unit, tensors in sides.items() for tensor in tensors})
        passes = []
        with self._bound(trace, TAIL), trace.inside(self.streamed.model):
            for is_training in (False, True):
                tail = TailTrace(trace, self.streamed.tail, inputs, self.leaves, sides, is_fused=is_fused, is_training=is_training)
                tail.run(self._tail_hidden(), rows, chunk_rows)
                passes.append(tail)
        evaluation, training = passes
        return _Traced(
            forward=evaluation.forward, recompute=training.forward, backward=training.backward, saved=training.saved, loss=training.loss
        )

    def _has_fused_loss(self) -> bool:
        """Assumed where Triton is; a CUDA device that is not here is assumed to have it."""
        return self.is_cuda and (not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None)

    # -- around it ----------------------------------------------------------------------------------------------------

    def _tail_hidden(self) -> Tensor:
        streamed = self.streamed
        dtype = streamed.hidden_dtypes[streamed.block_names[-1]]
        return torch.empty(self.micro_batch, self.seq_len, streamed.config.get_text_config().hidden_size, dtype=dtype)

    def _batch(self) -> dict[str, Tensor]:
        return build_batch(self.streamed, self.micro_batch, self.seq_len, is_masked=self.is_masked)

    @contextlib.contextmanager
    def _bound(self, trace: OpTrace, unit: str) -> Iterator[list[Tensor]]:
        """`unit` reads fake parameters inside, which are given."""
        specs = self.streamed.parameters
        leaves = {
            name: torch.empty(specs[name].shape, dtype=getattr(torch, specs[name].dtype), requires_grad=specs[name].trainable)
            for name in self.streamed.unit_parameters[unit]
        }
        trace.give("parameter", leaves)
        self.leaves = leaves
        with self.streamed.bound(unit, leaves):
            trace.give("parameter", dict(self.streamed.model.named_buffers()))
            if unit in self.streamed.block_names:
                trace.give("parameter", dict(self.streamed.block(unit).named_buffers()))
            yield list(leaves.values())

    def _before(self, unit: str) -> str:
        names = self.streamed.unit_names
        return names[names.index(unit) - 1]

    # -- the document -------------------------------------------------------------------------------------------------

    def _describe(self, first: str, units: tuple[str, ...], traced: _Traced | None, notes: tuple[str, ...]) -> UnitWork:
        streamed = self.streamed
        specs = [streamed.parameters[name] for name in streamed.unit_parameters[first]]
        returned = streamed.hidden_dtypes.get(first)
        routing = self._routing(first)
        hidden_size = streamed.config.get_text_config().hidden_size
        return UnitWork(
            name=first,
            units=units,
            num_parameters=sum(spec.num_elements for spec in specs),
            parameter_bytes=sum(spec.num_bytes for spec in specs),
            trainable_bytes=sum(spec.num_bytes for spec in specs if spec.trainable),
            boundary_bytes=0 if returned is None else self.micro_batch * self.seq_len * hidden_size * returned.itemsize,
            boundary_dtype="" if returned is None else str(returned).removeprefix("torch."),
            forward=traced.forward if traced is not None else None,
            recompute=traced.recompute if traced is not None else None,
            backward=traced.backward if traced is not None else None,
            saved=traced.saved if traced is not None else (),
            side_input_bytes=self._side_input_bytes(first),
            side_output_bytes=sum(tensor.nbytes for tensor in traced.side_outputs) if traced is not None else 0,
            routing=routing,
            retention=traced.retention if traced is not None else None,
            notes=notes,
        )

    def _side_input_bytes(self, unit: str) -> int:
        if self.embedded is None or unit not in self.embedded.arguments.calls:
            return 0
        used = self.embedded.arguments.calls[unit].side_inputs
        return sum(self.embedded.arguments.side_inputs[number].untyped_storage().nbytes() for number in used)

    def _argument_bytes(self) -> int:
        """Each storage once; what is a buffer of the model is not a micro-batch's."""
        if self.embedded is None:
            return 0
        buffers = {buffer.untyped_storage()._cdata for buffer in self.streamed.model.buffers()}
        arguments = self.embedded.arguments
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*arguments.tensors, *arguments.side_inputs)}
        return sum(size for address, size in storages.items() if address not in buffers)

    def _routing(self, unit: str) -> tuple[Routing, ...]:
        if unit in (EMBEDDING, TAIL):
            return ()
        found = []
        config = self.streamed.config.get_text_config()
        for path, module in self.streamed.block(unit).named_modules():
            count = getattr(module, "num_experts", None)
            if not isinstance(count, int) or count < 2 or not any(True for _ in module.parameters(recurse=False)):
                continue
            if not any(parameter.dim() == 3 and parameter.shape[0] == count for parameter in module.parameters(recurse=False)):
                continue  # the router, which knows the number too
            each = int(getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 0)
            if each:
                tokens = self.micro_batch * self.seq_len * each / count
                found.append(Routing(module=path, num_experts=count, experts_per_token=each, expected_tokens_per_expert=tokens))
        return tuple(found)

    def _note_other_packages(self) -> None:
        """Some blocks' code takes kernels of other packages where they are installed, and plain torch elsewhere."""
        codes = {type(self.streamed.block(unit)).__module__ for unit in self.streamed.block_names}
        names = ("use_kernel_func_from_hub_with_fallback", "is_fast_path_available")
        if self.is_cuda and any(hasattr(sys.modules.get(code), name) for code in codes for name in names):
            self.notes.append("kernels that other packages have for these blocks are not described: where they are installed, costs differ")

    def _attention_notes(self) -> list[str]:
        if self.kernels is None or not self.kernels.attention or self.kernels.asks_device:
            return []
        names = ", ".join(self.kernels.attention)
        notes = [f"attention kernels are assumed to be those of an NVIDIA GPU of compute capability 8.0 or later: {names}"]
        if self.kernels.has_doubt:
            notes.append(
                "key heads are broadcast where flash attention cannot run: whether another fused kernel takes them depends on the "
                "version of torch; math, which keeps T x T, is assumed"
            )
        return notes


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _start(trace: OpTrace) -> int:
    """A new pass begins; returns the number of its first operation."""
    trace.forget_peak()
    return len(trace.ops)
