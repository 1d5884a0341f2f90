"""The native update is the plain one, bit for bit: claims about `optim.native` and csrc/."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from overspill import optim
from overspill.optim import start_update_chunk, update, update_backend, update_reference
from overspill.optim.segment import segment_table, validate_segment
from overspill.spec.update_rule import AdamW, round_fp32

native = pytest.importorskip("overspill.optim.native", reason="the native core is not built")
core = native._native

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [1, 7, 31, 64, 1003, 32768, 65539]
"""Below, at and above one vector and one piece of 32768 elements, with tails."""
SCALARS = AdamW(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1).scalars(step=3, gradient_scale=round_fp32(1 / 3))


@pytest.mark.parametrize("isa", core.supported_isas())
@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("extreme", [False, True])
def test_every_instruction_set_gives_the_bits_of_the_reference(build_segment, isa, parameter_dtype, gradient_dtype, extreme):
    for length in LENGTHS:
        expected = build_segment(parameter_dtype, gradient_dtype, length, seed=length, extreme=extreme)
        found = expected.clone()
        update_reference(SCALARS, **expected.arguments)
        update(SCALARS, **found.arguments, isa=isa)
        expected.assert_same_bits(found)


@pytest.mark.parametrize("isa", core.supported_isas())
def test_every_half_precision_gradient_is_widened_exactly(build_segment, isa):
    for dtype in (torch.float16, torch.bfloat16):
        expected = build_segment(torch.float32, dtype, 65536)
        expected.gradient.view(torch.int16).copy_(torch.arange(-(2**15), 2**15))
        found = expected.clone()
        update_reference(SCALARS, **expected.arguments)
        update(SCALARS, **found.arguments, isa=isa)
        expected.assert_same_bits(found)


@pytest.mark.parametrize("isa", core.supported_isas())
def test_fp16_parameters_round_to_nearest_even_everywhere(build_segment, isa):
    """Masters around every fp16 value and every midpoint; lr 0, so the update only rounds."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    midpoints = (halves[:-1] + halves[1:]) / 2
    around = torch.cat([halves, midpoints])
    around = torch.cat(
        [around, torch.nextafter(around, around + 1), torch.nextafter(around, around - 1), torch.tensor([65519.99, 65520.0, 7e4])]
    )
    around = torch.cat([around, -around])
    segment = build_segment(torch.float16, torch.float32, len(around))
    segment.states["master"].copy_(around)
    segment.gradient.zero_()
    segment.states["exp_avg"].zero_()  # the update is +0, which leaves -0 as it is
    update(AdamW(lr=0.0).scalars(step=1), **segment.arguments, isa=isa)
    assert torch.equal(segment.states["master"], around)
    expected = around.to(torch.float16)
    assert torch.equal(segment.parameter.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("parameter_dtype", DTYPES)
def test_misaligned_starts_change_nothing_and_nothing_outside_is_touched(build_segment, parameter_dtype):
    whole = build_segment(parameter_dtype, torch.bfloat16, 2000)
    for start, end in ((1, 1000), (3, 1999), (17, 18)):
        expected, found = whole.clone(), whole.clone()
        update_reference(SCALARS, **expected.cut(start, end).arguments)
        update(SCALARS, **found.cut(start, end).arguments)
        expected.assert_same_bits(found)


def test_thread_count_changes_nothing(build_segment):
    segments = [build_segment(torch.bfloat16, torch.float32, 300_001) for _ in range(4)]
    for segment, num_threads in zip(segments, (1, 2, 5, 0), strict=True):
        update(SCALARS, **segment.arguments, num_threads=num_threads)
    for segment in segments[1:]:
        segments[0].assert_same_bits(segment)


def test_calls_from_several_threads_take_turns(build_segment):
    expected = build_segment(torch.bfloat16, torch.bfloat16, 100_000)
    segments = [expected.clone() for _ in range(4)]
    for _ in range(5):
        update_reference(SCALARS, **expected.arguments)

    def work(segment) -> None:
        for _ in range(5):
            update(SCALARS, **segment.arguments, num_threads=3)

    threads = [threading.Thread(target=work, args=(segment,)) for segment in segments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for segment in segments:
        expected.assert_same_bits(segment)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "int8"])
