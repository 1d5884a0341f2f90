"""Forward and backward of GPT blocks with saved tensors kept, moved to host memory or to the SSD, and beside torch's `save_on_cpu`.

    python benchmarks/activations/run.py --hidden 8192 --layers 4 --rows 8 --ssd-dir /nvme/overspill --out results.jsonl

A line a mode: time of a step (forward + backward, no update), what of it is forward, the device's peak, what left and how fast. Beside
them the bound of `activations/amounts.py`: the share of all saved bytes that the link can take while forward runs,
min(1, B_d2h · T_forward / A), from the plain step's forward time and the rate that was measured. SSDTrain's shapes are (hidden, layers)
8192 x 4, 12288 x 3, 16384 x 2, at 1024 tokens a row and heads of 128.

Blocks: pre-norm, causal attention by torch's SDPA, MLP of four times the width with GELU; random weights; a sum of squares for a loss.
A mode that fails is a line with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import overspill
from overspill.activations.amounts import most_without_slowdown
from overspill.spec.documents import to_plain
from overspill.units import format_bytes

HEAD_SIZE = 128
"""As in SSDTrain's models."""
MODES = {
    "keep": ("host", "nothing", "none"),
    "rebuild": ("host", "nothing", "cheap"),
    "host": ("host", "adaptive", "none"),
    "host-everything": ("host", "everything", "none"),
    "host-rebuild": ("host", "adaptive", "cheap"),
    "host-ssdtrain": ("host", "ssdtrain", "none"),
    "ssd": ("ssd", "adaptive", "none"),
    "ssd-everything": ("ssd", "everything", "none"),
    "ssd-ssdtrain": ("ssd", "ssdtrain", "none"),
    "save_on_cpu": None,
    "save_on_cpu-pinned": None,
}
"""Tier, amount and recompute; None: torch's own."""


class GptBlock(nn.Module):
    """[rows, length, hidden] to the same."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, length, width = hidden.shape
        heads = self.qkv(self.norm_1(hidden)).view(rows, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return hidden + self.down(nn.functional.gelu(self.up(self.norm_2(hidden)), approximate="tanh"))


class Gpt(nn.Module):
    """Blocks without an embedding and a head: their share shrinks with the width, and here it is the blocks that count."""

    def __init__(self, hidden: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GptBlock(hidden, num_heads) for _ in range(num_layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.float().square().mean()


class Stopwatch:
    """Seconds on the device, or on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    num_heads = max(1, options.hidden // HEAD_SIZE)
    with torch.device(device):
        model = Gpt(options.hidden, options.layers, num_heads).to(getattr(torch, options.dtype))
        inputs = torch.randn(options.rows, options.length, options.hidden).to(getattr(torch, options.dtype))
    lines = {mode: measure(mode, model, inputs, options, device) for mode in options.modes}
    plain = lines.get("keep", {})
    rates = [line["report"]["rates"] for line in lines.values() if line.get("report")]
    known = next((item for item in rates if item["d2h_bytes_per_s"]), None)
    packed = max((line["packed_bytes"] for line in lines.values() if "packed_bytes" in line), default=0)
    bound = None
    if known and packed and "forward_s" in plain:
        bound = most_without_slowdown(device_bytes=packed, forward_s=plain["forward_s"], d2h_bytes_per_s=known["d2h_bytes_per_s"])
    with options.out.open("a") as file:
        for mode, line in lines.items():
            line.update(bound_fraction=bound, **about(options, device))
            file.write(json.dumps(line, sort_keys=True) + "\n")
            print(describe(mode, line, plain))
    if bound is not None and known is not None:
        rate = known["d2h_bytes_per_s"] / 1e9
        print(f"bound: {bound:.0%} of {format_bytes(packed)} can leave in {plain['forward_s'] * 1e3:.1f} ms of forward at {rate:.1f} GB/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--host-budget", default="32GiB")
    parser.add_argument("--ssd-host-budget", default="4GiB", help="of the modes ssd: little, so that the SSD has to take the rest")
    parser.add_argument("--ssd-dir")
    parser.add_argument("--ssd-budget", default="64GiB")
    parser.add_argument("--min-bytes", default="1MiB")
    parser.add_argument("--window")
    parser.add_argument("--steps", type=int, default=5, help="measured, after six that warm up and settle the amounts")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.ssd_dir is None:
        options.modes = [mode for mode in options.modes if not mode.startswith("ssd")]
    return options


def context(mode: str, model: nn.Module, options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """What a mode does with saved tensors."""
    chosen = MODES[mode]
    if chosen is None:
        return torch.autograd.graph.save_on_cpu(pin_memory=mode.endswith("pinned"))
    tier, amount, recompute = chosen
    ssd = {"ssd_dir": options.ssd_dir, "ssd_budget": options.ssd_budget} if tier == "ssd" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is on the CPU")
        return overspill.offload_activations(
            model, host_budget=options.ssd_host_budget if ssd else options.host_budget, amount=amount, min_bytes=options.min_bytes,
            window=options.window, recompute=recompute, **ssd,
        )  # fmt: skip


def measure(mode: str, model: nn.Module, inputs: torch.Tensor, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One mode's line."""
    watch = Stopwatch(device)
    try:
        forward_s, step_s, wall_s = [], [], []
        with context(mode, model, options) as active:
            for number in range(6 + options.steps):
                if number == 6 and device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                begun, marks = time.perf_counter(), [watch.mark()]
                loss = model(inputs)
                marks.append(watch.mark())
                loss.backward()
                marks.append(watch.mark())
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number >= 6:
                    wall_s.append(time.perf_counter() - begun)
                    forward_s.append(watch.seconds(marks[0], marks[1]))
                    step_s.append(watch.seconds(marks[0], marks[2]))
                del loss
                model.zero_grad(set_to_none=True)
            report = to_plain(active.report()) if hasattr(active, "report") else None
    except Exception as error:  # a line too: that a mode does not fit is a result
        return {"mode": mode, "error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        _forget(model, device)
    line: dict[str, Any] = {"mode": mode, "report": report}
    for name, values in (("forward_s", forward_s), ("step_s", step_s), ("wall_s", wall_s)):
        line[name], line[f"{name}_spread"] = statistics.median(values), [min(values), max(values)]
    if device.type == "cuda":
        line["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    if report is not None:
        last = report["rounds"][-1]
        line["packed_bytes"], line["moved_bytes"] = last["packed_bytes"], last["host_bytes"] + last["ssd_bytes"]
        line["rebuilt_bytes"] = last["rebuilt_bytes"]
    return line


def _forget(model: nn.Module, device: torch.device) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(mode: str, line: dict[str, Any], plain: dict[str, Any]) -> str:
    """A line for people."""
    if "error" in line:
        return f"{mode:20} {line['error'][:100]}"
    words = [f"{mode:20} step {line['step_s'] * 1e3:8.1f} ms"]
    if "step_s" in plain:
        words.append(f"({line['step_s'] / plain['step_s']:.2f} of keep)")
    if "device_peak_bytes" in line:
        words.append(f"peak {format_bytes(line['device_peak_bytes'])}")
    if line.get("packed_bytes"):
        words.append(f"moved {format_bytes(line['moved_bytes'])} of {format_bytes(line['packed_bytes'])}")
    return "  ".join(words)


def about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a result is of."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "hidden": options.hidden, "layers": options.layers, "rows": options.rows, "length": options.length, "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d"),
        "steps": options.steps,
    }  # fmt: skip


if __name__ == "__main__":
    main()
