"""Which: from budgets and a model to a plan, and from a schedule to a prediction; pure."""

from overspill.planning.arena import ArenaPlan, plan_arena, plan_arenas
from overspill.planning.cost import Costs, build_costs
from overspill.planning.layout import build_layout
from overspill.planning.place import build_plan, predict_step
from overspill.planning.pools import pool_demand, pool_events
from overspill.planning.simulate import resident_peaks, simulate
from overspill.scheduling import full_step

__all__ = [
    "ArenaPlan",
    "Costs",
    "build_costs",
    "build_layout",
    "build_plan",
    "full_step",
    "plan_arena",
    "plan_arenas",
    "pool_demand",
    "pool_events",
    "predict_step",
    "resident_peaks",
    "simulate",
]
