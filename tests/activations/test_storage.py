"""Where and in what form records are stored: ranges of host memory that never meet, forms with a known error."""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import build, offload, run_step
from torch import nn

from overspill.activations.arena import HostArena, Range
from overspill.activations.forms import AsIs, Bf16, Int8Groups
from overspill.activations.links import ThreadEnd, ThreadLink
from overspill.activations.ssd_lane import SsdLane
from overspill.tiers import FakeStore, HostMemory


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ranges_never_meet_and_never_exceed_the_limit(data: st.DataObject) -> None:
    memory = HostMemory(pin=False, budget_bytes=1 << 20)
    arena = HostArena(memory, "saved", limit_bytes=1 << 19, segment_bytes=1 << 16)
    lent: list[Range] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if lent and data.draw(st.booleans()):
            arena.give(lent.pop(data.draw(st.integers(0, len(lent) - 1))))
            continue
        found = arena.take(data.draw(st.integers(1, 1 << 18)))
        if found is not None:
            assert found.tensor.data_ptr() % 4096 == 0
            lent.append(found)
        spans = sorted((item.tensor.data_ptr(), item.tensor.data_ptr() + item.tensor.numel()) for item in lent)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert arena.used_bytes == sum(item.num_bytes for item in lent) <= memory.allocated_bytes <= 1 << 19
    for item in lent:
        arena.give(item)
    whole = arena.take(1 << 19)
    assert whole is not None, "empty segments make room for one that fits nowhere"
    assert arena.take(1) is None
    arena.give(whole)
    arena.close()
    assert memory.allocated_bytes == 0


def test_rounds_of_changing_lengths_pin_nothing_again() -> None:
    memory = HostMemory(pin=False, budget_bytes=1 << 20)
    arena = HostArena(memory, "saved", limit_bytes=1 << 20, segment_bytes=1 << 20)
    for length in range(1, 50):
        ranges = [arena.take(length * 999) for _ in range(10)]
        assert None not in ranges and memory.allocated_bytes == 1 << 20
        for item in reversed(ranges):
            assert item is not None
            arena.give(item)


def test_a_range_comes_with_the_work_that_still_touches_its_bytes() -> None:
    memory = HostMemory(pin=False, budget_bytes=1 << 20)
    arena = HostArena(memory, "saved", limit_bytes=1 << 16, segment_bytes=1 << 16)
    first, second, rest = arena.take(8192), arena.take(8192), arena.take((1 << 16) - 16384)
    assert first is not None and second is not None and rest is not None
    under_way, has_ended = pending(8192)
    arena.give(first, [under_way])
    arena.give(second)
    again, beyond = arena.take(4096), arena.take(12288)
    assert again is not None and again.after == (under_way,)
    assert beyond is not None and beyond.after == (under_way,)
    arena.give(rest)
    far = arena.take(4096)
    assert far is not None and far.after == ()
    has_ended.set_result(None)
    arena.give(again)
    once_more = arena.take(4096)
    assert once_more is not None and once_more.after == ()


def test_the_next_of_the_same_length_gets_the_same_bytes_and_all_work_that_touches_them() -> None:
    """Also what touched them before somebody had them for nothing."""
    arena = HostArena(HostMemory(pin=False, budget_bytes=1 << 20), "saved", limit_bytes=1 << 16, segment_bytes=1 << 16)
    before, other = arena.take(5000), arena.take(8192)
    assert before is not None and other is not None
    (earlier, has_ended), (later, _) = pending(5000), pending(5000)
    arena.give(before, [earlier])
    unused = arena.take(5000)
    assert unused is not None and unused.after == (earlier,) and unused.tensor.data_ptr() == before.tensor.data_ptr()
    arena.give(unused)
    used = arena.take(5000)
    assert used is not None and used.after == (earlier,)
    arena.give(used, [later])
    assert arena.used_bytes == 8192
    has_ended.set_result(None)
    last = arena.take(5000)
    assert last is not None and last.after == (later,) and arena.used_bytes == 8192 + 8192 == arena.peak_bytes
    with pytest.raises(AssertionError, match="given back twice"):
        arena.give(used)


