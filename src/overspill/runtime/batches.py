"""Micro-batches as the caller gives them: checked against the plan, counted, brought to the device.

Labels stay on the CPU too: which rows have a target is known there without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from overspill.runtime.compute import MicroBatch
from overspill.spec.plan import Plan

IGNORED = -100
"""A label that is no target (transformers' convention)."""
_KEYS = ("input_ids", "labels", "attention_mask", "position_ids")


def token_count(batch: Mapping[str, torch.Tensor]) -> int:
    """Samples times padded length."""
    return batch["input_ids"].numel()


def token_counts(batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, ...]:
    """`token_count` of each micro-batch: what a program depends on."""
    return tuple(map(token_count, batches))


def count_targets(batch: Mapping[str, torch.Tensor]) -> int:
    """Labels that are predicted: not ignored, and not the first of their sample."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def sum_losses(batches: Sequence[MicroBatch]) -> float:
    """Of micro-batches whose program has run: each has its part of the mean over all targets."""
    return math.fsum(float(batch.loss) for batch in batches if batch.loss is not None)


def prepare_batches(
    micro_batches: Sequence[Mapping[str, torch.Tensor]], plan: Plan, *, vocab_size: int, device: torch.device
) -> list[MicroBatch]:
    """Check all micro-batches of a program and move what the model reads to the device.

    Raises:
        ValueError: there is none; or as `prepare_batch`.
    """
    if not micro_batches:
        raise ValueError("at least one micro-batch is needed, got none")
    return [
        MicroBatch(
            batch=prepare_batch(batch, plan, index, vocab_size=vocab_size, device=device),
            shape=torch.Size([*batch["input_ids"].shape, plan.hidden_size]),
        )
        for index, batch in enumerate(micro_batches)
    ]


def prepare_batch(
    batch: Mapping[str, torch.Tensor], plan: Plan, index: int, *, vocab_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Check one micro-batch and move what the model reads to the device.

    Raises:
        ValueError: unknown or missing keys, shapes that differ or exceed the plan's, token ids outside the vocabulary.
    """
    unknown = sorted(set(batch) - set(_KEYS))
    if unknown or "input_ids" not in batch or "labels" not in batch:
        raise ValueError(
            f"micro-batch {index} has keys {sorted(batch)}; it needs input_ids and labels, and may have {_KEYS[2]}, {_KEYS[3]}"
        )
    kinds = {key: tensor.dtype for key, tensor in batch.items() if tensor.is_floating_point()}
    if kinds:
        raise ValueError(f"micro-batch {index}: {', '.join(kinds)} must be integers, got {', '.join(map(str, kinds.values()))}")
    batch = {key: tensor.long() for key, tensor in batch.items()}
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.ndim != 2:
        raise ValueError(f"micro-batch {index}: input_ids must be [samples, tokens], got shape {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(f"micro-batch {index} is empty: shape {tuple(ids.shape)}")
    for key, tensor in batch.items():
        if tensor.shape != ids.shape:
            raise ValueError(
                f"micro-batch {index}: {key} has shape {tuple(tensor.shape)}, input_ids {tuple(ids.shape)}; they must be equal"
            )
    if ids.numel() > plan.micro_batch * plan.seq_len:
        raise ValueError(
            f"micro-batch {index} has {ids.shape[0]} x {ids.shape[1]} tokens, the plan was made for {plan.micro_batch} x {plan.seq_len}; "
            "plan with a larger --micro-batch or --seq-len, or split it"
        )
    for key, tensor, lowest in (("input_ids", ids, 0), ("labels", labels, IGNORED)):
        low, high = int(tensor.min()), int(tensor.max())
        if low < lowest or high >= vocab_size or (key == "labels" and bool(((tensor < 0) & (tensor != IGNORED)).any())):
            raise ValueError(f"micro-batch {index}: {key} reach from {low} to {high}, the vocabulary from 0 to {vocab_size - 1}")
    return {key: tensor if key == "labels" else tensor.to(device) for key, tensor in batch.items()}
