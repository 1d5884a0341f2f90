"""Claims about overlap: it changes no bit however the lanes are delayed, it saves the time it says, and failures end it cleanly."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model
from training_loop import make_batches

import overspill
from overspill.errors import StorageError
from overspill.optim import start_update_chunk
from overspill.optim.segment import segment_table
from overspill.runtime.compute import UnitRunner
from overspill.runtime.lanes import Abandoned, Completion, Lanes, settle_all
from overspill.spec.schedule import Lane
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.trace import Span, busy_s, overlap_s
from overspill.tiers import FakeStore

OPTIMIZER = overspill.AdamW(lr=1e-2)


def open_session(*, serial: bool, delay_s: float = 0.0, chunk_bytes: int = 64 * 1024, **fields: object) -> overspill.Session:
    defaults: dict[str, object] = {"dtype": "float32", "seq_len": 12, "micro_batch": 2, "device": "cpu", "accumulate": 2, "ssd_dir": "fake"}
    return overspill.Session(
        tiny_model("llama_tied"),
        plan=overspill.PlanRequest(**{**defaults, **fields}),  # type: ignore[arg-type]
        optimizer=OPTIMIZER,
        serial=serial,
        chunk_bytes=chunk_bytes,
        open_store=lambda directory, capacity_bytes, is_scratch: FakeStore(capacity_bytes, delay_s=delay_s),
    )


def outcome(session: overspill.Session, num_steps: int = 3) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and norm of each step, and every parameter and moment after them."""
    with session:
        reports = [session.step(make_batches(2, vocab_size=96, seed=step)) for step in range(num_steps)]
        for report in reports:
            assert report.host_resident_peak_bytes > 0
        session.flush()
        tensors = {name: session.homes.read(name) for name in session.homes.names}
        tensors |= {f"{name}.exp_avg_sq": session.homes.read_state(name, "exp_avg_sq") for name in session.homes.names}
    return [(report.loss, report.grad_norm) for report in reports], tensors


def assert_same(found: tuple[list, dict], expected: tuple[list, dict]) -> None:  # type: ignore[type-arg]
    assert found[0] == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name


PLACEMENTS = [
    {"parameters": "ssd", "states": "ssd", "boundaries": "ssd"},
    {"parameters": "host", "states": "host", "boundaries": "host"},
    {"parameters": "host", "states": "ssd", "boundaries": "device"},
    {"parameters": "ssd", "states": "host", "boundaries": "host", "group_size": 1},
    {"parameters": "device", "states": "host", "boundaries": "device"},
    {"parameters": "host", "states": "host", "boundaries": "device", "deferred_updates": 2},
]


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: "-".join(map(str, placement.values())))
def test_overlapped_steps_are_the_serial_ones_to_the_last_bit(placement: dict[str, object], clip: float | None) -> None:
    expected = outcome(open_session(serial=True, clip=clip, **placement))
    assert_same(outcome(open_session(serial=False, clip=clip, delay_s=0.0005, **placement)), expected)


HUNTED = [placement for placement in PLACEMENTS if placement["parameters"] != "device"]


