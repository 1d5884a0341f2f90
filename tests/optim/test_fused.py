"""The fused kernels give the bits of the plain form and of the native core: claims about `optim.fused` and `optim.fused_squares`.

Every test with a `device` runs on a GPU (marker gpu), and without one in Triton's interpreter, where Triton is installed:

    TRITON_INTERPRET=1 python -m pytest tests/optim/test_fused.py

Without TRITON_INTERPRET and without a GPU, where Triton is installed, the machine code is made for one GPU and looked at.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from update_matrix import GRADIENTS, LAYOUTS, OPTIMIZERS, by_kind

from overspill.optim import (
    SEGMENT_DTYPE,
    Rounding,
    backends,
    global_norm,
    sum_of_squares,
    update,
    update_backend,
    update_chunk,
    update_reference,
)
from overspill.optim.segment import segment_table, validate_table
from overspill.spec.state_formats import STATE_FORMATS, resolve_state_format
from overspill.spec.update_rule import SGD, Lion, UpdateScalars, round_fp32

native = pytest.importorskip("overspill.optim.native", reason="the native core is not built")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
LENGTHS = [1, 255, 1003, 2305]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`cpu`: the interpreter."""
    if not HAS_TRITON or (request.param == "cpu") != INTERPRETS:
        pytest.skip("needs Triton, and TRITON_INTERPRET=1 or a GPU")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    with warnings.catch_warnings():
        if INTERPRETS:
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of infinities and NaN
            monkeypatch.setattr("overspill.optim.fused_squares.LANES", 16384)  # a program costs the interpreter milliseconds
        yield request.param


def fuse(scalars: UpdateScalars | list[UpdateScalars], segment, table: np.ndarray | None = None, **arguments):
    """`update_chunk_fused` of one segment, or of those of the table."""
    from overspill.optim.fused import update_chunk_fused

    sets = scalars if isinstance(scalars, list) else [scalars]
    name = str(segment.parameter.dtype).removeprefix("torch.")
    return update_chunk_fused(
        sets,
        segment_table(segment.parameter.numel(), segment.rounding) if table is None else table,
        state_format=resolve_state_format(segment.state_format, name, sets[0].kind),
        parameter=segment.parameter,
        gradient=segment.gradient,
        states=segment.states,
        **{"with_stats": False} | arguments,
    )


def assert_all_agree(scalars: UpdateScalars, segment, device: str) -> None:
    """Fused on the device, plain on the device, native on the CPU."""
    fused, plain = segment.to(device).clone(), segment.to(device).clone()
    fuse(scalars, fused)
    update_reference(scalars, **plain.arguments, with_stats=False)
    update(scalars, **segment.arguments)
    plain.to("cpu").assert_same_bits(fused)
    segment.assert_same_bits(fused)


@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=by_kind)
def test_every_rule_in_every_format_gives_the_bits_of_both_other_forms(build_segment, device, state_format, dtype, optimizer):
    scalars = optimizer.scalars(step=3, gradient_scale=round_fp32(1 / 3))
    for index, length in enumerate(LENGTHS if device == "cpu" else [*LENGTHS, 1_000_003]):
        for gradient_dtype in GRADIENTS if length == 1003 or device == "cuda" else GRADIENTS[:1]:
            segment = build_segment(
                dtype, gradient_dtype, length, seed=length, extreme=index % 2 == 0, state_format=state_format, optimizer=optimizer.kind
            )
            assert_all_agree(scalars, segment, device)


