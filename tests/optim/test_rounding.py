"""What rounding asks of its random bits: claims about the generator of `rng`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from overspill import rng
from overspill.optim import Rounding, narrow

NUMBER = 2**20
FOUR_SIGMA = 4 / 2**10
"""Of a mean of 2**20 signs."""


def signs(words: np.ndarray, bit: int) -> np.ndarray:
    return 1.0 - 2.0 * ((words >> np.uint32(bit)) & np.uint32(1))


@pytest.fixture(scope="module")
def words() -> dict[str, np.ndarray]:
    def of(step: int, name: str, first: int = 0) -> np.ndarray:
        return rng.rounding_bits(0, step, name, first, NUMBER)

    return {"base": of(1, "w"), "next step": of(2, "w"), "next tensor": of(1, "v"), "next element": of(1, "w", 1), "far": of(1, "w", 2**16)}


def test_every_bit_is_balanced(words):
    for bit in range(32):
        assert abs(signs(words["base"], bit).mean()) < FOUR_SIGMA


def test_every_pair_of_bits_of_a_word_is_uncorrelated(words):
    matrix = np.stack([signs(words["base"], bit) for bit in range(32)])
    correlation = matrix @ matrix.T / NUMBER - np.eye(32)
    assert np.abs(correlation).max() < 5 / 2**10  # the largest of 496


@pytest.mark.parametrize("other", ["next step", "next tensor", "next element", "far"])
def test_bits_of_neighbours_steps_and_tensors_are_uncorrelated(words, other):
    ours = np.stack([signs(words["base"], bit) for bit in range(0, 32, 3)])
    theirs = np.stack([signs(words[other], bit) for bit in range(32)])
    assert np.abs(ours @ theirs.T / NUMBER).max() < 5.5 / 2**10  # the largest of 352


def test_the_parts_that_round_parameter_and_moments_are_uniform_and_uncorrelated(words):
    base = torch.from_numpy(words["base"].astype(np.int64))
    parts = [(base & 0xFFFF) / 2**16, (base >> 16) / 2**16, (narrow.second_words(base) >> 16) / 2**16]
    for index, part in enumerate(parts):
        counts = torch.histc(part, bins=256, min=0, max=1)
        chi_square = ((counts - NUMBER / 256) ** 2 / (NUMBER / 256)).sum().item()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
        for other in parts[index + 1 :]:
            assert abs(torch.corrcoef(torch.stack([part, other]))[0, 1].item()) < FOUR_SIGMA


def test_successive_steps_of_one_element_are_uniform():
    """One element over many steps: what its rounding error averages over."""
    values = np.array([rng.rounding_bits(3, step, "layers.0.w", 77, 1)[0] for step in range(1, 20_001)]) / 2.0**32
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * 20_000)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(20_000)


@pytest.mark.parametrize("first", [0, 5, 2**31 - 3, 2**32 - 700])
def test_numpy_torch_and_native_words_are_the_same(first):
    key = rng.rounding_key(1, 2, "w")
    plain = rng.rounding_words(key, first, 600)
    ours = narrow.rounding_words(Rounding(key=key, first_element=first), 0, 600, torch.device("cpu"))
    assert np.array_equal(plain.astype(np.int64), ours.numpy())
