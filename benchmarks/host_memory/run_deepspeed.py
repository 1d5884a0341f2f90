"""The same model, batches and steps under DeepSpeed (0.19.8 is what was compared), measured with the same witnesses.

    python benchmarks/host_memory/run_deepspeed.py --name infinity-states --shape 1.10B --ssd-dir DIRECTORY --out results.jsonl

| configuration | parameters | optimizer states | gradients |
|---|---|---|---|
| `zero3-cpu` | host | host | host |
| `infinity-states` | host | SSD | SSD |
| `infinity-both` | SSD | SSD | SSD |

bf16 compute, fp32 Adam by DeepSpeedCPUAdam, activation checkpointing. Tuned as its users tune it: pinned buffers, 16 threads, queue
depth 64, 2 MiB blocks; and for little host memory: swap buffers and sub-groups no larger than the largest tensor. With parameters
on the SSD every parameter that lives on the GPU holds a swap buffer, so those defaults that keep a billion elements alive
(`max_live_parameters`, `max_reuse_distance`) end in "Not enough buffers" on any model of that size; `--live` and `--prefetch` set
them, 0 by default for `infinity-both`.

This file supervises: the training is a child process (`--child`) under a time limit and, on a machine with 32 GiB or more, a floor under
MemAvailable at which the child is ended before the machine is. A failure is a result with its text, never a crash.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from attempt import read_json, run_attempt
from measure import HostWatch, IoCounters, append_result, provenance, status_bytes
from run_overspill import describe

sys.path.insert(0, str(Path(__file__).parents[1]))

CONFIGURATIONS = ("zero3-cpu", "infinity-states", "infinity-both")
AIO = {
    "block_size": 2 << 20,
    "queue_depth": 64,
    "intra_op_parallelism": 16,
    "single_submit": False,
    "overlap_events": True,
}
"""What the first author of MemAscend measures DeepSpeed's engine with; the defaults (1 MiB, depth 8, 1 thread) are much slower."""
NUM_STATE_BUFFERS = 4
"""Master weights, two moments, gradient: the least that DeepSpeed takes."""
FLOOR_BYTES = 5 << 30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=CONFIGURATIONS, required=True)
    parser.add_argument("--shape", default="1.10B")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ssd-dir")
    parser.add_argument("--buffer-count", type=int, default=8, help="swap buffers for parameters on the SSD")
    parser.add_argument("--prefetch", type=int, help="elements fetched ahead; left out: 0 for infinity-both, else DeepSpeed's default")
    parser.add_argument("--live", type=int, help="elements kept on the GPU for reuse; left out: as for --prefetch")
    parser.add_argument("--max-in-cpu", type=int, default=0, help="elements of SSD parameters that are also kept in host memory")
    parser.add_argument("--sub-group", type=int, help="elements updated at a time; left out: the largest tensor's")
    parser.add_argument("--limit-s", type=float, default=240)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def build_config(options: argparse.Namespace, largest_elements: int) -> dict[str, Any]:
    """The DeepSpeed configuration of `options`."""
    folder = str(swap_folder(options)) if options.ssd_dir else None
    on_ssd = {"zero3-cpu": (), "infinity-states": ("states",), "infinity-both": ("states", "parameters")}[options.name]
    if on_ssd and folder is None:
        raise ValueError(f"{options.name} needs --ssd-dir")
    states: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    parameters: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    if "states" in on_ssd:
        states |= {"device": "nvme", "nvme_path": folder, "buffer_count": NUM_STATE_BUFFERS}
    if "parameters" in on_ssd:
        parameters |= {
            "device": "nvme",
            "nvme_path": folder,
            "buffer_count": options.buffer_count,
            "buffer_size": largest_elements,
            "max_in_cpu": options.max_in_cpu,
        }
    zero: dict[str, Any] = {"stage": 3, "offload_optimizer": states, "offload_param": parameters}
    if on_ssd:
        zero["sub_group_size"] = options.sub_group or largest_elements
    default = 0 if "parameters" in on_ssd else None
    live = default if options.live is None else options.live
    prefetch = default if options.prefetch is None else options.prefetch
    if live is not None:
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if prefetch is not None:
        zero["stage3_prefetch_bucket_size"] = prefetch
    return base_config(samples=options.samples, accumulate=1, clip=options.clip) | {"zero_optimization": zero, "aio": AIO}


