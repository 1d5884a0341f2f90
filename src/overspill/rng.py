"""Randomness: every random number of a run is a function of names and counters, never of an order of events.

Rules:

1. A seed is a hash of what it is for (run, step, micro-batch, unit; or run, epoch). Nothing draws from a shared generator,
   so the order in which units run, where tensors rest, how many ranks or threads work and whether a unit is recomputed
   change no number.
2. The hash is BLAKE2b: the same on every machine, in every process and Python version (`hash()` is not).
3. Bits for stochastic rounding are counter-based: the bits of an element are a function of the step, its tensor's name and
   its global index in the tensor, so that chunks, tiers, threads and ranks do not matter either.

Who uses which: dropout and the like `unit_seed`, set before the forward and again before its recompute; the order of
training samples `shuffle_seed`; rounding to a narrow format `rounding_bits`.

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), tested against the
authors' known answers. This file is the plain form, in numpy; it imports no torch, so every layer may import it.
"""

from __future__ import annotations

import hashlib

import numpy as np

SEED_BITS = 63
"""What `torch.manual_seed` takes as a non-negative int64."""

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


def unit_seed(run_seed: int, step: int, micro_batch: int, unit: str) -> int:
    """The seed of all randomness inside one unit's forward (and its recompute) for one micro-batch.

    Args:
        run_seed: the run's seed, any int.
        step: optimizer step, counted from 1.
        micro_batch: global number of the micro-batch within the step, the same whichever rank or group runs it.
        unit: the unit's name.

    Returns:
        A seed in [0, 2**63).
    """
    return _hash("unit", run_seed, step, micro_batch, unit) >> (64 - SEED_BITS)


def shuffle_seed(run_seed: int, epoch: int) -> int:
    """The seed of the order of training samples in one epoch (counted from 0), in [0, 2**63)."""
    return _hash("shuffle", run_seed, epoch) >> (64 - SEED_BITS)


def rounding_key(run_seed: int, step: int, tensor_name: str) -> int:
    """The 64-bit Philox key of one tensor in one step."""
    return _hash("rounding", run_seed, step, tensor_name)


def rounding_bits(run_seed: int, step: int, tensor_name: str, first_element: int, num_elements: int) -> np.ndarray:
    """32 random bits for each of a tensor's elements [first_element, first_element + num_elements).

    Element i gets word i % 4 of the Philox block with counter i // 4 under `rounding_key`.

    Returns:
        uint32, shape (num_elements,). Any split of a range gives the same bits as the whole.
    """
    if first_element < 0 or num_elements < 0:
        raise ValueError(f"{tensor_name}: an element range cannot be negative, got first {first_element}, number {num_elements}")
    first_block, last_block = first_element // 4, -(-(first_element + num_elements) // 4)
    blocks = np.arange(first_block, last_block, dtype=np.uint64)
    counters = np.zeros((len(blocks), 4), dtype=np.uint32)
    counters[:, 0] = blocks & _LOW_32
    counters[:, 1] = blocks >> _SHIFT_32
    words = philox4x32(counters, rounding_key(run_seed, step, tensor_name)).reshape(-1)
    start = first_element - 4 * first_block
    return words[start : start + num_elements]


def philox4x32(counters: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 of each row of `counters`.

    Args:
        counters: uint32, shape (num_blocks, 4), least significant word first.
        key: 64 bits.

    Returns:
        uint32, shape (num_blocks, 4).
    """
    c0, c1, c2, c3 = (counters[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(_PHILOX_ROUNDS):
        product0 = c0 * np.uint64(_PHILOX_MULTIPLIERS[0])
        product1 = c2 * np.uint64(_PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT_32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW_32,
            (product0 >> _SHIFT_32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW_32,
        )
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & 0xFFFFFFFF
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def _hash(purpose: str, *parts: int | str) -> int:
    """64 bits of BLAKE2b over the purpose and the parts, each written with its type and length so that none run together."""
    digest = hashlib.blake2b(digest_size=8, person=b"overspill")
    for part in (purpose, *parts):
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little")
