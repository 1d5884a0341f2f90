"""What is trained, and on how much: without torch, so that a call can plan before anything has loaded. `nets.py` builds it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetShape:
    """What is trained, and on how much."""

    kind: str
    """`gpt`, `bert`, `t5`, or the name of a Llama in `shapes.py`."""
    hidden: int
    layers: int
    rows: int
    """Sequences of the micro-batch."""
    length: int

    def tokens(self, rows: int | None = None) -> int:
        return (rows or self.rows) * self.length


def _wide(kind: str, hidden: int, layers: int) -> NetShape:
    return NetShape(kind=kind, hidden=hidden, layers=layers, rows=4, length=1024)


SHAPES = {
    "gpt-12288x3": _wide("gpt", 12288, 3),
    "gpt-8192x4": _wide("gpt", 8192, 4),
    "bert-12288x3": _wide("bert", 12288, 3),
    "t5-12288x3": _wide("t5", 12288, 3),
    "llama-1.10B-2048": NetShape(kind="1.10B", hidden=2048, layers=16, rows=8, length=2048),
    "llama-3.02B-2048": NetShape(kind="3.02B", hidden=3072, layers=28, rows=4, length=2048),
    "bert-8192x4": _wide("bert", 8192, 4),
    "t5-8192x4": _wide("t5", 8192, 4),
    "llama-1.10B-16384": NetShape(kind="1.10B", hidden=2048, layers=16, rows=1, length=16384),
    "llama-3.02B-16384": NetShape(kind="3.02B", hidden=3072, layers=28, rows=1, length=16384),
}
"""In the order of a call: wherever it ends, the widths come first, and kinds have been had about equally often. Rows are chosen: a step of
0.1 to 1.1 s on an H100, so that a table fits into two calls, and blocks whose kernels take longer than their launches and hooks (3 ms of a
Llama's); the bound hardly depends on them: bytes and forward time grow together."""
TINY = {
    "gpt-64x4": NetShape(kind="gpt", hidden=64, layers=4, rows=2, length=16),
    "bert-64x2": NetShape(kind="bert", hidden=64, layers=2, rows=2, length=16),
    "t5-64x3": NetShape(kind="t5", hidden=64, layers=3, rows=2, length=16),
    "llama-tiny-32": NetShape(kind="tiny", hidden=64, layers=4, rows=2, length=32),
}
"""For trying the benchmark on a CPU."""
