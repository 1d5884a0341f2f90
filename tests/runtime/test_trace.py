"""Claims about a step's time: every moment has one cause, the trace can be read, rates leave nothing behind, and it costs little."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from training_loop import make_batches
from transformers import LlamaConfig, LlamaForCausalLM

import overspill
from overspill.errors import StorageError
from overspill.planning.floor import build_step_work
from overspill.runtime import rates as rates_module
from overspill.runtime.compute import UnitRunner
from overspill.runtime.lanes import Completion, Lanes
from overspill.runtime.opening import Files
from overspill.runtime.trace import SLICE_OPS, LazyTrace, Recorder
from overspill.spec.schedule import Lane, Schedule, ScheduledOp, Update
from overspill.spec.tensors import Tier
from overspill.spec.trace import DISPATCH, Idle, Span, busy_s, exposed_s, find_idle, lane_busy_s
from overspill.tiers import FakeStore
from overspill.units import GIB

PLACEMENTS: list[dict[str, object]] = [
    {"parameters": "ssd", "states": "ssd", "boundaries": "ssd"},
    {"parameters": "host", "states": "ssd", "boundaries": "device", "clip": 1.0},
    {"parameters": "ssd", "states": "host", "boundaries": "host", "group_size": 1},
    {"parameters": "device", "states": "device", "boundaries": "device"},
]


def open_session(ssd_dir: str = "fake", *, delay_s: float = 0.0, serial: bool = False, **fields: object) -> overspill.Session:
    defaults: dict[str, object] = {
        "dtype": "float32",
        "seq_len": 12,
        "micro_batch": 2,
        "device": "cpu",
        "accumulate": 2,
        "ssd_dir": ssd_dir,
    }
    is_fake = ssd_dir == "fake"
    return overspill.Session(
        tiny_model("llama_tied"),
        plan=overspill.PlanRequest(**{**defaults, **fields}),  # type: ignore[arg-type]
        optimizer=overspill.AdamW(lr=1e-2),
        serial=serial,
        chunk_bytes=32 * 1024,
        open_store=(lambda directory, capacity_bytes, is_scratch: FakeStore(capacity_bytes, delay_s=delay_s)) if is_fake else None,
    )


def batches(step: int = 0) -> list[dict[str, torch.Tensor]]:
    return make_batches(2, vocab_size=96, seed=step)


# -- causes of idle time ---------------------------------------------------------------------------------------------


def span(op: int, lane: Lane, start_s: float, end_s: float, *waits: int) -> Span:
    return Span(op, lane, start_s, end_s, waits=waits)


def test_a_gap_belongs_to_the_lane_whose_op_ended_last_and_before_that_to_what_this_one_waited_for() -> None:
    """The drive reads until 4, the link copies from 4.5 to 6, compute begins at 6.25: the drive is what made the step long."""
    spans = [
        span(0, Lane.SSD_READ, 0, 4),
        span(1, Lane.COMPUTE, 0, 1),
        span(2, Lane.H2D, 4.5, 6, 0),
        span(3, Lane.D2H, 1, 5.5, 1),  # nobody waits for it
        span(4, Lane.COMPUTE, 6.25, 8, 1, 2),
    ]
    assert find_idle(spans, 8.5) == [
        Idle(1, 4, "ssd_read", 0, 4),
        Idle(4, 4.5, DISPATCH, -1, 4),
        Idle(4.5, 6, "h2d", 2, 4),
        Idle(6, 6.25, DISPATCH, -1, 4),
        Idle(8, 8.5, DISPATCH, -1, -1),
    ]


def test_an_op_that_stood_behind_another_on_its_lane_exposes_the_lane_with_both() -> None:
    """Compute waits for the second fetch alone, which had to wait for the first."""
    spans = [span(0, Lane.H2D, 0, 3), span(1, Lane.H2D, 3, 4), span(2, Lane.COMPUTE, 4, 5, 1)]
    assert find_idle(spans, 5) == [Idle(0, 3, "h2d", 0, 2), Idle(3, 4, "h2d", 1, 2)]


def test_overlapping_reads_of_a_drive_belong_to_the_drive() -> None:
    spans = [span(0, Lane.SSD_READ, 0, 5), span(1, Lane.SSD_READ, 1, 6), span(2, Lane.COMPUTE, 6, 7, 1)]
    assert exposed_s(find_idle(spans, 7)) == {
        **dict.fromkeys(("h2d", "d2h", "ssd_write", "host_update", "network", DISPATCH), 0.0),
        "ssd_read": 6,
    }


def test_the_end_of_a_step_waits_for_all_lanes() -> None:
    spans = [span(0, Lane.COMPUTE, 0, 2), span(1, Lane.D2H, 2, 3, 0), span(2, Lane.HOST_UPDATE, 3, 5, 1)]
    assert find_idle(spans, 5) == [Idle(2, 3, "d2h", 1, -1), Idle(3, 5, "host_update", 2, -1)]


def test_work_under_compute_is_busy_and_not_exposed() -> None:
    spans = [span(0, Lane.H2D, 0, 2), span(1, Lane.COMPUTE, 0, 2), span(2, Lane.COMPUTE, 2, 3, 0)]
    assert sum(exposed_s(find_idle(spans, 3)).values()) == 0
    assert lane_busy_s(spans)["h2d"] == busy_s(spans, Lane.H2D) == 2


@pytest.mark.parametrize("serial", [False, True], ids=["overlapped", "serial"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: "-".join(map(str, placement.values())))
def test_exposed_time_and_compute_are_the_step(placement: dict[str, object], serial: bool) -> None:
    with open_session(delay_s=0.0005, serial=serial, **placement) as session:
        for step in range(2):
            report = session.step(batches(step))
            assert sum(report.exposed_s.values()) + report.lane_busy_s["compute"] == pytest.approx(report.step_s, rel=1e-9)
            assert all(value >= 0 for value in report.exposed_s.values())
            trace = session.executor.trace
            assert trace is not None
            moved = {lane: sum(item.num_bytes for item in trace.spans if item.lane == lane) for lane in report.lane_bytes}
            assert moved == report.lane_bytes
            for item in trace.spans:
                assert item.submitted_s <= item.ready_s <= item.start_s <= item.end_s or item.lane is Lane.COMPUTE
                assert 0 <= item.submitted_s <= item.end_s and item.submitted_s <= report.step_s
                lands_later = trace.lands_later and item.lane is not Lane.COMPUTE
                assert item.end_s <= report.step_s or lands_later
            updated = [(item.start_s, item.end_s) for item in trace.spans if item.lane is Lane.HOST_UPDATE]
            assert all(before[1] <= after[0] < after[1] for before, after in itertools.pairwise(updated)), "one after the other"
            assert trace.lands_later == (not serial and placement.get("clip") is None)
            assert not trace.earlier, "the step before was read, and so waited for"


@pytest.mark.clock
def test_a_slow_drive_is_exposed_and_slow_compute_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of 5 ms that nothing hides; the same reads under compute of 30 ms a unit hide for the most part."""
    placement = {"parameters": "ssd", "states": "host", "boundaries": "device", "accumulate": 1}
    exposed, run = {}, UnitRunner.run

    def slow(self, op, visit, micro_batch, context, gradients):  # type: ignore[no-untyped-def]
        time.sleep(0.03)
        run(self, op, visit, micro_batch, context, gradients)

    for is_slow in (False, True):
        if is_slow:
            monkeypatch.setattr(UnitRunner, "run", slow)
        with open_session(delay_s=0.005, **placement) as session:
            reports = [session.step(make_batches(1, vocab_size=96, seed=step)) for step in range(3)]
        exposed[is_slow] = min(report.exposed_s["ssd_read"] for report in reports[1:])
    assert exposed[True] < 0.5 * exposed[False], exposed


