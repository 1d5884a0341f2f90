"""Seconds that the jobs of `run.py` take on an H100, on paper: for the order of a call, and for what is begun before its deadline.

Parts: a process opens the device and draws the weights; steps, counted in steps of `keep`; bytes that others' tools push over the link one
after the other; memory that is pinned for every mode. What a call has seen takes the place of it (`run.py` multiplies by the slowest).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from net_shapes import NetShape  # noqa: E402

FLOPS, ATTENTION_FLOPS, MEMORY_BYTES_PER_S = 600e12, 320e12, 2.4e12
"""Of products, of attention, and of what only passes over memory. Measured on H100 machines: 720, 344 and 2.4 at best."""
PASSES = 6
"""Over all that is saved, in a step. Assumed."""
LINK_BYTES_PER_S, PINNED_BYTES_PER_S, PAGEABLE_BYTES_PER_S = 50e9, 5e9, 3e9
"""Measured on H100 machines: copies, pinning by several threads; the last is assumed."""
TORCHS_PINNED_BYTES_PER_S = 2.5e9
LLAMA_FFN = 8192
"""Of both Llamas."""
OPENING_S = 7.0
"""The context, the weights, the first kernels, the end of the process."""
STEPS_OF = {"core": 96, "ssd": 52, "peers": 12, "more": 30, "fit": 10}
"""Warm-up and timed, of all modes; those that are compared with `core` count themselves below."""
PEER_STEPS = 6
FIT_S = 24.0
"""Of each of seven modes; `fit.py` begins no further try after less."""


def block_parameters(shape: NetShape) -> int:
    """Of all blocks."""
    if shape.kind in ("gpt", "bert", "t5"):
        crosses = shape.layers // 2 if shape.kind == "t5" else 0
        return (12 * shape.layers + 4 * crosses) * shape.hidden**2
    return round(shape.layers * shape.hidden * (2.6 * shape.hidden + 3 * LLAMA_FFN))  # few heads for keys and values


def saved_bytes(shape: NetShape) -> float:
    """A, about: 16 tensors of a token's width in two bytes, of a Llama's block 22 bytes a hidden element and 8 one of its MLP."""
    per_block = 32 * shape.hidden
    if shape.kind not in ("gpt", "bert", "t5"):
        per_block = 22 * shape.hidden + 8 * LLAMA_FFN
    return float(shape.tokens() * shape.layers * per_block)


def step_s(shape: NetShape) -> float:
    """Of `keep`: backward takes twice forward."""
    products = 2.0 * block_parameters(shape) * shape.tokens() / FLOPS
    attention = 4.0 * shape.tokens() * shape.length * shape.hidden * shape.layers / (1 if shape.kind == "bert" else 2) / ATTENTION_FLOPS
    return 3.0 * (products + attention) + PASSES * saved_bytes(shape) / MEMORY_BYTES_PER_S


def estimate_s(job: str, shape: NetShape) -> float:
    """Of a job that has loaded, with all its modes."""
    step, everything, weights = step_s(shape), saved_bytes(shape), 2.0 * block_parameters(shape)
    seconds = OPENING_S + STEPS_OF[job] * step
    if job == "core":
        seconds += 4 * 1.5 * LINK_BYTES_PER_S * step / 3 / PINNED_BYTES_PER_S
    elif job == "ssd":
        seconds += 4.0
    elif job == "peers":
        ours = 2 * 8 * (step + 2 * everything / LINK_BYTES_PER_S) + 2 * everything / PINNED_BYTES_PER_S
        pushed = everything, 1.3 * (everything + weights)  # trl; save_on_cpu packs weights, and shared tensors several times
        theirs = (PEER_STEPS * (step + 2 * size / LINK_BYTES_PER_S) + 1.3 * size / TORCHS_PINNED_BYTES_PER_S for size in pushed)
        seconds += ours + sum(theirs)
    elif job == "more":
        seconds += PEER_STEPS * 2 * 1.3 * (everything + weights) / PAGEABLE_BYTES_PER_S
    elif job == "fit":
        seconds += 7 * FIT_S
    return seconds
