"""Bytes of the state, held against the formulas of design 3: claims about `spec.state_formats`."""

from __future__ import annotations

import pytest

from overspill.spec.state_formats import resolve_state_format
from overspill.spec.tensors import CHUNK_ALIGNMENT_ELEMENTS


@pytest.mark.parametrize(("dtype", "state_bytes", "sum_bytes"), [("bfloat16", 10, 12), ("float16", 12, 14), ("float32", 8, 12)])
def test_bytes_per_element_follow_the_table(dtype, state_bytes, sum_bytes):
    state_format = resolve_state_format("fp32", dtype)
    assert state_format.bytes_per_element == state_bytes
    assert state_format.bytes_per_element_with_parameter == sum_bytes


@pytest.mark.parametrize(
    ("name", "dtype", "optimizer", "state_bytes"),
    [
        ("bf16", "bfloat16", "adamw", 4),
        ("bf16", "float32", "adamw", 4),
        ("int8", "bfloat16", "adamw", 2 + 2 / 256),
        ("int8", "float32", "lion", 1 + 1 / 256),
        ("int8", "bfloat16", "sgd_momentum", 1 + 1 / 256),
        ("bf16", "bfloat16", "lion", 2),
        ("fp32", "bfloat16", "lion", 6),
        ("fp32", "bfloat16", "sgd", 2),
        ("fp32", "float32", "sgd", 0),
        ("int8", "bfloat16", "sgd", 0),
    ],
)
def test_bytes_per_element_of_every_format_and_optimizer(name, dtype, optimizer, state_bytes):
    state_format = resolve_state_format(name, dtype, optimizer)
    assert state_format.bytes_per_element == state_bytes
    assert state_format.record_bytes(256 * 4096) == state_bytes * 256 * 4096
    assert state_format.record_bytes(4096) % 4096 == 0


def test_an_int8_record_is_codes_then_exponents_filled_up_to_a_page():
    state_format = resolve_state_format("int8", "bfloat16")
    assert state_format.field_ranges(8192) == {
        "exp_avg": (0, 8192),
        "exp_avg_sq": (8192, 16384),
        "exp_avg_exponent": (16384, 16416),
        "exp_avg_sq_exponent": (16416, 16448),
    }
    assert state_format.record_bytes(8192) == 20480


def test_bf16_record_is_remainder_then_moments_without_gaps():
    assert resolve_state_format("fp32", "bfloat16").field_ranges(4096) == {
        "remainder": (0, 8192),
        "exp_avg": (8192, 24576),
        "exp_avg_sq": (24576, 40960),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fields_of_a_chunk_lie_on_4096_byte_boundaries(dtype):
    state_format = resolve_state_format("fp32", dtype)
    ranges = state_format.field_ranges(3 * CHUNK_ALIGNMENT_ELEMENTS)
    assert list(ranges) == [field.name for field in state_format.fields]
    assert all(start % 4096 == 0 and end % 4096 == 0 for start, end in ranges.values())
    assert max(end for _, end in ranges.values()) == state_format.record_bytes(3 * CHUNK_ALIGNMENT_ELEMENTS)


def test_unknown_formats_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'fp8' is unknown; choose one of: fp32, bf16, int8"):
        resolve_state_format("fp8", "bfloat16")
    with pytest.raises(ValueError, match="optimizer 'rmsprop' is unknown; choose one of: adamw, lion, sgd"):
        resolve_state_format("fp32", "bfloat16", "rmsprop")
    for name in ("bf16", "int8"):
        with pytest.raises(ValueError, match="no layout for parameters of float16, which need fp32 master weights"):
            resolve_state_format(name, "float16")
    with pytest.raises(ValueError, match="no layout for parameters of float64"):
        resolve_state_format("fp32", "float64")
