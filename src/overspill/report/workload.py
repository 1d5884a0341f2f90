"""A workload for people: what one micro-batch costs each class of units, and what its backward keeps."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from overspill.spec.workload import Pass, SavedTensor, TemplateTimes, UnitTimes, UnitWork, WorkloadSpec
from overspill.units import format_bytes, format_seconds

_ABSENT = "–"


def workload_table(spec: WorkloadSpec, times: TemplateTimes | None = None) -> Table:
    """A row a class of units; with `times` what was measured beside what was counted."""
    title = f"{spec.model}: a micro-batch of {spec.micro_batch} x {spec.seq_len} tokens in {spec.dtype}, with {spec.device} kernels"
    table = Table(title=title, title_justify="left")
    table.add_column("units")
    names = ["number", "parameters", "boundary", "forward", "backward with recomputation", "saved", "peak of forward", "peak of backward"]
    for name in [*names, "forward time", "backward time"] if times is not None else names:
        table.add_column(name, justify="right")
    for item in spec.classes:
        cells = (
            str(item.num_units),
            format_bytes(item.parameter_bytes),
            format_bytes(item.boundary_bytes) if item.boundary_bytes else _ABSENT,
            _flops(item.forward),
            _flops(item.recompute, item.backward),
            format_bytes(item.saved_bytes) if item.backward is not None else _ABSENT,
            format_bytes(item.forward.peak_bytes) if item.forward is not None else _ABSENT,
            format_bytes(item.backward.peak_bytes) if item.backward is not None else _ABSENT,
        )
        measured = _seconds(item, times) if times is not None else ()
        table.add_row(item.name, *cells, *measured)
    return table


def saved_table(item: UnitWork) -> Table:
    """What autograd keeps of one unit, largest first; tensors that are somebody else's memory are left out."""
    table = Table(title=f"Saved by {item.name}: {format_bytes(item.saved_bytes)}", title_justify="left")
    for name in ("made by", "operation", "shape", "dtype"):
        table.add_column(name)
    for name in ("bytes", "to recompute", "moving"):
        table.add_column(name, justify="right")
    for tensor in _largest(item.saved):
        work = tensor.recompute
        table.add_row(
            tensor.module or "the unit itself",
            tensor.op,
            " x ".join(map(str, tensor.shape)),
            tensor.dtype,
            format_bytes(tensor.kept_bytes),
            _count(work.flops) if work.flops else _ABSENT,
            format_bytes(work.moved_bytes),
        )
    return table


def describe_workload_notes(spec: WorkloadSpec, times: TemplateTimes | None = None) -> list[str]:
    """What was assumed, and what is missing, one sentence each."""
    notes = list(spec.notes)
    for item in spec.classes:
        notes += [f"{item.name}: {note}" for note in item.notes]
        notes += [
            f"{item.name}: the {routing.num_experts} experts of {routing.module} are assumed to get "
            f"{routing.expected_tokens_per_expert:g} tokens each"
            for routing in item.routing
        ]
    for measured in (*times.blocks, times.tail) if times is not None else ():
        notes += [f"{measured.name}: {measured.note}"] if measured.note else []
        notes += [f"{measured.name}: {sentence}"] if (sentence := _describe_launches(measured)) else []
    return notes


def _describe_launches(times: UnitTimes) -> str:
    """What launches have to do with a block's time; empty where it is not replayed for them."""
    replays = [timing.median_s for timing in (times.replayed_forward, times.replayed_backward) if timing is not None]
    if not replays or not times.is_worth_replaying:
        return ""
    return (
        f"launching its kernels takes {format_seconds(times.launch_s)} of {format_seconds(times.forward_backward_s)}, so it is replayed as "
        f"CUDA graphs, in {format_seconds(sum(replays))}"
    )


def _largest(saved: Sequence[SavedTensor]) -> list[SavedTensor]:
    return sorted((tensor for tensor in saved if tensor.kept_bytes), key=lambda tensor: -tensor.kept_bytes)


def _flops(*passes: Pass | None) -> str:
    known = [part.work.flops for part in passes if part is not None]
    return _count(sum(known)) if len(known) == len(passes) else _ABSENT


def _count(flops: int) -> str:
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= limit:
            return f"{flops / limit:.2f} {prefix}FLOP"
    return f"{flops} FLOP"


def _seconds(item: UnitWork, times: TemplateTimes) -> tuple[str, str]:
    found: UnitTimes | None = next((measured for measured in (*times.blocks, times.tail) if measured.name == item.name), None)
    if found is None:
        return _ABSENT, _ABSENT
    forward, backward = (format_seconds(part.median_s) if part is not None else _ABSENT for part in (found.forward, found.backward))
    return forward, backward