def all_exponents(seed: int) -> Tensor:
    """fp32 values of every sign and exponent, with first, last and random mantissas, in a random order; NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(0, 2**23, (512, 8), generator=generator)
    mantissa[:, 0], mantissa[:, 1], mantissa[:, 2], mantissa[:, 3] = 0, 1, 2**23 - 1, 2**22
    bits = (torch.arange(512).view(-1, 1) << 23) + mantissa
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).flatten()
    return bits[torch.randperm(bits.numel(), generator=generator)].view(torch.float32)


@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, Lion(lr=0.0), SGD(lr=0.0)], ids=lambda item: f"{item.kind}-{item.lr}")
def test_values_of_every_exponent_give_the_same_bits(build_segment, device, state_format, dtype, optimizer):
    values = [all_exponents(seed) for seed in range(4)]
    length = values[0].numel()
    segment = build_segment(dtype, torch.float32, length, extreme=True, state_format=state_format, optimizer=optimizer.kind)
    segment.gradient.copy_(values[0])
    if "remainder" in segment.states:
        bits = values[1].view(torch.int32)
        segment.parameter.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
        segment.states["remainder"].copy_(bits.to(torch.int16))
    else:
        segment.parameter.copy_(values[1])
    for name, moment in zip(("master", "exp_avg", "momentum_buffer", "exp_avg_sq"), (1, 2, 2, 3), strict=True):
        if name in segment.states and segment.states[name].dtype != torch.uint8:
            segment.states[name].copy_(values[moment].abs() if name == "exp_avg_sq" else values[moment])
    assert_all_agree(optimizer.scalars(step=1), segment, device)


@pytest.mark.parametrize("optimizer", [OPTIMIZERS[0], OPTIMIZERS[4]], ids=by_kind)
def test_every_code_under_every_block_exponent_gives_the_same_bits(build_segment, device, optimizer):
    segment = build_segment(torch.bfloat16, torch.bfloat16, 256 * 256, state_format="int8", optimizer=optimizer.kind)
    for name, state in segment.states.items():
        codes = torch.arange(256).to(torch.uint8)
        state.copy_(codes if name.endswith("_exponent") else codes.repeat(256))
    segment.gradient[1::2] = 0.0
    assert_all_agree(optimizer.scalars(step=2), segment, device)


@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_a_chunk_is_its_segments_one_by_one_and_what_lies_between_is_left_alone(build_segment, device, state_format):
    """Five sets of scalars; several segments in one block of the kernel, and one over several blocks."""
    sets = [OPTIMIZERS[0].scalars(step=5, weight_decay=decay) for decay in (0.1, 0.0, 0.2, 0.3, 0.4)]
    shift = 0 if state_format == "int8" else 3
    rows = [(shift, 250, 7, 512, 0), (256, 1, 1 << 63, 0, 1), (512, 100, 8, 0, 1), (768 + shift, 3001, 9, 2**32 - 1000, 0)]
    rows += [(4096, 0, 3, 0, 2), (4096, 255, 10, 0, 4), (4608, 1390, 11, 5, 2)]
    table = np.array(rows, dtype=SEGMENT_DTYPE)
    chunk = build_segment(torch.bfloat16, torch.bfloat16, 6001, state_format=state_format)
    expected, fused, closed = chunk.clone(), chunk.to(device).clone(), chunk.to(device).clone()
    for start, number, key, first, index in rows:
        part = expected.cut(start, start + number)
        part.rounding = Rounding(key=key, first_element=first)
        update_reference(sets[index], **part.arguments, with_stats=False)
    fuse(sets, fused, table)
    expected.assert_same_bits(fused)
    for bad in (math.inf, -math.inf, math.nan):
        fuse(sets, closed, table, gates=torch.tensor([1.0, bad, 3.0], dtype=torch.float64, device=device))
    chunk.assert_same_bits(closed)
    fuse(sets, closed, table, gates=torch.tensor([1e300, -1.0, 0.0], dtype=torch.float64, device=device))
    expected.assert_same_bits(closed)


@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_misaligned_arrays_and_another_block_size_change_nothing(build_segment, device, monkeypatch, state_format):
    scalars = OPTIMIZERS[0].scalars(step=2)
    segment = build_segment(torch.bfloat16, torch.bfloat16, 2001, state_format=state_format)
    whole = segment.to(device)

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:1], tensor])[1:]

    states = {name: shifted(state) for name, state in whole.states.items()}
    moved = type(whole)(shifted(whole.parameter), shifted(whole.gradient), states, state_format, whole.rounding)
    fuse(scalars, whole)
    monkeypatch.setattr("overspill.optim.fused.BLOCK_ELEMENTS", 2048)
    fuse(scalars, moved)
    whole.to("cpu").assert_same_bits(moved)


def test_stats_are_of_the_segments_alone(build_segment, device):
    segment = build_segment(torch.bfloat16, torch.bfloat16, 1000).to(device)
    segment.gradient[600] = math.inf
    rows = np.array([(0, 256, 0, 0, 0), (256, 100, 0, 0, 0)], dtype=SEGMENT_DTYPE)
    stats = fuse(OPTIMIZERS[0].scalars(step=1), segment, rows, with_stats=True)
    assert stats.num_non_finite == 0
    assert stats.sum_of_squares == pytest.approx(segment.gradient[:356].double().square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", GRADIENTS)
def test_sums_of_squares_are_those_of_the_definition_for_all_tensors_at_once_and_for_each(device, dtype):
    from overspill.optim.fused_squares import sums_of_squares_fused

    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 1000, 65536, 65537, 100_003, 4 * 2**20 + 1001] + ([] if device == "cpu" else [9 * 2**20 + 8, 4 * 2**20])
    whole = (torch.randn(sum(lengths), generator=generator) * 1e-2).to(dtype)
    parts = list(whole.split(lengths))
    expected = [sum_of_squares(part).item() for part in parts]
    on_device = list(whole.to(device).split(lengths))
    assert sums_of_squares_fused(on_device).tolist() == expected
    assert [sums_of_squares_fused([part.clone()]).item() for part in on_device[:6]] == expected[:6]
    assert sums_of_squares_fused([part.to(device) for part in parts[2:5]]).tolist() == expected[2:5]
    assert global_norm([sums_of_squares_fused(on_device), 0.0]) == global_norm(expected)


def test_a_sum_of_squares_is_finite_exactly_when_every_element_is(device):
    from overspill.optim.fused_squares import sums_of_squares_fused

    largest = torch.full((70_001,), torch.finfo(torch.float32).max, device=device)
    assert math.isfinite(sums_of_squares_fused([largest]).item())
    for bad in (math.inf, -math.inf, math.nan):
        for position in (0, 65_536, 70_000):
            values = largest.clone()
            values[position] = bad
            sums = sums_of_squares_fused([largest, values, largest[:3], largest[:0]]).tolist()
            assert [math.isfinite(value) for value in sums] == [True, False, True, True]
    assert sums_of_squares_fused([largest[:0]]).tolist() == [0.0]


@pytest.mark.gpu
def test_cuda_tensors_are_updated_by_the_fused_kernel_and_nothing_waits_for_the_device(build_segment, device):
    from overspill.optim import sums_of_squares

    assert update_backend("cuda") == "fused"
    for state_format in STATE_FORMATS:
        segment = build_segment(torch.bfloat16, torch.bfloat16, 100_000, state_format=state_format).to("cuda")

        def run(key: int, segment=segment, state_format=state_format) -> None:
            update_chunk(
                [OPTIMIZERS[0].scalars(step=key)],
                segment_table(100_000, Rounding(key=key)),
                state_format=resolve_state_format(state_format, "bfloat16"),
                parameter=segment.parameter,
                gradient=segment.gradient,
                states=segment.states,
                with_stats=False,
                gates=sums_of_squares([segment.gradient, segment.gradient[:1000]]),
            )

        run(1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not HAS_TRITON or INTERPRETS, reason="needs Triton as a compiler")
@pytest.mark.parametrize(("state_format", "dtype"), LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=by_kind)
def test_the_machine_code_contracts_nothing_approximates_nothing_and_keeps_denormals(state_format, dtype, optimizer):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from overspill.optim.fused_kernels import EXACT, update_kernel

    short = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int16": "*i16", "uint8": "*u8"}
    name = str(dtype).removeprefix("torch.")
    layout = resolve_state_format(state_format, name, optimizer.kind)
    fields = {field.name: short[field.dtype] for field in layout.fields}
    moments = [*layout.moments, "none", "none"][:2]
    given = [short[name], "*bf16", fields.get("remainder", fields.get("master")), *map(fields.get, moments)]
    given += [fields.get(f"{moment}_exponent") for moment in moments]
    kinds = [*given, "*i64", "*fp64", "i32", ("fp32",) * 22, optimizer.kind, state_format, 16, 16, 1024]
    is_type = [isinstance(kind, tuple) or str(kind).startswith("*") or kind == "i32" for kind in kinds]
    names = [parameter.name for parameter in update_kernel.params]
    source = ASTSource(
        fn=update_kernel,
        signature={name: kind if typed else "constexpr" for name, kind, typed in zip(names, kinds, is_type, strict=True)},
        constexprs={(place,): kind for place, (kind, typed) in enumerate(zip(kinds, is_type, strict=True)) if not typed},
    )
    code = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={**EXACT, "num_warps": 4}).asm["ptx"]
    operations = set(re.findall(r"^\s+(?:@\S+\s+)?([a-z]\w*(?:\.\w+)+)", code, re.MULTILINE))
    floating = {operation for operation in operations if operation.endswith((".f32", ".f64")) and operation.count(".") > 1}
    assert {"mul.rn.f32"} <= operations
    assert [item for item in operations if "ftz" in item or "approx" in item or ".full" in item or item.startswith(("fma.", "mad.f"))] == []
    assert {item for item in floating if item.startswith(("add", "sub", "mul", "div", "sqrt")) and ".rn." not in item} == set()
    assert ({"div.rn.f32", "sqrt.rn.f32"} <= operations) == (optimizer.kind == "adamw")


def test_without_triton_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be used on cuda:0 .Triton is not installed; pip install triton.*plain torch"):
            assert not backends._works(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not backends._works(0)
    finally:
        backends._works.cache_clear()
    assert not backends.is_fused("cpu")


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 600, 0, 0, 0), (512, 100, 0, 0, 0)],
        [(0, 2000, 0, 0, 0)],
        [(0, -1, 0, 0, 0)],
        [(128, 100, 0, 0, 0)],
        [(0, 100, 0, 0, 3)],
        [(0, 257, 0, 0, 0), (512, 512, 0, 0, 0)],
    ],
)
def test_a_wrong_table_is_refused_in_the_words_of_the_native_core(build_segment, rows):
    table = np.array(rows, dtype=SEGMENT_DTYPE)
    layout = resolve_state_format("int8", "bfloat16")
    chunk = build_segment(torch.bfloat16, torch.bfloat16, 1024, state_format="int8")
    messages = []
    for check in (
        lambda: validate_table(table, num_elements=1024, state_format=layout, num_scalars=1),
        lambda: native.update_chunk_native(
            [OPTIMIZERS[0].scalars(step=1)],
            table,
            state_format=layout,
            parameter=chunk.parameter,
            gradient=chunk.gradient,
            states=chunk.states,
        ),
    ):
        try:
            check()
            messages.append("fine")
        except ValueError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]


def test_gates_hold_the_native_update_back_too(build_segment):
    segment = build_segment(torch.bfloat16, torch.bfloat16, 300)
    before, scalars = segment.clone(), [OPTIMIZERS[0].scalars(step=1)]
    arguments = {"state_format": resolve_state_format("fp32", "bfloat16"), "parameter": segment.parameter, "gradient": segment.gradient}
    for number in (math.nan, 1.0):
        segment.assert_same_bits(before)
        gates = torch.tensor([number], dtype=torch.float64)
        update_chunk(scalars, segment_table(300), **arguments, states=segment.states, gates=gates)
    assert not torch.equal(segment.states["exp_avg"], before.states["exp_avg"])
