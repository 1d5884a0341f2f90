"""The plain way to one optimizer step's gradients: the whole model, micro-batch after micro-batch, ordinary autograd.

What is streamed is held against this. It shares with it only `cross_entropy_chunks` (so that both round alike) and nothing of
stand-ins or units: the model runs unmodified, its decoder as a whole, its head as `forward` around the decoder's output.

* Gradients add up micro-batch by micro-batch, in order, in fp32 or the parameter's dtype.
* A tied weight gets its head's gradients in one sum and its embedding's in another, added once at the end (as a unit-major loop
  does, which ends with the head long before it comes to the embedding). Otherwise the sum would only be equal up to its order.
* `seed_unit(unit, micro_batch)` is called before each unit runs, for dropout.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overspill.huggingface.tail import cross_entropy_chunks, find_targets

SeedUnit = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepGradients:
    """What one step's forward and backward gave."""

    losses: tuple[Tensor, ...]
    """Each micro-batch's share of the step's loss."""
    gradients: dict[str, Tensor]
    """By canonical name; parameters without one are absent."""


def run_plain_step(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    chunk_rows: int,
    loss_scale: float = 1.0,
    seed_unit: SeedUnit | None = None,
) -> StepGradients:
    """Losses and gradients (of loss x `loss_scale`) of one step over `batches`; the model keeps its weights and its mode."""
    num_targets = sum(find_targets(batch["labels"]).num_targets for batch in batches)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with _untied(model) as copies, _seeded(model, seed_unit) as start:
        model.zero_grad(set_to_none=True)
        losses = []
        for index, batch in enumerate(batches):
            start(index)
            losses.append(_run_micro_batch(model, batch, num_targets, chunk_rows, loss_scale))
        gradients = {names[id(p)]: p.grad for p in model.parameters() if id(p) in names and p.grad is not None}
        for name, copy in copies:
            gradients[name] = copy.grad + gradients[name]
        model.zero_grad(set_to_none=True)
    return StepGradients(losses=tuple(losses), gradients=gradients)


def _run_micro_batch(model: PreTrainedModel, batch: Mapping[str, Tensor], num_targets: int, chunk_rows: int, loss_scale: float) -> Tensor:
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    coefficient = model.config.router_aux_loss_coef if getattr(model.config, "output_router_logits", False) else 0.0
    decoder = model.get_decoder()
    output = decoder(**inputs, **({"output_router_logits": True} if coefficient else {}))
    last_hidden = output.last_hidden_state

    def around(rows: Tensor, **extra: Any) -> Any:
        changed = type(output)(**output)
        changed["last_hidden_state"] = rows
        with mock.patch.object(decoder, "forward", lambda *args, **kwargs: changed):
            return model(**inputs, **extra)

    def accumulate(name: str, gradient: Tensor) -> None:
        parameter = parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    inside = {id(parameter) for parameter in decoder.parameters()}
    parameters = dict(model.named_parameters())
    targets = find_targets(batch["labels"])
    total, gradient = cross_entropy_chunks(
        lambda rows: around(rows, **({"output_router_logits": False} if coefficient else {})).logits,
        last_hidden,
        targets,
        chunk_rows=chunk_rows,
        factor=loss_scale / num_targets,
        parameters={name: parameter for name, parameter in parameters.items() if id(parameter) not in inside},
        accumulate=accumulate,
    )
    loss = total / num_targets
    outputs, output_gradients = [last_hidden], [gradient]
    if coefficient:
        weight = coefficient * (targets.num_targets / num_targets)
        router_loss = around(last_hidden.detach()[:1, :1], output_router_logits=True).aux_loss
        outputs.append(router_loss * (weight * loss_scale))
        output_gradients.append(None)
        loss = loss + weight * router_loss.detach()
    torch.autograd.backward(outputs, output_gradients)
    return loss.detach()


@contextlib.contextmanager
def _untied(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Every further place of a tied parameter has a copy of its own inside: [(canonical name, copy)]."""
    first: dict[int, str] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: list[tuple[str, nn.Parameter]] = []
    for path, module in model.named_modules():
        for attribute, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = first.setdefault(id(parameter), f"{path}.{attribute}")
            if name != f"{path}.{attribute}":
                places.append((module, attribute, parameter))
                copies.append((name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)))
                module._parameters[attribute] = copies[-1][1]
    try:
        yield copies
    finally:
        for module, attribute, parameter in places:
            module._parameters[attribute] = parameter


@contextlib.contextmanager
def _seeded(model: PreTrainedModel, seed_unit: SeedUnit | None) -> Iterator[Callable[[int], None]]:
    """`seed_unit` runs before each unit inside; the value yielded starts a micro-batch."""
    if seed_unit is None:
        yield lambda index: None
        return
    blocks = block_names(model)
    current = [0]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seed_unit(name, current[0])) for name in blocks
    ]
    handles.append(model.get_submodule(blocks[-1]).register_forward_hook(lambda module, args, output: seed_unit("tail", current[0])))

    def start(index: int) -> None:
        current[0] = index
        seed_unit("embedding", index)

    try:
        yield start
    finally:
        for handle in handles:
            handle.remove()


def block_names(model: PreTrainedModel) -> list[str]:
    """Qualified names of the decoder blocks, in order."""
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    name, container = next((name, module) for name, module in decoder.named_children() if isinstance(module, nn.ModuleList))
    return [f"{path}.{name}.{index}" for index in range(len(container))]
