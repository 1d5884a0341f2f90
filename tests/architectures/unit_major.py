"""A unit-major optimizer step in its plainest form: every weight in memory, but a unit reads it only through `bound`.

Forward and backward visit each unit once, with all micro-batches; boundaries are detached, everything is recomputed in
backward, nothing else is kept. A streaming executor does the same with weights that come and go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from plain_loop import SeedUnit, StepGradients
from torch import Tensor

from overspill.huggingface import BlockOutput, Embedded, StreamedModel
from overspill.huggingface.tail import find_targets


class GradientSums:
    """Gradients by name, added up in the order in which they come."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        self.sums[name] = gradient if name not in self.sums else self.sums[name] + gradient


def run_unit_major_step(
    streamed: StreamedModel,
    weights: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    chunk_rows: int,
    loss_scale: float = 1.0,
    seed_unit: SeedUnit | None = None,
) -> StepGradients:
    """Losses and gradients of one step, as `run_plain_step` gives them."""
    seed = seed_unit or (lambda unit, index: None)
    embedded, boundaries, side_outputs = _run_forward(streamed, weights, batches, seed)
    num_targets = sum(find_targets(batch["labels"]).num_targets for batch in batches)
    sums = GradientSums()
    losses, gradients, side_gradients = [], [], []
    leaves = _leaves(streamed, "tail", weights)
    with streamed.bound("tail", leaves):
        for index, batch in enumerate(batches):
            tail = streamed.run_tail(
                batch,
                boundaries[index].pop(),
                side_outputs=side_outputs[index],
                parameters=leaves,
                num_targets=num_targets,
                loss_scale=loss_scale,
                chunk_rows=chunk_rows,
                accumulate=sums.add,
                before_tail=lambda index=index: seed("tail", index),
            )
            losses.append(tail.loss)
            gradients.append(tail.hidden_gradient)
            side_gradients.append(tail.side_output_gradients)
    input_gradients = [[torch.zeros_like(t) for t in e.side_inputs] for e in embedded]
    for unit in reversed(streamed.block_names):
        leaves = _leaves(streamed, unit, weights)
        trainable = [name for name, leaf in leaves.items() if leaf.requires_grad]
        with streamed.bound(unit, leaves):
            for index, record in enumerate(embedded):
                hidden = boundaries[index].pop().requires_grad_()
                sides = [tensor.clone().requires_grad_() for tensor in record.arguments.side_inputs]
                used = record.arguments.calls[unit].side_inputs
                seed(unit, index)
                output = streamed.run_block(unit, hidden, record.arguments, side_inputs=sides)
                results = torch.autograd.grad(
                    [output.hidden, *output.side_outputs],
                    [hidden, *(sides[k] for k in used), *(leaves[name] for name in trainable)],
                    [gradients[index], *side_gradients[index].get(unit, ())],
                    allow_unused=True,
                )
                gradients[index] = results[0]
                for k, gradient in zip(used, results[1:], strict=False):
                    if gradient is not None:
                        input_gradients[index][k] += gradient
                for name, gradient in zip(trainable, results[1 + len(used) :], strict=True):
                    if gradient is not None:
                        sums.add(name, gradient)
    embedding = _embedding_gradients(streamed, weights, batches, gradients, input_gradients, seed)
    for name, gradient in embedding.sums.items():
        sums.add(name, gradient)
    return StepGradients(losses=tuple(losses), gradients=sums.sums)


def _run_forward(
    streamed: StreamedModel, weights: Mapping[str, Tensor], batches: Sequence[Mapping[str, Tensor]], seed: SeedUnit
) -> tuple[list[Embedded], list[list[Tensor]], list[dict[str, tuple[Tensor, ...]]]]:
    """Per micro-batch: what `embed` gave, the hidden states before each block and before the tail, the side outputs."""
    with torch.no_grad():
        embedded = []
        with streamed.bound("embedding", _leaves(streamed, "embedding", weights)):
            for index, batch in enumerate(batches):
                seed("embedding", index)
                embedded.append(streamed.embed(batch))
        boundaries = [[record.hidden] for record in embedded]
        side_outputs: list[dict[str, tuple[Tensor, ...]]] = [{} for _ in batches]
        for unit in streamed.block_names:
            with streamed.bound(unit, _leaves(streamed, unit, weights)):
                for index, record in enumerate(embedded):
                    seed(unit, index)
                    output: BlockOutput = streamed.run_block(unit, boundaries[index][-1], record.arguments)
                    boundaries[index].append(output.hidden)
                    side_outputs[index][unit] = output.side_outputs
    return embedded, boundaries, side_outputs


def _embedding_gradients(
    streamed: StreamedModel,
    weights: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    gradients: Sequence[Tensor],
    input_gradients: Sequence[Sequence[Tensor]],
    seed: SeedUnit,
) -> GradientSums:
    sums = GradientSums()
    leaves = _leaves(streamed, "embedding", weights)
    trainable = [name for name, leaf in leaves.items() if leaf.requires_grad]
    with streamed.bound("embedding", leaves):
        for index, batch in enumerate(batches):
            seed("embedding", index)
            again = streamed.embed(batch)
            results = torch.autograd.grad(
                [again.hidden, *again.side_inputs],
                [leaves[name] for name in trainable],
                [gradients[index], *input_gradients[index]],
                allow_unused=True,
            )
            for name, gradient in zip(trainable, results, strict=True):
                if gradient is not None:
                    sums.add(name, gradient)
    return sums


def _leaves(streamed: StreamedModel, unit: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name].detach().requires_grad_(streamed.parameters[name].trainable) for name in streamed.unit_parameters[unit]}
