"""Claims about steps that are stopped half-way: no update is lost, none is done twice, and no failure is told twice."""

from __future__ import annotations

import errno
import itertools
import signal
import threading
import time
from collections.abc import Iterable

import pytest
import torch
from slow_core import delay_updates
from test_ctrl_c_anywhere import lent_bytes
from test_lanes import assert_same, open_session, outcome
from training_loop import make_batches

from overspill.errors import StorageError
from overspill.runtime import updating
from overspill.runtime.compute import UnitRunner
from overspill.runtime.executor import Executor
from overspill.runtime.lanes import Lanes
from overspill.spec.schedule import Lane, Phase, Update
from overspill.tiers import HostMemory, SlotPool, memory
from overspill.tiers.calls import SpacePolicy, SpaceWaiter

BATCHES = make_batches(2, vocab_size=96, seed=0)


def test_a_step_stopped_with_pending_updates_whose_write_failed_closes_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arithmetic of the step before was done, but a state did not get home."""
    with open_session(serial=False, parameters="ssd", states="ssd", boundaries="device", clip=1.0) as session:
        session.step(BATCHES)
        num_updates = sum(isinstance(item.op, Update) for item in session.schedule(BATCHES).ops)
        submit, run, stopped = Lanes.submit, UnitRunner.run, threading.Event()

        def late(self, lane, job, waits):  # type: ignore[no-untyped-def]
            def slow_job():  # type: ignore[no-untyped-def]
                time.sleep(0.02)
                if stopped.is_set():
                    raise StorageError("the drive is gone")
                return job()

            return submit(self, lane, slow_job if lane is Lane.SSD_WRITE else job, waits)

        def stop(self, op, *rest):  # type: ignore[no-untyped-def]
            if op.phase is not Phase.BACKWARD:
                return run(self, op, *rest)
            while len(session.executor.updated) < num_updates:
                time.sleep(0.001)
            stopped.set()
            raise KeyboardInterrupt

        monkeypatch.setattr(Lanes, "submit", late)
        monkeypatch.setattr(UnitRunner, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            session.step(BATCHES)
        with pytest.raises(RuntimeError, match="half-way"):
            session.flush()


CLIPPED_PLACEMENTS: list[dict[str, object]] = [
    {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "group_size": 1},
    {"parameters": "host", "states": "host", "boundaries": "host"},
    {"parameters": "host", "states": "ssd", "boundaries": "device"},
    {"parameters": "device", "states": "host", "boundaries": "device"},
    {"parameters": "ssd", "states": "host", "boundaries": "device", "device_states_bytes": 60_000},
    {"parameters": "host", "states": "host", "boundaries": "device", "device_states_bytes": 200_000},
]


def stop_at(place: list[int], error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise in the compute op after `place[0]` others; below 0 never."""
    run = UnitRunner.run

    def stop(self, *arguments):  # type: ignore[no-untyped-def]
        place[0] -= 1
        if place[0] == -1:
            raise error("stopped by the test")
        return run(self, *arguments)

    monkeypatch.setattr(UnitRunner, "run", stop)


