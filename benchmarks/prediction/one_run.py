"""One run of the protocol in `run.py`, in a process of its own that has imported everything before it is told what to do.

    python benchmarks/prediction/one_run.py READY_FD      (started by `workers.py`)

Python, torch and transformers take some twelve seconds to load, more than most runs need for all their steps. So the process loads them,
says so on `READY_FD`, and waits for a line on its input: an order (`Order`), as JSON. It does that one thing and ends; a process that was
never told anything ends with its input. Nothing of a run has happened in it before: no session, no CUDA context, no matrix product.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "host_memory")]

from disturbance import counted_so_far  # noqa: E402
from timelines import compact, compute_by_kind, host_by_kind, launched_by_kind, leads, op_kinds  # noqa: E402
from workers import take_order, write_stacks_when_asked  # noqa: E402

MOST_TOKENS_TOGETHER = 8192
"""Of a micro-batch."""
LEAST_COUNTED = 2
"""Steps that are counted in any case."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is told to do."""

    run: dict[str, Any]
    """`shape`, `seq_len`, `place` and `clip`, of a name."""
    report: str
    """File for the result."""
    folder: str
    """An empty one on the drive; used by runs on the SSD."""
    machine: str | None
    tokens: int
    """Of a step."""
    warmup: int
    """Steps that are not counted."""
    steps: int
    """Most that are."""
    steps_s: float
    """No further step is begun when the counted ones have taken this long, and are `LEAST_COUNTED`."""
    templates_s: float
    dtype: str
    cuda_graphs: bool


def main(ready_fd: int) -> int:
    write_stacks_when_asked()
    load_all()
    told = take_order(ready_fd)
    if told is None:
        return 0
    if "probe" in told:
        return probe(told["probe"])
    order = Order(**told)
    try:
        result = measure_run(order)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:1000]}
    Path(order.report).write_text(json.dumps(result))
    return 1 if "error" in result else 0


def load_all() -> None:
    """Import what a run will import; nothing is called."""
    import measure  # noqa: F401
    import shapes  # noqa: F401
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM  # noqa: F401

    import overspill.probe.machine
    import overspill.runtime.session  # noqa: F401


def probe(arguments: list[str]) -> int:
    """`overspill probe` with `arguments`."""
    from overspill.cli import main as command

    sys.argv = ["overspill", "probe", *arguments]
    command()
    return 0


def build_config(shape: str, *, seq_len: int) -> Any:
    """A transformers config."""
    from shapes import SHAPES, LlamaShape
    from transformers import Qwen3MoeConfig

    more = {
        "160M": LlamaShape(hidden_size=768, num_blocks=12, num_heads=12, num_kv_heads=12, ffn_size=3072),
        "0.5B": LlamaShape(hidden_size=1024, num_blocks=24, num_heads=16, num_kv_heads=8, ffn_size=4608),
    }
    if shape in ("moe", "tiny-moe"):
        is_tiny = shape == "tiny-moe"
        config = Qwen3MoeConfig(
            vocab_size=256 if is_tiny else 32000, hidden_size=64 if is_tiny else 1024, num_hidden_layers=2 if is_tiny else 12,
            num_attention_heads=4 if is_tiny else 16, num_key_value_heads=2 if is_tiny else 8, head_dim=16 if is_tiny else 64,
            intermediate_size=128, moe_intermediate_size=32 if is_tiny else 768, num_experts=4 if is_tiny else 8,
            num_experts_per_tok=2, max_position_embeddings=max(4096, seq_len), tie_word_embeddings=False,
        )  # fmt: skip
        config.use_cache = False
        return config
    return {**SHAPES, **more}[shape].config(max_positions=max(4096, seq_len))


