"""Claims about steps that are stopped half-way: no update is lost, none is done twice, and no failure is told twice."""

from __future__ import annotations

import errno
import itertools
import signal
import threading
import time

import pytest
import torch
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


def test_a_step_stopped_with_pending_updates_done_but_not_written_back_closes_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arithmetic of the step before was done, but states still waited for their write: the homes are old in part."""
    with open_session(serial=False, parameters="ssd", states="ssd", boundaries="device", clip=1.0) as session:
        session.step(BATCHES)
        num_updates = sum(isinstance(item.op, Update) for item in session.schedule(BATCHES).ops)
        submit, run = Lanes.submit, UnitRunner.run

        def late(self, lane, job, waits):  # type: ignore[no-untyped-def]
            def slow_job():  # type: ignore[no-untyped-def]
                time.sleep(0.02)
                return job()

            return submit(self, lane, slow_job if lane is Lane.SSD_WRITE else job, waits)

        def stop(self, op, *rest):  # type: ignore[no-untyped-def]
            if op.phase is not Phase.BACKWARD:
                return run(self, op, *rest)
            while len(session.executor.updated) < num_updates:
                time.sleep(0.001)
            raise KeyboardInterrupt

        monkeypatch.setattr(Lanes, "submit", late)
        monkeypatch.setattr(UnitRunner, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            session.step(BATCHES)
        with pytest.raises(RuntimeError, match="half-way"):
            session.flush()


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

    def interrupted(self, schedule, completions, failure):  # type: ignore[no-untyped-def]
        self.lanes.submit(Lane.SSD_READ, job, ())
        timers = [ctrl_c_after(0.05), ctrl_c_after(0.15)]
        try:
            return settle(self, schedule, completions, failure)
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
