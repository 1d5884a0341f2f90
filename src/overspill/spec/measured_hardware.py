"""The `HardwareSpec` that predictions take from a machine file.

Every rate that was measured comes in the place of the assumed one; `source` says which are which.

How much of a matrix product's rate a block reaches depends on the model, so where nobody has described it, a prediction takes
`BLOCK_FRACTION` of that rate, and says so.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import MODEL_LAUNCH
from overspill.spec.machine_file import ComputeFigures, DriveFigures, LinkFigures, MachineFile, MachineRates
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.tensors import CHUNK_BYTES, DTYPE_BYTES

BLOCK_FRACTION = 0.5
"""Of the rate of a matrix product that a block reaches. Assumed: two Llama shapes reached 0.50 and 0.53 on one H100."""


def hardware_from(
    file: MachineFile, capacities: HardwareSpec, *, name: str, state_format: str = "fp32", ssd: tuple[str, ...] = ()
) -> HardwareSpec:
    """`capacities` with the file's rates in place of the assumed ones, and `source` saying which are which.

    Args:
        capacities: what is free now. Host capacity becomes the budget that was given to the probe; else 0, unknown, on a machine whose
            memory changes while one looks.
        name: of the file, for `source`.
        ssd: file systems of the directories that will be used; the file's drive figures hold only for the same ones.
    """
    rates, changes, assumed = file.rates, dict[str, float](), []
    if file.footprint is not None:
        changes |= {f"footprint_{name}": number for name, number in dataclasses.asdict(file.footprint).items()}
    if rates.link:
        link = _nearest(rates.link)
        changes |= {"h2d_bytes_per_s": link.h2d.median_per_s, "d2h_bytes_per_s": link.d2h.median_per_s}
        both = link.duplex.median_per_s
        changes |= {
            "h2d_duplex_bytes_per_s": min(both, link.h2d.median_per_s),
            "d2h_duplex_bytes_per_s": min(both, link.d2h.median_per_s),
        }
    else:
        assumed.append("link")
    if rates.ssd and ssd in ((), file.identity.ssd):
        drive = _nearest(rates.ssd)
        changes |= {"ssd_read_bytes_per_s": drive.read.median_per_s, "ssd_write_bytes_per_s": drive.write.median_per_s}
        changes |= {
            "ssd_read_mixed_bytes_per_s": min(drive.mixed_read.median_per_s, drive.read.median_per_s),
            "ssd_write_mixed_bytes_per_s": min(drive.mixed_write.median_per_s, drive.write.median_per_s),
        }
    else:
        assumed.append("SSD")
    if state_format in rates.update:
        changes["host_update_parameters_per_s"] = rates.update[state_format].median_per_s
    else:
        assumed.append("update")
    if rates.host_copy is not None or rates.host_in_place is not None:
        changes["host_memory_bytes_per_s"] = _host_memory_bytes_per_s(rates)
    if rates.launches is not None:
        changes["launch_s"] = MODEL_LAUNCH / rates.launches.median_per_s
    if rates.compute is not None:
        changes["device_flops"] = BLOCK_FRACTION * rates.compute.alone.median_per_s
        changes |= _compute_changes(rates.compute)
    else:
        assumed.append("compute")
    how = f"measured ({name}, {file.measured_at[:10]})"
    if rates.compute is not None:
        how += f"; blocks assumed at {BLOCK_FRACTION:g} of a matrix product"
    if assumed:
        how += f"; {', '.join(assumed)} assumed"
    if not file.capacities.is_memory_steady or file.capacities.host_budget_bytes is not None:
        capacities = dataclasses.replace(capacities, host_capacity_bytes=file.capacities.host_usable_bytes or 0)
    return dataclasses.replace(capacities, source=how, **changes)  # type: ignore[arg-type]


FULL_FRACTION = 0.97
"""Of what lanes reach apart: if they reach that together as well, host memory is not what they wait for. Chosen."""


def _host_memory_bytes_per_s(rates: MachineRates) -> float:
    """What host memory serves all lanes together with: what the update and both directions of the link reached beside each other, if
    they slowed each other down; else the most that anything reached."""
    most = max(rate.median_per_s for rate in (rates.host_copy, rates.host_in_place) if rate is not None)
    beside, copies = rates.update_beside_copies, rates.copies_beside_update
    if beside is None or copies is None or not rates.link or "fp32" not in rates.update:
        return most
    item = DTYPE_BYTES[rates.update_parameter_dtype]
    record = resolve_state_format("fp32", rates.update_parameter_dtype).bytes_per_element
    per_parameter = item + 2 * (item + record)  # the gradient read, parameter and record read and written
    together = per_parameter * beside.median_per_s + 2 * copies.median_per_s
    apart = per_parameter * rates.update["fp32"].median_per_s + 2 * _nearest(rates.link).duplex.median_per_s
    return together if together < FULL_FRACTION * apart else max(most, together)


def _compute_changes(compute: ComputeFigures) -> dict[str, float]:
    """What a prediction takes from the compute figures beside the rate that blocks are assumed to reach."""
    changes = {"matrix_flops": compute.alone.median_per_s}
    if compute.device_memory is not None:
        changes["device_memory_bytes_per_s"] = compute.device_memory.median_per_s
        memory = compute.device_memory.median_per_s
        kinds = {"product_flops": compute.product, "attention_flops": compute.attention, "grouped_flops": compute.grouped}
        changes |= {name: kind.net_per_s(memory) for name, kind in kinds.items() if kind is not None}
    for name, rate in (("elementwise", compute.elementwise), ("scattered", compute.scattered)):
        changes |= {f"{name}_bytes_per_s": rate.median_per_s} if rate is not None else {}
    if compute.beside_copies is not None:
        changes["compute_beside_copies"] = min(1.0, compute.beside_copies.median_per_s / compute.alone.median_per_s)
    if compute.copies_alone is not None and compute.copies_beside is not None:
        changes["copies_beside_compute"] = min(1.0, compute.copies_beside.median_per_s / compute.copies_alone.median_per_s)
    return changes


_Figures = TypeVar("_Figures", LinkFigures, DriveFigures)


def _nearest(rows: tuple[_Figures, ...]) -> _Figures:
    """The row whose unit is nearest to a chunk's size."""
    return min(rows, key=lambda row: abs(row.unit_bytes - CHUNK_BYTES))
