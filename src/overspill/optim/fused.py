"""The fast update on CUDA tensors: one kernel a chunk (`fused_kernels`), bit for bit equal to `reference` and the native core.

What it costs: bytes of memory, each array once, as the native core; no temporaries; one launch for two sets of scalars (with
weight decay and without). Scalars travel as arguments of the kernel. The table of a chunk's segments is copied to the device when
its content is new, from pinned memory and in order with the kernel: once for a chunk in format fp32, once a chunk and step in the
others, whose keys change. Nothing waits for the device, unless `with_stats` is asked for.

The same functions run on CPU tensors under `TRITON_INTERPRET=1`, for tests. Not on AMD GPUs: their denormals are untested.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from overspill.optim.fused_kernels import EXACT, launching_on, stream_of, update_kernel
from overspill.optim.fused_squares import sums_of_squares_fused
from overspill.optim.gradient_checks import count_non_finite
from overspill.optim.segment import NO_STATS, SEGMENT_DTYPE, GradientStats, pack_scalars, validate_scalars, validate_segment, validate_table
from overspill.spec.state_formats import StateFormat, exponents_of
from overspill.spec.update_rule import UpdateScalars
from overspill.tiers.cuda import to_device

BLOCK_ELEMENTS = 1024
"""Elements a program updates: a multiple of 256, a power of two. Chosen, not tuned. Has no effect on the result."""

NUM_WARPS = 4
"""Of a program: 8 elements a thread, so 16 bytes of bf16 a load. Chosen, not tuned. Has no effect on the result."""

TABLES_KEPT = 4096
"""Tables on the device, of some hundred bytes each."""


@torch.no_grad()
def update_chunk_fused(
    scalars: Sequence[UpdateScalars],
    segments: np.ndarray,
    *,
    state_format: StateFormat,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    with_stats: bool = True,
    gates: Tensor | None = None,
) -> GradientStats:
    """One optimizer step of all segments of a chunk, in place and in the order of the current stream; returns before it is done.

    Arguments and errors as `optim.update_chunk`; the arrays must not overlap, which is not checked. With
    `with_stats` it waits for the device.
    """
    given = validate_segment(parameter, gradient, states, format_name=state_format.name, optimizer=state_format.optimizer)
    validate_scalars(scalars, given)
    validate_table(segments, num_elements=parameter.numel(), state_format=given, num_scalars=len(scalars))
    if not given.is_rounded_stochastically:
        segments = segments.copy()
        segments["key"] = segments["first_element"] = 0  # no effect, so that the table stays the same
    packed = pack_scalars(scalars)
    arrays = _arrays(given, parameter, gradient, states)
    num_gates = 0 if gates is None else gates.numel()
    with launching_on(parameter.device):
        for pair in range(0, len(packed), 2):
            table, num_programs = _table_on(parameter.device, stream_of(parameter.device), segments.tobytes(), pair // 2, BLOCK_ELEMENTS)
            if num_programs == 0:
                continue
            update_kernel[(num_programs,)](
                *arrays,
                table,
                gates,
                num_gates,
                packed[pair] + packed[min(pair + 1, len(packed) - 1)],
                RULE=given.optimizer,
                FORMAT=given.name,
                ROWS=table.shape[1],
                GATES=_step_up(num_gates),
                BLOCK=BLOCK_ELEMENTS,
                num_warps=NUM_WARPS,
                **EXACT,
            )
    return _stats(segments, gradient) if with_stats else NO_STATS


def _arrays(state_format: StateFormat, parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor]) -> list[Tensor | None]:
    """As the kernel takes them: None for what the state format does not have."""
    master = states.get("remainder", states.get("master"))
    moments = [*(states[name] for name in state_format.moments), None, None][:2]
    exponents = [*(states.get(exponents_of(name)) for name in state_format.moments), None, None][:2]
    return [parameter, gradient, master, *moments, *exponents]


@functools.lru_cache(maxsize=TABLES_KEPT)
def _table_on(device: torch.device, stream: int, segments: bytes, pair: int, block: int) -> tuple[Tensor, int]:
    """The kernel's table of the segments with the scalars 2 * pair and 2 * pair + 1, and how many programs it makes.

    Args:
        stream: `stream_of` the device.
        segments: bytes of a table of `SEGMENT_DTYPE`.
    """
    rows = np.frombuffer(segments, dtype=SEGMENT_DTYPE)
    rows = rows[(rows["scalars"] // 2 == pair) & (rows["num_elements"] > 0)]
    ends = rows["start"] + rows["num_elements"]
    programs = -(-ends // block) - rows["start"] // block
    length = _step_up(len(rows))
    table = np.full((5, length), np.iinfo(np.int64).max, dtype=np.int64)
    table[0, : len(rows)] = np.cumsum(programs) - programs
    table[1, : len(rows)], table[2, : len(rows)] = rows["start"], ends
    table[3, : len(rows)] = rows["key"].view(np.int64)
    table[4, : len(rows)] = rows["first_element"].astype(np.int64) + ((rows["scalars"].astype(np.int64) % 2) << 32)
    return to_device(torch.from_numpy(table), device), int(programs.sum())


def _step_up(number: int) -> int:
    """The next of 16, 64, 256, ...: few kernels are compiled."""
    return 16 << max(0, -(-((number - 1).bit_length() - 4) // 2) * 2)


def _stats(segments: np.ndarray, gradient: Tensor) -> GradientStats:
    parts = [gradient[start : start + number] for start, number in segments[["start", "num_elements"]].tolist()]
    squares = sum(sums_of_squares_fused(parts).tolist()) if parts else 0.0
    return GradientStats(num_non_finite=sum(map(count_non_finite, parts)), sum_of_squares=squares)