def measure_run(order: Order) -> dict[str, Any]:
    """Open, predict, train, compare."""
    import torch
    from measure import IoCounters, status_bytes

    import overspill
    from overspill.huggingface import build_meta_model

    run, marks = order.run, {"imported": status_bytes("VmRSS")}
    seq_len = run["seq_len"]
    micro_batch = max(1, min(order.tokens, MOST_TOKENS_TOGETHER) // seq_len)
    accumulate = max(1, order.tokens // (micro_batch * seq_len))
    config = build_config(run["shape"], seq_len=seq_len)
    model = build_meta_model(config, dtype=getattr(torch, order.dtype))
    fill_windows(model)
    request = overspill.PlanRequest(
        parameters=run["place"], states=run["place"], boundaries="device", dtype=order.dtype, seq_len=seq_len, micro_batch=micro_batch,
        accumulate=accumulate, clip=run["clip"], ssd_dir=order.folder if run["place"] == "ssd" else None,
    )  # fmt: skip
    counters = IoCounters(Path(order.folder))
    optimizer = overspill.AdamW(lr=1e-4)
    with overspill.Session(model, plan=request, optimizer=optimizer, machine=order.machine, cuda_graphs=order.cuda_graphs) as session:
        marks["opened"] = status_bytes("VmRSS")
        batches = [random_batch(config.vocab_size, micro_batch, seq_len, index) for index in range(accumulate)]
        from_file = session.predict_plan()
        before = counted_so_far()
        _ = session.rates  # what `overspill finetune` asks for before its first step
        times = session.time_templates(limit_s=order.templates_s)
        rates, while_predicting = session.rates, counted_so_far() - before  # looked at again meanwhile
        prediction = session.predict_plan()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        marks |= {"before_steps": status_bytes("VmRSS"), "peak_before_steps": status_bytes("VmHWM")}
        io = counters.read()
        reports = [session.step(batches) for _ in range(order.warmup)]
        before = counted_so_far()
        counted = _counted_steps(session, batches, order)
        while_counted = counted_so_far() - before
        reports += counted
        session.executor.finish()
        io = counters.read() - io
        context_bytes = max([_context_bytes(session.device), *(report.device_context_bytes for report in reports)])
        marks["ended"] = status_bytes("VmRSS")
        plan, lazy = session.plan, session.executor.lazy_trace
        kinds = op_kinds(plan, lazy._source[1] if lazy._source else lazy.get().schedule)
        launched, trace = launched_by_kind(kinds, lazy), session.executor.trace
        timelines = {"predicted": prediction.spans, "measured": trace.spans}
    figures = _figures(from_file, prediction, reports, counted, context_bytes)
    return {
        "hardware": f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **run,
        "micro_batch": micro_batch,
        "accumulate": accumulate,
        "group_size": plan.group_size,
        "cuda_graphs": order.cuda_graphs,
        "num_parameters": plan.num_parameters,
        **figures,
        "drive": _drive_bytes(io, reports, plan),
        "memory_marks": marks,
        "device_reserved_peak_bytes": max(report.device_peak_bytes for report in reports),
        "device_context_bytes": context_bytes,
        "compute_s": {who: compute_by_kind(kinds, spans) for who, spans in timelines.items()},
        "host_s": {who: host_by_kind(kinds, spans) for who, spans in timelines.items()},
        "launched_s": launched,
        "leads": {who: leads(spans) for who, spans in timelines.items()},
        "spans": {"kinds": kinds, **{who: compact(spans) for who, spans in timelines.items()}},
        "all_step_s": [report.step_s for report in reports],
        "num_counted": len(counted),
        "disturbance": {"predicting": dataclasses.asdict(while_predicting), "counted": dataclasses.asdict(while_counted)},
        "rates": dataclasses.asdict(rates),
        "templates": [] if times is None else [
            {
                "name": item.name, "forward_s": item.forward_s, "forward_backward_s": item.forward_backward_s, "note": item.note,
                "launch_s": item.launch_s, "is_replayable": item.is_replayable,
                "replays_s": [timing.median_s for timing in (item.replayed_forward, item.replayed_backward) if timing],
                "launches_s": [
                    timing.issue_s for timing in (item.forward, item.backward, item.replayed_forward, item.replayed_backward) if timing
                ],
                "spread_s": item.backward.spread_s if item.backward else None,
                "num_repetitions": item.backward.num_repetitions if item.backward else 0,
            }
            for item in (*times.blocks, times.tail)
        ],
    }  # fmt: skip


def _counted_steps(session: Any, batches: list[dict[str, Any]], order: Order) -> list[Any]:
    reports: list[Any] = []
    while len(reports) < order.steps:
        if len(reports) >= min(LEAST_COUNTED, order.steps) and math.fsum(report.step_s for report in reports) > order.steps_s:
            break
        reports.append(session.step(batches))
    return reports


def _figures(from_file: Any, prediction: Any, reports: list[Any], counted: list[Any], context_bytes: int) -> dict[str, Any]:
    """What was predicted, what was measured, and what lies between."""
    from overspill.spec.prediction import compare

    found = compare(prediction, reports[-1])
    step_s = statistics.median(report.step_s for report in counted)
    measured = dict(found.measured) | {
        "step_s": step_s,
        "step_s_from_file": step_s,
        "device_peak_bytes": max(report.device_peak_bytes for report in reports) + context_bytes,
    }
    predicted = dict(found.predicted) | {"step_s_from_file": from_file.step_s if from_file.has_times else None}
    missed = {
        name: None if value is None else 0.0 if value == measured[name] else (measured[name] - value) / (measured[name] or 1)
        for name, value in predicted.items()
    }
    return {
        "predicted": predicted,
        "measured": measured,
        "missed_by": missed,
        "source": prediction.source,
        "source_from_file": from_file.source,
        "replays": {"predicted": prediction.num_replays, "measured": reports[-1].num_replays},
        "device_terms": {term.name: term.num_bytes for term in prediction.device_terms},
        "host_terms": {term.name: term.num_bytes for term in prediction.host_terms},
        "lane_busy_s": {"predicted": dict(prediction.lane_busy_s), "measured": dict(reports[-1].lane_busy_s)},
        "exposed_s": {"predicted": dict(prediction.exposed_s), "measured": dict(reports[-1].exposed_s)},
    }


def _context_bytes(device: Any) -> int:
    """What the driver counts beside the allocator's, now; 0 on a CPU. Nothing else may use the device."""
    import torch

    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(max(0, total - free - torch.cuda.memory_reserved(device)))


def _drive_bytes(io: Any, reports: list[Any], plan: Any) -> dict[str, int]:
    """Of all steps, landed: what the lanes say, and what the kernel counted for this process at the drive.

    From a session's first step to the end of its last one, since a step's own bytes cannot be told from those of the landing beside it. The
    first update reads states that nobody has written: a file system answers for such blocks without asking its drive
    (`unwritten_read_bytes`), so these are in the lanes' bytes and not in the kernel's. With clip that update is made by the second step.
    """
    has_updated = len(reports) > (1 if plan.clip is not None else 0)
    return {
        "lanes_read_bytes": sum(report.ssd_read_bytes for report in reports),
        "unwritten_read_bytes": _state_bytes_on_ssd(plan) if has_updated else 0,
        "lanes_written_bytes": sum(report.ssd_written_bytes for report in reports),
        "kernel_read_bytes": io.process_read_bytes,
        "kernel_written_bytes": io.process_written_bytes,
    }


def _state_bytes_on_ssd(plan: Any) -> int:
    """Of all records of states that rest there."""
    from overspill.spec.tensors import Tier

    names = [name for name in plan.bundles if plan.has_state(name) and plan.placements[name].states is Tier.SSD]
    return sum(plan.state_record_bytes(name, index) for name in names for index in range(len(plan.bundles[name].chunks)))


def fill_windows(model: Any) -> None:
    """Weights that take no memory of their own to speak of: each matrix is a window on one random vector, as in `shapes`."""
    import torch
    from shapes import WEIGHT_STD
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.dim() == 1:
                value = torch.ones(parameter.shape, dtype=parameter.dtype)
            else:
                vector = (torch.randn(sum(parameter.shape), generator=generator) * WEIGHT_STD).to(parameter.dtype)
                value = vector.as_strided(parameter.shape, (1,) * parameter.dim())
            module._parameters[name] = nn.Parameter(value)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                raise ValueError(f"buffer {name} of {type(module).__name__} has no value")


def random_batch(vocab_size: int, samples: int, seq_len: int, seed: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(0, vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
