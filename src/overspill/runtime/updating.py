"""What an `Update` op does: the optimizer's arithmetic on one chunk, in place.

A chunk is updated in one call: a table says where its tensors are, which of them have weight decay, and where their random
bits come from. What of that table is the same in every step is made once per chunk and kept. On the host an update is started, and made by
the core's threads while the next one is prepared (`runtime/lanes`, rule 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

from overspill.cores import update_threads
from overspill.optim import SEGMENT_DTYPE, GradientStats, let_helpers_give_way, start_update_chunk, update_chunk
from overspill.rng import rounding_key, split_at_parts
from overspill.runtime.visit import TORCH_DTYPES
from overspill.spec.plan import Plan
from overspill.spec.schedule import Role, Update
from overspill.spec.state_formats import StateFormat
from overspill.spec.update_rule import Optimizer, UpdateScalars

if TYPE_CHECKING:
    from overspill._native import StartedUpdate


class UpdateContext:
    """The scalars and the random bits with which the updates of one optimizer step run, whenever they run.

    Args:
        seed: the run's, for stochastic rounding.
    """

    def __init__(self, optimizer: Optimizer, *, seed: int, step: int, lr: float, gradient_scale: float) -> None:
        self.seed, self.step = seed, step
        self._scalars = tuple(
            optimizer.scalars(step=step, lr=lr, weight_decay=weight_decay, gradient_scale=gradient_scale) for weight_decay in (None, 0.0)
        )
        self.applied: frozenset[tuple[str, int]] = frozenset()
        """(bundle, chunk) of the updates that were made already, by a step that then stopped; they are not made again."""
        self._keys: dict[tuple[str, int], int] = {}

    @property
    def scalars(self) -> tuple[UpdateScalars, UpdateScalars]:
        """With the optimizer's weight decay, and without."""
        return self._scalars[0], self._scalars[1]

    def rounding_key(self, tensor: str, part: int) -> int:
        """`rng.rounding_key` of this run and step; a tensor's chunks ask for the same one."""
        key = self._keys.get((tensor, part))
        if key is None:
            key = self._keys[tensor, part] = rounding_key(self.seed, self.step, tensor, part)
        return key


class _Chunk(TypedDict):
    """Of the arguments of `update_chunk` and `start_update_chunk`, what is of one chunk."""

    segments: np.ndarray
    state_format: StateFormat
    parameter: torch.Tensor
    gradient: torch.Tensor
    states: dict[str, torch.Tensor]


class Updater:
    """Executes `Update` ops."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        is_beside_gpu = plan.device.startswith("cuda")
        self.num_threads = update_threads(is_beside_gpu=is_beside_gpu)
        """Most threads of an update on the host; 0: one a core."""
        if is_beside_gpu:
            let_helpers_give_way()
        self._tables: dict[tuple[str, int], tuple[np.ndarray, tuple[tuple[str, int], ...]]] = {}
        """(bundle, chunk) -> its segments without keys, and the (tensor, part) of each row."""
        self._fields: dict[tuple[str, int], dict[str, tuple[int, int, torch.dtype]]] = {}
        """(bundle, chunk) -> each state field's bytes [start, end) in the record, and its dtype."""

    def run(
        self, op: Update, context: UpdateContext, copies: Mapping[Role, torch.Tensor], *, gates: torch.Tensor | None = None
    ) -> GradientStats:
        """Update one chunk.

        Args:
            gates: unless all of it is finite, nothing is changed.
            copies: parameter, gradient and, if there is any, state record of the chunk, uint8, where the update runs; parameter and
                state are overwritten.
        """
        chunk = self._chunk(op, context, copies)
        return update_chunk(context.scalars, num_threads=self.num_threads, with_stats=False, gates=gates, **chunk)

    def start(self, op: Update, context: UpdateContext, copies: Mapping[Role, torch.Tensor]) -> StartedUpdate | None:
        """Begin to update one chunk in host memory; None: it is done. `copies` are held until it has ended."""
        return start_update_chunk(context.scalars, num_threads=self.num_threads, **self._chunk(op, context, copies))

    def _chunk(self, op: Update, context: UpdateContext, copies: Mapping[Role, torch.Tensor]) -> _Chunk:
        bundle = self.plan.bundles[op.bundle]
        dtype = TORCH_DTYPES[bundle.dtype]
        states = {}
        for name, (start, end, kind) in self._field_ranges(op.bundle, op.chunk).items():
            states[name] = copies[Role.STATE][start:end].view(kind)
        state_format = self.plan.state_layout(op.bundle)
        return {
            "segments": self._segments(op.bundle, op.chunk, context if state_format.is_rounded_stochastically else None),
            "state_format": state_format,
            "parameter": copies[Role.PARAMETER].view(dtype),
            "gradient": copies[Role.GRADIENT].view(dtype),
            "states": states,
        }

    def _segments(self, bundle: str, chunk: int, context: UpdateContext | None) -> np.ndarray:
        """The table of a chunk's segments, with the keys of the context's step."""
        if (bundle, chunk) not in self._tables:
            self._tables[bundle, chunk] = self._build_table(bundle, chunk)
        table, owners = self._tables[bundle, chunk]
        if context is not None:
            table = table.copy()
            table["key"] = [context.rounding_key(*owner) for owner in owners]
        return table

    def _build_table(self, name: str, index: int) -> tuple[np.ndarray, tuple[tuple[str, int], ...]]:
        bundle = self.plan.bundles[name]
        chunk = bundle.chunks[index]
        rows, owners = [], []
        for segment in bundle.segments(chunk):
            for first, number in split_at_parts(segment.tensor_start, segment.end - segment.start):
                start = segment.start - chunk.start + first - segment.tensor_start
                rows.append((start, number, 0, first & 0xFFFFFFFF, 0 if segment.tensor.decay else 1))
                owners.append((segment.tensor.name, first >> 32))
        return np.array(rows, dtype=SEGMENT_DTYPE), tuple(owners)

    def _field_ranges(self, name: str, index: int) -> dict[str, tuple[int, int, torch.dtype]]:
        if (name, index) not in self._fields:
            state_format = self.plan.state_layout(name)
            ranges = state_format.field_ranges(self.plan.bundles[name].chunks[index].num_elements)
            self._fields[name, index] = {field.name: (*ranges[field.name], TORCH_DTYPES[field.dtype]) for field in state_format.fields}
        return self._fields[name, index]
