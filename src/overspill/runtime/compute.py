"""One unit on one micro-batch: what a `Compute` op does on the device.

Forward runs without a graph. Backward rebuilds the unit's graph from its detached boundary, takes the gradients by the
boundary, by side inputs and by the parameters, and drops the graph: nothing of a unit outlives its op but hidden states, and the graphs
that the plan keeps (`runtime/retained`), by which the backward then differentiates.

Randomness: before the embedding, each block, and the tail's own code, the generators are seeded from (run, step,
micro-batch, unit), the same in forward and recomputation, so the order of ops does not matter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from overspill.activations.retaining import HIDDEN
from overspill.errors import NonFiniteError, UnsupportedModelError
from overspill.huggingface import Embedded, HostReads, StreamedModel
from overspill.rng import unit_seed
from overspill.runtime.gradients import Gradients
from overspill.runtime.graphs import BlockGraphs
from overspill.runtime.residency import Residency
from overspill.runtime.retained import RetainedGraphs
from overspill.runtime.visit import TORCH_DTYPES, Visit
from overspill.spec.plan import Plan
from overspill.spec.retention import most_passes
from overspill.spec.schedule import Compute, Phase, Piece, Role
from overspill.tiers.cuda import cuda_index


@dataclasses.dataclass
class MicroBatch:
    """One micro-batch while its step runs."""

    batch: Mapping[str, torch.Tensor]
    """input_ids [B, T], labels [B, T], optional attention_mask and position_ids; labels on the CPU, the rest on the device."""
    shape: torch.Size
    """Of its hidden states: [B, T, hidden]."""
    arguments: Any = None
    """The recorded calls of all blocks."""
    side_inputs: tuple[torch.Tensor, ...] = ()
    side_gradients: list[torch.Tensor | None] = dataclasses.field(default_factory=list)
    side_outputs: dict[str, tuple[torch.Tensor, ...]] = dataclasses.field(default_factory=dict)
    side_output_gradients: dict[str, tuple[torch.Tensor | None, ...]] = dataclasses.field(default_factory=dict)
    reads: HostReads = dataclasses.field(default_factory=HostReads)
    """Of the embedding's forward, for the tail and, where no graph was kept, the embedding's backward."""
    loss: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    """Where generation wants logits, [B]; None: the tail computes the loss."""
    logits: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step's ops need to know besides the plan."""

    step: int
    seed: int
    num_targets: int
    """All targets of the step; a micro-batch's loss is its sum over this."""
    loss_scale: float = 1.0
    trains: bool = True
    """A backward follows."""