# -- the floor -------------------------------------------------------------------------------------------------------


def test_reports_have_a_floor_from_the_first_question_on_and_none_is_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(delay_s=0.001, **PLACEMENTS[0]) as session:
        assert session.step(batches()).floor is None
        rates = session.rates
        assert rates.notes == () and rates.link is not None and rates.ssd is not None
        assert rates.update_parameters_per_s is not None and rates.update_parameters_per_s > 0
        assert session.rates is rates
        report = session.step(batches(1))
        assert report.floor is not None and report.floor.unmeasured == ()
        assert report.floor_s == report.floor.floor_s >= report.lane_busy_s["compute"] * 0.999
        assert report.step_over_floor == report.step_s / report.floor.floor_s
        trace = session.executor.trace
        assert trace is not None
        assert build_step_work(trace.schedule, rates).lane_s.keys() == {"h2d", "d2h", "ssd_read", "ssd_write", "host_update"}


@pytest.mark.parametrize("states", ["host", "ssd"])
def test_updates_are_measured_over_as_much_as_homes_will_take_and_no_more(monkeypatch: pytest.MonkeyPatch, states: str) -> None:
    """So that a large cache does not hold them, and the process's peak does not rise: 3 GiB that nobody has touched are states to come."""
    asked: dict[str, int] = {}

    def measure(*_: object, **sizes: int) -> object:
        asked.update(sizes)
        raise ValueError("looked at")

    def open_store(directory: str, capacity_bytes: int, is_scratch: bool) -> FakeStore:
        return FakeStore(capacity_bytes)

    monkeypatch.setattr(rates_module, "time_updates", measure)
    with open_session(parameters="host", states=states, boundaries="host") as session:
        untouched = 3 * GIB if states == "host" else 0
        rates, _ = rates_module.measure_rates(
            session.plan, session.optimizer, Files(open_store=open_store), room_bytes=GIB, untouched_bytes=untouched
        )
    assert any("looked at" in note for note in rates.notes)
    assert asked["room_bytes"] == max(GIB, untouched)
    if states == "host":
        assert 2 * GIB <= asked["updated_bytes"] <= untouched
    else:
        assert asked["updated_bytes"] == rates_module.UPDATED_BYTES


