"""Randomness is a function of names and counters: claims about `rng`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from overspill import rng


def test_philox_gives_the_known_answers_of_its_authors():
    # Random123's kat_vectors, philox4x32-10.
    cases = [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        assert rng.philox4x32(np.array([counter], dtype=np.uint32), key)[0].tolist() == expected


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
    assert whole.dtype == np.uint32 and len(np.unique(whole)) > 2040
    for length in (0, 1, 5, 64):
        assert np.array_equal(rng.rounding_bits(1, 2, "w", first, length), whole[first : first + length])


def test_rounding_bits_count_past_32_bit_block_numbers():
    far = rng.rounding_bits(1, 2, "w", 2**34 + 4, 4)
    assert not np.array_equal(far, rng.rounding_bits(1, 2, "w", 4, 4))


def test_negative_ranges_are_refused():
    with pytest.raises(ValueError, match="w: an element range cannot be negative"):
        rng.rounding_bits(1, 2, "w", -1, 4)


def test_importing_rng_imports_no_torch():
    code = "import sys, overspill.rng; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