class UnitRunner:
    """Executes `Compute` ops."""

    def __init__(self, plan: Plan, model: StreamedModel, residency: Residency, graphs: BlockGraphs) -> None:
        self.plan, self.model, self.residency, self.graphs = plan, model, residency, graphs
        self.names = [unit.name for unit in plan.units]
        self.device = torch.device(plan.device)
        self.retained = RetainedGraphs(model)

    def run(self, op: Compute, visit: Visit, micro_batch: MicroBatch, context: StepContext, gradients: Gradients) -> None:
        """Run one op inside its unit's visit."""
        position = self.names.index(op.unit)
        if position == len(self.names) - 1:
            self._run_tail(op, visit, micro_batch, context, gradients)
        elif op.phase is Phase.FORWARD:
            self._run_forward(op, position, visit, micro_batch, context)
        elif position == 0:
            self._run_embedding_backward(op, visit, micro_batch, context, gradients)
        else:
            self._run_block_backward(op, position, visit, micro_batch, context, gradients)

    def _boundary(self, unit: str, op: Compute, role: Role = Role.BOUNDARY) -> Piece:
        return Piece(role=role, owner=unit, index=op.micro_batch)

    def _seed(self, op: Compute, context: StepContext) -> None:
        seed_generators(unit_seed(context.seed, context.step, op.micro_batch, op.unit), self.device)

    def _run_forward(self, op: Compute, position: int, visit: Visit, micro_batch: MicroBatch, context: StepContext) -> None:
        self._seed(op, context)
        with torch.no_grad():
            if position == 0:
                embedded = self._embed(op, visit, micro_batch, trains=context.trains)
                hidden = embedded.hidden
                micro_batch.arguments = embedded.arguments
                micro_batch.side_inputs = tuple(tensor.detach() for tensor in embedded.side_inputs)
                micro_batch.side_gradients = [None] * len(micro_batch.side_inputs)
            else:
                kept = self._forward_retained(op, visit, micro_batch) if op.is_retained else None
                if op.is_retained and kept is None:
                    self._seed(op, context)  # the attempt may have drawn
                hidden = self._forward_block(op, visit, micro_batch) if kept is None else kept
        self._check_boundary(op, op.produced[0][0], hidden, micro_batch)
        self.residency.put_boundary(op.produced[0][0], hidden)

    def _embed(self, op: Compute, visit: Visit, micro_batch: MicroBatch, *, trains: bool) -> Embedded:
        def run() -> Embedded:
            return self.model.embed(micro_batch.batch, reading=micro_batch.reads.noted())

        if not trains or not visit.trainable:
            return run()
        visit.outlives = True
        fixed = tuple(micro_batch.batch.values())
        return self.retained.embed(op.micro_batch, run, parameters=visit.parameters, trainable=visit.trainable, fixed=fixed)

    def _forward_retained(self, op: Compute, visit: Visit, micro_batch: MicroBatch) -> torch.Tensor | None:
        """The block's output, its graph kept; None: it could not be kept, and the forward is yet to be done."""
        piece, room_bytes = next((piece, size) for piece, size in op.produced if piece.role is Role.ACTIVATIONS)
        visit.outlives = True
        output = self.retained.forward(
            piece,
            self.residency.boundary(self._boundary(op.unit, op)),
            micro_batch.arguments,
            parameters=visit.parameters,
            trainable=visit.trainable,
            side_inputs=micro_batch.side_inputs,
            room_bytes=room_bytes,
            most_passes=most_passes(self.plan.activation_mode(op.unit)),
        )
        if output is not None and output.side_outputs:
            micro_batch.side_outputs[op.unit] = output.side_outputs
        return output.hidden if output is not None else None

    def _forward_block(self, op: Compute, visit: Visit, micro_batch: MicroBatch) -> torch.Tensor:
        source = self.residency.boundary(self._boundary(op.unit, op))
        replayed = self.graphs.forward(op.unit, visit, source, micro_batch.arguments)
        if replayed is not None:
            return replayed
        with self.graphs.watch(op.unit):
            output = self.model.run_block(op.unit, source, micro_batch.arguments, side_inputs=micro_batch.side_inputs or None)
        if output.side_outputs:
            micro_batch.side_outputs[op.unit] = tuple(tensor.detach() for tensor in output.side_outputs)
        return output.hidden

    def _check_boundary(self, op: Compute, piece: Piece, hidden: torch.Tensor, micro_batch: MicroBatch) -> None:
        dtype = TORCH_DTYPES[self.plan.boundary_dtype(piece.owner)]
        if hidden.shape != micro_batch.shape or hidden.dtype != dtype:
            raise UnsupportedModelError(
                f"{op.unit} of {self.plan.model} returns hidden states {tuple(hidden.shape)} {hidden.dtype}, the plan expects "
                f"{tuple(micro_batch.shape)} {dtype}"
            )

    def _run_block_backward(
        self, op: Compute, position: int, visit: Visit, micro_batch: MicroBatch, context: StepContext, gradients: Gradients
    ) -> None:
        hidden = self.residency.boundary(self._boundary(op.unit, op)).detach()
        above = self.residency.boundary(self._boundary(self.names[position + 1], op, Role.BOUNDARY_GRADIENT))
        kept = self.retained.take(op.consumed[0]) if op.consumed else None
        replayed = None
        if self.graphs.recorder is not None and kept is None:
            targets = gradients.targets(op.unit, visit.bundle_of, visit.trainable)
            replayed = self.graphs.backward(op.unit, visit, hidden, above, micro_batch.arguments, targets)
        if replayed is not None:
            hidden_gradient, used = replayed
            gradients.note(op.unit, used)
        elif kept is not None:
            sides = micro_batch.side_output_gradients.get(op.unit, ())
            try:
                results = kept.differentiate({HIDDEN: hidden, **visit.parameters}, above, sides)
            except torch.OutOfMemoryError:  # half of the graph is used up; the op's retry recomputes
                self.retained.give_up(op.unit, "the device has no memory left for its backward")
                raise
            hidden_gradient = self._take_gradients(op, visit, micro_batch, gradients, hidden, results)
        else:
            differentiate = functools.partial(self._differentiate_block, op, visit, micro_batch, hidden.requires_grad_(), above)
            self._decide_unneeded(op, context, differentiate)
            self._seed(op, context)
            with self.graphs.watch(op.unit):
                results = differentiate()
            hidden_gradient = self._take_gradients(op, visit, micro_batch, gradients, hidden, results)
        self.residency.put_boundary(self._boundary(op.unit, op, Role.BOUNDARY_GRADIENT), hidden_gradient)

    def _decide_unneeded(self, op: Compute, context: StepContext, differentiate: Callable[[], Sequence[torch.Tensor | None]]) -> None:
        """At the first backward of a kind of block: what its recomputation can leave out."""
        unneeded = self.model.unneeded
        if unneeded is None or unneeded.is_decided(op.unit):
            return

        def seeded() -> Sequence[torch.Tensor | None]:
            self._seed(op, context)
            return differentiate()

        unneeded.decide(op.unit, seeded)

    def _differentiate_block(
        self,
        op: Compute,
        visit: Visit,
        micro_batch: MicroBatch,
        hidden: torch.Tensor,
        above: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """The block once more, and back: gradients of the hidden states, of each side input, and of each trainable parameter. Nothing else
        is changed by it."""
        side_inputs = tuple(tensor.detach().requires_grad_() for tensor in micro_batch.side_inputs)
        with torch.enable_grad():
            output = self.model.run_block(op.unit, hidden, micro_batch.arguments, side_inputs=side_inputs or None)
        outputs, grad_outputs = [output.hidden], [above]
        for tensor, gradient in zip(output.side_outputs, micro_batch.side_output_gradients.get(op.unit, ()), strict=True):
            if gradient is not None:
                outputs.append(tensor)
                grad_outputs.append(gradient)
        inputs = [hidden, *side_inputs, *(visit.parameters[name] for name in visit.trainable)]
        return torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)

    def _take_gradients(
        self,
        op: Compute,
        visit: Visit,
        micro_batch: MicroBatch,
        gradients: Gradients,
        hidden: torch.Tensor,
        results: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Add up what `_differentiate_block` has found; the gradient of the hidden states, which is for the unit before."""
        num_side = len(micro_batch.side_inputs)
        hidden_gradient = results[0].contiguous() if results[0] is not None else torch.zeros_like(hidden)
        # All at once and after all else that needs memory: an op that runs out of it before a contribution to a parameter is run again.
        micro_batch.side_gradients = [
            _sum(total, gradient) for total, gradient in zip(micro_batch.side_gradients, results[1 : 1 + num_side], strict=True)
        ]
        micro_batch.side_output_gradients.pop(op.unit, None)
        self._add_all(op.unit, visit, gradients, visit.trainable, results[1 + num_side :])
        return hidden_gradient

    def _run_embedding_backward(
        self, op: Compute, visit: Visit, micro_batch: MicroBatch, context: StepContext, gradients: Gradients
    ) -> None:
        above = self.residency.boundary(self._boundary(self.names[1], op, Role.BOUNDARY_GRADIENT))
        kept, results = self.retained.take_embedding(op.micro_batch), None
        if kept is not None:
            try:
                results = kept.differentiate(visit.parameters, above, micro_batch.side_gradients)
            except torch.OutOfMemoryError:  # the op's retry makes the graph again
                raise
            except Exception:  # such as a saved tensor that the model has changed since; what is the model's own mistake comes again
                self.retained.give_up_embeddings()
        if results is not None:
            self._add_all(op.unit, visit, gradients, visit.trainable, results)
        else:
            self._differentiate_embedding(op, visit, micro_batch, context, gradients, above)
        micro_batch.arguments = None
        micro_batch.side_inputs, micro_batch.side_gradients = (), []

    def _differentiate_embedding(
        self, op: Compute, visit: Visit, micro_batch: MicroBatch, context: StepContext, gradients: Gradients, above: torch.Tensor
    ) -> None:
        """The embedding once more, and back."""
        self._seed(op, context)
        with torch.enable_grad():
            embedded = self.model.embed(micro_batch.batch, reading=micro_batch.reads.answered())
        outputs, grad_outputs = [embedded.hidden], [above]
        for tensor, gradient in zip(embedded.side_inputs, micro_batch.side_gradients, strict=True):
            if gradient is not None and tensor.requires_grad:
                outputs.append(tensor)
                grad_outputs.append(gradient)
        names = visit.trainable
        if names and embedded.hidden.requires_grad:
            inputs = [visit.parameters[name] for name in names]
            self._add_all(op.unit, visit, gradients, names, torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))

    def _run_tail(self, op: Compute, visit: Visit, micro_batch: MicroBatch, context: StepContext, gradients: Gradients) -> None:
        hidden = self.residency.boundary(self._boundary(op.unit, op)).detach()
        if micro_batch.positions is not None:
            with torch.no_grad():
                micro_batch.logits = self.model.logits(micro_batch.batch, hidden, micro_batch.positions)
            micro_batch.arguments = None
            return
        trains = op.phase is Phase.BACKWARD

        def accumulate(name: str, gradient: torch.Tensor) -> None:
            gradients.add(visit.bundle_of[name], op.unit, name, gradient)

        output = self.model.run_tail(
            micro_batch.batch,
            hidden.requires_grad_(trains),
            side_outputs=micro_batch.side_outputs,
            parameters=visit.parameters,
            num_targets=context.num_targets,
            loss_scale=context.loss_scale,
            chunk_rows=self.plan.loss_chunk_rows,
            accumulate=accumulate if trains else None,
            before_tail=lambda: self._seed(op, context),
            reading=micro_batch.reads.answered(),
        )
        micro_batch.loss = output.loss
        micro_batch.side_outputs = {}
        if not trains:
            micro_batch.arguments = None
            return
        assert output.hidden_gradient is not None
        micro_batch.side_output_gradients = dict(output.side_output_gradients)
        self.residency.put_boundary(self._boundary(op.unit, op, Role.BOUNDARY_GRADIENT), output.hidden_gradient)

    def _add_all(self, unit: str, visit: Visit, gradients: Gradients, names: Sequence[str], results: Sequence[torch.Tensor | None]) -> None:
        for name, gradient in zip(names, results, strict=True):
            if gradient is not None:
                gradients.add(visit.bundle_of[name], unit, name, gradient)


def _sum(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    return total + gradient if total is not None and gradient is not None else gradient if total is None else total


def seed_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and for `device`.

    `torch.manual_seed` also visits every other kind of accelerator; one that is not there writes down a stack trace for later at
    each call (some 0.5 ms with torch 2.11, and memory that is never given back).
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[cuda_index(device)].manual_seed(seed)


def forget_casts(device: torch.device) -> None:
    """After an op: autocast would hold a cast of every weight that it has met until the caller leaves it."""
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


def check_losses(micro_batches: Sequence[MicroBatch], step: int) -> None:
    """Stop if a loss is not finite.

    Raises:
        NonFiniteError: with the micro-batch's number.
    """
    for index, micro_batch in enumerate(micro_batches):
        if micro_batch.loss is not None and not bool(torch.isfinite(micro_batch.loss)):
            raise describe_loss(micro_batch.loss, index, step)


def describe_loss(loss: torch.Tensor | None, index: int, step: int) -> NonFiniteError:
    """The error for a loss that is not finite, met before this step has updated anything."""
    value = float(loss) if loss is not None else float("nan")
    return NonFiniteError(
        f"loss of step {step}, micro-batch {index} is {value}; no weight was changed by this step; "
        "lower --lr, add --warmup-steps, or look at the data of this batch"
    )
