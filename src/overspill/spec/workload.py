"""The model and the batch as the planner sees them: sizes, no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from overspill.spec.tensors import CHUNK_BYTES, Bundle, Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """A model's units and bundles, and the two sizes that decide its working memory."""

    model: str
    """Class name."""
    units: tuple[Unit, ...]
    bundles: Mapping[str, Bundle]
    hidden_size: int
    vocab_size: int
    hidden_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Unit -> dtype of the hidden states that it returns, where it is not the plan's dtype (Mamba-2 keeps them in fp32)."""
    buffer_bytes: int = 0
    """Buffers (rotary tables, masks) that stay on the device."""
    chunk_bytes: int = CHUNK_BYTES
    """Bound on the bytes of all roles of one chunk, by which the bundles are cut."""
