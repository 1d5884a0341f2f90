"""overspill: train language models that overspill the GPU, and even the RAM.

The public names; each is loaded when it is first used, so that `import overspill` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Session": "overspill.runtime.session",
    "CheckpointPolicy": "overspill.spec.checkpoint",
    "describe_workload": "overspill.huggingface.workload",
    "WorkloadSpec": "overspill.spec.workload",
    "resume": "overspill.runtime.resume",
    "Plan": "overspill.spec.plan",
    "PlanRequest": "overspill.spec.plan",
    "Tier": "overspill.spec.tensors",
    "AdamW": "overspill.spec.update_rule",
    "SGD": "overspill.spec.update_rule",
    "Lion": "overspill.spec.update_rule",
    "all_finite": "overspill.optim",
    "LearningRate": "overspill.spec.update_rule",
    "StepReport": "overspill.spec.report",
    "Prediction": "overspill.spec.report",
    "EvaluationReport": "overspill.spec.report",
    "FakeStore": "overspill.tiers",
    "Fault": "overspill.tiers",
    "FaultInjector": "overspill.tiers",
    "FaultKind": "overspill.tiers",
    "pinned_empty": "overspill.tiers.pinned",
    "OverspillError": "overspill.errors",
    "UnsupportedModelError": "overspill.errors",
    "ModelFolderError": "overspill.errors",
    "DataError": "overspill.errors",
    "BudgetError": "overspill.errors",
    "ScheduleError": "overspill.errors",
    "StorageError": "overspill.errors",
    "HostMemoryError": "overspill.errors",
    "NonFiniteError": "overspill.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from overspill.runtime.session import Session as Session


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'overspill' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
