"""How much of its updates does a bf16 model see, that rounds fp32 masters to nearest? From a model's own weights, without training.

    python benchmarks/formats/cells.py MODEL_FOLDER [--lr 2e-5]

A weight shows nothing of its updates until its master leaves its bf16 cell, and then a whole step. If masters lie anywhere in their
cells, equally likely, the two make up for each other and the model sees, on average, what the optimizer did. Where they start in the
middle, or on a coarse grid inside of the cell, it does not. Every weight is moved by 1, 2, 4 ... updates of the size `--lr` (which is
what AdamW's first updates are), up or down at random; `seen` is the mean movement of the nearest bf16 over the intended one. Stochastic
rounding sees 1.00 by construction.

For each start of starts.py, and the share of weights in the middle of their cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from starts import STARTS, move_to_start

UPDATES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_WEIGHTS = 4_000_000
"""Of one tensor that are looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder with fp32 weights")
    parser.add_argument("--lr", type=float, default=2e-5)
    options = parser.parse_args()
    print(f"seen movement over intended, after so many updates of {options.lr:g}")
    print(f"{'start':10} {'in the middle':>14} " + " ".join(f"{count:>6}" for count in UPDATES))
    for start in STARTS:
        middle, seen = look(options.model, start, options.lr)
        print(f"{start:10} {middle:14.1%} " + " ".join(f"{share:6.3f}" for share in seen))


def look(model: Path, start: str, lr: float) -> tuple[float, list[float]]:
    """Share of weights in the middle of their cells, and `seen` after each of `UPDATES`; matrices only."""
    generator = torch.Generator().manual_seed(0)
    num_weights = num_middle = 0
    moved = [0.0] * len(UPDATES)
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as source:
            names = source.keys()
            for name in names:
                weights = source.get_tensor(name)
                if weights.dim() < 2:
                    continue
                masters = move_to_start(name, weights.float(), start, seed=0).flatten()
                if masters.numel() > MOST_WEIGHTS:
                    masters = masters[torch.randint(masters.numel(), (MOST_WEIGHTS,), generator=generator)]
                before = masters.bfloat16().float()
                num_weights += masters.numel()
                num_middle += int((masters == before).sum())
                direction = torch.randint(0, 2, masters.shape, generator=generator) * 2.0 - 1
                for index, count in enumerate(UPDATES):
                    after = (masters + direction * (count * lr)).bfloat16().float()
                    moved[index] += ((after - before) * direction).double().sum().item()
    return num_middle / num_weights, [total / (count * lr * num_weights) for total, count in zip(moved, UPDATES, strict=True)]


if __name__ == "__main__":
    main()