def hunt(monkeypatch: pytest.MonkeyPatch, num_rounds: int) -> None:
    """Every job of every lane starts late, and its completion is told late, by a random time."""
    expected = {
        (index, clip): outcome(open_session(serial=True, clip=clip, **placement), 2)
        for (index, placement), clip in itertools.product(enumerate(HUNTED), (None, 1.0))
    }
    run = Lanes._run

    def late(self, completion, job, waits, stream):  # type: ignore[no-untyped-def]
        def slow_job():  # type: ignore[no-untyped-def]
            time.sleep(delays.random() * 0.002 * (delays.random() < 0.3))
            result = job()
            time.sleep(delays.random() * 0.002 * (delays.random() < 0.3))
            return result

        run(self, completion, slow_job, waits, stream)

    monkeypatch.setattr(Lanes, "_run", late)
    for number in range(num_rounds):
        delays = random.Random(number)
        index, clip = number % len(HUNTED), (None, 1.0)[number // len(HUNTED) % 2]
        found = outcome(open_session(serial=False, clip=clip, **HUNTED[index]), 2)  # type: ignore[arg-type]
        assert_same(found, expected[index, clip])


def test_random_delays_on_every_lane_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hunt(monkeypatch, 2 * len(HUNTED))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_rounds_of_random_delays_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hunt(monkeypatch, 200)


@pytest.mark.clock
def test_reads_run_under_the_compute_of_the_unit_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units take 20 ms, a drive about as long for a unit's chunks: more than half of what it reads is read while a unit computes."""
    run = UnitRunner.run

    def slow(self, op, visit, micro_batch, context, gradients):  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        run(self, op, visit, micro_batch, context, gradients)

    monkeypatch.setattr(UnitRunner, "run", slow)
    for serial in (True, False):
        with open_session(serial=serial, delay_s=0.004, accumulate=1, parameters="ssd", states="host", boundaries="device") as session:
            for seed in range(2):
                session.step(make_batches(1, vocab_size=96, seed=seed))
            shared = overlap_s(session.executor.spans, Lane.COMPUTE, Lane.SSD_READ)
            assert shared == 0 if serial else shared > 0.5 * busy_s(session.executor.spans, Lane.SSD_READ)


@pytest.mark.clock
def test_states_are_read_updated_and_written_back_side_by_side() -> None:
    """Reading and writing each take the drive 4 ms a chunk; overlapped, they share most of that time."""
    spans = {}
    for serial in (True, False):
        with open_session(
            serial=serial, delay_s=0.004, chunk_bytes=16 * 1024, accumulate=1, parameters="host", states="ssd", boundaries="device"
        ) as session:
            for step in range(2):
                session.step(make_batches(1, vocab_size=96, seed=step))
            spans[serial] = session.executor.spans
    written = busy_s(spans[False], Lane.SSD_WRITE)
    assert overlap_s(spans[True], Lane.SSD_READ, Lane.SSD_WRITE) == 0
    assert overlap_s(spans[False], Lane.SSD_READ, Lane.SSD_WRITE) > 0.5 * written
    assert max(span.end_s for span in spans[False]) < 0.75 * max(span.end_s for span in spans[True])


def test_measured_peaks_are_the_predicted_ones_although_lanes_overlap() -> None:
    for placement in PLACEMENTS:
        with open_session(serial=False, **placement) as session:
            batches = make_batches(2, vocab_size=96, seed=0)
            for _ in range(2):
                prediction = session.predict(batches)
                report = session.step(batches)
                difference = report - prediction
                assert set(difference.lane_bytes.values()) == {0}
                assert difference.host_resident_peak_bytes == difference.device_resident_peak_bytes == 0
                assert difference.ssd_resident_peak_bytes == 0


@pytest.mark.parametrize("lane", [Lane.SSD_READ, Lane.SSD_WRITE, Lane.HOST_UPDATE, Lane.H2D, Lane.D2H])
def test_a_failure_on_any_lane_ends_the_step_with_that_failure_and_leaves_no_thread(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    submit = Lanes.submit
    numbers = itertools.count()

    def failing(self, where, job, waits):  # type: ignore[no-untyped-def]
        def broken() -> None:
            raise StorageError(f"broken on {where}")

        return submit(self, where, broken if where is lane and next(numbers) == 5 else job, waits)

    monkeypatch.setattr(Lanes, "submit", failing)
    with open_session(serial=False, parameters="ssd", states="ssd", boundaries="host") as session:
        with pytest.raises(StorageError, match=f"broken on {lane}"):
            session.step(make_batches(2, vocab_size=96, seed=0))
            session.flush()  # the last updates and writes may fail when the step has returned
        if session.executor.updated:
            with pytest.raises(RuntimeError, match="half-way"):
                session.step(make_batches(2, vocab_size=96, seed=0))
        else:
            session.step(make_batches(2, vocab_size=96, seed=0))
    assert threading.active_count() == threads


def test_jobs_behind_a_failure_are_abandoned_and_the_lanes_work_again_after_a_reset() -> None:
    lanes = Lanes(torch.device("cpu"))
    done: list[str] = []

    def fail() -> None:
        raise StorageError("broken")

    first = lanes.submit(Lane.SSD_READ, fail, [])
    second = lanes.submit(Lane.HOST_UPDATE, lambda: done.append("second"), [first])
    third = lanes.submit(Lane.SSD_READ, lambda: done.append("third"), [])
    assert isinstance(first.settle(), StorageError) and isinstance(second.settle(), StorageError)
    assert isinstance(third.settle(), Abandoned) and not done
    lanes.reset()
    lanes.submit(Lane.SSD_READ, lambda: done.append("fourth"), []).wait()
    assert done == ["fourth"]
    lanes.close()


def wait_for(event: threading.Event) -> None:
    event.wait(0.2)


class EventOfStream:
    """Ends when it is waited for; the numbers of those that were, in order."""

    def __init__(self, number: int, waited: list[int], error: Exception | None = None) -> None:
        self.number, self.waited, self.error = number, waited, error

    def synchronize(self) -> None:
        self.waited.append(self.number)
        if self.error is not None:
            raise self.error


def test_of_a_stream_only_the_last_event_is_waited_for_and_every_failure_is_found() -> None:
    lanes, waited = Lanes(torch.device("cpu")), list[int]()
    broken, late = RuntimeError("an illegal memory access"), OSError("no such drive")
    completions = [lanes.done(lane) for lane in (Lane.COMPUTE, Lane.H2D, Lane.COMPUTE, Lane.H2D, Lane.D2H, Lane.HOST_UPDATE)]
    for number, completion in enumerate(completions[:5]):
        completion._event = EventOfStream(number, waited, broken if number == 3 else None)  # type: ignore[assignment]
    completions[4]._error = late
    assert settle_all(completions) == [late, broken] and waited == [2, 3]

    release = threading.Event()
    job = lanes.submit(Lane.HOST_UPDATE, lambda: wait_for(release), ())
    threading.Timer(0.05, release.set).start()
    assert settle_all([job]) == [] and release.is_set(), "it waits for what has not been issued"
    lanes.close()


def test_the_dispatching_thread_does_what_there_is_to_do_until_what_it_waits_for_is_issued() -> None:
    lanes, release, rounds = Lanes(torch.device("cpu")), threading.Event(), list[bool]()

    def work() -> bool:
        rounds.append(release.is_set())
        if len(rounds) == 5:
            release.set()
        return len(rounds) < 4 or release.is_set()

    lanes.while_blocked = work
    slow = lanes.submit(Lane.H2D, lambda: wait_for(release), ())
    done = lanes.run_here(lambda: None, [slow])
    assert done.is_done and slow.is_done and len(rounds) == 4, "no more than there is; then it waits"
    lanes.run_here(lambda: None, [slow, done])
    assert len(rounds) == 4, "nothing to wait for"
    lanes.close()


def test_the_dispatching_thread_leaves_the_interpreter_alone_while_the_host_updates() -> None:
    """Python lets a thread that computes keep the interpreter for 5 ms, and each chunk's update asks for it twice."""
    lanes, release, rounds = Lanes(torch.device("cpu")), threading.Event(), list[int]()
    lanes.while_blocked = lambda: rounds.append(1) is None
    update = lanes.submit(Lane.HOST_UPDATE, lambda: wait_for(release), ())
    fetch = lanes.submit(Lane.H2D, lambda: None, (update,))
    threading.Timer(0.05, release.set).start()
    lanes.run_here(lambda: None, [fetch])
    assert update.is_done and not rounds, "the fetch waits for the update"
    release.clear()
    slow = lanes.submit(Lane.H2D, lambda: wait_for(release), ())
    threading.Timer(0.05, release.set).start()
    lanes.run_here(lambda: None, [slow])
    assert rounds, "no update is left"
    lanes.close()


class HeldUpdate:
    """What a job of `host_update` has given to the core; ends when it is told to."""

    def __init__(self) -> None:
        self.began_s = self.ended_s = 0.0
        self.ended = threading.Event()

    @property
    def is_done(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> None:
        assert self.ended.wait(20)

    def end(self) -> None:
        self.began_s, self.ended_s = 10.0, 11.0
        self.ended.set()


def submit_behind_one_another(lanes: Lanes, updates: list[HeldUpdate], begun: list[HeldUpdate] | None = None) -> list[Completion]:
    """All are queued before the first is begun."""

    def start(update: HeldUpdate) -> HeldUpdate:
        if begun is not None:
            begun.append(update)
        return update

    release = threading.Event()
    arrived = lanes.submit(Lane.D2H, lambda: wait_for(release), ())
    done = [lanes.submit(Lane.HOST_UPDATE, functools.partial(start, update), (arrived,)) for update in updates]
    release.set()
    return done


def until(condition: Callable[[], bool]) -> None:
    end_s = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < end_s
        time.sleep(0.001)


def test_the_next_update_is_issued_under_the_one_before_it_and_no_further_one() -> None:
    lanes, updates = Lanes(torch.device("cpu")), [HeldUpdate() for _ in range(4)]
    done = submit_behind_one_another(lanes, updates)
    for number, update in enumerate(updates):
        until(lambda number=number: all(completion.is_issued for completion in done[: number + 2]))  # type: ignore[misc]
        time.sleep(0.01)
        assert not any(completion.is_issued for completion in done[number + 2 :])
        assert not done[number].is_done and lanes.is_updating
        update.end()
        done[number].wait()
        assert done[number].span_s(None, 4.0) == (6.0, 7.0), "when the core made it, not when it was prepared"
    until(lambda: not lanes.is_updating)
    lanes.close()


@pytest.mark.parametrize("end", [Lanes.drain, Lanes.close])
def test_who_drains_the_lanes_or_closes_them_waits_for_the_core(end: Callable[[Lanes], None]) -> None:
    lanes, updates = Lanes(torch.device("cpu")), [HeldUpdate(), HeldUpdate()]
    submit_behind_one_another(lanes, updates)
    threading.Timer(0.05, updates[0].end).start()
    threading.Timer(0.1, updates[1].end).start()
    end(lanes)
    assert updates[1].is_done and not lanes.is_updating
    lanes.close()


def test_who_needs_an_updated_chunk_waits_for_the_core() -> None:
    lanes, update = Lanes(torch.device("cpu")), HeldUpdate()
    made = lanes.submit(Lane.HOST_UPDATE, lambda: update, ())
    written = lanes.submit(Lane.SSD_WRITE, lambda: None, (made,))
    until(lambda: made.is_issued)
    time.sleep(0.01)
    assert not written.is_issued
    update.end()
    written.wait()
    lanes.close()


def test_updates_that_the_core_has_when_another_op_fails_are_made_and_no_other_is_begun() -> None:
    lanes, updates, begun = Lanes(torch.device("cpu")), [HeldUpdate() for _ in range(4)], list[HeldUpdate]()

    def fail() -> None:
        raise StorageError("broken")

    done = submit_behind_one_another(lanes, updates, begun)
    until(lambda: done[1].is_issued)
    failed = lanes.submit(Lane.SSD_READ, fail, ())
    assert isinstance(failed.settle(), StorageError)
    assert not done[0].is_done and not done[1].is_done
    for update in updates[:2]:
        update.end()
    assert [type(completion.settle()) for completion in done] == [type(None), type(None), Abandoned, Abandoned]
    assert begun == updates[:2]
    lanes.close()


def test_a_lane_that_has_updated_keeps_no_buffer_alive() -> None:
    lanes, alive = Lanes(torch.device("cpu")), weakref.WeakSet[torch.Tensor]()
    layout = resolve_state_format("fp32", "float32", "sgd")
    scalars = [overspill.SGD(lr=0.1, momentum=0.0).scalars(step=1)]
    done = []
    for _ in range(3):
        tensors = [torch.ones(70_000), torch.ones(70_000)]
        alive.update(tensors)

        def job(parameter: torch.Tensor, gradient: torch.Tensor) -> object:
            table = segment_table(parameter.numel())
            return start_update_chunk(scalars, table, state_format=layout, parameter=parameter, gradient=gradient, states={})

        done.append(lanes.submit(Lane.HOST_UPDATE, functools.partial(job, *tensors), ()))  # type: ignore[arg-type]
        del tensors
    until(lambda: not lanes.is_updating)
    assert all(completion.is_done for completion in done) and not alive
    lanes.close()


def test_busy_time_counts_overlapping_transfers_of_a_lane_once() -> None:
    spans = [Span(op=index, lane=Lane.SSD_READ, start_s=start, end_s=end) for index, (start, end) in enumerate([(0, 2), (1, 3), (5, 6)])]
    other = [Span(op=9, lane=Lane.COMPUTE, start_s=2.5, end_s=5.5)]
    assert busy_s(spans, Lane.SSD_READ) == 4
    assert overlap_s(spans + other, Lane.SSD_READ, Lane.COMPUTE) == 1.0