def test_an_update_that_was_disturbed_for_a_moment_is_no_slow_one_and_who_predicts_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [[1.0, 1.0, 40.0, 1.0, 1.0], [4.0, 4.0, 4.0, 4.0, 4.0], [4.0, 4.0]]
    monkeypatch.setattr(rates_module, "time_updates", lambda *_, **__: looks.pop(0))
    with open_session(**PLACEMENTS[0]) as session:
        session.time_templates(limit_s=0.5)
        assert len(looks) == 3, "nobody has asked for rates yet"
        first = session.rates
        assert first.update_parameters_per_s is not None and first.update_parameters_per_s == max(first.update_samples_per_s)
        floor = session.step(batches()).floor
        session.time_templates(limit_s=0.5)
        both = session.rates
        assert both.link == first.link and both.update_samples_per_s[:5] == first.update_samples_per_s
        assert both.update_parameters_per_s == pytest.approx(first.update_parameters_per_s / 4), "the median of all: six of ten say so"
        later = session.step(batches(1)).floor
        assert floor is not None and later is not None and later.work_s["host_update"] == pytest.approx(4 * floor.work_s["host_update"])

        nothing = dataclasses.replace(first, update_parameters_per_s=None, update_samples_per_s=())
        arguments = (session.plan, session.optimizer)
        assert rates_module.look_again(nothing, *arguments, room_bytes=GIB) == nothing, "there was nothing to look at"
        monkeypatch.setattr(rates_module, "time_updates", refuse)
        assert rates_module.look_again(first, *arguments, room_bytes=GIB) == first, "no room any more: the first look stands"


def refuse(*_: object, **__: object) -> object:
    raise StorageError("no room")


@pytest.mark.clock
def test_steps_that_nothing_delays_are_not_quicker_than_their_floors() -> None:
    """Together, with the flush: without clip a step's last updates land in the time of the one after it. The drive's rate is what a fake
    drive of 2 ms a transfer gives; on a busy machine it may be measured slow, so with 30 % of grace."""
    for placement in (PLACEMENTS[0], PLACEMENTS[1]):
        with open_session(delay_s=0.002, **placement) as session:
            assert session.rates.notes == ()
            begun_s = time.perf_counter()
            reports = [session.step(batches(step)) for step in range(3)]
            session.flush()
            took_s = time.perf_counter() - begun_s
            assert took_s > 0.7 * sum(report.floor_s or math.inf for report in reports), reports[-1].floor


