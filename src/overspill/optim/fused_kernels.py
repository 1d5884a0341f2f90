"""The update on a GPU, as one Triton kernel: one pass over a chunk, bit for bit what `reference` and the native core do.

A program takes one block of `BLOCK` elements of the chunk, counted from the chunk's start so that its loads stay aligned, and of
that block what belongs to one segment; where a segment begins or ends inside the block the rest is masked. It finds its segment
in the chunk's table (`fused.py` makes it), widens, applies the rule of `spec.update_rule`, narrows as `spec.state_formats` says,
and stores.

Why the bits are the same (rule 1 of `spec.update_rule`):

1. The launch forbids contraction (`EXACT`): LLVM then writes mul.rn and add.rn, which ptxas never fuses, and ptxas gets --fmad=false.
2. Division and root are `tl.div_rn` and `tl.sqrt_rn`: div.rn.f32 and sqrt.rn.f32. A plain `/` would be div.full, off by 2 ulp.
3. Denormals are kept: no instruction has .ftz. libdevice would choose forms with it unless `EXACT` said no.
4. bf16 is widened and narrowed, and random bits are drawn, in integers; the largest magnitude of a block is an integer maximum,
   whose order does not matter. So nothing depends on BLOCK, warps or alignment.

tests/optim/test_fused.py holds 1 to 3 against the machine code, without a GPU, and the bits against both other forms: with a
GPU, and without one in Triton's interpreter.

Names: p, g, m, v are parameter (or master), gradient, first and second moment; lanes are a block's elements, [BLOCK / 256, 256].
Imported only where Triton is; `overspill` does not depend on it.
"""

# Triton's language is typed when it is compiled and not by annotations. A compile-time `if` is written as a statement, to be seen.
# ruff: noqa: SIM108
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
"""Options of every launch."""


