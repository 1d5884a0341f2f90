"""How far predictions are off, on runs that calibrated nothing.

    python benchmarks/prediction/run.py --out results.jsonl --ssd-dir DIRECTORY [--runs NAME...] [--deadline-s 525]
    python benchmarks/prediction/run.py --list
    python benchmarks/prediction/run.py --summarize results.jsonl

Protocol:

1. Calibration is `overspill probe` (a machine file) and the templates that each run times itself before its first step. No step of any
   run in `CALIBRATION` or `HELD_OUT` is used to predict another. Constants of the code were chosen from the runs in `CALIBRATION`.
2. A held-out run is a process of its own with a limit. Its prediction is made when the session has opened, before its first step, twice:
   with the templates timed there, and from the machine file alone.
3. Measured are the median of the counted steps' times, the most that allocator and driver had reserved, VmHWM from a fresh process to
   the last step, and the drive's bytes. `missed_by` is measured less predicted, over measured.
4. A line a run, with the terms of both peaks; a run that fails is a line with its error. `--summarize` prints medians and the worst beside
   `TARGETS`.

A name is SHAPE:SEQ_LEN:PLACE[:clip], as 1.10B:2048:ssd:clip; tokens of a step are `TOKENS`, in one micro-batch where that is small enough.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "host_memory")]

from attempt import read_json, run_attempt  # noqa: E402
from measure import append_result, provenance  # noqa: E402

TOKENS = 16384
MOST_TOKENS_TOGETHER = 8192
"""Of a micro-batch."""
CALIBRATION = ("1.10B:2048:host", "1.10B:2048:host:clip")
"""Their shapes gave the code its constants (context, fragmentation, launches), so they are in no result."""
_SHAPES, _LENGTHS = ("160M", "0.5B", "1.10B", "moe"), (512, 2048, 8192)
HELD_OUT = tuple(
    name
    for shape in _SHAPES
    for length in _LENGTHS
    for place in ("host", "ssd")
    for name in (f"{shape}:{length}:{place}", f"{shape}:{length}:{place}:clip")
    if name not in CALIBRATION
)
TARGETS = {
    "device_peak_bytes": (0.03, 0.08),
    "host_peak_bytes": (0.05, 0.10),
    "ssd_read_bytes": (0.0, 0.0),
    "ssd_written_bytes": (0.0, 0.0),
    "step_s": (0.08, 0.20),
    "step_s_from_file": (0.20, None),
}
"""Figure -> median and worst miss that are wanted."""
CLOSING_S = 6.0
"""Left before the deadline for ending a run and writing its line."""


def parse_name(name: str) -> dict[str, Any]:
    """The run of that name.

    Raises:
        ValueError: it is none.
    """
    parts = name.split(":")
    shapes = {*_SHAPES, "tiny", "tiny-moe"}
    is_run = (
        len(parts) in (3, 4) and parts[0] in shapes and parts[1].isdigit() and parts[2] in ("host", "ssd") and parts[3:] in ([], ["clip"])
    )
    if not is_run:
        raise ValueError(
            f"{name!r} is not a run: it is SHAPE:SEQ_LEN:PLACE[:clip] with a shape of {', '.join(sorted(shapes))}, on host or ssd"
        )
    return {"shape": parts[0], "seq_len": int(parts[1]), "place": parts[2], "clip": 1.0 if parts[3:] else None}


def build_config(shape: str, *, seq_len: int) -> Any:
    """A transformers config."""
    from shapes import SHAPES, LlamaShape
    from transformers import Qwen3MoeConfig

    more = {
        "160M": LlamaShape(hidden_size=768, num_blocks=12, num_heads=12, num_kv_heads=12, ffn_size=3072),
        "0.5B": LlamaShape(hidden_size=1024, num_blocks=24, num_heads=16, num_kv_heads=8, ffn_size=4608, vocab_size=64000),
    }
    if shape in ("moe", "tiny-moe"):
        is_tiny = shape == "tiny-moe"
        config = Qwen3MoeConfig(
            vocab_size=256 if is_tiny else 32000, hidden_size=64 if is_tiny else 1024, num_hidden_layers=2 if is_tiny else 12,
            num_attention_heads=4 if is_tiny else 16, num_key_value_heads=2 if is_tiny else 8, head_dim=16 if is_tiny else 64,
            intermediate_size=128, moe_intermediate_size=32 if is_tiny else 768, num_experts=4 if is_tiny else 16,
            num_experts_per_tok=2, max_position_embeddings=max(4096, seq_len), tie_word_embeddings=False,
        )  # fmt: skip
        config.use_cache = False
        return config
    return {**SHAPES, **more}[shape].config(max_positions=max(4096, seq_len))


# -- the supervisor ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="names; without: all that are held out")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--summarize", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="a line a run is added here; runs that have one without an error are left out")
    parser.add_argument("--ssd-dir", type=Path)
    parser.add_argument("--machine", type=Path, help="a machine file; without: the cache's, probed first if there is none")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=90.0, help="of a run")
    parser.add_argument("--templates-s", type=float, default=5.0, help="for timing templates")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--deadline-s", type=float, default=525.0, help="of the whole call")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.list or options.summarize or options.child) and (options.out is None or options.ssd_dir is None):
        parser.error("give --out and --ssd-dir; --list shows the runs")
    return options


def main() -> int:
    options = parse_arguments()
    if options.list:
        print("\n".join(HELD_OUT))
        return 0
    if options.summarize:
        print(summarize([json.loads(line) for line in options.summarize.read_text().splitlines()]))
        return 0
    if options.child:
        return run_child(options)
    started, names = time.monotonic(), list(options.runs or HELD_OUT)
    try:
        for name in names:
            parse_name(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    done = {line["name"] for line in _lines(options.out) if "error" not in line}
    options.ssd_dir.mkdir(parents=True, exist_ok=True)
    ensure_machine_file(options)
    for name in names:
        left_s = options.deadline_s - (time.monotonic() - started) - CLOSING_S
        if name in done:
            continue
        if left_s < 0.3 * options.limit_s:
            print(f"{name}: not started, {left_s:.0f} s are left before the deadline", flush=True)
            break
        result = run_one(name, options, limit_s=min(options.limit_s, left_s))
        append_result(options.out, {"name": name, **provenance(), "is_held_out": name not in CALIBRATION, **result})
        missed = {key: round(value, 3) for key, value in result.get("missed_by", {}).items() if value is not None}
        print(f"{name}: {result.get('error', missed)}", flush=True)
    print(summarize(_lines(options.out)))
    return 0


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ensure_machine_file(options: argparse.Namespace) -> None:
    """Probe the machine once, with the drive that the runs use."""
    if options.machine is None:
        code = "import sys; from overspill.cli import main; sys.argv[0] = 'overspill'; main()"
        command = [sys.executable, "-c", code, "probe", "--ssd-dir", str(options.ssd_dir)]
        outcome = run_attempt(command, limit_s=60)
        print(outcome.output_tail[-2000:] if outcome.return_code != 0 else "the machine file is there", flush=True)


def run_one(name: str, options: argparse.Namespace, *, limit_s: float) -> dict[str, Any]:
    """The run's result, whatever became of its process."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(HERE / "run.py"), "--child", name, "--report", str(report), "--ssd-dir", str(options.ssd_dir)]
        for flag in ("tokens", "warmup", "steps", "dtype", "templates_s"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
        command += ["--machine", str(options.machine)] if options.machine is not None else []
        outcome = run_attempt(command, limit_s=limit_s)
        result = read_json(report) | {"wall_s": round(outcome.wall_s, 1)}
    if "error" not in result and (outcome.return_code != 0 or "missed_by" not in result):
        result["error"] = outcome.describe_failure(limit_s)
    if "error" in result:
        result["output_tail"] = outcome.output_tail[-2000:].replace(f"{HERE.parents[1]}{os.sep}", "")
    return result


def summarize(lines: list[dict[str, Any]]) -> str:
    """A table of medians and worst misses of the runs that are held out and ended well; the newest line of a run counts."""
    newest = {line["name"]: line for line in lines if line.get("is_held_out") and "error" not in line}
    failed = sorted({line["name"] for line in lines if "error" in line} - newest.keys())
    text = [f"{len(newest)} held-out runs", "figure | median | worst | wanted | the worst run", "--- | --- | --- | --- | ---"]
    for figure, (median, worst) in TARGETS.items():
        known = {name: abs(line["missed_by"][figure]) for name, line in newest.items() if line["missed_by"].get(figure) is not None}
        if known:
            name = max(known, key=lambda item: known[item])
            wanted = f"{median:.0%}" + (f" / {worst:.0%}" if worst is not None else "")
            text.append(f"{figure} | {statistics.median(known.values()):.2%} | {known[name]:.2%} | {wanted} | {name}")
    return "\n".join([*text, *(f"failed: {name}" for name in failed)])


# -- a run -------------------------------------------------------------------------------------------------------------


def run_child(options: argparse.Namespace) -> int:
    try:
        result = measure_run(options)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:1000]}
    options.report.write_text(json.dumps(result))
    return 1 if "error" in result else 0