@pytest.mark.clock
def test_measuring_rates_leaves_no_file_no_thread_and_the_written_bytes_counted(tmp_path: Path) -> None:
    import threading

    with open_session(str(tmp_path), parameters="ssd", states="ssd", boundaries="device") as session:
        session.step(batches())
        threads, names = threading.active_count(), sorted(path.name for path in tmp_path.iterdir())
        assert session.wear is not None
        before = session.wear.state.own_bytes
        begun_s = time.perf_counter()
        rates = session.rates
        assert time.perf_counter() - begun_s < 3, "measuring takes about a second, even here"
        assert rates.ssd is not None and rates.ssd.up_bytes_per_s > 0
        assert threading.active_count() == threads and sorted(path.name for path in tmp_path.iterdir()) == names
        report = session.step(batches(1))
        assert session.wear.state.own_bytes - before > report.ssd_written_bytes, "what the measurement wrote wears the drive too"
        forecast = session.wear.forecast()
        assert forecast is not None and forecast.bytes_per_step == pytest.approx(report.ssd_written_bytes), "but is no part of a step"


def test_a_drive_that_cannot_be_measured_is_noted_and_does_not_end_the_run() -> None:
    def open_store(directory: str, capacity_bytes: int, is_scratch: bool) -> FakeStore:
        if stores:
            raise StorageError("the drive is full")
        return FakeStore(capacity_bytes)

    stores: list[int] = []
    request = overspill.PlanRequest(
        dtype="float32",
        seq_len=12,
        micro_batch=2,
        device="cpu",
        accumulate=2,
        ssd_dir="fake",
        parameters="ssd",
        states="ssd",
        boundaries="device",
    )
    with overspill.Session(tiny_model("llama_tied"), plan=request, optimizer=overspill.AdamW(lr=1e-2), open_store=open_store) as session:
        stores.append(1)
        assert session.rates.ssd is None
        assert session.rates.notes == ("the rate of the SSD was not measured: the drive is full",)
        report = session.step(batches())
        assert report.floor is not None and set(report.floor.unmeasured) == {"ssd_read", "ssd_write"}
        assert report.floor_s is not None


def test_without_room_in_the_host_budget_nothing_is_measured_and_the_notes_say_so() -> None:
    with open_session(**PLACEMENTS[0]) as session:
        session.plan = dataclasses.replace(session.plan, host_budget_bytes=session.residency.host.allocated_bytes)
        rates = session.rates
        assert (rates.link, rates.ssd, rates.update_parameters_per_s) == (None, None, None)
        assert len(rates.notes) == 3 and all("the host budget of" in note for note in rates.notes), rates.notes
        assert session.step(batches()).floor is not None


# -- the file --------------------------------------------------------------------------------------------------------


