"""A step's trace as a file for ui.perfetto.dev or chrome://tracing: Chrome's trace-event JSON.

What is in it: a track for each lane, with a slice for each op, named as a person would; more tracks for a lane whose transfers overlap;
a track that says, for each moment in which compute was idle, what it waited for; arrows from the op that another one waited for last,
where that made it wait on another lane. A slice's arguments have op number, bytes, rate, and how long the op waited for others
(`blocked_ms`) and for its lane (`queued_ms`).

Source of the format: "Trace Event Format", Google, phases X (slice), M (names), s and f (arrows); times are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overspill.errors import StorageError
from overspill.report.progress import replace_text
from overspill.spec.plan import Plan
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Op, Piece, Role, Update
from overspill.spec.tensors import Tier
from overspill.spec.trace import Span, StepTrace

_ROLES = {
    Role.PARAMETER: "weights",
    Role.STATE: "optimizer states",
    Role.GRADIENT: "gradient",
    Role.PARTIAL_GRADIENT: "partial gradient",
    Role.BOUNDARY: "hidden states",
    Role.BOUNDARY_GRADIENT: "gradient of hidden states",
    Role.ACTIVATIONS: "activations",
}
_VERBS = {
    (Tier.SSD, Tier.HOST): "read",
    (Tier.HOST, Tier.DEVICE): "fetch",
    (Tier.DEVICE, Tier.HOST): "evict",
    (Tier.HOST, Tier.SSD): "write",
}
_TRACKS_PER_LANE = 1 << 20
"""Numbers of tracks: those of a lane lie together. A unit of many chunks on the SSD has as many reads under way, and a lane fewer ops
than this."""
_IDLE_TRACK = 1


class OpNames:
    """Names of a plan's ops for people: `fetch block 3 weights 2/8`, `backward block 3, micro-batch 1`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        last = len(plan.units) - 1
        self._units = {
            unit.name: "embedding" if number == 0 else "tail" if number == last else f"block {number - 1}"
            for number, unit in enumerate(plan.units)
        }

    def name(self, op: Op) -> str:
        """One op in a few words."""
        match op:
            case Fetch() | Evict():
                return f"{_VERBS[op.source, op.target]} {self._piece(op.piece)}"
            case Free():
                return f"free {self._piece(op.piece)}"
            case Compute():
                return f"{op.phase.value} {self._units[op.unit]}, micro-batch {op.micro_batch}"
            case Compress():
                return f"finish gradient of {self._owner(op.bundle)}"
            case Update():
                return f"update {self._owner(op.bundle)}{self._chunk(op.bundle, op.chunk)}"

    def _piece(self, piece: Piece) -> str:
        if piece.role in (Role.BOUNDARY, Role.BOUNDARY_GRADIENT, Role.ACTIVATIONS):
            return f"{_ROLES[piece.role]} into {self._units[piece.owner]}, micro-batch {piece.index}"
        reader = f" of the {self._units[piece.reader]}" if piece.reader and piece.owner not in self._units else ""
        return f"{self._owner(piece.owner)} {_ROLES[piece.role]}{reader}{self._chunk(piece.owner, piece.index)}"

    def _owner(self, bundle: str) -> str:
        """A bundle: its unit and, where that has several, the dtype or `frozen` that its name ends with."""
        if bundle in self._units:
            return self._units[bundle]
        unit = max((unit for unit in self._units if bundle.startswith(f"{unit}.")), key=len, default=None)
        return bundle if unit is None else f"{self._units[unit]} {bundle[len(unit) + 1 :].replace('.', ' ')}"

    def _chunk(self, bundle: str, index: int) -> str:
        count = len(self._plan.bundles[bundle].chunks)
        return f" {index + 1}/{count}" if count > 1 else ""


def trace_events(trace: StepTrace, plan: Plan, *, step: int) -> dict[str, Any]:
    """The JSON object of a step."""
    names = OpNames(plan)
    spans = [*trace.earlier, *trace.spans]
    texts = {span.op: names.name(trace.op(span.op)) + (" (of the step before)" if span.op < 0 else "") for span in spans}
    tracks = _assign_tracks(spans)
    events = _track_names(tracks, f"overspill {trace.schedule.name} step {step}: {plan.model} on {plan.device}")
    events += [_slice(span, texts[span.op], tracks[span.op], trace.op(span.op)) for span in spans]
    for part in trace.idle():
        waiting = texts.get(part.waiting, "the end of the step")
        name = f"waits for {part.cause}: {texts[part.op]}" if part.op != -1 else part.cause
        events.append(_event(name, "idle", _IDLE_TRACK, part.start_s, part.end_s, {"waiting": waiting}))
    events += _arrows(spans, tracks)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"step": step, "step_s": trace.step_s, "model": plan.model}}


