"""Which: from budgets and a model to a plan, and from a schedule to a prediction; pure."""

from overspill.planning.layout import build_layout
from overspill.planning.place import build_plan, predict_step
from overspill.planning.simulate import simulate

__all__ = ["build_layout", "build_plan", "predict_step", "simulate"]