def test_an_exported_trace_has_a_slice_for_every_op_in_words_and_no_two_overlap_on_a_track(tmp_path: Path) -> None:
    with open_session(delay_s=0.001, **PLACEMENTS[0]) as session:
        with pytest.raises(ValueError, match="no step yet"):
            session.export_trace(tmp_path / "none.json")
        session.step(batches())
        report = session.step(batches(1))
        chunks = len(session.plan.bundles["model.layers.1"].chunks)
        session.evaluate(batches())  # is not what is exported
        path = session.export_trace(tmp_path / "trace.json")
        with pytest.raises(StorageError, match="cannot write the trace of step 2"):
            session.export_trace(tmp_path / "nowhere" / "trace.json")
    content = json.loads(path.read_text())
    assert content["otherData"]["step"] == 2 and content["otherData"]["step_s"] == report.step_s
    events = content["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "h2d", "d2h", "ssd_read", "ssd_write", "host_update", "compute waits for"} <= set(tracks.values())
    slices = [event for event in events if event["ph"] == "X"]
    names = {event["name"] for event in slices}
    assert {"forward block 1, micro-batch 0", "backward tail, micro-batch 1", "finish gradient of block 0"} <= names
    done = ("read block 1 weights", "fetch block 1 weights", "evict block 1 gradient", "update block 1", "write block 1 optimizer states")
    assert {f"{text} 1/{chunks}" for text in done} <= names
    assert "fetch shared partial gradient of the tail" in names
    idle_s = sum(event["dur"] for event in slices if event["cat"] == "idle") / 1e6
    assert idle_s == pytest.approx(sum(report.exposed_s.values()), abs=1e-4)
    for track in tracks:
        own = sorted((event["ts"], event["ts"] + event["dur"]) for event in slices if event["tid"] == track)
        assert all(end <= start + 0.002 for (_, end), (start, _) in zip(own, own[1:], strict=False)), tracks[track]
    reads = [event for event in slices if event["name"] == f"read block 1 weights 1/{chunks}"]
    assert all(event["args"]["bytes"] > 0 and event["args"]["gb_per_s"] > 0 for event in reads)
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts and starts.keys() == ends.keys()
    assert all(starts[number]["ts"] <= ends[number]["ts"] for number in starts)


def test_a_trace_has_tracks_for_as_many_transfers_as_were_under_way(tmp_path: Path) -> None:
    """A unit of many chunks on the SSD is read ahead as a whole, however slow the drive is."""
    config = LlamaConfig(vocab_size=96, hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2)
    plan = overspill.PlanRequest(
        dtype="float32", seq_len=12, micro_batch=2, accumulate=2, device="cpu", parameters="ssd", states="ssd", ssd_dir="fake"
    )
    with overspill.Session(
        LlamaForCausalLM(config),
        plan=plan,
        optimizer=overspill.AdamW(lr=1e-2),
        chunk_bytes=4096,
        open_store=lambda directory, capacity_bytes, is_scratch: FakeStore(capacity_bytes, delay_s=0.01),
    ) as session:
        session.step(batches())
        assert len(session.plan.bundles["model.layers.0"].chunks) > 50
        events = json.loads(session.export_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sum(name.startswith("ssd_read") for name in tracks.values()) > 32
    assert len(set(tracks.values())) == len(tracks)
    lanes = {"read": "ssd_read", "fetch": "h2d", "write": "ssd_write", "update": "host_update"}
    for event in events:
        if event["ph"] == "X" and event["name"].split()[0] in lanes:
            assert tracks[event["tid"]].split()[0] == lanes[event["name"].split()[0]], event


# -- its cost --------------------------------------------------------------------------------------------------------


@pytest.mark.clock
def test_tracing_costs_less_than_10_us_an_op_and_says_what_it_took() -> None:
    with open_session(**PLACEMENTS[0]) as session:
        reports = [session.step(batches(step)) for step in range(4)]
        assert session.executor.trace is not None
        count = len(session.executor.trace.spans)
    best_s = min(report.trace_s for report in reports)
    assert 0 < best_s / count < 10e-6
    assert best_s < 0.1 * min(report.step_s for report in reports)  # of a step of some 50 ms; the ops of a real one are longer


@pytest.mark.clock
def test_what_an_op_costs_does_not_grow_with_the_number_of_ops() -> None:
    lanes = Lanes(torch.device("cpu"))
    seconds = {}
    for count in (2_000, 20_000):
        op = Update(bundle="b", chunk=0, tier=Tier.HOST, num_elements=1, num_bytes=1)
        kinds = [Lane.COMPUTE, Lane.HOST_UPDATE, Lane.HOST_UPDATE, Lane.HOST_UPDATE]
        items = [ScheduledOp(op=op, lane=kinds[i % 4], waits=(i - 1,) if i else ()) for i in range(count)]
        program = Schedule(name="t", ops=tuple(items), num_micro_batches=1, groups=((0,),), starts_pending=False, ends_pending=False)
        recorder, completions = Recorder(None, 0.0), []
        for index, item in enumerate(items):
            completion: Completion = lanes.done(item.lane)
            completion._begin_s, completion._end_s = 1.0 + index, 1.9 + index
            recorder.submitted_s.append(float(index))
            recorder.waits.append([completions[wait] for wait in item.waits])
            completions.append(completion)
        took = []
        for _ in range(3):
            begun_s = time.process_time()
            trace = LazyTrace(recorder, program, completions, count + 2.0).get()
            exposed = exposed_s(find_idle(trace.spans, trace.step_s))
            took.append(time.process_time() - begun_s)
        assert exposed["host_update"] == pytest.approx(0.9 * count * 3 / 4)
        seconds[count] = min(took) / count
    assert seconds[20_000] < 10e-6 and seconds[20_000] < 4 * seconds[2_000], seconds


# -- when it is found out --------------------------------------------------------------------------------------------


def test_a_report_that_nobody_keeps_is_never_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    slices = Recorder.slices
    monkeypatch.setattr(Recorder, "slices", lambda *args: built.append(1) or slices(*args))
    with open_session(parameters="host", states="host") as session:
        for step in range(3):
            assert session.step(batches(step)).step_s > 0
        assert not built


def test_a_report_that_is_kept_is_traced_while_the_next_step_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    slices = Recorder.slices
    with open_session(parameters="host", states="host") as session:
        monkeypatch.setattr(Recorder, "slices", lambda *args: built.append(where[0]) or slices(*args))
        where = ["between"]
        first = session.step(batches(0))
        assert not built
        settle = session.executor._settle
        session.executor._settle = lambda *args: (where.__setitem__(0, "settled"), settle(*args))[1]  # type: ignore[method-assign]
        second = session.step(batches(1))
        assert built == ["between"], "before the second step's ops were waited for"
        assert first.read_times._lazy is None, "its events are given back"  # type: ignore[attr-defined]
        assert sum(first.exposed_s.values()) + first.lane_busy_s["compute"] == pytest.approx(first.step_s, rel=1e-6, abs=1e-5)
        assert second.lane_busy_s["compute"] > 0 and second.times is second.times


def copy_of(lazy: LazyTrace) -> LazyTrace:
    """One that nobody has begun to read, of the same step."""
    assert lazy._source is not None
    recorder, schedule, completions, step_s, landing = lazy._source
    return LazyTrace(recorder, schedule, completions, step_s, landing=landing)


@pytest.mark.parametrize("fields", PLACEMENTS[:3])
def test_a_kept_report_is_read_slice_by_slice_where_the_next_step_would_only_wait(fields: dict[str, object]) -> None:
    with open_session(delay_s=0.01, **fields) as session:
        session.step(batches(0))
        first = session.step(batches(1))
        lazy, left = session.executor.lazy_trace, list[object]()
        assert lazy is not None and len(lazy._source[1].ops) > 2 * SLICE_OPS  # type: ignore[index]
        at_once, advances = copy_of(lazy), list[bool]()
        advance = session.executor.lanes.while_blocked
        session.executor.lanes.while_blocked = lambda: advances.append(advance()) or advances[-1]  # type: ignore[func-returns-value]
        session.executor.while_waiting = lambda: left.append(first.read_times._lazy)  # type: ignore[attr-defined]
        session.step(batches(2))
        assert left == [None], "nothing is left to read when all ops are under way"
        assert sum(advances) > 3 and lazy.get() == at_once.get()
        assert sum(first.exposed_s.values()) + first.lane_busy_s["compute"] == pytest.approx(first.step_s, rel=1e-6, abs=1e-5)
        assert 0 < first.trace_s < 0.1


def test_reading_that_ctrl_c_ends_begins_anew_and_what_has_not_landed_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(**PLACEMENTS[0]) as session:
        session.step(batches(0))
        lazy = session.executor.lazy_trace
        assert lazy is not None
        at_once, stopped = copy_of(lazy), copy_of(lazy)
        session.executor.finish()
        assert lazy.advance() and not lazy.is_complete
        with monkeypatch.context() as patch:
            patch.setattr(Completion, "span_s", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            for reading in (lazy, stopped):
                with pytest.raises(KeyboardInterrupt):
                    while reading.advance():
                        pass
        while lazy.advance():
            pass
        assert lazy.is_complete and not lazy.advance() and lazy.get() == stopped.get() == at_once.get()

        class Airborne:
            is_over = False

        waiting = LazyTrace(Recorder(None, 0.0), lazy.get().schedule, (), 0.0, landing=Airborne())  # type: ignore[arg-type]
        assert not waiting.advance() and not waiting.is_complete
