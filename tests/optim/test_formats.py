"""Every optimizer in every state format, plain and native: claims about `optim.narrow`, `optim.native` and csrc/."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from update_matrix import GRADIENTS, LAYOUTS, OPTIMIZERS, by_kind

from overspill.optim import SEGMENT_DTYPE, Rounding, narrow, reference, update, update_chunk, update_reference
from overspill.spec.state_formats import STATE_FORMATS, resolve_state_format
from overspill.spec.update_rule import AdamW, Lion, round_fp32

native = pytest.importorskip("overspill.optim.native", reason="the native core is not built")
core = native._native

LENGTHS = [1, 15, 255, 256, 257, 1003, 32768 + 517]


@pytest.mark.parametrize("isa", core.supported_isas())
@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=by_kind)
def test_every_instruction_set_gives_the_bits_of_the_reference(build_segment, isa, state_format, dtype, optimizer):
    scalars = optimizer.scalars(step=3, gradient_scale=round_fp32(1 / 3))
    for index, length in enumerate(LENGTHS):
        expected = build_segment(
            dtype,
            GRADIENTS[index % 3],
            length,
            seed=length,
            extreme=index % 2 == 1,
            state_format=state_format,
            optimizer=optimizer.kind,
        )
        found = expected.clone()
        plain = update_reference(scalars, **expected.arguments)
        stats = update(scalars, **found.arguments, isa=isa)
        expected.assert_same_bits(found)
        assert stats.num_non_finite == plain.num_non_finite
        assert stats.sum_of_squares == pytest.approx(plain.sum_of_squares, rel=1e-6, nan_ok=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=by_kind)
def test_cuda_gives_the_bits_of_the_cpu_in_every_format(build_segment, state_format, dtype, optimizer):
    for extreme in (False, True):
        segment = build_segment(dtype, torch.bfloat16, 100_001, extreme=extreme, state_format=state_format, optimizer=optimizer.kind)
        on_device = segment.to("cuda")
        for step in (1, 2):
            scalars = optimizer.scalars(step=step, gradient_scale=round_fp32(0.7))
            update(scalars, **segment.arguments)
            update(scalars, **on_device.arguments)
            segment.assert_same_bits(on_device.to("cpu"))


@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=by_kind)
def test_chunks_threads_and_slices_change_nothing(build_segment, monkeypatch, state_format, dtype, optimizer):
    scalars = optimizer.scalars(step=2)
    length = 70_001
    whole = build_segment(dtype, torch.float32, length, state_format=state_format, optimizer=optimizer.kind)
    cut, threaded, plain = whole.clone(), whole.clone(), whole.clone()
    update(scalars, **whole.arguments, num_threads=1)
    for start, end in ((0, 256), (256, 33_024), (33_024, length)):
        update(scalars, **cut.cut(start, end).arguments, num_threads=1)
    update(scalars, **threaded.arguments, num_threads=7)
    monkeypatch.setattr(reference, "SLICE_ELEMENTS", 1000)
    update_reference(scalars, **plain.arguments)
    for other in (cut, threaded, plain):
        whole.assert_same_bits(other)


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[0], OPTIMIZERS[-1]], ids=by_kind)
def test_rounding_is_the_same_with_every_number_of_threads_from_1_to_16(build_segment, state_format, optimizer):
    whole = build_segment(torch.bfloat16, torch.bfloat16, 20 * 8192 + 77, state_format=state_format, optimizer=optimizer.kind)
    others = {number: whole.clone() for number in range(2, 17)}
    update(optimizer.scalars(step=2), **whole.arguments, num_threads=1)
    for number, other in others.items():
        update(optimizer.scalars(step=2), **other.arguments, num_threads=number)
        whole.assert_same_bits(other)


@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
def test_misaligned_starts_change_nothing(build_segment, state_format):
    scalars = OPTIMIZERS[0].scalars(step=2)
    whole = build_segment(torch.bfloat16, torch.bfloat16, 2000, state_format=state_format)
    for start, end in ((1, 1000), (3, 1999), (17, 18)):
        expected, found = whole.clone(), whole.clone()
        update_reference(scalars, **expected.cut(start, end).arguments)
        update(scalars, **found.cut(start, end).arguments)
        expected.assert_same_bits(found)


@pytest.mark.parametrize("isa", core.supported_isas())
@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_rounding_takes_its_bits_from_an_elements_number_wherever_a_segment_starts_in_its_tensor(build_segment, isa, state_format):
    scalars = OPTIMIZERS[0].scalars(step=2)
    for first in (77, 2**16 - 256, 2**16 + 256 * 41, 2**24 - 1, 2**32 - 512):  # in and across blocks, halves and words of numbers
        expected = build_segment(torch.bfloat16, torch.bfloat16, 2048, state_format=state_format)
        expected.rounding = Rounding(key=0x3C6EF372FE94F82B, first_element=first)
        found = expected.clone()
        update_reference(scalars, **expected.arguments)
        update(scalars, **found.arguments, isa=isa)
        expected.assert_same_bits(found)


def segment_rows(*rows: tuple[int, int, int, int, int]) -> np.ndarray:
    return np.array(list(rows), dtype=SEGMENT_DTYPE)


@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_chunk_in_one_call_is_its_segments_one_by_one_and_padding_is_left_alone(build_segment, monkeypatch, state_format, backend):
    monkeypatch.setattr("overspill.optim._HAS_NATIVE", backend == "native")
    optimizer = OPTIMIZERS[0]
    sets = [optimizer.scalars(step=5), optimizer.scalars(step=5, weight_decay=0.0)]
    chunk = build_segment(torch.bfloat16, torch.bfloat16, 40_960, state_format=state_format)
    expected = chunk.clone()
    rows = segment_rows((0, 1000, 7, 512, 0), (1024, 300, 8, 0, 1), (1536, 35_000, 9, 0, 0))
    squares = 0.0
    for start, number, key, first, index in rows.tolist():
        part = expected.cut(start, start + number)
        part.rounding = Rounding(key=key, first_element=first)
        squares += update_reference(sets[index], **part.arguments).sum_of_squares
    stats = update_chunk(
        sets,
        rows,
        state_format=resolve_state_format(state_format, "bfloat16"),
        parameter=chunk.parameter,
        gradient=chunk.gradient,
        states=chunk.states,
        num_threads=3,
    )
    expected.assert_same_bits(chunk)
    assert stats.num_non_finite == 0 and stats.sum_of_squares == pytest.approx(squares, rel=1e-6)


def test_wrong_tables_and_scalars_are_refused_and_nothing_is_written(build_segment):
    chunk = build_segment(torch.bfloat16, torch.bfloat16, 1024, state_format="int8")
    before = chunk.clone()
    arguments = {"parameter": chunk.parameter, "gradient": chunk.gradient, "states": chunk.states}
    layout = resolve_state_format("int8", "bfloat16")
    scalars = [OPTIMIZERS[0].scalars(step=1)]
    cases = [
        (segment_rows((0, 600, 0, 0, 0), (512, 100, 0, 0, 0)), "range 1 .* must start at or after 768"),
        (segment_rows((0, 2000, 0, 0, 0)), "end within the chunk's 1024 elements"),
        (segment_rows((128, 100, 0, 0, 0)), "multiple of 256 in format int8"),
        (segment_rows((0, 100, 0, 0, 3)), "wants scalars 3, only 1 were given"),
    ]
    for rows, words in cases:
        with pytest.raises(ValueError, match=words):
            native.update_chunk_native(scalars, rows, state_format=layout, **arguments)
    with pytest.raises(ValueError, match="scalars are of the optimizer lion, the state is of adamw"):
        native.update_chunk_native([OPTIMIZERS[4].scalars(step=1)], cases[1][0], state_format=layout, **arguments)
    with pytest.raises(ValueError, match="rounds stochastically; give rounding"):
        update(scalars[0], **arguments, state_format="int8")
    with pytest.raises(ValueError, match=r"exp_avg_exponent has 2 elements .* \(4 values are needed\)"):
        short = chunk.states | {"exp_avg_exponent": chunk.states["exp_avg_exponent"][:2]}
        update_reference(scalars[0], **(chunk.arguments | {"states": short}))
    chunk.assert_same_bits(before)


@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=by_kind)
def test_zero_stays_zero_in_every_format(build_segment, state_format, dtype, optimizer):
    segment = build_segment(dtype, torch.bfloat16, 300, state_format=state_format, optimizer=optimizer.kind)
    for tensor in (segment.parameter, segment.gradient, *segment.states.values()):
        tensor.zero_()
    for step in (1, 2, 1000):
        update_reference(optimizer.scalars(step=step), **segment.arguments)
    for name, tensor in {"parameter": segment.parameter, **segment.states}.items():
        assert name.endswith("_exponent") or tensor.view(torch.uint8).count_nonzero() == 0, name


def test_stats_count_what_is_not_finite_and_the_rest_of_the_pass_is_the_same(build_segment):
    for dtype in GRADIENTS:
        segment = build_segment(torch.bfloat16, dtype, 33_333)
        segment.gradient[[0, 17, 32_767, 32_768, 33_332]] = torch.tensor([math.inf, -math.inf, math.nan, math.inf, math.nan], dtype=dtype)
        other = segment.clone()
        scalars = OPTIMIZERS[0].scalars(step=1)
        assert update(scalars, **segment.arguments).num_non_finite == 5
        assert update(scalars, **other.arguments, with_stats=False) == reference.NO_STATS
        segment.assert_same_bits(other)


@pytest.mark.parametrize("isa", core.supported_isas())
def test_the_sum_of_squares_depends_neither_on_threads_nor_on_the_instruction_set(build_segment, isa):
    segments = [build_segment(torch.float32, torch.bfloat16, 100_003) for _ in range(3)]
    sums = {
        update(OPTIMIZERS[0].scalars(step=1), **segments[0].arguments, isa=isa).sum_of_squares,
        update(OPTIMIZERS[0].scalars(step=1), **segments[1].arguments, isa="baseline", num_threads=1).sum_of_squares,
        update(OPTIMIZERS[0].scalars(step=1), **segments[2].arguments, isa=isa, num_threads=5).sum_of_squares,
    }
    assert len(sums) == 1


@pytest.mark.parametrize("isa", core.supported_isas())
def test_squares_that_vanish_beside_large_ones_are_rounded_alike_everywhere(build_segment, isa):
    """Where a CPU multiplies and adds in one instruction and where it does not, in loops of their own and in stages."""
    length = 64 * 256 + 77
    generator = torch.Generator().manual_seed(3)
    gradient = (10 ** (torch.rand(length, generator=generator, dtype=torch.float64) * 42 - 38)).bfloat16()
    sums = set()
    for state_format, by in (("fp32", isa), ("bf16", isa), ("int8", isa), ("bf16", "baseline")):
        segment = build_segment(torch.bfloat16, torch.bfloat16, length, state_format=state_format)
        segment.gradient.copy_(gradient)
        sums.add(update(OPTIMIZERS[0].scalars(step=1), **segment.arguments, isa=by).sum_of_squares)
    assert len(sums) == 1


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1.0, 1e20, 3e38])
def test_the_sum_of_squares_survives_where_fp32_squares_do_not(build_segment, size):
    for state_format in ("fp32", "bf16", "int8"):
        segment = build_segment(torch.bfloat16, torch.bfloat16, 3_001, state_format=state_format)
        segment.gradient.fill_(size)
        exact = segment.gradient.double().square().sum().item()
        stats = update(OPTIMIZERS[0].scalars(step=1), **segment.arguments)
        assert stats.num_non_finite == 0 and stats.sum_of_squares == pytest.approx(exact, rel=1e-6)


# -- against torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:4], ids=by_kind)
def test_each_of_1000_sgd_steps_is_within_two_ulp_of_torch_from_the_same_state(build_segment, optimizer):
    segment = build_segment(torch.float32, torch.float32, 500, optimizer=optimizer.kind)
    for state in segment.states.values():
        state.zero_()
    theirs = torch.nn.Parameter(segment.parameter.clone())
    judge = torch.optim.SGD(
        [theirs], lr=optimizer.lr, momentum=optimizer.momentum, nesterov=optimizer.nesterov, weight_decay=optimizer.weight_decay
    )
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 1001):
        gradient = torch.randn(500, generator=generator) * 10.0 ** (-(step % 5))
        before = segment.parameter.clone()
        theirs.grad = gradient.clone()
        judge.step()
        update(optimizer.scalars(step=step), parameter=segment.parameter, gradient=gradient, states=segment.states)
        added = sum((state.abs() for state in segment.states.values()), start=gradient.abs())  # what cancels in the direction counts
        size = torch.maximum(torch.maximum(theirs.detach().abs(), before.abs()), optimizer.lr * added)
        ulp = torch.nextafter(size, torch.full_like(size, math.inf)) - size
        assert ((segment.parameter - theirs.detach()).abs() / ulp).max() <= 2
        segment.parameter.copy_(theirs.detach())
        if segment.states:
            torch.testing.assert_close(segment.states["momentum_buffer"], judge.state[theirs]["momentum_buffer"], rtol=1e-5, atol=1e-6)
            segment.states["momentum_buffer"].copy_(judge.state[theirs]["momentum_buffer"])


def test_lion_moves_every_weight_by_lr_against_the_sign_of_the_mix_and_decays_it():
    parameter, gradient = torch.tensor([1.0, 1.0, 1.0, -2.0]), torch.tensor([1.0, -1.0, 0.0, 2.0])
    states = {"exp_avg": torch.tensor([0.0, 0.0, 0.0, -1.0])}
    update(Lion(lr=0.5, betas=(0.75, 0.5)).scalars(step=1), parameter=parameter, gradient=gradient, states=states)
    assert parameter.tolist() == [0.5, 1.5, 1.0, -1.5]  # the last: 0.75 * -1 + 0.25 * 2 < 0
    assert states["exp_avg"].tolist() == [0.5, -0.5, 0.0, 0.5]
    update(Lion(lr=0.5, weight_decay=0.5).scalars(step=2), parameter=parameter, gradient=gradient * 0, states={"exp_avg": torch.zeros(4)})
    assert parameter.tolist() == [0.375, 1.125, 0.75, -1.125]


# -- stochastic rounding -----------------------------------------------------------------------------------------------


def many_words(number: int, key: int = 5) -> torch.Tensor:
    return narrow.rounding_words(Rounding(key=key * 0x9E3779B97F4A7C15 % 2**64), 0, number, torch.device("cpu"))


def test_rounding_to_bf16_is_unbiased_within_four_sigma():
    words = many_words(2**20)
    for value in (1.0 + 2**-10, 3.1415927, -0.001234567, 1e-30, 65000.123):
        values = torch.full((2**20,), value)
        exact = values[0].double()
        rounded = narrow.round_to_bfloat16(values, words & 0xFFFF).double()
        assert rounded.unique().numel() == 2
        step = (rounded.max() - rounded.min()).item()
        assert abs((rounded.mean() - exact).item()) < 4 * step / 2 / 2**10
        for random in (words >> 16, narrow.second_words(words) >> 16):
            assert abs((narrow.round_to_bfloat16(values, random).double().mean() - exact).item()) < 4 * step / 2 / 2**10


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_unbiased_within_four_sigma_down_to_the_last_code(is_signed):
    words = many_words(2**20) >> 12
    for value in (1.0, 0.7, 0.123, 3e-3, 7e-5, 1.3e-5, 4e-6):
        blocks = torch.full((2**12, 256), value)
        blocks[:, 0] = 1.9  # fixes the exponent
        codes, exponents = narrow.encode_moment(blocks.view(-1), words, is_signed=is_signed)
        back = narrow.decode_moment(codes, exponents, is_signed=is_signed).view(-1, 256)[:, 1:].double()
        step = (back.max() - back.min()).item()
        exact = blocks[0, 1].double()
        assert back.unique().numel() == (1 if step == 0 else 2)
        assert abs((back.mean() - exact).item()) <= 4 * step / 2 / math.sqrt(back.numel()) + 1e-12, value


def test_the_error_and_range_of_the_codes_are_those_of_the_docstring():
    generator = torch.Generator().manual_seed(0)
    words = many_words(2**18) >> 12
    for is_signed, normal, least in ((True, 14, 17), (False, 30, 33)):
        exponents = torch.rand(2**18, generator=generator) * (normal - 0.5)
        values = torch.exp2(-exponents)
        values.view(-1, 256)[:, 0] = 1.0
        codes, scale = narrow.encode_moment(values, words, is_signed=is_signed)
        error = (narrow.decode_moment(codes, scale, is_signed=is_signed) / values - 1).double()
        assert error.abs().max() <= 0.125 and 0.03 < error.square().mean().sqrt() < 0.045
        tiny = torch.zeros(256)
        tiny[0], tiny[1] = 1.0, 2.0**-least
        codes, scale = narrow.encode_moment(tiny, torch.zeros(256, dtype=torch.int64), is_signed=is_signed)
        assert narrow.decode_moment(codes, scale, is_signed=is_signed)[:3].tolist() == [1.0, 2.0**-least, 0.0]


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    values = torch.tensor([1.0, 1e-20, 1e-38, 1e-45, 0.0]).repeat(52)[:256]
    codes, exponents = narrow.encode_moment(values, torch.zeros(256, dtype=torch.int64), is_signed=False)
    assert torch.equal(narrow.decode_moment(codes, exponents, is_signed=False) == 0, values == 0)


def test_every_code_decodes_and_encodes_to_itself():
    for is_signed in (True, False):
        codes = torch.arange(256).to(torch.uint8)
        for exponent in (37, 53, 127, 254):
            if not is_signed and exponent == 37:
                continue
            scale = torch.tensor([exponent], dtype=torch.uint8)
            values = narrow.decode_moment(codes, scale, is_signed=is_signed)
            assert values.isfinite().all() and values.unique().numel() == (255 if is_signed else 256)
            for random in (0, 0xFFFFF):
                again, same = narrow.encode_moment(values, torch.full((256,), random), is_signed=is_signed)
                assert torch.equal(again, codes) and torch.equal(same, scale)


def test_a_block_with_a_value_that_is_not_finite_reads_nan_and_its_neighbours_do_not():
    values = torch.ones(768)
    values[300], values[600] = math.inf, math.nan
    back = narrow.decode_moment(*narrow.encode_moment(values, many_words(768) >> 12, is_signed=True), is_signed=True)
    assert back.isnan().view(3, 256).all(dim=1).tolist() == [False, True, True] and (back[:256] == 1).all()


@pytest.mark.parametrize(("state_format", "noise"), [("bf16", 0.08), ("int8", 0.3)])
def test_a_second_moment_of_steady_gradients_keeps_its_mean_and_a_small_noise(state_format, noise):
    """The random walk of rounding every step, against the same moment in fp32, over 3 times the memory of beta2 = 0.999."""
    generator = torch.Generator().manual_seed(1)
    length = 4096
    optimizer = AdamW(lr=0.0, weight_decay=0.0)
    runs = {}
    for name in ("fp32", state_format):
        states = {
            field.name: torch.zeros(field.num_values(length), dtype=getattr(torch, field.dtype))
            for field in resolve_state_format(name, "float32").fields
        }
        runs[name] = (torch.zeros(length), states)
    for step in range(1, 3001):
        gradient = torch.randn(length, generator=generator) * 1e-3
        for name, (parameter, states) in runs.items():
            scalars = optimizer.scalars(step=step)
            rounding = Rounding(key=step * 0x9E3779B97F4A7C15 % 2**64)
            update(scalars, parameter=parameter, gradient=gradient, states=states, state_format=name, rounding=rounding, with_stats=False)
    exact, states = runs["fp32"][1]["exp_avg_sq"].double(), runs[state_format][1]
    if state_format == "int8":
        found = narrow.decode_moment(states["exp_avg_sq"], states["exp_avg_sq_exponent"], is_signed=False).double()
    else:
        found = states["exp_avg_sq"].double()
    ratio = found / exact
    assert abs(ratio.mean().item() - 1) < 4 * noise / math.sqrt(length) + 0.002
    assert ratio.std().item() < noise
    assert ratio.min() > 0.2


def test_updates_far_below_the_last_place_add_up_in_format_bf16():
    """lr is 1/50 of half a unit in the last place: nearest rounding would never move the weight."""
    parameter = torch.ones(4096, dtype=torch.bfloat16)
    states = {"exp_avg": torch.zeros(4096, dtype=torch.bfloat16)}
    lr = 2**-8 / 50
    for step in range(1, 201):
        scalars = Lion(lr=lr).scalars(step=step)
        rounding = Rounding(key=step * 0x2545F4914F6CDD1D % 2**64)
        update(scalars, parameter=parameter, gradient=torch.ones(4096), states=states, state_format="bf16", rounding=rounding)
    assert parameter.double().mean().item() == pytest.approx(1 - 200 * lr, abs=4 * math.sqrt(200 * lr * 2**-8 / 4096))
