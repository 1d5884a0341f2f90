"""What becomes of the tensors that a block's forward saves for its backward.

Words:

* **recompute**: nothing is kept but the hidden states that enter the block; its backward runs the forward once more.
* **retained**: the graph of the forward lives until the backward. What its nodes saved is one of three things: there anyway (weights,
  the hidden states that enter, arguments), *rebuilt* from other saved tensors when backward wants it (products, activations, norms: what
  costs less to make than to keep), or *stored*: the bytes that a mode is about.
* **passes** of a rebuilt tensor: bytes that its ops read and write, for each byte of it. A norm in fp32 of bf16 hidden states takes nine:
  it is widened, multiplied and narrowed, in twice its own size each time.

Rule. Bytes of a unit are of one micro-batch at its longest; a shorter one is counted in proportion. What a micro-batch stores beyond that
(another attention kernel, under a padding mask that `PlanRequest.is_masked` did not announce) stays on the device.
"""

from __future__ import annotations

import enum
import math
from typing import Final

STORED_ALIGNMENT_BYTES = 512
"""Where stored tensors lie beside each other: what torch's CUDA allocator aligns to, as kernels choose by alignment."""
DEFAULT_ACTIVATIONS: Final = "recompute"
"""Of `ACTIVATION_CHOICES`."""


class ActivationMode(enum.StrEnum):
    """What memory a unit's activations take between forward and backward."""

    RECOMPUTE = "recompute"
    """None beside the hidden states that enter it."""
    KEEP = "keep"
    """What is stored, on the device."""
    KEEP_COSTLY = "keep-costly"
    """What is stored, and what takes more than `COSTLY_PASSES` to rebuild, on the device."""
    KEEP_WHOLE = "keep-whole"
    """All that the graph saved and is not there anyway, on the device: nothing is rebuilt."""
    HOST = "host"
    """What is stored, in host memory; on the device on its way there and back."""
    SSD = "ssd"
    """The same on the SSD; in host memory and on the device on its way there and back."""


COSTLY_PASSES = 4.0
"""Between the three of a product or a norm's weights and the seven or more of what is computed wider than it is saved."""
ON_DEVICE = (ActivationMode.KEEP, ActivationMode.KEEP_COSTLY, ActivationMode.KEEP_WHOLE)
"""Each stores more than the one before, and rebuilds less."""
ACTIVATION_CHOICES = ("auto", "recompute", "keep", "host", "ssd")
"""What can be asked for; `auto`: a mode for each block, by what the budgets hold and the links carry."""


def most_passes(mode: ActivationMode) -> float:
    """What takes more passes to rebuild is stored, in a retained graph of this mode."""
    if mode is ActivationMode.KEEP_WHOLE:
        return 0.0
    return COSTLY_PASSES if mode is ActivationMode.KEEP_COSTLY else math.inf
