"""What becomes of the tensors that a block's forward saves for its backward.

Words:

* **recompute**: nothing is kept but the hidden states that enter the block; its backward runs the forward once more.
* **retained**: the graph of the forward lives until the backward. What its nodes saved is one of three things: there anyway (weights,
  the hidden states that enter, arguments), *rebuilt* from other saved tensors when backward wants it (products, activations, norms: what
  costs less to make than to keep), or *stored*: the bytes that a mode is about.

Rule. Bytes of a unit are of one micro-batch at its longest; a shorter one is counted in proportion. What a micro-batch stores beyond that
(another attention kernel, under a padding mask that `PlanRequest.is_masked` did not announce) stays on the device.
"""

from __future__ import annotations

import enum
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
    KEEP_WHOLE = "keep-whole"
    """All that the graph saved and is not there anyway, on the device: nothing is rebuilt."""
    HOST = "host"
    """What is stored, in host memory; on the device on its way there and back."""
    SSD = "ssd"
    """The same on the SSD; in host memory and on the device on its way there and back."""


ON_DEVICE = (ActivationMode.KEEP, ActivationMode.KEEP_WHOLE)
ACTIVATION_CHOICES = ("auto", *(mode.value for mode in ActivationMode if mode is not ActivationMode.KEEP_WHOLE))
"""What can be asked for; `auto`: a mode for each block, by what the budgets hold and the links carry."""
