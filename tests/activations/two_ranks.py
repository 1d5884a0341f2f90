"""One of two ranks: DDP and FSDP2 on gloo, with and without saved tensors moved. Run by `test_context.py`."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import overspill


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(3)])


def gradients(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(inputs).float().square().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [getattr(gradient, "_local_tensor", gradient).clone() for gradient in found]


def compare(name: str, model: nn.Module, rank: int) -> None:
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(rank))
    expected = gradients(model, inputs)
    with overspill.offload_activations(model, host_budget="16MiB", min_bytes=1, window=4096, amount="everything") as active:
        for _ in range(3):
            assert all(map(torch.equal, gradients(model, inputs), expected)), f"{name}: other gradients"
    report = active.report()
    # Of each block: its input, what goes into GELU and what comes out; and the model's output.
    element = 2 if name == "fsdp2" else 4
    assert report.rounds[-1].packed_bytes <= 3 * 16 * (32 + 64 + 64) * element + 16 * 32 * 4 + 16 * 32 * element, report
    assert report.left_alone["parameter"] > 0 and report.num_live == 0
    print(name, "equal", flush=True)


def compare_segments(name: str, model: nn.Module, rank: int, pattern: str) -> None:
    """Blocks that are run again in backward, where FSDP2's parameters have been gathered anew."""
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(rank))
    expected = gradients(model, inputs)
    with overspill.offload_activations(
        model, host_budget="16MiB", min_bytes=1, window=4096, amount="everything", recompute=["cheap", pattern]
    ) as active:
        for _ in range(2):
            assert all(map(torch.equal, gradients(model, inputs), expected)), f"{name}: other gradients from segments"
    report = active.report()
    assert report.num_segment_rebuilds == 2 * len(report.segments) == 2 * 3, report
    assert report.rounds[-1].packed_bytes <= 5 * 16 * 32 * 4, report
    assert not any("forward" in vars(module) for module in model.modules())
    print(name, "segments equal", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    model: nn.Module = nn.parallel.DistributedDataParallel(build())
    compare("ddp", model, rank)
    compare_segments("ddp", model, rank, "module.*")
    model = build()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    compare("fsdp2", model, rank)
    compare_segments("fsdp2", model, rank, "*")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Threads of gloo's groups outlive `destroy_process_group`. One that still lets go of the last collective's tensors
    # while the interpreter ends asks for its lock and aborts the process (pytorch#179291): leave without that ending.
    sys.stdout.flush()
    os._exit(0)
