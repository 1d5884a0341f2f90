"""overspill in the placements that are compared, through its public interface alone.

Fields of the plan and of the report that a version of overspill does not have yet are left out: a row that needs such a field of the
plan is an error row, a figure that is not reported is null.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from plain_systems import LEARNING_RATE, Batch
from rows import GIB, Row
from shapes import SHAPES, build_windowed_model
from timelines import compact, compute_by_kind, leads, op_kinds

import overspill

DEVICE_STATES_BYTES = 6 * GIB
STATE_BYTES = 10
"""Of a bf16 parameter in format fp32: what its master has beyond it, and two moments."""
PLACEMENTS = {
    "resident-overspill": {"parameters": "device", "states": "device", "boundaries": "device"},
    "overspill-host": {"parameters": "host", "states": "host", "device_states_share": 0.10},
    "overspill-host-graphs": {"parameters": "host", "states": "host", "device_states_share": 0.10},
    "overspill-host-prompt": {"parameters": "host", "states": "host", "device_states_share": 0.10, "deferred_updates": 0},
    "overspill-host-states6": {"parameters": "host", "device_states_bytes": DEVICE_STATES_BYTES},
    "overspill-host-keep": {"parameters": "host", "states": "host", "device_states_share": 0.10, "activations": "keep"},
    "overspill-host-auto": {"parameters": "host", "states": "host", "device_states_share": 0.10, "activations": "auto"},
    "overspill-host-auto-prompt": {
        "parameters": "host",
        "states": "host",
        "device_states_share": 0.10,
        "activations": "auto",
        "deferred_updates": 0,
    },
    "overspill-host-states6-auto": {"parameters": "host", "device_states_bytes": DEVICE_STATES_BYTES, "activations": "auto"},
    "overspill-host-bf16": {"parameters": "host", "states": "host", "state_format": "bf16"},
    "overspill-host-bf16-auto": {"parameters": "host", "states": "host", "state_format": "bf16", "activations": "auto"},
    "overspill-ssd": {"parameters": "ssd", "states": "ssd"},
    "overspill-ssd-states": {"parameters": "host", "states": "ssd"},
}
"""What the plan's request fixes; hidden states between blocks (`boundaries`) rest on the device if there is room."""
LARGE_SHARE = 0.07
"""Of the states of 3.02B and larger, in place of a tenth: the embedding's and one block's, for a device peak below 12 GiB."""
FIGURES = ("floor_s", "step_over_floor")
"""Of a report, for every counted step: their medians are the row's."""


def build_request(row: Row, *, dtype: torch.dtype, ssd_dir: str | None) -> overspill.PlanRequest:
    """The row's plan request.

    Raises:
        ValueError: this overspill has no such option, or the row needs a directory on an SSD.
    """
    options: dict[str, Any] = dict(PLACEMENTS[row.system])
    known = {field.name for field in dataclasses.fields(overspill.PlanRequest)}
    if "device_states_bytes" in options:
        if "device_states_bytes" not in known:
            raise ValueError(f"{row.system} needs PlanRequest.device_states_bytes, which this overspill does not have")
        options["states"] = "host"
    if "activations" in options and "activations" not in known:
        raise ValueError(f"{row.system} needs PlanRequest.activations, which this overspill does not have")
    if (share := options.pop("device_states_share", None)) is not None:
        share = LARGE_SHARE if SHAPES[row.shape].num_parameters > 2e9 else share
        options["device_states_bytes"] = int(share * SHAPES[row.shape].num_parameters * STATE_BYTES)
    if "ssd" in options.values():
        if ssd_dir is None:
            raise ValueError(f"{row.system} needs --ssd-dir, a directory on the drive that shall hold the states")
        folder = Path(ssd_dir) / "overspill"
        folder.mkdir(parents=True, exist_ok=True)
        options["ssd_dir"] = str(folder)
    return overspill.PlanRequest(
        **options,
        dtype=str(dtype).removeprefix("torch."),
        seq_len=row.seq_len,
        micro_batch=row.samples,
        accumulate=row.micro_batches,
        clip=row.clip,
        device_budget_bytes=None if row.cap_gib is None else int(row.cap_gib * GIB),
    )


class Overspill:
    """One session."""

    def __init__(self, row: Row, *, dtype: torch.dtype, device: torch.device, ssd_dir: str | None) -> None:
        request = build_request(row, dtype=dtype, ssd_dir=ssd_dir)
        states = {"fp32": "fp32 master weights and moments", "bf16": "bf16 moments, no masters, stochastic rounding"}[request.state_format]
        self.precision = f"bf16 parameters, {states}"
        model = build_windowed_model(SHAPES[row.shape], dtype=dtype, max_positions=max(4096, row.seq_len))
        self.session = overspill.Session(model, plan=request, optimizer=overspill.AdamW(lr=LEARNING_RATE), cuda_graphs=True)
        if row.system == "overspill-host-graphs":
            self.session.executor.graphs.choose({unit.name for unit in self.session.plan.blocks})
        self.reports: list[overspill.StepReport] = []
        self.floor_error: str | None = None

    def step(self, batches: Sequence[Batch]) -> float:
        """One optimizer step; its loss."""
        self.reports.append(self.session.step(batches))
        return self.reports[-1].loss

    def between_steps(self) -> None:
        """After the first step, untimed: the session measures its lanes' rates when it is first asked, and reports floors from then on."""
        try:
            getattr(self.session, "rates", None)
        except Exception as error:  # the speed is worth having without its floor; the line says why there is none
            self.floor_error = f"{type(error).__name__}: {error}"

    def figures(self, *, counted: int) -> dict[str, Any]:
        """Of the plan; of the last step; and the medians over the last `counted` ones."""
        plan, report, reports = self.session.plan, self.reports[-1], self.reports[-counted:]
        exposed = [getattr(item, "exposed_s", {}) for item in reports]
        found = {name: _median(getattr(item, name, None) for item in reports) for name in FIGURES}
        trace, unneeded = self.session.executor.trace, self.session.model.unneeded
        return found | {
            "compute_s": compute_by_kind(op_kinds(plan, trace.schedule), trace.spans),
            "leads": leads(trace.spans),
            "left_out": dict(unneeded.left_out) if unneeded is not None else {},
            "floor_error": self.floor_error,
            "exposed_s": {lane: _median(item.get(lane) for item in exposed) for lane in exposed[-1]},
            "dispatch_s": _median(item.get("dispatch") for item in exposed),
            "trace_s": _median(getattr(item, "trace_s", None) for item in reports),
            "report_step_s": _median(item.step_s for item in reports),
            "lane_busy_s": dict(report.lane_busy_s),
            "lane_bytes": dict(report.lane_bytes),
            "num_ops": report.num_ops,
            "num_replays": report.num_replays,
            "boundaries": plan.boundaries.value,
            "group_size": plan.group_size,
            "prefetch_units": plan.prefetch_units,
            "home_bytes": {tier.value: plan.home_bytes(tier) for tier in overspill.Tier},
            "deferred": list(plan.deferred),
            "activations": {unit: mode.value for unit, mode in getattr(plan, "activations", {}).items()},
            "notes": list(plan.notes),
        }

    def timeline(self) -> dict[str, Any]:
        """Of the last step, for `--spans`."""
        trace = self.session.executor.trace
        return {"kinds": op_kinds(self.session.plan, trace.schedule), "measured": compact(trace.spans)}

    def close(self) -> None:
        self.session.close()


def _median(values: Iterable[float | None]) -> float | None:
    """None if no step has one."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
