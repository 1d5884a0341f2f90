"""Claims about steps that return before their last updates are home: the same bits, shorter steps, and nothing lost whatever fails."""

from __future__ import annotations

import collections
import functools
import gc
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_core import delay_updates
from test_ctrl_c_anywhere import STEP, interrupted_at, lent_bytes
from test_lanes import PLACEMENTS, assert_same
from tiny_models import tiny_model
from training_loop import make_batches

import overspill
from overspill.errors import StorageError
from overspill.runtime import landing as landing_module
from overspill.runtime.compute import UnitRunner
from overspill.runtime.executor import Executor
from overspill.runtime.landing import Landing
from overspill.runtime.lanes import Completion, JobGroup, Lanes
from overspill.runtime.updating import Updater
from overspill.spec.schedule import Compress, Lane, Update
from overspill.spec.trace import busy_s
from overspill.tiers import FakeStore
from overspill.tiers.calls import SpacePolicy
from overspill.tiers.fake import FailureRule
from overspill.tiers.faults import Fault, FaultInjector, FaultKind

FIRST = "model.embed_tokens"
"""The bundle whose gradient comes last, where it is not tied."""


def open_session(
    name: str = "llama", *, serial: bool = False, delay_s: float = 0.0, failures: FailureRule = lambda *call: None, **fields: Any
) -> overspill.Session:
    defaults: dict[str, Any] = {"dtype": "float32", "seq_len": 12, "micro_batch": 2, "device": "cpu", "accumulate": 2, "ssd_dir": "fake"}
    checkpoints = fields.pop("checkpoints", None)
    return overspill.Session(
        tiny_model(name),
        plan=overspill.PlanRequest(**{**defaults, **fields}),
        optimizer=overspill.AdamW(lr=1e-2),
        serial=serial,
        chunk_bytes=32 * 1024,
        checkpoints=checkpoints,
        open_store=lambda directory, capacity_bytes, is_scratch: FakeStore(capacity_bytes, delay_s=delay_s, failures=failures),
    )


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Another number of micro-batches, and of tokens, in every step."""
    return make_batches(1 + step % 2, vocab_size=96, tokens=12 - 2 * (step % 3), seed=step)


def content(session: overspill.Session) -> dict[str, torch.Tensor]:
    tensors = {name: session.homes.read(name) for name in session.homes.names}
    return tensors | {f"{name}.exp_avg": session.homes.read_state(name, "exp_avg") for name in session.homes.names}


def outcome(session: overspill.Session, num_steps: int = 5) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    with session:
        reports = [session.step(batches(step)) for step in range(num_steps)]
        return [(report.loss, report.grad_norm) for report in reports], content(session)  # reading a home waits by itself


class Gate:
    """Holds updates on the host, for which no compute of their step waits, from those of the bundle whose gradient comes last on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, then: Callable[[], None] = lambda: None) -> None:
        self.is_held, self.opened, self.is_armed = threading.Event(), threading.Event(), True
        start = Updater.start

        def held(updater: Updater, op: Update, *arguments: Any) -> object:
            if self.is_armed and op.bundle == updater.plan.units[0].bundles[0]:
                self.is_held.set()
                assert self.opened.wait(20)
                then()
            return start(updater, op, *arguments)

        monkeypatch.setattr(Updater, "start", held)

    def open_soon(self, seconds: float = 0.05) -> None:
        threading.Timer(seconds, self.opened.set).start()


def broken() -> None:
    raise StorageError("the drive is gone")