def stop_and_go_on(
    placement: dict[str, object], error: type[BaseException], places: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some chunks then have had the update of the step before, others wait for theirs: each gets it exactly once."""
    expected = outcome(open_session(serial=True, clip=0.1, **placement), 2)
    place = [-1]
    stop_at(place, error, monkeypatch)
    for number in places:
        with open_session(serial=False, clip=0.1, **placement) as session:
            reports = [session.step(make_batches(2, vocab_size=96, seed=0))]
            before = lent_bytes(session)
            for place[0] in (number, number // 2, number):  # again, before the first has been made good
                with pytest.raises(error):
                    session.step(make_batches(2, vocab_size=96, seed=1))
                assert session.step_number == 1
            place[0] = -1
            assert lent_bytes(session) == before or session._pending is None
            if number % 2:
                session.flush()
            reports.append(session.step(make_batches(2, vocab_size=96, seed=1)))
            session.flush()
            tensors = {name: session.homes.read(name) for name in session.homes.names}
            tensors |= {f"{name}.exp_avg_sq": session.homes.read_state(name, "exp_avg_sq") for name in session.homes.names}
            assert_same(([(report.loss, report.grad_norm) for report in reports], tensors), expected)


ERRORS = [KeyboardInterrupt, MemoryError]
NUM_COMPUTES = 18
"""Forward and backward of five units, two micro-batches; the tail but once."""


@pytest.mark.parametrize(("placement", "error"), list(zip(CLIPPED_PLACEMENTS, itertools.cycle(ERRORS), strict=False)), ids=str)
def test_a_step_that_stops_in_a_compute_op_loses_only_itself(
    placement: dict[str, object], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_and_go_on(placement, error, (1, 4, 7), monkeypatch)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("states", ["host", "ssd"])
def test_updates_that_the_core_has_when_a_step_stops_are_made_once(
    states: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, of 10 ms each, and others wait for their turn."""
    delay_updates(monkeypatch, lambda _: 0.01)
    stop_and_go_on({"parameters": "host", "states": states, "boundaries": "device"}, error, (2,), monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("placement", CLIPPED_PLACEMENTS, ids=str)
def test_a_step_that_stops_in_any_compute_op_loses_only_itself(
    placement: dict[str, object], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_and_go_on(placement, error, range(NUM_COMPUTES), monkeypatch)


def test_a_flush_that_stops_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": 0.1}
    expected = outcome(open_session(serial=True, **fields), 1)
    with open_session(serial=False, **fields) as session:
        report = session.step(make_batches(2, vocab_size=96, seed=0))
        submit, numbers = Lanes.submit, itertools.count()

        def interrupted(self, lane, job, waits):  # type: ignore[no-untyped-def]
            if lane is Lane.HOST_UPDATE and next(numbers) in (2, 5):
                raise KeyboardInterrupt
            return submit(self, lane, job, waits)

        monkeypatch.setattr(Lanes, "submit", interrupted)
        num_stopped = 0
        while session._pending is not None:
            try:
                session.flush()
            except KeyboardInterrupt:
                num_stopped += 1
        assert num_stopped == 2
        tensors = {name: session.homes.read(name) for name in session.homes.names}
        tensors |= {f"{name}.exp_avg_sq": session.homes.read_state(name, "exp_avg_sq") for name in session.homes.names}
    assert_same(([(report.loss, report.grad_norm)], tensors), expected)


def test_a_step_stopped_after_all_pending_updates_were_written_back_lost_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"parameters": "ssd", "states": "ssd", "boundaries": "device", "clip": 1.0}
    expected = outcome(open_session(serial=True, **fields), 1)
    with open_session(serial=True, **fields) as session:
        report = session.step(make_batches(2, vocab_size=96, seed=0))

        def stop(self, op, *rest):  # type: ignore[no-untyped-def]
            if op.phase is Phase.BACKWARD:
                raise KeyboardInterrupt
            return run(self, op, *rest)

        run = UnitRunner.run
        monkeypatch.setattr(UnitRunner, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            session.step(BATCHES)
        tensors = {name: session.homes.read(name) for name in session.homes.names}
        tensors |= {f"{name}.exp_avg_sq": session.homes.read_state(name, "exp_avg_sq") for name in session.homes.names}
    assert_same(([(report.loss, report.grad_norm)], tensors), expected)


def test_ctrl_c_during_the_first_update_on_the_device_closes_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is seen when the native call has returned: the chunk is changed, and a repeated step would change it again."""
    update = updating.update_chunk
    numbers = itertools.count()

    def signalled(*args, **fields):  # type: ignore[no-untyped-def]
        result = update(*args, **fields)
        if next(numbers) == 0:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(updating, "update_chunk", signalled)
    with open_session(serial=False, parameters="device", states="device", boundaries="device") as session:
        with pytest.raises(KeyboardInterrupt):
            session.step(BATCHES)
        with pytest.raises(RuntimeError, match="half-way"):
            session.step(BATCHES)


@pytest.mark.parametrize("lane", [Lane.SSD_READ, Lane.SSD_WRITE])
def test_a_failure_is_told_by_its_own_step_only(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of scratch are handed from step to step with the work that used them; work that failed has ended."""
    submit = Lanes.submit
    num_survived = 0
    for failing in range(0, 60, 6):
        numbers = itertools.count()

        def once(self, where, job, waits, numbers=numbers, failing=failing):  # type: ignore[no-untyped-def]
            def broken() -> None:
                raise StorageError("broken once")

            return submit(self, where, broken if where is lane and next(numbers) == failing else job, waits)

        with open_session(serial=False, parameters="ssd", states="ssd", boundaries="ssd", clip=1.0, group_size=1) as session:
            monkeypatch.setattr(Lanes, "submit", once)
            try:
                session.step(BATCHES)
            except StorageError:
                num_survived += 1
                session.step(BATCHES)
            monkeypatch.setattr(Lanes, "submit", submit)
    assert num_survived > 2


def ctrl_c_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_while_a_step_settles_is_told_when_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, and with a job whose completion its caller never got."""
    settle, ended = Executor._settle, []

    def job() -> None:
        time.sleep(0.3)
        ended.append(True)

    def interrupted(self, step, failure):  # type: ignore[no-untyped-def]
        self.lanes.submit(Lane.SSD_READ, job, ())
        timers = [ctrl_c_after(0.05), ctrl_c_after(0.15)]
        try:
            return settle(self, step, failure)
        finally:
            assert ended
            for timer in timers:
                timer.join()

    monkeypatch.setattr(Executor, "_settle", interrupted)
    fields = {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": 1.0}  # without clip a step settles nothing but compute
    with open_session(serial=False, **fields) as session, pytest.raises(KeyboardInterrupt):
        session.step(BATCHES)


def test_ctrl_c_while_a_pool_waits_for_idle_memory_passes_through_and_loses_no_slot() -> None:
    lanes = Lanes(torch.device("cpu"))
    pool = SlotPool(HostMemory(pin=False, budget_bytes=None), "host", limit_bytes=8192)
    slot = pool.acquire(8192)
    reading = lanes.submit(Lane.SSD_READ, lambda: time.sleep(0.3), ())
    slot.release([reading])
    timer = ctrl_c_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        pool.acquire(4096)
    timer.join()
    assert pool.resident_bytes == 8192
    pool.acquire(4096).release()
    assert reading.is_done and pool.resident_bytes == 4096
    lanes.close()


def test_ctrl_c_while_a_lane_starts_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, start = Lanes(torch.device("cpu")), threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        lanes.submit(Lane.SSD_READ, lambda: None, ())
    monkeypatch.undo()
    lanes.submit(Lane.SSD_READ, lambda: None, ()).wait()
    lanes.close()
    assert threading.active_count() == threads


def test_ctrl_c_while_host_memory_is_mapped_leaves_nothing_half_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMemory(pin=False, budget_bytes=None)

    def interrupted(num_bytes: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "map_anonymous", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.allocate("slot", 4096)
    monkeypatch.undo()
    assert host.allocated_bytes == 0
    host.allocate("slot", 4096)
    host.close()


def test_what_meets_a_full_drive_after_the_step_was_given_up_does_not_wait_until_the_store_proceeds() -> None:
    said: list[str] = []
    waiter = SpaceWaiter(SpacePolicy(poll_s=0.01, report=said.append))
    waiter.interrupt()
    assert not waiter.may_retry("file", errno.ENOSPC, 0.0) and not said
    waiter.proceed()
    assert waiter.may_retry("file", errno.ENOSPC, 0.0) and len(said) == 1
    waiter.interrupt()
    assert not waiter.may_retry("file", errno.ENOSPC, 0.1)