def test_started_updates_give_the_bits_of_those_that_are_waited_for_one_after_the_other(build_segment, state_format):
    lengths = (100_000, 1, 0, 70_001, 300)
    expected = [build_segment(torch.bfloat16, torch.bfloat16, length, state_format=state_format) for length in lengths]
    found = [segment.clone() for segment in expected]
    for _ in range(3):
        for segment in expected:
            update(SCALARS, **segment.arguments)
        started = [start(segment) for segment in found]
        for one in started:
            one.wait()
            assert one.is_done and one.stats == (0, 0.0)
        for before, after in itertools.pairwise(started):
            assert 0 < before.began_s <= before.ended_s <= after.began_s <= after.ended_s < time.perf_counter()
    for segment, other in zip(expected, found, strict=True):
        segment.assert_same_bits(other)


def start(segment, **more):
    layout = validate_segment(segment.parameter, segment.gradient, segment.states, format_name=segment.state_format)
    table = segment_table(segment.parameter.numel(), segment.rounding)
    arguments = {"parameter": segment.parameter, "gradient": segment.gradient, "states": segment.states, "num_threads": 2} | more
    return start_update_chunk([SCALARS], table, state_format=layout, **arguments)


def test_what_is_started_holds_its_tensors_until_it_has_ended_and_no_longer(build_segment):
    segment = build_segment(torch.bfloat16, torch.bfloat16, 3_000_000)
    expected, kept = segment.clone(), segment.parameter.detach()
    update_reference(SCALARS, **expected.arguments)
    started = start(segment)
    gone = [weakref.ref(tensor) for tensor in (segment.parameter, segment.gradient, *segment.states.values())]
    del segment
    assert all(tensor() is not None for tensor in gone)
    started.wait()
    assert all(tensor() is None for tensor in gone)
    assert torch.equal(kept.view(torch.int16), expected.parameter.view(torch.int16))


def test_dropping_what_is_started_waits_for_its_end(build_segment):
    segment = build_segment(torch.bfloat16, torch.bfloat16, 3_000_000)
    expected = segment.clone()
    update_reference(SCALARS, **expected.arguments)
    start(segment)
    segment.assert_same_bits(expected)


def test_what_cannot_be_started_raises_at_once_and_writes_nothing(build_segment):
    segment = build_segment(torch.float32, torch.float32, 64)
    before = segment.clone()
    with pytest.raises(ValueError, match="overlap: 256 B"):
        start(segment, gradient=segment.parameter)
    segment.assert_same_bits(before)


