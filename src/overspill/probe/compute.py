"""A matrix product of a block's size on the device, alone and while copies keep the link busy, and what the copies lose by it.

Copies take memory bandwidth and, on a GPU, copy engines; a step computes beside them nearly all the time. So three things are measured:
the product alone, the product while both directions of the link are busy, and the copies while products run without a pause.

Limits: one product of one shape. The other kinds of kernels that blocks are made of have their own file (`kernels.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import torch

from overspill.errors import BudgetError
from overspill.probe.link import BOTH, Link
from overspill.probe.sampling import Run, Sampling, measured_rate, sample_beside, sample_seconds
from overspill.spec.machine_file import ComputeFigures, MeasuredRate
from overspill.spec.tensors import DTYPE_BYTES
from overspill.tiers.cuda import give_back_unused
from overspill.units import MIB, format_bytes

LEAST_TOKENS = 512
"""Chosen: fewer would not fill a large GPU."""
MEMORY_BYTES = 256 * MIB
"""Of the elementwise work: far more than any cache of a GPU. Chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixShape:
    """out_MN = rows_MK @ weight_KN."""

    m: int
    """Tokens."""
    k: int
    n: int
    dtype: str

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    @property
    def num_bytes(self) -> int:
        return (self.m * self.k + self.k * self.n + self.m * self.n) * DTYPE_BYTES[self.dtype]

    def within(self, room_bytes: int) -> MatrixShape:
        """The same with so few tokens that it fits, `LEAST_TOKENS` at least."""
        m = self.m
        while m > LEAST_TOKENS and dataclasses.replace(self, m=m).num_bytes > room_bytes:
            m //= 2
        return dataclasses.replace(self, m=m)

    def __str__(self) -> str:
        return f"[{self.m}, {self.k}] @ [{self.k}, {self.n}] in {self.dtype}"


BLOCK_ON_GPU = MatrixShape(m=8192, k=4096, n=14336, dtype="bfloat16")
"""The up projection of Llama-3.1-8B over 8,192 tokens: 1 TFLOP."""
BLOCK_ON_CPU = MatrixShape(m=512, k=1024, n=2816, dtype="float32")
"""The same of a model that one would train on a CPU: 3 GFLOP."""


def measure_compute(
    device: torch.device, shape: MatrixShape, link: Link | None, sampling: Sampling, *, room_bytes: int, until_s: float = math.inf
) -> ComputeFigures:
    """The product alone, and with `link` both beside each other.

    Args:
        shape: cut down to fewer tokens where the room is small.
        room_bytes: of the device.
        until_s: of `time.perf_counter`, shared by all parts.

    Raises:
        BudgetError: the matrices are larger than the room.
    """
    shape = shape.within(room_bytes)
    if shape.num_bytes > room_bytes:
        raise BudgetError(
            f"a product of {shape} needs {format_bytes(shape.num_bytes)} of the device, {format_bytes(room_bytes)} may be taken"
        )
    memory = _measure_memory(device, sampling, until_s=until_s)
    with _open_product(device, shape) as product:
        alone = measured_rate(sample_seconds(product, sampling, until_s=until_s), shape.flops)
        if link is None:
            return ComputeFigures(what=str(shape), alone=alone, beside_copies=None, device_memory=memory, moved_bytes=shape.num_bytes)
        copies = functools.partial(link.run, BOTH)
        beside = measured_rate(sample_beside(product, copies, sampling, until_s=until_s), shape.flops)
        copies_alone = measured_rate(sample_seconds(copies, sampling, until_s=until_s), link.size)
        copies_beside = measured_rate(sample_beside(copies, product, sampling, until_s=until_s), link.size)
    return ComputeFigures(
        what=str(shape),
        alone=alone,
        beside_copies=beside,
        copies_unit_bytes=link.size,
        copies_alone=copies_alone,
        copies_beside=copies_beside,
        device_memory=memory,
        moved_bytes=shape.num_bytes,
    )


def _measure_memory(device: torch.device, sampling: Sampling, *, until_s: float) -> MeasuredRate | None:
    """Bytes read and written a second of elementwise work in place; None on a CPU, whose memory is the host's."""
    if device.type != "cuda":
        return None
    values = torch.zeros(MEMORY_BYTES, dtype=torch.uint8, device=device).view(torch.bfloat16)

    def run(times: int) -> None:
        for _ in range(times):
            values.add_(1)
        torch.cuda.synchronize(device)

    return measured_rate(sample_seconds(run, sampling, until_s=until_s), 2 * MEMORY_BYTES)


@contextlib.contextmanager
def _open_product(device: torch.device, shape: MatrixShape) -> Iterator[Run]:
    """The product, so many times, on a stream of its own; the device's memory is given back."""
    dtype = getattr(torch, shape.dtype)
    try:
        # Random: equal numbers switch fewer transistors, and a GPU that is bound by its power would show too high a rate.
        rows, weight = (torch.randn(size, dtype=dtype, device=device) for size in ((shape.m, shape.k), (shape.k, shape.n)))
        out = torch.empty(shape.m, shape.n, dtype=dtype, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            stream = torch.cuda.Stream(device)

            def run(times: int) -> None:
                with torch.cuda.stream(stream):
                    for _ in range(times):
                        torch.mm(rows, weight, out=out)
                stream.synchronize()
        else:

            def run(times: int) -> None:
                for _ in range(times):
                    torch.mm(rows, weight, out=out)

        yield run
    finally:
        rows = weight = out = torch.empty(0)
        if device.type == "cuda":
            give_back_unused()
