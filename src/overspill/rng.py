"""Randomness: every random number of a run is a function of names and counters, never of an order of events.

Rules:

1. A seed is a hash of what it is for (run, step, micro-batch, unit; or run, epoch). Nothing draws from a shared generator,
   so the order in which units run, where tensors rest, how many ranks or threads work and whether a unit is recomputed
   change no number.
2. The hash is BLAKE2b: the same on every machine, in every process and Python version (`hash()` is not).
3. Bits for stochastic rounding are counter-based: the bits of an element are a function of the step, its tensor's name and
   its global index in the tensor, so that chunks, tiers, threads and ranks do not matter either.
4. One word of 32 bits an element and step serves all roundings of that element (`spec.state_formats`).

Who uses which: dropout and the like `unit_seed`, set before the forward and again before its recompute; the order of
training samples `shuffle_seed`; rounding to a narrow format `rounding_key` and `rounding_words`.

The generator of rounding bits is a keyed mixing hash, x = element number modulo 2**32, with the key's halves low and high:

    x ^= low;   x ^= x >> 16;   x *= 0x7feb352d;   x ^= high;   x ^= x >> 15;   x *= 0x846ca68b;   x ^= x >> 16

Shifts and multipliers are those of C. Wellons' `lowbias32` (found by search for the least bias of a 32-bit integer hash with
two multiplications, 2018); the second half of the key goes in between, so that the words of two tensors or steps are not
permutations of each other. Philox4x32-10, which stood here before, needs 20 wide multiplications for 4 words; on vectors it
took longer than all of AdamW's arithmetic (docs/log.md). What rounding asks of the bits is tested (tests/optim/test_rounding.py):
balanced, unbiased in their effect, uncorrelated between neighbours, steps and tensors. They are not for anything else.

This file is the plain form, in numpy; it imports no torch, so every layer may import it.
"""

from __future__ import annotations

import hashlib

import numpy as np

SEED_BITS = 63
"""What `torch.manual_seed` takes as a non-negative int64."""

_LOW_32 = 0xFFFFFFFF


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


def rounding_key(run_seed: int, step: int, tensor_name: str, part: int = 0) -> int:
    """The 64-bit key of one tensor in one step.

    Args:
        part: element number divided by 2**32, since the generator counts in 32 bits.
    """
    return _hash("rounding", run_seed, step, tensor_name, part)


def rounding_bits(run_seed: int, step: int, tensor_name: str, first_element: int, num_elements: int) -> np.ndarray:
    """32 random bits for each of a tensor's elements [first_element, first_element + num_elements).

    Returns:
        uint32, shape (num_elements,). Any split of a range gives the same bits as the whole.
    """
    if first_element < 0 or num_elements < 0:
        raise ValueError(f"{tensor_name}: an element range cannot be negative, got first {first_element}, number {num_elements}")
    words = [
        rounding_words(rounding_key(run_seed, step, tensor_name, first >> 32), first & _LOW_32, number)
        for first, number in split_at_parts(first_element, num_elements)
    ]
    return np.concatenate(words) if words else np.zeros(0, dtype=np.uint32)


def split_at_parts(first_element: int, num_elements: int) -> list[tuple[int, int]]:
    """(first, number) of the pieces of an element range that have one key each."""
    pieces = []
    end = first_element + num_elements
    while first_element < end:
        number = min(end, ((first_element >> 32) + 1) << 32) - first_element
        pieces.append((first_element, number))
        first_element += number
    return pieces


def rounding_words(key: int, first_element: int, num_elements: int) -> np.ndarray:
    """The words of elements [first_element, first_element + num_elements), all below 2**32, under `key`; uint32."""
    low, high = np.uint32(key & _LOW_32), np.uint32(key >> 32)
    x = np.arange(first_element, first_element + num_elements, dtype=np.uint64).astype(np.uint32) ^ low
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= high
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def _hash(purpose: str, *parts: int | str) -> int:
    """64 bits of BLAKE2b over the purpose and the parts, each written with its type and length so that none run together."""
    digest = hashlib.blake2b(digest_size=8, person=b"overspill")
    for part in (purpose, *parts):
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little")
