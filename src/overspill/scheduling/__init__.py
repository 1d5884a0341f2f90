"""When: from a plan to the ops of one step, checked and readable."""

from overspill.scheduling.build import build_evaluation, build_flush, build_train_step, full_step, largest_steps
from overspill.scheduling.render import describe, render_timeline
from overspill.scheduling.validate import validate
from overspill.scheduling.walk import Walk, budgets

__all__ = [
    "Walk", "budgets", "build_evaluation", "build_flush", "build_train_step", "describe", "full_step", "largest_steps", "render_timeline",
    "validate",
]  # fmt: skip
