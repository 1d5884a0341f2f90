"""Seconds that the jobs of `run.py` take on an H100, on paper: for the order of a call, and for what is begun before its deadline.

Parts: a process opens the device and draws the weights; every mode warms up, takes turns with keep (`turns.py`; modes that claims are
about until the time for it is over) and is cleaned up after; others' tools push bytes over the link one after the other; memory is pinned
for every mode. What a call has seen takes the place of it (`run.py` multiplies by the slowest).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from net_shapes import NetShape  # noqa: E402
from turns import Plan  # noqa: E402

FLOPS, ATTENTION_FLOPS, MEMORY_BYTES_PER_S = 600e12, 320e12, 2.4e12
"""Of products, of attention, and of what only passes over memory. Measured on H100 machines: 720, 344 and 2.4 at best."""
PASSES = 6
"""Over all that is saved, in a step. Assumed."""
LINK_BYTES_PER_S, PINNED_BYTES_PER_S, PAGEABLE_BYTES_PER_S = 50e9, 5e9, 3e9
"""Measured on H100 machines: copies, pinning by several threads; the last is assumed."""
TORCHS_PINNED_BYTES_PER_S = 2.5e9
LLAMA_FFN = 8192
"""Of both Llamas."""
OPENING_S = 5.0
"""The context, the weights, the first kernels, the end of the process."""
AROUND_S = 0.5
"""Of a mode: what cleaning up takes."""
ADAPTIVE_STEPS, WARM_S, FIRST_WARM_S = 25, 2.5, 3.5
"""Of steps in which amounts settle; of warming up at least. The last two are guesses between the least and the most (`steps.py`)."""
JUDGED_S, MOST_LEAST_S, NUM_TURNS = 5.0, 10.0, 6
"""As `run.py` has it when nothing else is said."""
MODES_OF = {"core": (4, 4), "ssd": (0, 3), "peers": (0, 0), "more": (0, 2), "fit": (0, 0)}
"""Modes that hold still from the first step and are not judged, and those whose amounts adapt."""
PEER_STEPS = 3
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


def turns_s(keep_s: float, own_s: float, *, is_judged: bool) -> float:
    """Of the turns of a mode and of keep, if their steps take so long."""
    plan = Plan(turns=NUM_TURNS, limit_s=JUDGED_S, most_s=MOST_LEAST_S, within=0.0)
    least_s = keep_s + plan.least_turns(keep_s + own_s) * (keep_s + own_s)
    return max(least_s, JUDGED_S if is_judged else 0.0)


def mode_s(keep_s: float, own_s: float, *, is_adaptive: bool = False, is_judged: bool = False) -> float:
    """Of one mode."""
    warm_s = max(WARM_S, (ADAPTIVE_STEPS if is_adaptive else PEER_STEPS) * own_s)
    return AROUND_S + warm_s + turns_s(keep_s, own_s, is_judged=is_judged) + own_s


def estimate_s(job: str, shape: NetShape) -> float:
    """Of a job that has loaded, with all its modes."""
    step, everything, weights = step_s(shape), saved_bytes(shape), 2.0 * block_parameters(shape)
    num_still, num_adaptive = MODES_OF[job]
    seconds = OPENING_S + FIRST_WARM_S + max(5 * step, 1.0)
    seconds += num_still * mode_s(step, step) + num_adaptive * mode_s(step, 1.1 * step, is_adaptive=True, is_judged=True)
    if job == "core":
        seconds += 4 * 1.5 * LINK_BYTES_PER_S * step / 3 / PINNED_BYTES_PER_S + 4 * step
    elif job == "ssd":
        seconds += 4.0
    elif job == "peers":
        ours = 2 * mode_s(step, step + 2 * everything / LINK_BYTES_PER_S, is_judged=True) + 2 * everything / PINNED_BYTES_PER_S
        pushed = everything, 1.3 * (everything + weights)  # trl; save_on_cpu packs weights, and shared tensors several times
        theirs = (mode_s(step, step + 2 * size / LINK_BYTES_PER_S) + 1.3 * size / TORCHS_PINNED_BYTES_PER_S for size in pushed)
        seconds += ours + sum(theirs)
    elif job == "more":
        seconds += mode_s(step, 2 * 1.3 * (everything + weights) / PAGEABLE_BYTES_PER_S)
    elif job == "fit":
        seconds += 7 * FIT_S
    return seconds
