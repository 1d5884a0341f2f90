"""Randomness is a function of names and counters: claims about `rng`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from overspill import rng


def test_rounding_words_are_the_hash_of_the_docstring():
    key = 0x243F6A8885A308D3
    for element, word in zip((0, 1, 2**32 - 1), (rng.rounding_words(key, e, 1)[0] for e in (0, 1, 2**32 - 1)), strict=True):
        x = element ^ (key & 0xFFFFFFFF)
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= key >> 32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        x ^= x >> 16
        assert int(word) == x


def test_seeds_differ_in_every_argument_and_fit_63_bits():
    base = (7, 1, 0, "layers.0")
    variants = [base, (8, 1, 0, "layers.0"), (7, 2, 0, "layers.0"), (7, 1, 1, "layers.0"), (7, 1, 0, "layers.1"), (71, 1, 0, "layers.0")]
    seeds = [rng.unit_seed(*variant) for variant in variants] + [rng.shuffle_seed(7, 1), rng.shuffle_seed(7, 0)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_is_the_same_in_another_process_with_another_hash_seed():
    code = "from overspill import rng; print(rng.unit_seed(-3, 5, 2, 'model.layers.11'))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{rng.unit_seed(-3, 5, 2, 'model.layers.11')}\n"}


def test_seeds_do_not_change_between_versions():
    assert rng.unit_seed(0, 1, 0, "layers.0") == 600339330862205422
    assert rng.shuffle_seed(0, 0) == 4424675336298815476


@pytest.mark.parametrize("first", [0, 1, 3, 4, 1021])
def test_rounding_bits_do_not_depend_on_how_a_tensor_is_cut(first):
    whole = rng.rounding_bits(1, 2, "w", 0, 2048)
    assert whole.dtype == np.uint32 and len(np.unique(whole)) == 2048
    for length in (0, 1, 5, 64):
        assert np.array_equal(rng.rounding_bits(1, 2, "w", first, length), whole[first : first + length])


def test_rounding_bits_count_past_32_bit_element_numbers():
    far = rng.rounding_bits(1, 2, "w", 2**34 + 4, 4)
    assert not np.array_equal(far, rng.rounding_bits(1, 2, "w", 4, 4))
    across = rng.rounding_bits(1, 2, "w", 2**32 - 3, 7)
    assert np.array_equal(across, np.concatenate([rng.rounding_bits(1, 2, "w", 2**32 - 3, 3), rng.rounding_bits(1, 2, "w", 2**32, 4)]))
    assert rng.split_at_parts(2**32 - 3, 7) == [(2**32 - 3, 3), (2**32, 4)]


def test_negative_ranges_are_refused():
    with pytest.raises(ValueError, match="w: an element range cannot be negative"):
        rng.rounding_bits(1, 2, "w", -1, 4)


def test_importing_rng_imports_no_torch():
    code = "import sys, overspill.rng; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
