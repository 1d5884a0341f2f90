"""Predicting the steps of a session: the workload described once, each program simulated once.

Rules:

1. A prediction touches no weights, tiers or device: it costs some tenths of a second of the CPU, between steps. `time_templates` alone uses
   the device, when somebody asks for it.
2. Rates that the session has measured itself come before those of a machine file; of a drive's two figures the lower one is taken, for
   the session looks only for a moment, and a drive that has rested, or caches, is quick at first.
3. A model that cannot be described without weights is predicted from what its plan assumes, and the prediction's terms say so.
4. `if_cheap` predicts the first programs (`FREE_PROGRAMS`), and then one that was not seen before only while all predicting takes less
   than `SHARE` of the time that was trained: batches padded to many lengths are many programs. One of the first that would take longer than
   `FREE_S` (8B on the SSD are 51,000 ops, 3 s) waits until that is at most `LATE_SHARE` of the time that was trained: no step waits for it
   that is not used to taking long.
5. A run does not end because it cannot be predicted: `if_cheap` warns once and leaves it at that.
6. Which blocks are replayed as CUDA graphs is what the session's executor has decided, for every program and batch: by the choice that
   timed templates gave it (`choose_blocks`), or by its own steps (`runtime/graphs`, rule 3). Until it has, and without a session, that
   choice stands alone, by templates if they were timed, else on paper.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from overspill.activations.retaining import book_without_values
from overspill.huggingface.workload import UNDESCRIBABLE, describe_workload
from overspill.planning import build_costs, simulate
from overspill.planning.graphs import choose_replayed
from overspill.planning.memory import device_terms, host_terms, recordings_bytes
from overspill.report.memory import host_resident_bytes
from overspill.runtime.machine import PROCESS_GROWTH_BYTES, without_cycle_collection
from overspill.runtime.programs import Programs
from overspill.runtime.template_timing import LIMIT_S, time_templates
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.rates import LaneRates
from overspill.spec.report import Prediction
from overspill.spec.schedule import Compute, Schedule
from overspill.spec.tensors import Tier
from overspill.spec.workload import TemplateTimes, WorkloadSpec

SHARE = 0.001
FREE_S, LATE_SHARE = 0.5, 0.01
S_PER_OP = 60e-6
"""Of predicting an op of a program that overlaps itself. Measured: 3.1 s for 51,000 ops on one core of a cloud machine."""
FREE_PROGRAMS = 3
"""The plan's longest step, the first one, and its twin that starts with pending updates."""
MOST_KEPT = 8
"""Predictions of programs. Chosen: each has a span an op."""


