"""The rules, layouts and dtypes over which every form of the update is held against the others."""

from __future__ import annotations

import torch

from overspill.spec.state_formats import STATE_FORMATS
from overspill.spec.update_rule import SGD, AdamW, Lion, Optimizer

OPTIMIZERS: list[Optimizer] = [
    AdamW(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    SGD(lr=1e-2, weight_decay=0.1),
    SGD(lr=1e-2, momentum=0.9, weight_decay=0.1),
    SGD(lr=1e-2, momentum=0.9, nesterov=True),
    Lion(lr=1e-4, weight_decay=0.1),
]
LAYOUTS = [("fp32", torch.float16)] + [(name, dtype) for name in STATE_FORMATS for dtype in (torch.bfloat16, torch.float32)]
"""State format and dtype of the parameter."""
GRADIENTS = [torch.bfloat16, torch.float16, torch.float32]


def by_kind(optimizer: Optimizer) -> str:
    """Name of a case."""
    return optimizer.kind
