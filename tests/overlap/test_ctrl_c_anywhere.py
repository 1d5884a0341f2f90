"""Ctrl-C at any place of the books of buffers: no slot stays lent, no record of scratch is lost, and the next step runs as ever.

The interpreter looks for signals where a function begins, after a call, and at a jump backwards. `interrupted_at` raises
KeyboardInterrupt at the n-th such place inside chosen files, so every trial can be repeated.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from test_lanes import open_session
from torch import overrides
from training_loop import make_batches

import overspill
from overspill.activations import rebuild, retaining, saved
from overspill.huggingface import HostReads, host_reads
from overspill.runtime import (
    executor,
    landing,
    lanes,
    program_runner,
    residency,
    retained,
    scratch_records,
    session,
    step,
    step_memory,
    verdicts,
    visit,
)
from overspill.spec.tensors import Tier
from overspill.tiers import extents, fake, memory, pool, records

BOOKS = frozenset(str(module.__file__) for module in (residency, scratch_records, pool, memory))
GRAPHS = frozenset(str(module.__file__) for module in (rebuild, retained, retaining, saved, scratch_records, visit))
ALLOCATIONS = BOOKS | {str(module.__file__) for module in (extents, fake, records)}
STEP = BOOKS | {str(module.__file__) for module in (executor, landing, lanes, program_runner, session, step, step_memory, verdicts, visit)}
READS = frozenset(str(module.__file__) for module in (host_reads, overrides, contextlib))
BATCHES = make_batches(2, vocab_size=96, seed=0)


@functools.cache
def places_of(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which the interpreter may have raised KeyboardInterrupt."""
    found, after = set(), True
    for instruction in dis.get_instructions(code):
        if after:
            found.add(instruction.offset)
        after = instruction.opname.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))
    return frozenset(found)


def interrupted_at(number: int, files: frozenset[str], work: Callable[[], Any]) -> bool:
    """Do `work`, with Ctrl-C at place `number` in `files` (this thread alone gets it); whether it came so far."""
    left = number

    def local(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "opcode" and frame.f_lasti in places_of(frame.f_code):
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    sys.settrace(enter)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def lent_bytes(session: overspill.Session) -> dict[Tier, int]:
    """Bytes that the pools think are lent."""
    return {Tier.DEVICE: session.residency.device_pool.used_bytes, Tier.HOST: session.residency.host_pool.used_bytes}


def interrupt_steps(clip: float | None, files: frozenset[str], stride: int, **more: Any) -> int:
    """Interrupt the second step at every `stride`-th place, then step again; how often that was possible."""
    fields: dict[str, Any] = {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": clip, "group_size": 1, **more}
    with open_session(serial=True, **fields) as plain:
        expected = {report.step: (report.loss, report.grad_norm) for report in (plain.step(BATCHES) for _ in range(3))}

    def begin() -> overspill.Session:
        opened = open_session(serial=False, **fields)
        opened.step(BATCHES)
        return opened

    num_survived, place = 0, stride // 2
    current = begin()
    rest = lent_bytes(current)
    while interrupted_at(place, files, functools.partial(current.step, BATCHES)):
        try:
            report = current.step(BATCHES)
        except RuntimeError as error:
            assert "half-way through an update" in str(error), place
        else:
            assert (report.loss, report.grad_norm) == expected[report.step] and lent_bytes(current) == rest, place
            assert len(current.executor.units.retained) == 0, place
            num_survived += 1
        current.close()
        current = begin()
        place += stride
    current.close()
    return num_survived


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
def test_a_step_interrupted_at_any_place_of_the_books_lends_no_slot_for_ever(clip: float | None) -> None:
    assert interrupt_steps(clip, BOOKS, 557) > 5


def test_a_step_interrupted_at_any_place_of_its_kept_graphs_leaves_none_behind() -> None:
    fields: dict[str, Any] = {"parameters": "host", "states": "host", "boundaries": "device", "activations": "ssd"}
    assert interrupt_steps(1.0, GRAPHS, 997, **fields) > 5


@pytest.mark.parametrize("entered", [HostReads.noted, HostReads.answered])
def test_reads_interrupted_at_any_place_are_nobodys_afterwards_and_a_mode_of_the_users_stays(
    entered: Callable[[HostReads], contextlib.AbstractContextManager[None]],
) -> None:
    """A mode that stayed would answer whoever asks next."""
    reads = HostReads()
    with reads.noted():
        bool(torch.ones(3).all())

    def work() -> None:
        with entered(reads):
            bool(torch.ones(3).all())

    place, num_left = 0, 0
    with torch.device("cpu"):
        before = overrides._get_current_function_mode_stack()
        while interrupted_at(place, READS, work):
            num_left += overrides._get_current_function_mode_stack() != before
            host_reads.leave()
            assert overrides._get_current_function_mode_stack() == before, place
            place += 1
    assert num_left > 0


def test_a_step_interrupted_where_its_reads_begin_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(mode: overrides.TorchFunctionMode) -> None:
        overrides.TorchFunctionMode.__enter__(mode)
        raise KeyboardInterrupt

    fields: dict[str, Any] = {"parameters": "host", "states": "host", "boundaries": "device", "group_size": 1}
    with open_session(serial=False, **fields) as opened:
        for mode in (host_reads._Noting, host_reads._Answering):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(mode, "__enter__", interrupted)
                opened.step(BATCHES)
            assert overrides._get_current_function_mode_stack() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
def test_a_step_interrupted_at_many_places_lends_no_slot_for_ever(clip: float | None) -> None:
    assert interrupt_steps(clip, STEP, 61) > 100


def test_the_first_step_interrupted_while_it_makes_its_slots_and_records_can_be_made_again() -> None:
    """Nothing is there yet: every allocation and every record of scratch is interrupted somewhere."""
    for place in range(30, 100_000, 997):
        with open_session(serial=False, parameters="host", states="ssd", boundaries="ssd", group_size=1) as fresh:
            if not interrupted_at(place, ALLOCATIONS, functools.partial(fresh.step, BATCHES)):
                break
            try:
                fresh.step(BATCHES)
            except RuntimeError as error:
                assert "half-way through an update" in str(error), place
            else:
                assert not any(lent_bytes(fresh).values()), place
    assert place > 2000


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
def test_a_step_that_was_made_but_not_counted_is_not_made_again(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the line between: the weights (or the gradients that wait) are the new ones, the number is the old one."""
    with open_session(serial=False, parameters="host", states="host", device_states_bytes=200_000, group_size=1, clip=clip) as opened:
        opened.step(BATCHES)
        run = opened._run

        def interrupted(*args: Any, **kwargs: Any) -> None:
            run(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(opened, "_run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opened.step(BATCHES)
        with pytest.raises(RuntimeError, match="step 2 was made but not counted"):
            opened.step(BATCHES)


def test_a_block_that_was_allocated_and_not_taken_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(serial=False, parameters="host", states="host", boundaries="host", group_size=1) as opened:
        device = opened.residency.device
        allocate = device.allocate

        def interrupted(name: str, num_bytes: int, **kwargs: Any) -> None:
            allocate(name, num_bytes, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(device, "allocate", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opened.step(BATCHES)
        opened.step(BATCHES)
        assert len(device.blocks("device/arena-")) == 1
