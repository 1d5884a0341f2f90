"""What the arenas of slots take for four models, beside pools by size and pools in which every slot is as large as the largest tensor.

    python benchmarks/pinned/pool_shapes.py --out benchmarks/results/pool-shapes.json

No weights and no GPU: each model is built on the meta device from its published numbers, planned with everything on the SSD (which is
when pools carry everything), and the schedule of one step is replayed through the real arenas (`tiers/arena.py`), with the places that
a session would give it (`planning/arena.py`), over memory that only counts. The same through pools that keep slots by size, each size at
its own most (`by_size`). Beside the models the runs of `benchmarks/host_memory` on 1.10B and 3.02B, whose pools were measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from overspill.huggingface import StreamedModel, build_meta_model
from overspill.planning import ArenaPlan, plan_arenas
from overspill.planning.pools import PoolEvent, pool_events
from overspill.runtime.opening import make_plan
from overspill.scheduling.build import full_step
from overspill.spec.documents import to_plain
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.report import PoolReport
from overspill.spec.tensors import CHUNK_BYTES, Tier
from overspill.tiers import Arena, Slot, SlotPool
from overspill.units import format_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))

from shapes import SHAPES

QWEN = {"rope_theta": 1e6, "tie_word_embeddings": False, "max_position_embeddings": 32768, "num_key_value_heads": 8}
MODELS: dict[str, PreTrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=131072,
    ),
    "Qwen2.5-7B": Qwen2Config(
        **{**QWEN, "num_key_value_heads": 4}, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28,
    ),
    "Qwen2.5-14B": Qwen2Config(
        **QWEN, vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40
    ),
    "Qwen2.5-32B": Qwen2Config(
        **QWEN, vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40
    ),
}  # fmt: skip


class CountingMemory:
    """Meets the protocol `Memory` and holds nothing: tensors on the meta device."""

    budget_bytes = None
    pinned_bytes = 0

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self.allocated_bytes = 0
        self.peak_bytes = 0

    def allocate(self, name: str, num_bytes: int, *, pinned: bool = True) -> torch.Tensor:
        self._sizes[name] = num_bytes
        self.allocated_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def blocks(self, prefix: str) -> dict[str, torch.Tensor]:
        named = {name: size for name, size in self._sizes.items() if name.startswith(prefix)}
        return {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in named.items()}

    def free(self, name: str) -> None:
        self.allocated_bytes -= self._sizes.pop(name)

    def close(self) -> None:
        self._sizes.clear()


RUNS = {
    f"{name}, hidden states on {boundaries}{', clipped' if clip else ''}": (name, boundaries, clip)
    for name in ("1.10B", "3.02B")
    for boundaries, clip in (("device", None), ("ssd", None), ("ssd", 1.0))
}
"""Of `benchmarks/host_memory`: 8 x 2048 tokens, parameters and states on the SSD."""


def plan_model(config: PreTrainedConfig, *, num_blocks: int | None = None, **request: Any) -> Plan:
    """The plan for a model with everything on the SSD.

    Args:
        num_blocks: instead of the model's own; blocks are alike, so a few show the same pattern.
        request: what differs from two micro-batches of 1 x 2048 tokens with hidden states in host memory.
    """
    if num_blocks is not None:
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": num_blocks, "layer_types": None})
    model = StreamedModel(build_meta_model(config, dtype=torch.bfloat16))
    fields = {"boundaries": "host", "seq_len": 2048, "micro_batch": 1, "accumulate": 2, **request}
    return make_plan(
        PlanRequest(parameters="ssd", states="ssd", ssd_dir="ssd", **fields),
        model,
        HardwareSpec(),
        device="cuda:0",
        chunk_bytes=CHUNK_BYTES,
    )


def step_events(plan: Plan) -> list[PoolEvent]:
    """What one step of the plan, in a row of them, borrows and gives back."""
    return list(pool_events(full_step(plan), plan))


def replay(events: list[PoolEvent], arenas: dict[Tier, ArenaPlan] | None = None, *, num_steps: int = 2) -> dict[str, PoolReport]:
    """Run the slots through `num_steps` steps; what the pools report.

    Args:
        arenas: places of the slots; None: slots by size.
    """
    pools = {tier: (Arena if arenas is not None else SlotPool)(CountingMemory(), tier.value) for tier in (Tier.DEVICE, Tier.HOST)}
    for _ in range(num_steps):
        for tier, arena in (arenas or {}).items():
            pools[tier].follow(arena.places, num_bytes=arena.num_bytes)
        lent: dict[tuple[Tier, int], Slot] = {}
        for event in events:
            if event.num_bytes:
                lent[event.tier, event.slot] = pools[event.tier].acquire(event.num_bytes)
            else:
                lent.pop((event.tier, event.slot)).release()
        for slot in lent.values():  # gradients that wait for the next step, which takes them before it asks for more
            slot.release()
    return {tier.value: pool.report() for tier, pool in pools.items()}


def tensor_slots(plan: Plan) -> dict[str, float]:
    """The same question for pools that lend a slot a tensor, as DeepSpeed's swapper does: the embedding and one block in flight."""
    names = [name for unit in plan.units[:2] for name in unit.bundles]
    sizes = [slot.tensor.num_elements * 2 for name in names for slot in plan.bundles[name].slots if len(slot.tensor.shape) > 1]
    return {
        "per_class_bytes": sum(sizes),
        "one_size_bytes": len(sizes) * max(sizes),
        "one_size_waste_fraction": 1 - sum(sizes) / (len(sizes) * max(sizes)),
    }


