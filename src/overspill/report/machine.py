"""A machine file for people: a table of what there is and how fast it is, and one sentence on what that means for a step.

The sentence takes a typical step: parameters and gradients of the compute dtype cross the link twice and once, AdamW in format `fp32`
updates in host memory or from the SSD, blocks are computed four times over (forward, recomputed, and twice that backward). All of it but
compute grows with the number of parameters alone, so what bounds a step is a question of how many tokens it has.
"""

from __future__ import annotations

from rich.table import Table

from overspill.spec.machine_file import MachineFile, MeasuredRate
from overspill.spec.measured_hardware import BLOCK_FRACTION
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.tensors import DTYPE_BYTES
from overspill.units import MIB, format_bytes, format_seconds

FLOPS_PER_PARAMETER_AND_TOKEN = 8
"""2 forward, 2 recomputed, 4 backward."""


def machine_table(file: MachineFile) -> Table:
    """Capacities, then rates with their spread."""
    where = file.identity
    device = "CPU only" if where.device == "cpu" else f"{where.device}, driver {where.driver}"
    table = Table(title=f"{where.cpu_model}, {where.num_cpus} cores · {device} · torch {where.torch}", title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("smallest – largest", justify="right")
    for what, text in _capacity_rows(file):
        table.add_row(what, text, "")
    table.add_section()
    for what, rate, unit in _rate_rows(file):
        factor, name = _UNITS[unit]
        table.add_row(what, f"{rate.median_per_s / factor:.2f} {name}", f"{rate.min_per_s / factor:.2f} – {rate.max_per_s / factor:.2f}")
    return table


def describe_bound(file: MachineFile) -> str:
    """What bounds a typical offloaded step on this machine, in one sentence."""
    lanes = _seconds_per_parameter(file)
    rates = file.rates
    if not {"link", "host update"} <= lanes.keys():
        missing = " and ".join(name for name in ("link", "host update") if name not in lanes)
        return f"what bounds a step cannot be said: the {missing} has no rate"
    in_memory = {name: lanes[name] for name in ("link", "host update")}
    texts = [_describe_lanes("with states in host memory", in_memory, file)]
    if "SSD" in lanes:
        texts.append(_describe_lanes("with states on the SSD", lanes, file))
    if rates.compute is not None:
        texts.append(f"beyond these tokens compute does (blocks assumed at {BLOCK_FRACTION:g} of a matrix product)")
    return f"A typical step in format fp32 is bound {'; '.join(texts)}."


def _describe_lanes(case: str, lanes: dict[str, float], file: MachineFile) -> str:
    slowest = max(lanes, key=lambda name: lanes[name])
    each = ", ".join(
        f"{name} {format_seconds(lanes[name] * 1e9)}" for name in sorted(lanes, key=lambda name: -lanes[name]) if name != slowest
    )
    text = f"by the {slowest} {case}: {format_seconds(lanes[slowest] * 1e9)} a billion parameters ({each})"
    if file.rates.compute is None:
        return text
    per_token_s = FLOPS_PER_PARAMETER_AND_TOKEN / (BLOCK_FRACTION * file.rates.compute.alone.median_per_s)
    return f"{text}, up to {_rounded(lanes[slowest] / per_token_s):,} tokens a step"


def _seconds_per_parameter(file: MachineFile) -> dict[str, float]:
    """Lane -> seconds of its work for one parameter."""
    rates, item = file.rates, DTYPE_BYTES[file.rates.update_parameter_dtype]
    record = resolve_state_format("fp32", rates.update_parameter_dtype).bytes_per_element
    found = {}
    if rates.link:
        found["link"] = rates.link[0].rates.work_s(2 * item, item)
    if "fp32" in rates.update:
        found["host update"] = 1 / rates.update["fp32"].median_per_s
    if rates.ssd:
        found["SSD"] = rates.ssd[0].rates.work_s(2 * item + record, item + record)
    return found


def _rounded(value: float) -> int:
    """To two digits: no prediction is better."""
    return int(float(f"{value:.1e}"))


_UNITS = {"bytes": (1e9, "GB/s"), "parameters": (1e9, "G/s"), "flops": (1e12, "TFLOP/s"), "launches": (1e3, "k/s")}


def _capacity_rows(file: MachineFile) -> list[tuple[str, str]]:
    found = file.capacities
    usable = found.host_usable_bytes
    what = "host memory to use" + (" (--host-budget)" if found.host_budget_bytes is not None else "")
    rows = [(what, "unknown: it changes" if usable is None else format_bytes(usable))]
    rows.append(("host memory in all", format_bytes(found.memory_total_bytes)))
    if found.cgroup_limit_bytes is not None:
        rows.append(("limit of the control group", format_bytes(found.cgroup_limit_bytes)))
    rows.append(("lockable (ulimit -l)", "unlimited" if found.memlock_bytes is None else format_bytes(found.memlock_bytes)))
    if found.device_free_bytes is not None and found.device_total_bytes is not None:
        rows.append(("device memory free", format_bytes(found.device_free_bytes)))
        rows.append(("device memory in all", format_bytes(found.device_total_bytes)))
    if file.footprint is not None:
        rows.append(("  a process beside its tensors", format_bytes(file.footprint.context_bytes + file.footprint.library_bytes)))
        rows.append(("  and in host memory", format_bytes(file.footprint.host_growth_bytes)))
    rows.append(("SSD free", "no --ssd-dir" if found.ssd_free_bytes is None else format_bytes(found.ssd_free_bytes)))
    return rows


def _rate_rows(file: MachineFile) -> list[tuple[str, MeasuredRate, str]]:
    """(what, rate, key of `_UNITS`)."""
    rates = file.rates
    rows: list[tuple[str, MeasuredRate, str]] = []
    for link in rates.link:
        kind = f"{link.unit_bytes / MIB:g} MiB{', pinned' if link.is_pinned else ''}"
        rows.append((f"to the device, {kind}", link.h2d, "bytes"))
        rows.append((f"from the device, {kind}", link.d2h, "bytes"))
        rows.append((f"  each way at once ({link.duplex_factor:.2f} of sum)", link.duplex, "bytes"))
    named = [("host copy, read + written", rates.host_copy), ("host in place, read + written", rates.host_in_place)]
    rows += [(what, rate, "bytes") for what, rate in named if rate is not None]
    for name, rate in rates.update.items():
        rows.append((f"AdamW on the host, {name}, parameters", rate, "parameters"))
        if name == "fp32" and rates.update_beside_copies is not None and rates.copies_beside_update is not None:
            rows.append(("  beside copies", rates.update_beside_copies, "parameters"))
            rows.append(("  copies beside it, each way", rates.copies_beside_update, "bytes"))
    if rates.launches is not None:
        rows.append(("small kernels launched from Python", rates.launches, "launches"))
    compute = rates.compute
    if compute is not None:
        rows.append((compute.what, compute.alone, "flops"))
        kinds = [("attention, causal, both passes", compute.attention), ("routed experts' products", compute.grouped)]
        rows += [(what, kind.rate, "flops") for what, kind in kinds if kind is not None]
        moved = [("device memory, x + 1", compute.device_memory), ("  norms, gates and sums", compute.elementwise)]
        rows += [(what, rate, "bytes") for what, rate in (*moved, ("  sums into indexed rows", compute.scattered)) if rate is not None]
        if compute.beside_copies is not None and compute.copies_beside is not None:
            rows.append((f"  beside copies ({compute.compute_slowdown:.2f} of time)", compute.beside_copies, "flops"))
            rows.append((f"  copies beside it ({compute.copies_slowdown:.2f} of time)", compute.copies_beside, "bytes"))
    for drive in rates.ssd:
        kind = f"{drive.unit_bytes / MIB:g} MiB, {drive.in_flight} at a time{'' if drive.is_direct else ', page cache'}"
        rows.append((f"SSD read, {kind}", drive.read, "bytes"))
        rows.append((f"SSD write, {kind}", drive.write, "bytes"))
        rows.append(("  read while written", drive.mixed_read, "bytes"))
        rows.append(("  written while read", drive.mixed_write, "bytes"))
    return rows