def test_ctrl_c_ends_the_wait_for_what_is_started_and_not_the_update(build_segment):
    """With one thread no two updates overlap, so they may be of the same segment."""
    found = build_segment(torch.bfloat16, torch.bfloat16, 1_000_000)
    expected = found.clone()
    for _ in range(800):
        update(SCALARS, **expected.arguments)
    started = [start(found, num_threads=1) for _ in range(800)]  # most of a second of one thread
    timer = threading.Timer(0.01, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        started[-1].wait()
    assert not started[-1].is_done, "it looks for signals ten times a second"
    started[-1].wait()
    timer.join()
    found.assert_same_bits(expected)


def _start_in_child(queue, started, segment) -> None:
    try:
        started.wait()
    except RuntimeError as error:
        queue.put(str(error))
    del started  # waits for nobody
    start(segment).wait()
    queue.put("made")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_waits_for_nothing_that_its_parent_has_started(build_segment):
    large, small = (build_segment(torch.bfloat16, torch.bfloat16, length) for length in (1_000_000, 70_000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    started = [start(large, num_threads=1) for _ in range(400)]  # a second of one thread, so no two overlap
    child = context.Process(target=_start_in_child, args=(queue, started.pop(), small))
    child.start()
    try:
        assert "process that was forked" in queue.get(timeout=30) and queue.get(timeout=30) == "made"
        child.join(timeout=30)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.terminate()


AT_EXIT = """
import threading, torch
from overspill.optim import start_update_chunk
from overspill.optim.segment import segment_table
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.update_rule import SGD

tensors = {"parameter": torch.ones(8_000_000), "gradient": torch.ones(8_000_000), "states": {}}
layout, scalars = resolve_state_format("fp32", "float32", "sgd"), [SGD(lr=0.1, momentum=0.0).scalars(step=1)]
started = []

def work():
    while True:
        started.append(start_update_chunk(scalars, segment_table(8_000_000), state_format=layout, num_threads=1, **tensors))
        started[-1].wait()

threading.Thread(target=work, daemon=True).start()
while len(started) < 3:
    pass
"""


def test_an_interpreter_that_ends_while_a_daemon_thread_waits_for_an_update_ends_well():
    """As with a session that nobody has closed."""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0 and not ended.stderr, ended.stderr


def test_without_the_native_core_what_is_started_is_made(build_segment, monkeypatch):
    expected, found = (build_segment(torch.bfloat16, torch.float16, 99) for _ in range(2))
    update_reference(SCALARS, **expected.arguments)
    monkeypatch.setattr(optim, "_HAS_NATIVE", False)
    assert start(found) is None
    expected.assert_same_bits(found)


def _finite_in_child(queue, values: torch.Tensor) -> None:
    """Only the native core works here: torch's own OpenMP threads do not survive a fork."""
    queue.put(native.all_finite_native(values, num_threads=2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    values = torch.zeros(200_000)
    assert native.all_finite_native(values, num_threads=2)  # the parent's pool exists
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_finite_in_child, args=(queue, values))
    child.start()
    try:
        assert queue.get(timeout=30)
    finally:
        child.join(timeout=30)
        if child.is_alive():
            child.terminate()


def test_denormals_survive_a_caller_that_flushes_them(build_segment):
    expected = build_segment(torch.float32, torch.float32, 1000, extreme=True)
    found = expected.clone()
    update_reference(SCALARS, **expected.arguments)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        update(SCALARS, **found.arguments, num_threads=1)
        assert torch.tensor([1e-40]).mul(1.0).item() == 0.0, "the caller's own setting must be left as it was"
    finally:
        torch.set_flush_denormal(False)
    expected.assert_same_bits(found)


def test_update_uses_the_native_core_on_the_cpu(build_segment, monkeypatch):
    assert update_backend() == update_backend("cpu") == "native"
    assert torch.cuda.is_available() or update_backend("cuda") == "reference"
    expected, found = (build_segment(torch.float16, torch.float16, 99) for _ in range(2))
    update_reference(SCALARS, **expected.arguments)
    monkeypatch.setattr(optim, "update_reference", None)
    update(SCALARS, **found.arguments, num_threads=1)
    expected.assert_same_bits(found)


def test_update_uses_the_reference_without_the_native_core(build_segment, monkeypatch):
    monkeypatch.setattr(optim, "_HAS_NATIVE", False)
    monkeypatch.setattr(native, "update_chunk_native", None)
    assert update_backend() == "reference"
    expected, found = (build_segment(torch.bfloat16, torch.float16, 99) for _ in range(2))
    update_reference(SCALARS, **expected.arguments)
    update(SCALARS, **found.arguments)
    expected.assert_same_bits(found)


def test_wrong_arguments_are_refused_and_nothing_is_written(build_segment):
    segment = build_segment(torch.float32, torch.float32, 64)
    before = segment.clone()
    with pytest.raises(ValueError, match="overlap: 256 B"):
        update(SCALARS, **(segment.arguments | {"gradient": segment.parameter}))
    with pytest.raises(ValueError, match="'sse9' cannot run here; choose one of .*baseline"):
        update(SCALARS, **segment.arguments, isa="sse9")
    with pytest.raises(ValueError, match="num_threads must be 0 .* got -1"):
        update(SCALARS, **segment.arguments, num_threads=-1)
    with pytest.raises(ValueError, match="contiguous tensor"):
        native.all_finite_native(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="no multiple of its element size 4 B"):
        core.all_finite(segment.parameter.data_ptr() + 2, dtype="float32", num_elements=1)
    with pytest.raises(ValueError, match="data is null"):
        core.all_finite(0, dtype="float32", num_elements=1)
    segment.assert_same_bits(before)


def test_an_empty_segment_is_no_work(build_segment):
    segment = build_segment(torch.bfloat16, torch.bfloat16, 0)
    update(SCALARS, **segment.arguments)


PRIORITIES = """
import os
import torch
from overspill.optim import let_helpers_give_way
from overspill.optim.native import all_finite_native

def raised():
    for _ in range(50):  # a thread lowers its own before its first task, and which of them gets one is not defined
        all_finite_native(torch.zeros(4_000_000), num_threads=3)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    return [number for task in os.listdir("/proc/self/task") if (number := os.getpriority(os.PRIO_PROCESS, int(task))) != own]

assert not raised()
let_helpers_give_way()
found = raised()
assert found and len(found) <= 2 and set(found) == {os.getpriority(os.PRIO_PROCESS, 0) + 5}, found
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
def test_helpers_give_way_once_they_are_told_and_callers_do_not():
    """In a process of its own: a priority that was lowered stays."""
    done = subprocess.run([sys.executable, "-c", PRIORITIES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
