"""A look at how fast a session's lanes are, for the floor of its steps and their predictions: about a second, once a session.

What is measured is what a step does, in the portions in which it does it (a chunk), but alone: copies over the link from and to pinned
memory, the optimizer's own update of chunks in host memory, reads and writes of a file without a name in the run's SSD directory.
Both directions of a link are measured alone and together (`spec/rates.py`). `overspill.probe` measures; this file says what a session has.

Rules:

1. Nothing is left: memory is given back, to the system too; the file has no name and is closed. The process's peak does not rise: what
   updates take beyond some 100 MiB is no more than homes will take that nobody has touched yet.
2. It never fails a run. What cannot be measured (no room, a raw block device, which only one store may hold) has no rate and a note.
3. Nobody else uses the lanes meanwhile: it runs between steps.
4. A figure is the median of samples. Of updates a sample is as long as those of a short step (`UPDATES`): on a host that is disturbed all
   the time single chunks take one or two times as long as others, a step has the mean of many, and so has a sample; while what happens
   once a second is in one sample of ten, and in one step of ten. On an H100 machine whose neighbours kept it busy single samples of 30 ms
   said 1.2 to 5.5 G parameters a second, steps of the same minutes had 2.4 to 4.7, most of them 2.8 to 3.1; the mean time of the former
   was that of the latter. The best of them, or what a machine file says of a quieter hour (4.9), would have been 1.6 times too quick.
5. Who is about to predict looks again some seconds later (`look_again`): a host is slow for seconds or minutes, too. What both looks
   have seen counts alike.

Limits: a drive that is fast only while its cache lasts shows its cache's speed here.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from overspill.errors import OverspillError
from overspill.probe.capacities import host_available_bytes, last_level_cache_bytes
from overspill.probe.drive import Passes, measure_drive
from overspill.probe.host_memory import choose_set_bytes, time_updates
from overspill.probe.link import measure_link, open_link
from overspill.probe.sampling import Sampling
from overspill.runtime.opening import Files
from overspill.runtime.updating import UpdateContext, Updater
from overspill.spec.plan import Plan
from overspill.spec.rates import LaneRates, LinkRates
from overspill.spec.schedule import Role, Update
from overspill.spec.tensors import Tier
from overspill.spec.update_rule import Optimizer
from overspill.tiers.block_device import is_block_device
from overspill.units import MIB, align_up

COPY_BYTES = 32 * MIB
"""Most bytes of one copy over the link; 0.6 ms on PCIe 5, so that starting it does not count. Chosen."""
UPDATED_BYTES = 128 * MIB
"""Of all arrays that are updated in turn, where states are not many in host memory (a large cache may hold them then). Chosen."""
SSD_BYTES = 96 * MIB
"""Of the file, which is written three times: 288 MiB. Chosen."""
SAMPLING = Sampling(least_s=0.02, num_samples=5)
"""Of the link: a third of a second in all. Chosen."""
UPDATES = Sampling(least_s=0.06, num_samples=5, most_samples=15)
"""Of the host's update (rule 4): a third of a second, or, where they disagree, a second. Chosen: 160M have 30 ms of updates a step, 1.10B
200, on an H100 machine with 16 cores."""

_Result = TypeVar("_Result")


def spare_host_bytes(plan: Plan, allocated_bytes: int) -> int:
    """Host memory that measuring may take for a moment: there are other programs, and the plan's budget.

    Args:
        allocated_bytes: what the session has of that budget.
    """
    room = host_available_bytes() // 4
    return room if plan.host_budget_bytes is None else max(0, min(room, plan.host_budget_bytes - allocated_bytes))


def measure_rates(plan: Plan, optimizer: Optimizer, files: Files, *, room_bytes: int, untouched_bytes: int = 0) -> tuple[LaneRates, int]:
    """All rates of a session (rule 2), and the bytes that this wrote to the SSD.

    Args:
        files: how the session reaches the SSD.
        room_bytes: of host memory that may be taken for a moment (up to about 200 MiB are).
        untouched_bytes: of homes that nothing has touched yet, so that as much may be taken before they are, for updates.
    """
    notes: list[str] = []
    written = [0]

    def attempt(what: str, measure: Callable[[], _Result]) -> _Result | None:
        try:
            return measure()
        except (OverspillError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch's, out of device memory as well
            notes.append(f"the rate of {what} was not measured: {error}")
            return None

    link = attempt("the link to the device", lambda: _measure_link(plan, room_bytes))
    updates = attempt("the host's update", lambda: _measure_update(plan, optimizer, room_bytes, untouched_bytes))
    ssd = attempt("the SSD", lambda: _measure_ssd(plan, files, written, room_bytes))
    rates = LaneRates(link=link, ssd=ssd, update_parameters_per_s=None, notes=tuple(notes))
    return _with_updates(rates, updates or ()), written[0]


def look_again(rates: LaneRates, plan: Plan, optimizer: Optimizer, *, room_bytes: int, untouched_bytes: int = 0) -> LaneRates:
    """`rates`, measured a while ago, with as many samples more of what changes most, the host's update (rule 5); the same where that was
    not measured, or cannot be any more."""
    if rates.update_parameters_per_s is None:
        return rates
    try:
        return _with_updates(rates, _measure_update(plan, optimizer, room_bytes, untouched_bytes))
    except (OverspillError, ValueError, OSError, RuntimeError):
        return rates


def _with_updates(rates: LaneRates, samples: Sequence[float]) -> LaneRates:
    """With samples of the update beside those that it has."""
    found = (*rates.update_samples_per_s, *samples)
    return dataclasses.replace(rates, update_parameters_per_s=statistics.median(found) if found else None, update_samples_per_s=found)


def _measure_link(plan: Plan, room_bytes: int) -> LinkRates:
    """Copies between host and device of the size of the largest chunk of parameters."""
    largest = max(bundle.chunks[0].num_elements * bundle.element_bytes for bundle in plan.bundles.values())
    with open_link(torch.device(plan.device), min(COPY_BYTES, align_up(largest, 4096)), room_bytes=room_bytes) as link:
        return measure_link(link, SAMPLING).rates


def _measure_update(plan: Plan, optimizer: Optimizer, room_bytes: int, untouched_bytes: int) -> tuple[float, ...]:
    """Parameters a second of the optimizer's update in host memory, one number a sample, chunk by chunk, as the step starts it; over more
    than caches hold, where states will take as much in host memory. Empty: nothing is updated there."""
    names = [name for name, bundle in plan.bundles.items() if bundle.trainable and plan.placements[name].update_tier is Tier.HOST]
    if not names:
        return ()
    name = max(names, key=lambda name: plan.bundles[name].num_elements)
    bundle = plan.bundles[name]
    num_elements = bundle.chunks[0].num_elements
    sizes = {role: num_elements * bundle.element_bytes for role in (Role.PARAMETER, Role.GRADIENT)}
    if plan.has_state(name):
        sizes[Role.STATE] = plan.state_record_bytes(name, 0)
    updater, context = Updater(plan), UpdateContext(optimizer, seed=0, step=1, lr=0.0, gradient_scale=1.0)
    op = Update(bundle=name, chunk=0, tier=Tier.HOST, num_elements=num_elements, num_bytes=sizes[Role.GRADIENT])
    update = functools.partial(updater.start, op, context)
    updated = max(UPDATED_BYTES, choose_set_bytes(last_level_cache_bytes(), untouched_bytes))
    room = max(room_bytes, untouched_bytes)
    seconds = time_updates(sizes, update, UPDATES, updated_bytes=updated, room_bytes=room)
    return tuple(num_elements / max(took_s, 1e-9) for took_s in seconds)


def _measure_ssd(plan: Plan, files: Files, written: list[int], room_bytes: int) -> LinkRates | None:
    """Whole chunks to and from a scratch file."""
    size = _ssd_chunk_bytes(plan)
    if size is None:
        return None
    if any(is_block_device(Path(place)) for place in plan.ssd_places):
        raise ValueError("a raw block device can have one store only, which is the run's own")
    count = max(2, min(SSD_BYTES // size, SAMPLING.most_repeats))
    samples = measure_drive(
        lambda capacity_bytes: files.open(plan.ssd_places, capacity_bytes, True).store,
        size,
        count,
        Passes(most_bytes=count * size),
        written=written,
        room_bytes=room_bytes,
    )
    return LinkRates(
        up_bytes_per_s=samples.read[0],
        down_bytes_per_s=samples.write[0],
        up_duplex_bytes_per_s=samples.mixed_read[0],
        down_duplex_bytes_per_s=samples.mixed_write[0],
    )


def _ssd_chunk_bytes(plan: Plan) -> int | None:
    """Of the largest piece that rests on the SSD, in whole pages; None if nothing does."""
    sizes = [plan.boundary_bytes(unit.name) for unit in plan.units[1:]] if plan.boundaries is Tier.SSD else []
    for name, bundle in plan.bundles.items():
        placement = plan.placements[name]
        if placement.parameters is Tier.SSD:
            sizes.append(bundle.chunks[0].num_elements * bundle.element_bytes)
        if placement.states is Tier.SSD:
            sizes.append(plan.state_record_bytes(name, 0))
    largest = min(max(sizes, default=0), SSD_BYTES // 4)
    return align_up(largest, 4096) if largest else None
