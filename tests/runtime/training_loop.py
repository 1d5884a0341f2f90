"""The plain loop that sessions are held against: the model resident and whole, autograd as it is, nothing streamed.

It shares with overspill what the claim says it shares: the chunked loss, the seeds, the update rule. Everything else (one
graph through the whole model, gradients in `.grad`, the model's own forward) is ordinary PyTorch: `plain_loop.run_plain_step`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from plain_loop import run_plain_step

from overspill.optim import Rounding, global_norm, sum_of_squares, update_reference
from overspill.rng import rounding_key, unit_seed
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.update_rule import Optimizer, clip_coefficient

DTYPES = {name: getattr(torch, name) for name in ("float32", "int16", "bfloat16", "uint8")}
Batch = Mapping[str, torch.Tensor]


def decays(model: torch.nn.Module) -> dict[str, bool]:
    """Weight decay on matrices, not on norms and biases; said here once more, on purpose, in other words."""
    result = {}
    for name, parameter in model.named_parameters():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
        result[name] = parameter.dim() >= 2 and "norm" not in owner and not name.endswith("bias")
    return result


class PlainTrainer:
    """Trains a resident causal LM with an optimizer as `spec.update_rule` states it."""

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        *,
        clip: float | None,
        seed: int,
        chunk_rows: int,
        device: str = "cpu",
        state_format: str = "fp32",
    ) -> None:
        self.state_format = state_format
        self.model, self.optimizer, self.clip, self.seed, self.chunk_rows = model.to(device).train(), optimizer, clip, seed, chunk_rows
        self.device = device
        self.step_number = 0
        self.parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self.decay = decays(model)
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self.parameters.items():
            fields = resolve_state_format(state_format, str(parameter.dtype).removeprefix("torch."), optimizer.kind).fields
            self.states[name] = {
                field.name: torch.zeros(field.num_values(parameter.numel()), dtype=DTYPES[field.dtype], device=device) for field in fields
            }

    def step(self, batches: Sequence[Batch]) -> tuple[float, float, dict[str, torch.Tensor]]:
        """One optimizer step: loss, gradient norm, gradients."""
        self.step_number += 1

        def seed_unit(unit: str, micro_batch: int) -> None:
            seed = unit_seed(self.seed, self.step_number, micro_batch, unit)
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` writes down stack traces for devices that are not there
            if self.device != "cpu":
                torch.cuda.manual_seed(seed)

        moved = [{key: value if key == "labels" else value.to(self.device) for key, value in batch.items()} for batch in batches]
        with torch.random.fork_rng(devices=[self.device] if self.device != "cpu" else []):
            result = run_plain_step(self.model, moved, chunk_rows=self.chunk_rows, seed_unit=seed_unit)
        gradients = result.gradients
        norm = global_norm(sum_of_squares(gradient) for gradient in gradients.values())
        scale = clip_coefficient(norm, self.clip) if self.clip is not None else 1.0
        for name, parameter in self.parameters.items():
            weight_decay = None if self.decay[name] else 0.0
            scalars = self.optimizer.scalars(step=self.step_number, weight_decay=weight_decay, gradient_scale=scale)
            update_reference(
                scalars,
                parameter=parameter.data.view(-1),
                gradient=gradients[name].reshape(-1),
                states=self.states[name],
                state_format=self.state_format,
                rounding=Rounding(key=rounding_key(self.seed, self.step_number, name)),
            )
        return math.fsum(float(loss) for loss in result.losses), norm, gradients


def make_batches(count: int, *, vocab_size: int, samples: int = 2, tokens: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Micro-batches with unequal numbers of targets, padding and masked prompts."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        length = tokens - index % 3
        ids = torch.randint(1, vocab_size, (samples, length), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, : 1 + index] = -100
        if index % 2:
            labels[-1, -3:], mask[-1, -3:], ids[-1, -3:] = -100, 0, 0
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches
