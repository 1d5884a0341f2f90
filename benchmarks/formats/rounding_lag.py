"""Why narrow formats may end below fp32: weights that start on the bf16 grid, seen through bf16, stand still at first.

    python benchmarks/formats/rounding_lag.py

A softmax regression of 256 features and 64 classes, weights of a typical size rounded to bf16 once, AdamW steps far below a bf16 step
of them. The loss is taken of the weights that the model computes with, five seeds:

* `nearest`: fp32 masters, the model sees them rounded to nearest: what state format fp32 does with bf16 compute.
* `dithered`: the same, but the masters do not start in the middle of their bf16 cell.
* `stochastic`: bf16 weights, rounded stochastically: formats bf16 and int8.
* `exact`: fp32 weights, no bf16 anywhere.

How much of this a real model's weights have is for cells.py to say. In SmolLM2-135M half a bf16 step is 12 steps of 2e-5 for the median
weight, 20 for the mean: about `--size 0.3` here.
"""

from __future__ import annotations

import argparse
import statistics

import torch

KINDS = ("nearest", "dithered", "stochastic", "exact")


def train(kind: str, *, size: float, lr: float, seed: int, marks: list[int]) -> list[float]:
    """Losses after the steps `marks`."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2048, 256, generator=generator)
    teacher = torch.randn(256, 64, generator=generator) * size
    targets = (features @ teacher + torch.randn(2048, 64, generator=generator) / 2).argmax(1)
    weights = (torch.randn(256, 64, generator=generator) * size * 1.3).bfloat16().float()
    generator.manual_seed(seed)
    if kind == "dithered":
        weights += (torch.rand(weights.shape, generator=generator) - 0.5) * bf16_step(weights)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    losses = []
    for step in range(1, marks[-1] + 1):
        rows = torch.randint(0, len(targets), (256,), generator=generator)
        seen = look(weights, kind).requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(features[rows] @ seen, targets[rows]), seen)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        weights = weights - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        if kind == "stochastic":
            bits = weights.view(torch.int32).long() + torch.randint(0, 1 << 16, weights.shape, generator=generator)
            weights = (bits >> 16 << 16).int().view(torch.float32)
        if step in marks:
            losses.append(torch.nn.functional.cross_entropy(features @ look(weights, kind), targets).item())
    return losses


def look(weights: torch.Tensor, kind: str) -> torch.Tensor:
    """What the model computes with."""
    return weights.bfloat16().float() if kind in ("nearest", "dithered") else weights.clone()


def bf16_step(weights: torch.Tensor) -> torch.Tensor:
    """Distance of neighbouring bf16 numbers."""
    return 2.0 ** (weights.abs().clamp_min(1e-30).log2().floor() - 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.3, help="standard deviation of the weights")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--marks", type=lambda text: [int(item) for item in text.split(",")], default=[5, 25, 100, 300])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print(f"size {options.size}, lr {options.lr}, {options.seeds} seeds; loss after steps {options.marks}: mean (standard deviation)")
    for kind in KINDS:
        runs = [train(kind, size=options.size, lr=options.lr, seed=seed, marks=options.marks) for seed in range(options.seeds)]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in zip(*runs, strict=True)]
        means = [statistics.mean(values) for values in zip(*runs, strict=True)]
        print(f"{kind:10s} " + "  ".join(f"{mean:.5f} ({deviation:.5f})" for mean, deviation in zip(means, spread, strict=True)))


if __name__ == "__main__":
    main()