def test_what_was_given_back_serves_a_request_of_any_length_before_more_is_pinned() -> None:
    memory = HostMemory(pin=False, budget_bytes=1 << 20)
    arena = HostArena(memory, "saved", limit_bytes=1 << 17, segment_bytes=1 << 16)
    ranges = [arena.take(8192) for _ in range(8)]
    under_way, _ = pending(8192)
    for item in ranges:
        assert item is not None
        arena.give(item, [under_way])
    whole = arena.take(1 << 16)
    assert whole is not None and whole.after == (under_way,) * 8 and memory.allocated_bytes == 1 << 16


def test_rounds_of_changing_lengths_find_the_room_that_they_would_find_in_an_empty_arena() -> None:
    """Though what the round before has given back is cut still."""
    page = 4096
    arena = HostArena(HostMemory(pin=False, budget_bytes=100 * page), "saved", limit_bytes=100 * page, segment_bytes=100 * page)
    for pages in ([6] * 10, [10, 10, 10, 65], [6] * 16, [10, 10, 10, 65]):
        ranges = [arena.take(number * page) for number in pages]
        assert None not in ranges, f"{ranges.index(None)} ranges of {pages} pages found room"
        for item in reversed(ranges):
            assert item is not None
            arena.give(item)


def test_tensors_of_just_over_half_of_a_segment_do_not_leave_half_of_the_arena_empty() -> None:
    page, memory = 4096, HostMemory(pin=False, budget_bytes=256 * 4096)
    arena = HostArena(memory, "saved", limit_bytes=256 * page, segment_bytes=16 * page)

    def most(num_pages: int) -> int:
        ranges = [item for item in iter(lambda: arena.take(num_pages * page), None)]
        for item in reversed(ranges):
            arena.give(item)
        arena.mend()
        return len(ranges)

    assert [most(pages) for pages in (1, 9, 9, 9)] == [256, 16, 28, 28]
    assert [most(pages) for pages in (33, 33, 33)] == [4, 7, 7], "and of the larger ones that it has then"
    assert most(129) == 1 and memory.allocated_bytes == memory.peak_bytes == 256 * page, "what was pinned is freed before"


