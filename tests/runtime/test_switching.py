"""Threads of lanes get the interpreter promptly while a session lives, and the process's setting comes back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tiny_models import tiny_model
from training_loop import make_batches

import overspill
from overspill.switching import SWITCH_S, PromptSwitches

PLAN = overspill.PlanRequest(parameters="host", states="host", boundaries="host", seq_len=12, micro_batch=2, accumulate=1)


@pytest.fixture(autouse=True)
def interval() -> Iterator[float]:
    before = sys.getswitchinterval()
    yield before
    assert sys.getswitchinterval() == before
    sys.setswitchinterval(before)


def test_the_last_one_puts_back_what_was_before(interval: float) -> None:
    first, second = PromptSwitches(), PromptSwitches()
    first.hold()
    first.hold()
    second.hold()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    first.release()
    first.release()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    second.release()
    assert sys.getswitchinterval() == interval
    first.hold()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S), "and again"
    first.release()


def test_what_the_user_sets_stays(interval: float) -> None:
    switches = PromptSwitches()
    for before, meanwhile in ((SWITCH_S / 2, None), (interval, 2e-3)):
        sys.setswitchinterval(before)
        chosen = sys.getswitchinterval()
        switches.hold()
        assert sys.getswitchinterval() <= SWITCH_S
        if meanwhile is not None:
            sys.setswitchinterval(meanwhile)
            chosen = sys.getswitchinterval()
        switches.release()
        assert sys.getswitchinterval() == chosen
    sys.setswitchinterval(interval)


def test_sessions_hold_it_until_the_last_is_closed(interval: float) -> None:
    sessions = [overspill.Session(tiny_model("llama"), plan=PLAN, optimizer=overspill.AdamW(lr=1e-2)) for _ in range(2)]
    for session in sessions:
        session.step(make_batches(1, vocab_size=96, seed=0))
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    sessions[0].close()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    sessions[1].close()
    assert sys.getswitchinterval() == interval


@pytest.mark.clock
def test_short_calls_beside_a_thread_that_runs_python_do_not_wait_for_it() -> None:
    chunk, stop, spent_s = torch.zeros(1_000_000), threading.Event(), {False: 0.0, True: 0.0}

    def call(is_prompt: bool) -> None:
        begun_s = time.perf_counter()
        for _ in range(25):
            chunk.add_(1.0)
        spent_s[is_prompt] += time.perf_counter() - begun_s

    def compute() -> None:
        while not stop.is_set():
            sum(range(50))

    computing = threading.Thread(target=compute)
    computing.start()
    try:
        for is_prompt in (False, True) * 6:
            switches = PromptSwitches()
            if is_prompt:
                switches.hold()
            calling = threading.Thread(target=call, args=(is_prompt,))
            calling.start()
            calling.join()
            switches.release()
    finally:
        stop.set()
        computing.join()
    assert spent_s[True] < 0.7 * spent_s[False]
