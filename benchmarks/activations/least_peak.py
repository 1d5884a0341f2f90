"""The least activation peak of a wide net on paper: what its backward holds although every saved tensor is gone, and comes back just in
time. Without torch. `Bench.measure_least` measures the same on the device, of any net; its figure goes before this one.

In units of a hidden state (tokens · hidden · bytes), of the ops of a block in the order of its backward. The gradient of the block's output
(1) waits for the end of the block, because the residual adds to it:

    op                           saved, wanted now            gradient in    gradients out           together with the 1
    MLP, second linear           GELU's result 4              (the 1)        4                        9
    GELU                         its input 4                  4              4                       13
    MLP, first linear            the norm's result 1          4              1                        7
    norm                         its input 1                  1              1                        4
    attention, last linear       its result 1                 (the 1)        1                        3
    attention                    q, k, v, result 4            1              3                        9

of which the greatest, 13, is GELU's; rebuilding its result for the second linear (`cheap`) takes as much: 4 and 4, the gradient's 4, and
the 1. In forward the MLP holds the residual 1, its norm 1, 4 and 4. The sum of squares at the end, in fp32, holds its input 2, the gradient
2, and 2 and 2 while the power is derived, beside the 1: 9.

A block that decodes adds to the gradient of what was encoded (1), which waits from the last such block on: in blocks before that one 14.
Weights' gradients do not count (`bounds.activation_peak_bytes`).

What it leaves out: tensors on the way back before their op is due. Who waits for nothing has the next op's there as well, if no more: at
the second linear GELU's input (9 + 4), at GELU the norm's result (13 + 1), so 14. Allocators round, and libraries take workspaces.
"""

from __future__ import annotations

from net_shapes import NetShape

WIDE_KINDS = ("gpt", "bert", "t5")
GELU_UNITS = 13


def least_peak_bytes(shape: NetShape, itemsize: int) -> int | None:
    """None: of this net nothing is known on paper."""
    if shape.kind not in WIDE_KINDS:
        return None
    num_decoding = shape.layers // 2 if shape.kind == "t5" else 0
    return (GELU_UNITS + (num_decoding > 1)) * shape.tokens() * shape.hidden * itemsize