def figures(report: PoolReport) -> dict[str, object]:
    return {
        "peak_bytes": report.peak_bytes,
        "asked_bytes": report.peak_asked_bytes,
        "waste_fraction": report.waste_fraction,
        "one_size_bytes": report.one_size_bytes,
        "one_size_waste_fraction": report.one_size_waste_fraction,
        "most_in_flight": report.most_in_flight,
        "num_created": report.num_created,
        "num_trimmed": report.num_trimmed,
        "classes": to_plain(report.classes),
    }


def describe(plan: Plan) -> dict[str, Any]:
    """Of a step's slots: in arenas, and by size."""
    events = step_events(plan)
    begun = time.perf_counter()
    arenas = plan_arenas(events, plan)
    found: dict[str, Any] = {"num_slots": {tier.value: len(arena.places) for tier, arena in arenas.items()}}
    found["plan_s"] = time.perf_counter() - begun
    found["pools"] = {tier: figures(report) for tier, report in replay(events, arenas).items()}
    return found | {"by_size": {tier: figures(report) for tier, report in replay(events).items()}}


def print_figures(name: str, found: dict[str, Any]) -> None:
    for tier, pool in found["pools"].items():
        one_size = f"one size {format_bytes(pool['one_size_bytes'])}, waste {pool['one_size_waste_fraction']:.2%}"
        by_size = f"by size {found['by_size'][tier]['waste_fraction']:.2%}"
        print(f"{name} {tier}: {format_bytes(pool['peak_bytes'])}, waste {pool['waste_fraction']:.2%} ({by_size}); {one_size}")
    print(f"{name}: {sum(found['num_slots'].values())} slots placed in {found['plan_s']:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Waste of the pools for four models, from their shapes.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--blocks", type=int, help="instead of each model's own number")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    models = {}
    for name in options.models:
        plan = plan_model(MODELS[name], num_blocks=options.blocks)
        models[name] = {"num_parameters": plan.num_parameters, "slots_of_tensors": tensor_slots(plan), **describe(plan)}
        print_figures(name, models[name])
    runs = {}
    for name, (shape, boundaries, clip) in RUNS.items():
        config = SHAPES[shape].config()
        runs[name] = describe(plan_model(config, num_blocks=options.blocks, boundaries=boundaries, clip=clip, micro_batch=8, accumulate=1))
        print_figures(name, runs[name])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "hardware": "none: computed from shapes",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": "2 micro-batches of 1 x 2048 tokens, parameters and states on the SSD, hidden states in host memory, no clipping",
        "models": models,
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