def stream_of(device: torch.device) -> int:
    """The stream in which this thread's kernels on `device` run. A table is in order with those alone, so it is part of a cache's key:
    memory that a cache lets go of is reused in the order of the stream it was made on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Places of a set's scalars: the order of `segment.SCALARS`.
GRADIENT_SCALE = tl.constexpr(0)
DECAY = tl.constexpr(1)
BETA1 = tl.constexpr(2)
ONE_MINUS_BETA1 = tl.constexpr(3)
BETA2 = tl.constexpr(4)
ONE_MINUS_BETA2 = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
BIAS_CORRECTION2_FACTOR = tl.constexpr(7)
EPS = tl.constexpr(8)
MOMENTUM = tl.constexpr(9)
WEIGHT_DECAY = tl.constexpr(10)
NUM_SCALARS = tl.constexpr(11)


@triton.jit(do_not_specialize=["num_gates"])
def update_kernel(
    parameter,
    gradient,
    master,
    first,
    second,
    first_exponents,
    second_exponents,
    table,
    gates,
    num_gates,
    scalars,
    RULE: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the part of one segment that lies in one block.

    Args:
        master: int16 remainders or float32 masters; None where the parameter is its own.
        first, second: moments, and for int8 their blocks' exponents; None where the rule has none.
        table: int64 [5, ROWS]: first program, first element, end, key, and first element in the tensor + 2**32 * (which set).
        gates: float64 [num_gates], at most GATES: unless all are finite, nothing is stored. None for no such condition.
        scalars: two sets, one after the other.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tl.sum((tl.load(table + tl.arange(0, ROWS)) <= program).to(tl.int32)) - 1
    start, end = tl.load(table + ROWS + row), tl.load(table + 2 * ROWS + row)
    base = (start // BLOCK + program - tl.load(table + row)) * BLOCK
    if gates is not None:
        places = tl.arange(0, GATES)
        total = tl.sum(tl.load(gates + places, mask=places < num_gates, other=0))
        end = tl.where(total - total == 0, end, start)  # an empty segment is masked out, exponents included
    key, packed = tl.load(table + 3 * ROWS + row), tl.load(table + 4 * ROWS + row)
    element = packed + base - start  # of the tensor, modulo 2**32, at the block's start
    is_second = (packed >> 32) != 0
    low, high = (start - base).to(tl.int32), tl.minimum(end - base, BLOCK).to(tl.int32)
    arrays = (parameter, gradient, master, first, second)
    exponents = (first_exponents, second_exponents)
    if (start <= base) & (base + BLOCK <= end):
        _update_block(arrays, exponents, base, low, high, element, key, is_second, scalars, RULE, FORMAT, BLOCK, False)
    else:
        _update_block(arrays, exponents, base, low, high, element, key, is_second, scalars, RULE, FORMAT, BLOCK, True)


@triton.jit
def _update_block(
    arrays,
    exponents,
    base,
    low,
    high,
    element,
    key,
    is_second,
    scalars,
    RULE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Elements [low, high) of the block that starts at `base`."""
    blocks = tl.arange(0, BLOCK // 256)[:, None]
    lanes = blocks * 256 + tl.arange(0, 256)[None, :]
    inside = (lanes >= low) & (lanes < high)
    has_block = (blocks * 256 < high) & (blocks * 256 + 256 > low)
    block = base // 256 + blocks

    g = widen(load(arrays[1], base + lanes, inside, MASKED))
    p = _read_master(arrays[0], arrays[2], base + lanes, inside, MASKED)
    m = _read_moment(arrays[3], exponents[0], base + lanes, inside, block, has_block, True, MASKED)
    v = _read_moment(arrays[4], exponents[1], base + lanes, inside, block, has_block, False, MASKED)
    p, m, v = _apply_rule(p, g, m, v, is_second, scalars, RULE)

    words = 0
    if FORMAT != "fp32":
        words = _rounding_words(element.to(tl.uint32) + lanes.to(tl.uint32), key)
    _write_master(p, arrays[0], arrays[2], base + lanes, inside, words, MASKED)
    _write_moment(m, arrays[3], exponents[0], base + lanes, inside, block, has_block, words, True, MASKED)
    if FORMAT != "fp32":
        words = words * 0x9E3779B1  # more bits from the same words, for the second moment
    _write_moment(v, arrays[4], exponents[1], base + lanes, inside, block, has_block, words, False, MASKED)


@triton.jit
def _apply_rule(p, g, m, v, is_second, scalars, RULE: tl.constexpr):
    """The lists of spec/update_rule.py, with their numbers."""
    g = g * _pick(scalars, GRADIENT_SCALE, is_second)  # 2
    step_size = _pick(scalars, STEP_SIZE, is_second)
    if RULE == "adamw":
        q = p * _pick(scalars, DECAY, is_second)  # 3
        m = m + (g - m) * _pick(scalars, ONE_MINUS_BETA1, is_second)  # 4, 5, 6
        b = (g * _pick(scalars, ONE_MINUS_BETA2, is_second)) * g  # 8, 9
        v = v * _pick(scalars, BETA2, is_second) + b  # 7, 10
        denom = tl.sqrt_rn(v) * _pick(scalars, BIAS_CORRECTION2_FACTOR, is_second)  # 11, 12
        denom = denom + _pick(scalars, EPS, is_second)  # 13
        p = q - tl.div_rn(step_size * m, denom)  # 14, 15, 16
    elif RULE == "lion":
        c = m * _pick(scalars, BETA1, is_second) + g * _pick(scalars, ONE_MINUS_BETA1, is_second)  # 3, 4, 5
        u = tl.where(c > 0, step_size, tl.where(c < 0, step_size * -1.0, c))  # 6; Triton's minus is 0 - x, which loses -0
        p = p * _pick(scalars, DECAY, is_second) - u  # 7, 8
        m = m * _pick(scalars, BETA2, is_second) + g * _pick(scalars, ONE_MINUS_BETA2, is_second)  # 9, 10, 11
    else:
        g = g + p * _pick(scalars, WEIGHT_DECAY, is_second)  # 3, 4
        if RULE != "sgd":
            m = m * _pick(scalars, MOMENTUM, is_second) + g  # 5, 6
            if RULE == "sgd_nesterov":
                g = g + m * _pick(scalars, MOMENTUM, is_second)  # 7, 8
            else:
                g = m
        p = p - step_size * g  # 9, 10
    return _canonical(p), _canonical(m), _canonical(v)


@triton.jit
def _pick(scalars, index: tl.constexpr, is_second):
    return tl.where(is_second, scalars[NUM_SCALARS + index], scalars[index])


@triton.jit
def _canonical(values):
    """Rule 2 of spec/update_rule.py: the one quiet NaN."""
    if values.dtype == tl.float32:
        values = tl.where(values == values, _bits(values), 0x7FC00000).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _bits(values):
    return values.to(tl.int32, bitcast=True)


@triton.jit
def load(pointer, places, inside, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(pointer + places, mask=inside, other=0)
    else:
        values = tl.load(pointer + places)
    return values


@triton.jit
def _store(pointer, places, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + places, values, mask=inside)
    else:
        tl.store(pointer + places, values)


@triton.jit
def widen(values):
    """To fp32, exactly; bf16 by its bits."""
    if values.dtype == tl.bfloat16:
        values = (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _round_to_bfloat16(values, random):
    """fp32 to bf16, rounded up with the probability of what is cut off; `random` (uint32) has 16 bits."""
    return ((values.to(tl.uint32, bitcast=True) + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _rounding_words(element, key):
    """`rng.rounding_words`; uint32 in and out."""
    x = element ^ key.to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (key >> 32).to(tl.uint32)
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _read_master(parameter, master, places, inside, MASKED: tl.constexpr):
    if master is None:
        p = widen(load(parameter, places, inside, MASKED))
    elif master.dtype.element_ty == tl.float32:
        p = load(master, places, inside, MASKED)
    else:
        low = load(master, places, inside, MASKED).to(tl.int32)
        high = load(parameter, places, inside, MASKED).to(tl.int16, bitcast=True).to(tl.int32) + (low >> 31)
        p = ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
    return p


@triton.jit
def _write_master(p, parameter, master, places, inside, words, MASKED: tl.constexpr):
    if master is None:
        if parameter.dtype.element_ty == tl.bfloat16:
            p = _round_to_bfloat16(p, words & 0xFFFF)
        _store(parameter, places, p, inside, MASKED)
    elif master.dtype.element_ty == tl.float32:
        _store(master, places, p, inside, MASKED)
        half = tl.where(p == p, p.to(tl.float16).to(tl.int16, bitcast=True), 0x7E00).to(tl.int16)
        _store(parameter, places, half.to(tl.float16, bitcast=True), inside, MASKED)
    else:
        bits = _bits(p)
        high = ((bits >> 16) + ((bits >> 15) & 1)).to(tl.int16)  # nearest, ties away from zero
        _store(parameter, places, high.to(tl.bfloat16, bitcast=True), inside, MASKED)
        _store(master, places, bits.to(tl.int16), inside, MASKED)


@triton.jit
def _read_moment(moment, exponents, places, inside, block, has_block, IS_SIGNED: tl.constexpr, MASKED: tl.constexpr):
    if moment is None:
        values = 0.0
    elif exponents is None:
        values = widen(load(moment, places, inside, MASKED))
    else:
        codes = load(moment, places, inside, MASKED).to(tl.int32)
        values = _decode(codes, load(exponents, block, has_block, MASKED).to(tl.int32), IS_SIGNED)
    return values


@triton.jit
def _write_moment(values, moment, exponents, places, inside, block, has_block, words, IS_SIGNED: tl.constexpr, MASKED: tl.constexpr):
    if moment is not None:
        if exponents is not None:
            bits = _bits(values)
            if MASKED:
                bits = tl.where(inside, bits, 0)
            codes, exponent = _encode(bits, (words >> 12).to(tl.int32), IS_SIGNED)
            _store(moment, places, codes.to(tl.uint8), inside, MASKED)
            _store(exponents, block, exponent.to(tl.uint8), has_block, MASKED)
        elif moment.dtype.element_ty == tl.bfloat16:
            _store(moment, places, _round_to_bfloat16(values, words >> 16), inside, MASKED)
        else:
            _store(moment, places, values, inside, MASKED)


@triton.jit
def _decode(codes, exponent, IS_SIGNED: tl.constexpr):
    """fp32 values of 8-bit codes [blocks, 256] under their blocks' exponents [blocks, 1], both int32."""
    top: tl.constexpr = 15 if IS_SIGNED else 31
    is_broken = exponent == 255
    exponent = tl.where(is_broken, top + 22, tl.maximum(exponent, top + 22))
    magnitude = codes
    if IS_SIGNED:
        magnitude = codes & 0x7F
    normal = ((magnitude << 20) + ((exponent - top) << 23)).to(tl.float32, bitcast=True)
    denormal = magnitude.to(tl.float32) * ((exponent - top - 2) << 23).to(tl.float32, bitcast=True)
    values = tl.where(magnitude >= 8, normal, denormal)
    if IS_SIGNED:
        values = tl.where(codes >= 0x80, values * -1.0, values)  # Triton's minus is 0 - x, which loses -0
    return tl.where(is_broken, float("nan"), values)


@triton.jit
def _encode(bits, random, IS_SIGNED: tl.constexpr):
    """8-bit codes and block exponents, int32, of fp32 `bits` [blocks, 256]; `random` (int32) has 20 bits. As `narrow.encode_moment`."""
    top: tl.constexpr = 15 if IS_SIGNED else 31
    magnitude = bits & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1, keep_dims=True)  # at most the quiet NaN's bits, so the next line cannot overflow
    exponent = tl.minimum(tl.maximum((largest + 0xFFFFF) >> 23, top + 22), 255)
    last_places = ((276 + top - tl.minimum(exponent, 254)) << 23).to(tl.float32, bitcast=True)
    scaled = magnitude.to(tl.float32, bitcast=True) * last_places
    is_denormal = scaled < 8388608.0
    denormal = tl.where(is_denormal, scaled, 0.0).to(tl.int32)
    code = (tl.where(is_denormal, denormal, magnitude - ((exponent - top) << 23)) + random) >> 20
    if IS_SIGNED:
        code = code | ((bits >> 24) & 0x80)
    else:
        code = tl.where(magnitude != 0, tl.maximum(code, 1), code)
    return tl.where(exponent == 255, 0, code), exponent