def measure_run(options: argparse.Namespace) -> dict[str, Any]:
    """Open, predict, train, compare."""
    import torch

    import overspill
    from overspill.huggingface import build_meta_model
    from overspill.spec.prediction import compare

    run = parse_name(options.child)
    seq_len = run["seq_len"]
    micro_batch = max(1, min(options.tokens, MOST_TOKENS_TOGETHER) // seq_len)
    accumulate = max(1, options.tokens // (micro_batch * seq_len))
    config = build_config(run["shape"], seq_len=seq_len)
    model = build_meta_model(config, dtype=getattr(torch, options.dtype))
    fill_windows(model)
    folder = options.ssd_dir / "run"
    folder.mkdir(parents=True, exist_ok=True)
    request = overspill.PlanRequest(
        parameters=run["place"], states=run["place"], boundaries="device", dtype=options.dtype, seq_len=seq_len, micro_batch=micro_batch,
        accumulate=accumulate, clip=run["clip"], ssd_dir=str(folder) if run["place"] == "ssd" else None,
    )  # fmt: skip
    with overspill.Session(model, plan=request, optimizer=overspill.AdamW(lr=1e-4), machine=options.machine) as session:
        batches = [random_batch(config.vocab_size, micro_batch, seq_len, index) for index in range(accumulate)]
        from_file = session.predict_plan()
        times = session.time_templates(limit_s=options.templates_s)
        prediction = session.predict_plan()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        reports = [session.step(batches) for _ in range(options.warmup + options.steps)]
        counted = reports[options.warmup :]
    step_s = statistics.median(report.step_s for report in counted)
    last = max(reports, key=lambda report: report.device_peak_bytes)
    found = compare(prediction, reports[-1])
    measured = dict(found.measured) | {
        "step_s": step_s,
        "device_peak_bytes": last.device_peak_bytes + max(report.device_context_bytes for report in reports),
    }
    predicted = dict(found.predicted) | {"step_s_from_file": from_file.step_s if from_file.has_times else None}
    measured["step_s_from_file"] = step_s
    missed = {
        name: None if value is None else 0.0 if value == measured[name] else (measured[name] - value) / (measured[name] or 1)
        for name, value in predicted.items()
    }
    return {
        "hardware": f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **run,
        "micro_batch": micro_batch,
        "accumulate": accumulate,
        "group_size": session.plan.group_size,
        "num_parameters": session.plan.num_parameters,
        "predicted": predicted,
        "measured": measured,
        "missed_by": missed,
        "source": prediction.source,
        "source_from_file": from_file.source,
        "device_terms": {term.name: term.num_bytes for term in prediction.device_terms},
        "host_terms": {term.name: term.num_bytes for term in prediction.host_terms},
        "device_reserved_peak_bytes": last.device_peak_bytes,
        "device_context_bytes": reports[-1].device_context_bytes,
        "lane_busy_s": {"predicted": dict(prediction.lane_busy_s), "measured": dict(reports[-1].lane_busy_s)},
        "exposed_s": {"predicted": dict(prediction.exposed_s), "measured": dict(reports[-1].exposed_s)},
        "all_step_s": [report.step_s for report in reports],
        "templates": [] if times is None else [[item.name, item.forward_s, item.forward_backward_s, item.note] for item in times.blocks],
    }


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
    sys.exit(main())