class Predictions:
    """What the programs of a session will move, hold and take.

    Args:
        hardware: rates and capacities, as of the opening.
        rates: those that the session has measured; None as long as nobody asked.
        replays_graphs: whether blocks are replayed as CUDA graphs where launches bound them.
        decided: blocks that the executor has decided to replay; None: it has not decided yet (rule 6).
        serial: the session runs one op after the other.
        own_resident_bytes: of the session's homes and slots, what is in host memory now.
        workload: of the plan's batch, if somebody has described it.
    """

    def __init__(
        self,
        plan: Plan,
        config: PreTrainedConfig,
        programs: Programs,
        hardware: HardwareSpec,
        *,
        rates: Callable[[], LaneRates | None] = lambda: None,
        replays_graphs: bool = True,
        decided: Callable[[], frozenset[str] | None] = lambda: None,
        serial: bool = False,
        own_resident_bytes: Callable[[], int] = lambda: 0,
        workload: WorkloadSpec | None = None,
    ) -> None:
        self.plan, self.config, self.programs, self.hardware = plan, config, programs, hardware
        self.rates, self.replays_graphs, self.serial = rates, replays_graphs, serial
        self.times: TemplateTimes | None = None
        """Of this model on this device, if somebody has measured them; what is predicted from then on uses them."""
        self.loaded_process_bytes: int | None = None
        """Of host memory, beside homes and slots, as `host_terms` has it."""
        self.spent_s = 0.0
        self._decided, self._own_resident_bytes = decided, own_resident_bytes
        self._has_given_up = False
        self._workloads: dict[bool, WorkloadSpec | None] = {}
        if workload is not None and workload.loss is not None and workload.loss.chunk_rows == plan.loss_chunk_rows:
            self._workloads[workload.is_masked] = workload
        self._kept: dict[tuple[object, ...], tuple[Schedule, Prediction]] = {}

    def predict(self, schedule: Schedule, *, is_masked: bool = False, hardware: HardwareSpec | None = None) -> Prediction:
        """Of a program of the session.

        Args:
            is_masked: its micro-batches bring a mask or are packed.
            hardware: other rates than the session's.
        """
        begun, rates = time.perf_counter(), self.rates()
        with without_cycle_collection():  # a third of the time: hundreds of thousands of tuples are made, and none is garbage yet
            replayed = self.replayed_blocks(is_masked=is_masked, hardware=hardware)
            key = (id(schedule), is_masked, hardware, rates, self.times, self.loaded_process_bytes, replayed)
            if key not in self._kept:
                found = hardware or with_rates(self.hardware, rates)
                prediction = self._predict(schedule, is_masked=is_masked, hardware=found, replayed=replayed)
                if len(self._kept) >= MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = schedule, prediction  # the schedule, so that nothing else gets its id
                self.spent_s += time.perf_counter() - begun
        return self._kept[key][1]

    def predict_whole_step(self) -> Prediction:
        """Of a step of the plan's batch at its longest, as it is in a row of such steps."""
        return self.predict(self.programs.whole_step())

    def if_cheap(self, schedule: Schedule, *, is_masked: bool, trained_s: float) -> Prediction | None:
        """The same, or None where it would take too much of the time that was trained (rule 4)."""
        is_known = any(known is schedule and key[1] == is_masked for key, (known, _) in self._kept.items())
        if self._has_given_up or (not is_known and not self._is_cheap(schedule, trained_s)):
            return None
        try:
            return self.predict(schedule, is_masked=is_masked)
        except Exception as error:  # rule 5
            self._has_given_up = True
            warnings.warn(f"steps of this run are not predicted: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)
            return None

    def _is_cheap(self, schedule: Schedule, trained_s: float) -> bool:
        """Rule 4, for a program that was not seen before."""
        if len(self._kept) >= FREE_PROGRAMS:
            return self.spent_s <= SHARE * trained_s
        needed_s = S_PER_OP * len(schedule.ops)
        return needed_s <= FREE_S or needed_s <= LATE_SHARE * trained_s

    def _predict(self, schedule: Schedule, *, is_masked: bool, hardware: HardwareSpec, replayed: frozenset[str]) -> Prediction:
        workload = self.workload(is_masked=is_masked)
        costs = build_costs(
            self.plan,
            hardware,
            workload=workload,
            times=self.times if workload is not None else None,
            replayed=replayed,
        )
        on_device, on_host = (self.programs.slot_bytes(schedule, tier) for tier in (Tier.DEVICE, Tier.HOST))
        device = device_terms(schedule, self.plan, slot_bytes=on_device, hardware=hardware, workload=workload, replayed=replayed)
        prediction = simulate(
            schedule,
            self.plan,
            hardware,
            overlap=not self.serial,
            repeats=not self.serial and schedule.starts_pending == schedule.ends_pending,
            overlaps_steps=self.plan.timing is UpdateTiming.IMMEDIATE,
            costs=costs,
            arenas=self.programs.arena_plans(schedule),
            device_terms=device,
            host_terms=host_terms(
                schedule,
                self.plan,
                hardware,
                slot_bytes=on_host,
                device=device,
                workload=workload,
                loaded_process_bytes=self.loaded_process_bytes,
            ),
        )
        passes = [item.op for item in schedule.ops if isinstance(item.op, Compute) and not item.op.is_retained]
        blocks = replayed or {unit.name for unit in self.plan.blocks}
        return dataclasses.replace(
            prediction,
            num_replays=sum(op.unit in replayed for op in passes),
            replays_bytes=0 if self.plan.device.startswith("cpu") else recordings_bytes(self.plan, workload, blocks, hardware),
        )

    def replayed_blocks(self, *, is_masked: bool = False, hardware: HardwareSpec | None = None) -> frozenset[str]:
        """Blocks that the session replays as CUDA graphs, or is thought to as long as it has not decided (rule 6)."""
        decided = self._decided()
        if decided is None:
            return self.choose_blocks(is_masked=is_masked, hardware=hardware)
        return frozenset(unit for unit in decided if unit not in self.plan.activations)

    def choose_blocks(self, *, is_masked: bool = False, hardware: HardwareSpec | None = None) -> frozenset[str]:
        """Blocks that should be replayed: by templates once they were timed, else on paper (`planning/graphs.py`)."""
        if not self.replays_graphs or self.plan.device.startswith("cpu"):
            return frozenset()
        has_times = self.times is not None
        return choose_replayed(
            self.plan,
            self.workload(is_masked=is_masked and not has_times),
            hardware=self.hardware if hardware is None or has_times else hardware,
            times=self.times,
            device_peak_bytes=self._device_peak_bytes,
        )

    @functools.cached_property
    def _device_peak_bytes(self) -> int:
        """Of pieces, in a step at its longest, if there is a budget for them."""
        return 0 if self.plan.device_budget_bytes is None else self.programs.device_peak_bytes(self.programs.whole_step())

    def time_templates(self, device: torch.device, *, limit_s: float = LIMIT_S) -> TemplateTimes | None:
        """Time one block of every class and the tail on the device, for all predictions from now on. None: rule 3."""
        workload = self.workload()
        if workload is not None:
            self.times = time_templates(
                self.config,
                device=device,
                seq_len=self.plan.seq_len,
                micro_batch=self.plan.micro_batch,
                dtype=self.plan.dtype,
                limit_s=limit_s,
                loss_chunk_rows=self.plan.loss_chunk_rows,
                spec=workload,
                replays=self.replays_graphs,
            )
            if device.type == "cuda":
                self.note_loaded_process()
        return self.times

    def note_loaded_process(self) -> None:
        """From here on predictions take the process as it is now, with a step's kernels and libraries loaded, in place of what it was and
        is known to grow by. On a CPU nothing is loaded late, and what torch's allocator holds is told from the rest by nobody."""
        self.loaded_process_bytes = host_resident_bytes() - self._own_resident_bytes() + PROCESS_GROWTH_BYTES

    def workload(self, *, is_masked: bool = False) -> WorkloadSpec | None:
        """What a micro-batch at its longest costs each class of units; None: it cannot be described (rule 3)."""
        if is_masked not in self._workloads:
            plan = self.plan
            try:
                self._workloads[is_masked] = describe_workload(
                    self.config,
                    seq_len=plan.seq_len,
                    micro_batch=plan.micro_batch,
                    dtype=plan.dtype,
                    device="cpu" if plan.device.startswith("cpu") else "cuda",
                    is_masked=is_masked,
                    loss_chunk_rows=plan.loss_chunk_rows,
                    open_book=book_without_values if plan.activations else None,
                )
            except UNDESCRIBABLE:
                self._workloads[is_masked] = None
        found = self._workloads[is_masked]
        known = {unit for item in found.classes for unit in item.units} if found is not None else set()
        return found if {unit.name for unit in self.plan.units} <= known else None


def with_rates(hardware: HardwareSpec, rates: LaneRates | None) -> HardwareSpec:
    """`hardware` with what a session has measured in its place (rule 2)."""
    if rates is None:
        return hardware
    changes: dict[str, float | str] = {}
    if rates.link is not None:
        changes |= {
            "h2d_bytes_per_s": rates.link.up_bytes_per_s,
            "d2h_bytes_per_s": rates.link.down_bytes_per_s,
            "h2d_duplex_bytes_per_s": min(rates.link.up_bytes_per_s, rates.link.up_duplex_bytes_per_s),
            "d2h_duplex_bytes_per_s": min(rates.link.down_bytes_per_s, rates.link.down_duplex_bytes_per_s),
        }
    if rates.ssd is not None:
        found = {
            "ssd_read_bytes_per_s": rates.ssd.up_bytes_per_s,
            "ssd_write_bytes_per_s": rates.ssd.down_bytes_per_s,
            "ssd_read_mixed_bytes_per_s": min(rates.ssd.up_bytes_per_s, rates.ssd.up_duplex_bytes_per_s),
            "ssd_write_mixed_bytes_per_s": min(rates.ssd.down_bytes_per_s, rates.ssd.down_duplex_bytes_per_s),
        }
        knows_drive = hardware.is_measured and hardware.ssd_read_mixed_bytes_per_s > 0  # else its drive was another one
        changes |= {name: min(value, getattr(hardware, name)) for name, value in found.items()} if knows_drive else found
    if rates.update_parameters_per_s is not None:
        changes["host_update_parameters_per_s"] = rates.update_parameters_per_s
    if changes and hardware.is_measured:
        changes["source"] = f"{hardware.source}; lanes as this session measured them"
    elif changes:
        changes["source"] = "lanes measured in this session, compute assumed"
    return dataclasses.replace(hardware, **changes)  # type: ignore[arg-type]


def brings_mask(micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    """Whether blocks will read an attention mask: samples are padded or packed."""
    return any(
        "position_ids" in batch or ("attention_mask" in batch and not bool(batch["attention_mask"].all())) for batch in micro_batches
    )