def test_an_arena_that_lends_or_wastes_little_stays_as_it_is() -> None:
    page, memory = 4096, HostMemory(pin=False, budget_bytes=256 * 4096)
    arena = HostArena(memory, "saved", limit_bytes=256 * page, segment_bytes=16 * page)
    held = arena.take(page)
    assert held is not None
    for _ in range(3):
        ranges = [item for item in iter(lambda: arena.take(9 * page), None)]
        assert len(ranges) == 16 and held.tensor.data_ptr() == arena._segments[0].tensor.data_ptr()
        for item in ranges:
            arena.give(item)
        arena.mend()
    arena.give(held)
    arena.mend()
    larger = arena.take(9 * page)
    assert larger is not None and len(arena._segments) == 1 and arena._segments[0].tensor.numel() == 64 * page
    arena.close()
    full = HostArena(memory, "saved", limit_bytes=256 * page, segment_bytes=16 * page)
    for pages in (5, 7):  # a sixteenth and an eighth of it are ends of segments
        ranges = [item for item in iter(lambda pages=pages: full.take(pages * page), None)]
        for item in ranges:
            full.give(item)
        full.mend()
        assert len(ranges) == 16 * (16 // pages) and len(full._segments) == 16


@pytest.mark.parametrize("grows", [False, True])
def test_a_wait_that_is_broken_off_while_segments_are_freed_leaves_an_arena_that_goes_on(grows: bool) -> None:
    """By mending, or by a request that wants the place of empty ones: no segment is lent that is free, none is held that nobody knows."""

    class BrokenOff(ThreadEnd):
        num_waits = 0
        is_done = property(lambda self: self.num_waits > 1)

        def wait(self) -> None:
            self.num_waits += 1
            if self.num_waits == 1:
                raise KeyboardInterrupt

    page, memory = 4096, HostMemory(pin=False, budget_bytes=64 * 4096)
    arena = HostArena(memory, "saved", limit_bytes=64 * page, segment_bytes=16 * page)
    ranges = [item for item in iter(lambda: arena.take(9 * page), None)]
    assert len(ranges) == 4
    for number, item in enumerate(ranges):
        arena.give(item, [BrokenOff(item.num_bytes)] if number == 2 else [])
    with pytest.raises(KeyboardInterrupt):
        arena.take(60 * page) if grows else arena.mend()
    assert memory.allocated_bytes == sum(segment.tensor.numel() for segment in arena._segments) == 32 * page
    again = arena.take(9 * page)
    assert again is not None and any(again.tensor.data_ptr() == segment.tensor.data_ptr() for segment in arena._segments)
    arena.give(again)
    arena.mend()
    assert len([item for item in iter(lambda: arena.take(9 * page), None)]) == 7
    arena.close()
    assert memory.allocated_bytes == 0


@pytest.mark.parametrize("amount", ["everything", "adaptive"])
def test_tensors_that_fill_half_of_what_they_are_given_leave_all_once_that_is_mended(amount: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not in a round that is watched, whose times would be those of pinning."""
    monkeypatch.setattr("overspill.activations.arena.LEAST_SEGMENT_BYTES", 4096)
    monkeypatch.setattr("overspill.activations.steadying.AGREEING", 1.0)  # a link that is in doubt has every round watched
    mended: list[int] = []
    mend = HostArena.mend

    def counted(arena: HostArena) -> None:
        before = arena._segment_bytes
        mend(arena)
        if arena._segment_bytes != before:
            mended.append(number)

    monkeypatch.setattr(HostArena, "mend", counted)
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(32, 32, bias=False), nn.Tanh())))
    inputs = torch.randn(288, 32)  # 36 KiB, and a sixteenth of the budget has 64

    def step() -> torch.Tensor:
        return net(inputs).square().sum()

    expected = run_step(net, step)
    with offload(net, amount=amount, host_budget="1MiB", min_bytes=8192) as active:
        for number in range(1, 25):  # noqa: B007 - the hook above tells it
            loss, gradients = run_step(net, step)
            assert loss == expected[0] and all(torch.equal(gradients[name], expected[1][name]) for name in gradients)
        rounds = active.report().rounds
    assert rounds[0].host_bytes == 16 * 36 * 1024 < rounds[0].packed_bytes
    assert len(mended) == 1 and (mended[0] == 2 if amount == "everything" else mended[0] > 3), "the second and the third are watched"
    assert amount == "adaptive" or rounds[1].host_bytes == rounds[1].packed_bytes


def pending(num_bytes: int) -> tuple[ThreadEnd, Future]:  # type: ignore[type-arg]
    end = ThreadEnd(num_bytes)
    end._future = Future()
    return end, end._future


def test_staging_that_was_lent_goes_back_with_what_reads_it() -> None:
    """A record that is wanted while its write waits is copied from staging; the next one to use the bytes waits for that copy."""
    arena = HostArena(HostMemory(pin=False, budget_bytes=1 << 16), "staging", limit_bytes=1 << 16, segment_bytes=1 << 16)
    lane = SsdLane(FakeStore(1 << 20), 1 << 20, arena)
    staging = arena.take(1 << 16)
    assert staging is not None
    copy = lane.reserve(staging)
    assert copy is not None
    (arrived, has_arrived), (reading, has_read) = pending(1 << 16), pending(1 << 16)
    lane.start_write(copy, arrived)
    assert copy.lend(lambda staged: reading) is reading and arena.take(1) is None
    has_arrived.set_result(None)
    copy.settle()
    assert copy.lend(lambda staged: reading) is None, "it is on the SSD alone now"
    again = arena.take(1 << 16)
    assert again is not None and again.after == (reading,)
    has_read.set_result(None)
    arena.give(again)
    lane.free(copy, arrived)
    assert lane.used_bytes == 0
    lane.close()


VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=700)


@settings(max_examples=60, deadline=None)
@given(values=VALUES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_8_bit_groups_are_within_half_a_step_of_their_group(values: list[float], dtype: torch.dtype) -> None:
    form, given_values = Int8Groups(), torch.tensor(values).to(dtype)
    stored = form.encode(given_values)
    back = form.decode(stored, dtype, given_values.numel())
    assert back.dtype == dtype and back.shape == given_values.shape
    assert stored.numel() == -(-given_values.numel() // 256) * (256 + 8)
    for start in range(0, given_values.numel(), 256):
        group, found = given_values[start : start + 256].double(), back[start : start + 256].double()
        spread = float(group.max() - group.min())
        rounding = float(group.abs().max()) * torch.finfo(dtype).eps
        assert float((group - found).abs().max()) <= spread / 510 * 1.001 + rounding


@settings(max_examples=40, deadline=None)
@given(values=VALUES)
def test_bf16_halves_fp32_within_its_rounding(values: list[float]) -> None:
    given_values = torch.tensor(values)
    stored = Bf16().encode(given_values)
    assert stored.numel() == 2 * given_values.numel()
    assert torch.equal(Bf16().decode(stored, torch.float32, len(values)), given_values.to(torch.bfloat16).float())
    assert torch.equal(AsIs().decode(AsIs().encode(given_values), torch.float32, len(values)), given_values)


def test_a_group_that_is_not_finite_comes_back_as_nan_and_not_as_a_number() -> None:
    values = torch.zeros(512)
    values[3] = float("inf")
    back = Int8Groups().decode(Int8Groups().encode(values), torch.float32, 512)
    assert back[:256].isnan().all() and (back[256:] == 0).all()


@pytest.mark.parametrize(("form", "least", "most", "share"), [("as_is", 0, 0, 1.0), ("bf16", 1e-6, 0.01, 0.6), ("int8", 1e-6, 0.05, 0.4)])
def test_what_a_form_does_to_the_gradient_is_measured_and_reported(form: str, least: float, most: float, share: float) -> None:
    model, step = build("llama")
    before = run_step(model, step)[1]
    state = torch.get_rng_state()
    active = offload(model, storage=form)
    error = active.measure_gradient_error(lambda: step().backward())
    assert least <= error <= most
    report = active.report()
    assert report.gradient_error == error
    assert report.stored_bytes <= share * (report.host_bytes + report.ssd_bytes) + 1
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name]), "gradients are as before"


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_mask_of_floats_is_stored_as_it_is(form: str, masked: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    inputs, mask = torch.randn(2, 16, 32), torch.full((16, 16), masked).triu(1)

    def step() -> None:
        heads = layer(inputs).view(2, 16, 4, 8).transpose(1, 2)
        nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).square().sum().backward()

    assert 0 < offload(layer, storage=form).measure_gradient_error(step) < 0.02


def test_measuring_an_error_leaves_statistics_alone_and_counts_imaginary_parts() -> None:
    model, step = build("conv")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    offload(model, storage="int8").measure_gradient_error(lambda: step().backward())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    turned = nn.ParameterList([torch.zeros(64, dtype=torch.complex64)])
    values = iter([1.0, 1.01])

    def real_then_turned() -> None:
        turned[0].grad = torch.full((64,), next(values) * 1j, dtype=torch.complex64)

    assert offload(turned, storage="int8").measure_gradient_error(real_then_turned) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_lossy_gradient_does_not_depend_on_what_was_in_time(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is forwarded goes through its form as well."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)])
    inputs = torch.randn(16, 32)

    def step() -> torch.Tensor:
        return model(inputs).square().sum()

    seen = []
    copy = ThreadLink.copy

    def slow(self, end, target, source, after):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        copy(self, end, target, source, after)

    for window in ("1KiB", "64MiB"):
        with offload(model, storage=form, window=window) as active:
            seen.append(run_step(model, step)[1])
        monkeypatch.setattr(ThreadLink, "copy", slow)
    assert active.report().forwarded_bytes > 0
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
