"""Packing: several samples in one row, computed exactly as if each had a row of its own.

A packed row has no attention mask; its `position_ids` restart at 0 where a sample starts. From that transformers' mask functions derive
attention that never crosses a start (block-diagonal, windows included), rotary and learned positions count from the start, and
the first label of a sample is `IGNORE`, so nothing is predicted across a start. Padding at the end is one more sample, without
targets.

Rule 1. Exact or refused. Whether a model's code does all this cannot be seen from outside: masks made without `position_ids`,
        attention biases by column, convolutions and recurrent states leak from one sample into the next, and the loss hardly shows it.
        `PACKABLE` lists the architectures for which a test compares loss and gradients of packed rows with those of the samples
        apart; every other one is refused.
Rule 2. A router's balancing loss is a function of all tokens of a micro-batch, padding included without a mask: refused.
Rule 3. Rotary tables that depend on the longest position are refused where a sample could reach the length at which they change.

What it saves: positions that would be padding. With all samples known, best-fit decreasing wastes less than one sample a row and
usually under 2 %; a stream packs what is in its window. Packs are made once, so samples of one row stay together over epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from overspill import rng
from overspill.errors import UnsupportedModelError
from overspill.huggingface.side_outputs import has_router_loss
from overspill.huggingface.tokenization import IGNORE, Sample
from overspill.units import align_up

PACKABLE = frozenset(
    {
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""`model_type`s that rule 1 holds for, each by a test."""

PACKING_EPOCH = -2
"""In place of an epoch where ties between samples of one length are drawn: no epoch of training has this number."""

OPEN_ROWS = 16
"""Rows that a stream fills at a time. Chosen, not tuned."""

Row = tuple[Sample, ...]
"""What one row of a micro-batch holds: one sample, or a pack of several."""


def validate_packable(config: Any, *, seq_len: int) -> None:
    """Refuse a model for which packed rows would not be exact.

    Args:
        config: of transformers.
        seq_len: most tokens of a row.

    Raises:
        UnsupportedModelError: with the model's type and the reason.
    """
    kind = config.model_type
    cure = "train it without --packing"
    if kind not in PACKABLE:
        raise UnsupportedModelError(
            f"packing is not known to be exact for {kind} (its attention or state may cross from one sample into the next); {cure}. "
            f"It is for {', '.join(sorted(PACKABLE))}"
        )
    if has_router_loss(config):
        raise UnsupportedModelError(
            f"packing would change the router loss of this {kind}, which counts the tokens of a micro-batch; "
            f'{cure}, or set "output_router_logits" to false in its config.json'
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        limit = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        limit = limit or config.max_position_embeddings
        if parameters.get("rope_type") in ("dynamic", "longrope") and seq_len > limit:
            raise UnsupportedModelError(
                f"the rotary table of this {kind} changes with the longest sample beyond {limit} positions, and --seq-len is {seq_len}; "
                f"lower --seq-len to {limit}, or {cure}"
            )


def pack_samples(samples: Sequence[Sample], *, seq_len: int, seed: int) -> list[Row]:
    """All samples in as few rows as best-fit decreasing finds: the longest first, each into the fullest row that has room."""
    shuffled = np.random.default_rng(rng.shuffle_seed(seed, PACKING_EPOCH)).permutation(len(samples)).tolist()
    rows: list[list[Sample]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    open_rooms = 0  # bit r is set when by_room[r] is not empty
    for sample in sorted((samples[index] for index in shuffled), key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            index = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
            rows[index].append(sample)
        else:
            room, index = seq_len, len(rows)
            rows.append([sample])
        if room > length:
            by_room[room - length].append(index)
            open_rooms |= 1 << (room - length)
    return [tuple(row) for row in rows]


def pack_stream(samples: Iterable[Sample], *, seq_len: int) -> Iterator[Row]:
    """Rows of samples as they come: each goes into the fullest open row that has room; without one, the fullest row is given out."""
    rows: list[list[Sample]] = []
    rooms: list[int] = []
    for sample in samples:
        length = len(sample.input_ids)
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            index = min(fitting, key=rooms.__getitem__)
        else:
            if len(rows) == OPEN_ROWS:
                fullest = rooms.index(min(rooms))
                rooms.pop(fullest)
                yield tuple(rows.pop(fullest))
            index = len(rows)
            rows.append([])
            rooms.append(seq_len)
        rows[index].append(sample)
        rooms[index] -= length
        if rooms[index] < 2:  # no sample has fewer than two tokens
            rooms.pop(index)
            yield tuple(rows.pop(index))
    yield from map(tuple, rows)


def build_packed_batch(rows: Sequence[Row], *, pad_token_id: int, pad_to_multiple: int = 1) -> dict[str, torch.Tensor]:
    """One micro-batch of packed rows: `input_ids`, `labels`, `position_ids`, int64 (rows, positions); no attention mask."""
    length = align_up(max(sum(len(sample.input_ids) for sample in row) for row in rows), pad_to_multiple)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE, dtype=torch.int64),
    }
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.input_ids)
            batch["input_ids"][index, start:end] = torch.from_numpy(sample.input_ids)
            batch["position_ids"][index, start:end] = torch.arange(end - start)
            batch["labels"][index, start + 1 : end] = torch.from_numpy(sample.labels[1:])
            start = end
        batch["position_ids"][index, start:] = torch.arange(length - start)
    return batch