def write_trace(path: str | Path, trace: StepTrace, plan: Plan, *, step: int) -> Path:
    """Write a step's trace; the file is there as a whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    path = Path(path)
    try:
        replace_text(path, json.dumps(trace_events(trace, plan, step=step), separators=(",", ":")) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write the trace of step {step} to {path}: {error.strerror} (errno {error.errno}); choose another --trace"
        ) from error
    return path


def _event(name: str, kind: str, track: int, start_s: float, end_s: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "ts": round(start_s * 1e6, 3),
        "dur": round(max(0.0, end_s - start_s) * 1e6, 3),
        "pid": 1,
        "tid": track,
        "args": dict(arguments),
    }


def _slice(span: Span, text: str, track: int, op: Op) -> dict[str, Any]:
    took_s = span.end_s - span.start_s
    arguments: dict[str, Any] = {"op": span.op, "blocked_ms": round(span.blocked_s * 1e3, 4), "queued_ms": round(span.queued_s * 1e3, 4)}
    if span.num_bytes:
        arguments["bytes"] = span.num_bytes
        if took_s > 0:
            arguments["gb_per_s"] = round(span.num_bytes / took_s / 1e9, 3)
    if isinstance(op, Update):
        arguments["parameters"] = op.num_elements
    if isinstance(op, Compute):
        arguments["flops"] = op.flops
    return _event(text, type(op).__name__.lower(), track, span.start_s, span.end_s, arguments)


def _assign_tracks(spans: Sequence[Span]) -> dict[int, int]:
    """Op -> track. A track's slices may not overlap, so a transfer that begins while others of its lane go on takes another track."""
    lanes = list(Lane)
    ends_s: dict[int, list[float]] = {number: [] for number in range(len(lanes))}
    tracks: dict[int, int] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        lane = lanes.index(span.lane)
        own = ends_s[lane]
        number = next((number for number, end_s in enumerate(own) if end_s <= span.start_s), len(own))
        if number == len(own):
            own.append(0.0)
        own[number] = span.end_s
        tracks[span.op] = (lane + 1) * _TRACKS_PER_LANE + number
    return tracks


def _track_names(tracks: Mapping[int, int], process: str) -> list[dict[str, Any]]:
    lanes = list(Lane)
    found = {_IDLE_TRACK: "compute waits for"}
    for track in sorted(set(tracks.values())):
        lane, number = lanes[track // _TRACKS_PER_LANE - 1], track % _TRACKS_PER_LANE
        found[track] = lane.value if number == 0 else f"{lane.value} ({number + 1})"
    order = {_IDLE_TRACK: 2 * _TRACKS_PER_LANE - 1}  # below compute
    events = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": process}}]
    for track, name in found.items():
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}})
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": track, "args": {"sort_index": order.get(track, track)}})
    return events


def _arrows(spans: Sequence[Span], tracks: Mapping[int, int]) -> list[dict[str, Any]]:
    """From what an op waited for last to that op, where this was on another lane and after the op was submitted."""
    by_op = {span.op: span for span in spans}
    events: list[dict[str, Any]] = []
    for span in spans:
        maker = max((by_op[op] for op in span.waits if op in by_op), key=lambda other: other.end_s, default=None)
        if maker is None or maker.lane is span.lane or maker.end_s <= span.submitted_s:
            continue
        common = {"name": "waited for", "cat": "wait", "id": span.op, "pid": 1}
        inside_s = maker.start_s + 0.99 * (maker.end_s - maker.start_s)  # an arrow belongs to the slice that it begins in
        events.append({**common, "ph": "s", "ts": round(inside_s * 1e6, 3), "tid": tracks[maker.op]})
        events.append({**common, "ph": "f", "bp": "e", "ts": round(span.start_s * 1e6, 3), "tid": tracks[span.op]})
    return events