def base_config(*, samples: int, accumulate: int, clip: float | None) -> dict[str, Any]:
    """What every configuration has in common: bf16 compute, AdamW (which DeepSpeed runs as DeepSpeedCPUAdam where states are offloaded)."""
    return {
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip or 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
        "steps_per_print": 1_000_000,
    }


def swap_folder(options: argparse.Namespace) -> Path:
    """A folder of DeepSpeed's own, so that it can be removed afterwards."""
    return Path(options.ssd_dir) / "deepspeed"


def main() -> int:
    options = parse_arguments()
    if options.child is not None:
        return run_child(options)
    configuration = {key: value for key, value in vars(options).items() if key not in ("out", "child", "steps")}
    result = {"system": "deepspeed", **provenance(), **configuration}
    with tempfile.TemporaryDirectory() as folder:
        report, last_words = Path(folder) / "report.json", Path(folder) / "last-words.json"
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", str(report)]
        outcome = run_attempt(command, limit_s=options.limit_s, environment={"LAST_WORDS": str(last_words)})
        result |= {"wall_s": outcome.wall_s, **read_json(report)}
        if last_words.exists():
            result |= read_json(last_words)
        elif "steps" not in result:
            result.setdefault("error", outcome.describe_failure(options.limit_s))
        if "error" in result:
            result["output_tail"] = outcome.output_tail
    if options.ssd_dir:
        shutil.rmtree(swap_folder(options), ignore_errors=True)
    append_result(options.out, result)
    print(describe(result), flush=True)
    return 1 if "error" in result else 0


def run_child(options: argparse.Namespace) -> int:
    """The training itself; its result, or its failure, goes to the file that the supervisor named."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    floor_bytes = FLOOR_BYTES if memory_bytes >= 32 << 30 else None
    watch = HostWatch(floor_bytes=floor_bytes, last_words=Path(os.environ["LAST_WORDS"]))
    try:
        result = train(options, watch)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}", "host": {"failed": watch.read()}}
    assert options.child is not None
    options.child.write_text(json.dumps(result))
    watch.close()
    sys.stdout.flush()
    # DeepSpeed's threads and atexit hooks have kept processes from ending; the result is written.
    os._exit(1 if "error" in result else 0)


def train(options: argparse.Namespace, watch: HostWatch) -> dict[str, Any]:
    import torch
    from one_rank import pretend_one_rank
    from shapes import SHAPES, random_batch
    from transformers import LlamaForCausalLM

    pretend_one_rank()
    import deepspeed

    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    torch.zeros(1, device=device)
    own_bytes = status_bytes("VmRSS")
    shape = SHAPES[options.shape].with_blocks(options.blocks)
    config = build_config(options, shape.largest_tensor_elements)
    if options.ssd_dir:
        swap_folder(options).mkdir(parents=True, exist_ok=True)
    counters = IoCounters(Path(options.ssd_dir or "."))
    deepspeed.init_distributed(dist_backend="nccl" if is_cuda else "gloo")
    started = time.perf_counter()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        model = LlamaForCausalLM(shape.config(max_positions=max(4096, options.seq_len)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    open_s = time.perf_counter() - started
    opening = watch.read()
    steps = []
    tokens = options.samples * options.seq_len
    for step in range(options.steps):
        batch = random_batch(shape, samples=options.samples, seq_len=options.seq_len, seed=step)
        inputs = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        before, begun = counters.read(), time.perf_counter()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        if is_cuda:
            torch.cuda.synchronize()
        step_s, value = time.perf_counter() - begun, float(loss.detach())
        peak_bytes = torch.cuda.max_memory_reserved() if is_cuda else 0
        io = dataclasses.asdict(counters.read() - before)
        steps.append({"step_s": step_s, "loss": value, "tokens_per_s": tokens / step_s, "io": io, "device_peak_bytes": peak_bytes})
        print(f"step {step + 1}: {step_s:.2f} s, loss {value:.4f}", flush=True)
    training = watch.read()
    return {
        "hardware": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "num_parameters": shape.num_parameters,
        "tokens_per_step": tokens,
        "config": config,
        "process_own_bytes": own_bytes,
        "open_s": open_s,
        "host": {"opening": opening, "training": training},
        "is_peak_resettable": watch.is_resettable,
        "drive": counters.drive,
        "steps": steps,
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps[1:] or steps),
        "device_peak_bytes": max(step["device_peak_bytes"] for step in steps),
    }


if __name__ == "__main__":
    sys.exit(main())