# -- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
@pytest.mark.parametrize("placement", [*PLACEMENTS, {"parameters": "host", "states": "host", "device_states_bytes": 40_000}], ids=str)
def test_steps_that_overlap_are_the_serial_ones_to_the_last_bit(
    placement: dict[str, Any], clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job of every lane starts late, and its completion is told late, by a random time."""
    expected = outcome(open_session(serial=True, clip=clip, **placement))
    run, delays, late = Lanes._run, random.Random(7), []
    made = Landing.__init__

    def slow(self: Lanes, completion: Completion, job: Any, waits: Any, stream: Any) -> None:
        def slow_job() -> Any:
            time.sleep(delays.random() * 0.005 * (delays.random() < 0.3))
            result = job()
            time.sleep(delays.random() * 0.005 * (delays.random() < 0.3))
            return result

        run(self, completion, slow_job, waits, stream)

    monkeypatch.setattr(Lanes, "_run", slow)
    monkeypatch.setattr(Landing, "__init__", lambda self, *args, **named: (made(self, *args, **named), late.append(len(self.late)))[0])
    assert_same(outcome(open_session(clip=clip, **placement)), expected)
    assert len(late) == (5 if clip is None else 0) and (clip is not None or sum(late) > 5 or "device_states_bytes" in placement), late


# -- under the next forward ------------------------------------------------------------------------------------------


def slow_forward(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    run = UnitRunner.run

    def slow(self: UnitRunner, op: Any, *arguments: Any) -> None:
        time.sleep(seconds)
        run(self, op, *arguments)

    monkeypatch.setattr(UnitRunner, "run", slow)


CASES: dict[str, dict[str, Any]] = {
    # Embedding and first block, which are needed first, are updated on the device: the second block's update hides under their forward,
    # and where states rest on a drive (of 60 ms a transfer) so do its reads and writes.
    "host": {"states": "host", "device_states_bytes": 100_000},
    "ssd": {"states": "ssd", "device_states_bytes": 100_000, "delay_s": 0.06},
}


@pytest.mark.clock
@pytest.mark.parametrize("case", CASES)
def test_what_a_step_leaves_lands_under_the_next_forward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waited for at a step's end it costs its whole time; the next step waits for less than half of that."""
    slow_forward(monkeypatch, 0.03)
    if case == "host":
        delay_updates(monkeypatch, lambda _: 0.06)
    with open_session(parameters="host", boundaries="device", accumulate=1, **CASES[case]) as session:
        session.step(make_batches(1, vocab_size=96, seed=9))
        landing_s = []
        for step in range(3):
            session.flush()
            session.step(make_batches(1, vocab_size=96, seed=step))
            begun_s = time.perf_counter()
            session.flush()
            landing_s.append(time.perf_counter() - begun_s)
        drained_s = min(landing_s)
        assert drained_s > 0.02
        begun_s = time.perf_counter()
        reports = []
        for step in range(3):
            reports.append(session.step(make_batches(1, vocab_size=96, seed=step)))
        between_s = time.perf_counter() - begun_s - sum(report.step_s for report in reports)
        assert between_s < 0.1 * reports[0].step_s, "a loop takes the sum of its steps"
        trace = session.executor.trace
        assert trace is not None and trace.earlier
        waited_s = sum(part.end_s - part.start_s for part in trace.idle() if part.op < -1)
        compute = [item for item in trace.spans if item.lane is Lane.COMPUTE]
        under_s = busy_s(compute, Lane.COMPUTE) + busy_s(trace.earlier, *Lane) - busy_s([*compute, *trace.earlier], *Lane)
    print(f"{case}: drained {drained_s * 1e3:.0f} ms a step, overlapped {waited_s * 1e3:.0f} ms; {under_s * 1e3:.0f} ms under compute")
    assert waited_s < 0.5 * drained_s and under_s > 0.5 * drained_s, (waited_s, under_s, drained_s)


def test_lanes_go_on_in_the_programs_order_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: dict[Lane, list[int]] = collections.defaultdict(list)
    begun: dict[Lane, list[int]] = collections.defaultdict(list)
    submit = Lanes.submit

    def counted(self: Lanes, lane: Lane, job: Any, waits: Any) -> Completion:
        number = len(submitted[lane])
        submitted[lane].append(number)

        def noted() -> Any:
            begun[lane].append(number)
            return job()

        return submit(self, lane, noted, waits)

    monkeypatch.setattr(Lanes, "submit", counted)
    with open_session(parameters="ssd", states="ssd", boundaries="ssd", delay_s=0.0005) as session:
        for step in range(3):
            session.step(batches(step))
        session.flush()
    assert begun == submitted and len(begun) == 5


def test_the_step_before_has_landed_before_a_gradient_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """So verdicts, and who asks what was updated, know one step at a time."""
    dispatched: list[tuple[object, bool]] = []
    compress, finish = Executor.leave_visit_of, Executor.finish

    def look(self: Executor, bundle: str) -> None:
        dispatched.append((bundle, self.landing is None))
        compress(self, bundle)

    monkeypatch.setattr(Executor, "leave_visit_of", look)
    delay_updates(monkeypatch, lambda _: 0.01)
    with open_session(parameters="host", states="host") as session:
        for step in range(3):
            session.step(batches(step))
            assert session.executor.landing is not None
        finish(session.executor)
        kinds = {item.op.bundle for item in session.schedule(batches(2)).ops if isinstance(item.op, Compress)}
    assert kinds <= {bundle for bundle, _ in dispatched}
    assert all(has_landed for bundle, has_landed in dispatched if bundle in kinds and bundle == "tail") and dispatched


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
def test_serial_and_pending_steps_leave_nothing_under_way(clip: float | None) -> None:
    with open_session(serial=clip is None, clip=clip, parameters="host", states="host") as session:
        session.step(batches(0))
        assert session.executor.landing is None


# -- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.clock
def test_waiting_for_the_step_befores_update_is_exposed_as_the_hosts_update_of_the_step_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(parameters="host", states="host", boundaries="device", accumulate=1) as session:
        session.step(make_batches(1, vocab_size=96, seed=0))
        session.flush()
        delays = {session.plan.units[0].bundles[0]: 0.4}  # once
        delay_updates(monkeypatch, lambda op: delays.pop(op.bundle, 0))
        first = session.step(make_batches(1, vocab_size=96, seed=1))
        assert session.executor.landing is not None
        second = session.step(make_batches(1, vocab_size=96, seed=2))
        assert second.step_s > 0.3 > first.step_s
        assert second.exposed_s["host_update"] > 0.25
        for report in (first, second):
            assert sum(report.exposed_s.values()) + report.lane_busy_s["compute"] == pytest.approx(report.step_s, rel=1e-9)
        assert first.lane_busy_s["host_update"] > 0.3 > second.lane_busy_s["host_update"], "busy for the step that it updates for"


@pytest.mark.clock
def test_a_gradient_that_waited_for_an_update_to_give_its_room_back_says_so_in_the_next_steps_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wait for a buffer, which no schedule names. Without it what the first compute waited for ended at the gradient's copy."""
    delay_updates(monkeypatch, lambda op: 0.05 if "layers" in op.bundle else 0)
    with open_session(parameters="host", states="host", boundaries="device", accumulate=1, device_states_bytes=0) as session:
        for seed in range(3):
            session.step(make_batches(1, vocab_size=96, seed=seed))
        trace = session.executor.trace
        assert trace is not None
        first = next(span for span in trace.spans if span.lane is Lane.COMPUTE)
        waited_s = sum(part.end_s - part.start_s for part in trace.idle() if part.waiting == first.op and part.cause == "host_update")
        leaving = [span for span in trace.earlier if span.lane is Lane.D2H]
        assert any(isinstance(trace.op(wait), Update) for span in leaving for wait in span.waits)
    assert first.start_s > 0.05 and waited_s > 0.8 * first.start_s, (first.start_s, waited_s)


@pytest.mark.clock
def test_reading_a_steps_times_at_once_waits_until_it_has_landed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gate = Gate(monkeypatch)
    with open_session(parameters="host", states="host") as session:
        report = session.step(batches(0))
        gate.open_soon(0.2)
        begun_s = time.perf_counter()
        assert report.lane_busy_s["host_update"] > 0
        assert time.perf_counter() - begun_s > 0.1
        assert "step before" not in session.export_trace(tmp_path / "one.json").read_text()
        gate.opened.clear()
        session.step(batches(1))
        gate.open_soon(0.2)
        session.step(batches(2))
        assert "of the step before)" in session.export_trace(tmp_path / "three.json").read_text()


# -- failures --------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[overspill.Session, Path], object]] = {
    "step": lambda session, folder: session.step(batches(2)),
    "flush": lambda session, folder: session.flush(),
    "evaluate": lambda session, folder: session.evaluate(batches(2)),
    "generate": lambda session, folder: session.generate([[1, 2]], max_new_tokens=1),
    "save_checkpoint": lambda session, folder: session.save_checkpoint(),
    "save_pretrained": lambda session, folder: session.save_pretrained(folder / "model"),
    "rates": lambda session, folder: session.rates,
    "home": lambda session, folder: session.homes.read(session.homes.names[0]),
    "close": lambda session, folder: session.close(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("is_known", [False, True], ids=["while-waiting", "before"])
def test_a_landing_that_fails_is_told_once_by_the_next_call_as_of_its_step(
    call: str, is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    gate = Gate(monkeypatch, then=broken)
    gate.is_armed = False
    policy = overspill.CheckpointPolicy(directory=str(tmp_path / "run"))
    session = open_session(parameters="host", states="host", checkpoints=policy)
    session.step(batches(0))
    session.flush()
    gate.is_armed = True
    assert session.step(batches(1)).step == 2
    assert session.executor.landing is not None
    if is_known:
        gate.opened.set()
        session.executor.landing.settle()
    else:
        gate.open_soon()
    with pytest.raises(StorageError, match=r"step 2 had returned, and failed .* home: the drive is gone"):
        CALLS[call](session, tmp_path)
    if call != "close":
        with pytest.raises(RuntimeError, match=r"half-way through an update and cannot go on: StorageError: step 2 had returned"):
            session.step(batches(2))
        with pytest.raises(RuntimeError, match="half-way"):
            session.flush()
    session.close()
    deadline_s = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline_s:
        time.sleep(0.01)  # the gate's timer
    assert threading.active_count() <= threads


def test_a_write_that_fails_after_its_step_returned_is_told_by_the_next_one_and_leaving_the_session_tells_nothing_more() -> None:
    """Of a drive as slow as 50 ms a transfer: the last write of states has not begun when compute has ended."""
    calls = {"write": 0}
    last = [1 << 30]

    def fail(operation: str, index: int, name: str) -> int | None:
        calls["write"] += operation == "write"
        return 5 if operation == "write" and calls["write"] > last[0] else None

    with open_session(parameters="host", states="ssd", boundaries="device", delay_s=0.01, failures=fail) as session:
        session.step(batches(0))
        session.flush()
        num_writes = sum(item.lane is Lane.SSD_WRITE for item in session.schedule(batches(1)).ops)
        last[0] = calls["write"] + num_writes - 1
        session.step(batches(1))
        with pytest.raises(StorageError, match=r"step 2 had returned.*write of .* failed"):
            session.step(batches(2))


def test_closing_while_the_landing_waits_for_room_on_the_drive_does_not_wait_for_a_person(tmp_path: Path) -> None:
    """The last write of the second step meets a full drive."""
    fields: dict[str, Any] = {"dtype": "float32", "seq_len": 12, "micro_batch": 2, "device": "cpu", "accumulate": 2}
    placement = {"parameters": "host", "states": "ssd", "boundaries": "device"}
    num_calls = 0
    for faults in (0, 1):
        paused: list[str] = []
        calls = FaultInjector(*[Fault(kind=FaultKind.ENOSPC, call_index=num_calls - 1, num_calls=1 << 30)] * faults)
        session = overspill.Session(
            tiny_model("llama"),
            plan=overspill.PlanRequest(**fields, **placement, ssd_dir=str(tmp_path / str(faults))),
            optimizer=overspill.AdamW(lr=1e-2),
            calls=calls,
            space=SpacePolicy(poll_s=0.01, report=paused.append),
        )
        for step in range(2):
            session.step(batches(step))
        if not faults:
            session.flush()
            num_calls = len(calls.log)
            session.close()
            continue
        deadline_s = time.monotonic() + 5
        while not paused and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert paused and session.executor.landing is not None
        with pytest.raises(StorageError, match=r"step 2 had returned.*ENOSPC"):
            session.close()


def test_ctrl_c_while_a_call_waits_for_the_landing_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(open_session(serial=True, parameters="host", states="host"), 3)
    gate = Gate(monkeypatch)
    with open_session(parameters="host", states="host") as session:
        seen = []
        for step in range(3):
            gate.opened.clear()
            report = session.step(batches(step))
            seen.append((report.loss, report.grad_norm))
            wait = Landing.settle

            def interrupted(self: Landing) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(landing_module.Landing, "settle", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.flush()
            monkeypatch.setattr(landing_module.Landing, "settle", wait)
            gate.open_soon(0.02)
        assert_same((seen, content(session)), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError])
def test_whatever_ends_the_next_forward_no_update_of_the_step_before_is_lost(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step is given up in its forward, while jobs of the first have not begun; then it is made."""
    expected = outcome(open_session(serial=True, parameters="host", states="ssd", device_states_bytes=30_000), 3)
    delay_updates(monkeypatch, lambda _: 0.01)
    with open_session(parameters="host", states="ssd", device_states_bytes=30_000, delay_s=0.005) as session:
        first = session.step(batches(0))
        landing, run = session.executor.landing, UnitRunner.run
        assert landing is not None and not landing.is_over

        def stop(self: UnitRunner, *arguments: Any) -> None:
            assert not landing.is_over
            raise error("given up")

        monkeypatch.setattr(UnitRunner, "run", stop)
        with pytest.raises(error, match="given up"):
            session.step(batches(1))
        assert landing.is_over and session.executor.landing is None
        monkeypatch.setattr(UnitRunner, "run", run)
        reports = [first, *(session.step(batches(step)) for step in (1, 2))]
        assert [report.step for report in reports] == [1, 2, 3]
        assert_same(([(report.loss, report.grad_norm) for report in reports], content(session)), expected)


def test_ctrl_c_in_a_forward_while_the_landing_fails_stays_ctrl_c_with_a_note_and_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, then=broken)
    with open_session(parameters="host", states="host", boundaries="device", device_states_bytes=0) as session:
        session.step(batches(0))
        assert gate.is_held.wait(5)

        def stop(self: Any, item: Any) -> None:
            gate.open_soon()
            raise KeyboardInterrupt

        monkeypatch.setattr("overspill.runtime.step.RunningStep._dispatch", stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            session.step(batches(1))
        assert "step 1 had returned" in " ".join(stopped.value.__notes__)
        with pytest.raises(RuntimeError, match="half-way.*step 1 had returned"):
            session.step(batches(1))


def interrupt_second_steps(stride: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> int:
    """Interrupt the second step at every `stride`-th place, go on, and compare; how often that was possible."""
    expected = outcome(open_session(serial=True, **fields), 3)
    delay_updates(monkeypatch, lambda _: 0.0005)
    num_survived, place = 0, stride // 2
    while True:
        with open_session(**fields) as session:
            seen = [session.step(batches(0))]
            rest = lent_bytes(session)
            if not interrupted_at(place, STEP, functools.partial(session.step, batches(1))):
                return num_survived
            try:
                seen += [session.step(batches(step)) for step in (1, 2)]
            except RuntimeError as error:
                assert "half-way through an update" in str(error) and session.executor.updated, place
                assert session.executor.landing_failure is None, place
            else:
                if session.step_number == 3:
                    assert_same(([(report.loss, report.grad_norm) for report in seen], content(session)), expected)
                    assert lent_bytes(session) == rest, place
                    num_survived += 1
        place += stride


def test_ctrl_c_at_any_place_of_the_next_step_loses_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interrupt_second_steps(307, monkeypatch, parameters="host", states="ssd", boundaries="device") > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_ctrl_c_at_many_places_of_the_next_step_loses_no_update(placement: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert interrupt_second_steps(53, monkeypatch, **placement) > 15


# -- nothing is kept -------------------------------------------------------------------------------------------------


def test_nothing_of_a_step_is_kept_over_300_steps() -> None:
    with open_session(parameters="host", states="ssd", boundaries="host", accumulate=1, delay_s=0.0002) as session:
        counts, lent = [], []
        for step in range(300):
            session.step(make_batches(1, vocab_size=96, tokens=4, seed=step))
            if step in (20, 299):
                session.flush()
                gc.collect()
                kinds = (Completion, Landing, JobGroup)
                counts.append([sum(type(item) is kind for item in gc.get_objects()) for kind in kinds])
                lent.append(lent_bytes(session))
        num_ops = len(session.schedule(make_batches(1, vocab_size=96, tokens=4, seed=0)).ops)
        assert counts[1][0] <= counts[0][0] + 20 <= 3 * num_ops and counts[1][1:] <= [2, 6], counts
        assert lent[0] == lent[1]
        assert len(session.executor.lanes.group.taken) == 0
