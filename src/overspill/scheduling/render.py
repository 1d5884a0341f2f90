"""A schedule as text: one line an op, one column a lane, so that an order can be read and diffed."""

from __future__ import annotations

from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Op, Schedule, Update
from overspill.units import format_bytes


def describe(op: Op) -> str:
    """One op in a few words."""
    match op:
        case Fetch() | Evict():
            return f"{type(op).__name__.lower()} {op.piece} {op.source}->{op.target} {format_bytes(op.num_bytes)}"
        case Free():
            return f"free {op.piece} {op.tier}"
        case Compute():
            return f"{op.phase} {op.unit} micro-batch {op.micro_batch}"
        case Compress():
            return f"compress {op.bundle}"
        case Update():
            return f"update {op.bundle}[{op.chunk}] on {op.tier}"


def render_timeline(schedule: Schedule, *, frees: bool = False) -> str:
    """The program as a table: op number, a mark in its lane's column, what it does, what it waits for.

    Args:
        frees: whether Free ops are listed; they take no time.
    """
    lanes = [lane for lane in Lane if any(item.lane is lane for item in schedule.ops)]
    head = f"{'op':>6}  " + "  ".join(f"{lane.value:^11}" for lane in lanes)
    lines = [f"{schedule.name}: {len(schedule.ops)} ops, groups {[len(group) for group in schedule.groups]}", head]
    for index, item in enumerate(schedule.ops):
        if isinstance(item.op, Free) and not frees:
            continue
        marks = "  ".join(f"{'#' if item.lane is lane else '.':^11}" for lane in lanes)
        waits = f"  after {','.join(map(str, item.waits[-4:]))}" if item.waits else ""
        lines.append(f"{index:>6}  {marks}  {describe(item.op)}{waits}")
    return "\n".join(lines)
