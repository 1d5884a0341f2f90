"""The throughput comparison runs small, on a CPU, with every system that can; what cannot is a row with its error."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "throughput"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent / "host_memory")]

import chunked_loss  # noqa: E402
import deepspeed_systems  # noqa: E402
import rows  # noqa: E402
from measure import HostWatch  # noqa: E402
from shapes import SHAPES, build_windowed_model, place_weights  # noqa: E402

LAYOUT = "tiny:2x1x16"


def load(name: str) -> ModuleType:
    """A script of the folder under a name of its own: other benchmarks have a run.py and a summarize.py too."""
    spec = importlib.util.spec_from_file_location(f"throughput_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, summarize = load("run"), load("summarize")


def measured(name: str, folder: Path, *, steps: int = 2, until: float = float("inf")) -> dict[str, Any]:
    """The row's line, run in this process."""
    row, found, watch = rows.parse_row(name), {}, HostWatch()
    try:
        run.measure_row(row, watch, found.update, warmup=1, steps=steps, dtype_name="float32", ssd_dir=str(folder / "ssd"), until=until)
    finally:
        watch.close()
    return {"run": "here", **run.describe_row(row), **found}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("throughput")
    systems = [
        "resident",
        "resident:clip",
        "resident-keep",
        "resident-overspill",
        "overspill-host",
        "overspill-host-keep",
        "overspill-host-auto",
        "overspill-host:clip",
        "overspill-ssd",
        "overspill-ssd-states",
    ]
    names = [f"{LAYOUT}:{system}" for system in [*systems, "fsdp2", "fsdp2:clip"]]
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(variable, raising=False)  # FSDP2's rows set them, and they are taken back here
        found = {name: measured(name, folder) for name in names}
        for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(variable, None)
    return found


def test_every_system_trains_the_same_losses(lines: dict[str, dict[str, Any]]) -> None:
    expected = lines[f"{LAYOUT}:resident"]["losses"]
    assert len(expected) == 3
    for name, line in lines.items():
        assert line["losses"] == pytest.approx(expected, abs=2e-3), name


def test_a_line_has_speed_spread_and_peaks(lines: dict[str, dict[str, Any]]) -> None:
    for name, line in lines.items():
        speeds, training = line["tokens_per_s"], line["host"]["training"]
        assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"], name
        assert line["repetitions"] == 2 and len(line["all_step_s"]) == 3 and line["is_complete"]
        assert training["vm_hwm_bytes"] > 0 and line["device"]["training"]["driver_peak_bytes"] == 0
    host = lines[f"{LAYOUT}:overspill-host"]
    assert host["floor_error"] is None and host["floor_s"] != 0 and host["report_step_s"] > 0
    assert lines[f"{LAYOUT}:overspill-ssd"]["lane_bytes"]["ssd_write"] > 0
    assert lines[f"{LAYOUT}:resident-overspill"]["home_bytes"]["host"]["states"] == 0


def test_a_row_that_runs_out_of_time_keeps_the_steps_that_it_has(tmp_path: Path) -> None:
    line = measured(f"{LAYOUT}:resident", tmp_path, steps=50, until=0.0)
    assert line["repetitions"] == 1 and line["is_complete"]


def test_chunked_loss_and_its_gradients_equal_the_full_logits_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["tiny"]
    model = build_windowed_model(shape, dtype=torch.float32, max_positions=64)
    place_weights(model, torch.device("cpu"))
    chunked_loss.recompute_blocks(model)
    ids = torch.randint(0, shape.vocab_size, (2, 50))
    logits = model(input_ids=ids, use_cache=False).logits
    full = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    full.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * shape.vocab_size)  # the least number of rows: 64 of 100
    loss = chunked_loss.CausalLoss(model, dtype=torch.float32)(ids, ids, num_targets=2 * 49)
    loss.backward()
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.10B:1x8:zero2", "is not a row"),
        ("9B:1x8x2048:zero2", "is not a shape"),
        ("1.10B:1x8x2048:zero4", "is not a system"),
        ("1.10B:1x8x1:zero2", "has no target"),
    ],
)
def test_a_name_that_is_no_row_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows.parse_row(name)


def test_every_part_has_rows_that_exist_and_ends_before_its_deadline() -> None:
    deadline_s = run.parse_arguments(["--list"]).deadline_s
    for part, names in rows.PARTS.items():
        assert [rows.parse_row(name).name for name in names] == names and len(set(names)) == len(names), part
        assert sum(rows.parse_row(name).estimate_s(warmup=2, steps=5) for name in names) < deadline_s - 30, part
    for name, size in rows.PARAMETERS_B.items():
        assert size == pytest.approx(SHAPES[name].num_parameters / 1e9, rel=0.05) or name == "tiny"
    assert rows.PARAMETERS_B.keys() == SHAPES.keys()


def test_the_14b_shape_is_qwen2_5_14b() -> None:
    shape = SHAPES["14B"]
    model = build_windowed_model(shape, dtype=torch.bfloat16, max_positions=64)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters == 14_770_033_664
    assert float(model.model.layers[0].self_attn.q_proj.bias.abs().max()) == 0


def test_deepspeed_is_configured_as_its_row_says() -> None:
    def zero(system: str) -> dict[str, Any]:
        row = rows.parse_row(f"1.10B:8x1x2048:{system}:clip")
        config = deepspeed_systems.build_config(row, num_parameters=1_100_000_000)
        assert (config["gradient_accumulation_steps"], config["train_micro_batch_size_per_gpu"], config["gradient_clipping"]) == (8, 1, 1.0)
        return dict(config["zero_optimization"])

    assert zero("zero2")["stage"] == 2 and "offload_param" not in zero("zero2")
    assert zero("zero3")["stage"] == 3 and zero("zero3")["offload_param"]["device"] == "cpu"
    superoffload = zero("superoffload")
    assert superoffload["offload_optimizer"]["super_offload"] and superoffload["sub_group_size"] == 55_000_000


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is there")
def test_a_run_writes_a_line_for_every_row_whatever_becomes_of_it(tmp_path: Path) -> None:
    names = [f"{LAYOUT}:zero2", f"{LAYOUT}:resident:clip", f"{LAYOUT}:overspill-ssd-states"]
    settings = {"INSTALL": "0", "DTYPE": "float32", "STEPS": "1", "WARMUP": "0", "SSD_DIR": str(tmp_path / "ssd")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run_in(FOLDER / "run_gpu.sh", str(tmp_path), "tiny", ":resident:clip", "tiny:2x1x16:zero2", PATH=path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "throughput.md").read_text() in done.stdout
    out = tmp_path / "throughput-tiny.jsonl"
    late = script("run.py", "--rows", names[2], "--deadline-s", "7", "--out", str(out))
    assert late.returncode == 0, late.stderr
    found = {line["row"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert names == [name for name in found if name in names]
    assert found[names[0]]["run"] == found[names[1]]["run"] != found[names[2]]["run"]
    assert "error" not in found[names[1]] and found[names[1]]["repetitions"] == 1
    assert found[names[0]]["error"] == "ModuleNotFoundError: No module named 'deepspeed'"
    assert found[names[2]]["error"].startswith("not started: ")
    assert str(ROOT) not in found[names[0]]["output_tail"]


def test_arguments_that_name_nothing_are_refused() -> None:
    assert script("run.py", "--rows", "tiny:resident", "--out", "x").returncode == 2
    assert "no row of part 8B contains zero2" in script("run.py", "--part", "8B", "--rows", "zero2", "--out", "x").stderr
    assert "give --out" in script("run.py", "--part", "8B").stderr


# -- summaries, on recorded lines ------------------------------------------------------------------------------------


def line(row: str, tokens_per_s: float, *, run_name: str = "a", **more: Any) -> dict[str, Any]:
    parsed = rows.parse_row(row)
    return {
        "run": run_name,
        **run.describe_row(parsed),
        "precision": "bf16",
        "open_s": 1.0,
        "losses": [10.4],
        "host": {"training": {"vm_hwm_bytes": 3 << 30, "available_fall_bytes": 4 << 30}},
        "device": {"training": {"driver_peak_bytes": 5 << 30, "reserved_peak_bytes": 4 << 30}},
        **run.spread([parsed.tokens_per_step / tokens_per_s], parsed.tokens_per_step),
        **more,
    }


def test_ratios_are_to_the_faster_resident_of_the_same_run_and_say_when_they_are_not() -> None:
    work = "1.10B:1x8x2048"
    ours = line(f"{work}:overspill-host", 40_000)
    results = [
        line(f"{work}:resident", 90_000, run_name="earlier"),
        line(f"{work}:resident", 44_000),
        line(f"{work}:resident-overspill", 50_000),
        line("1.10B:2x8x2048:resident", 99_000),
        ours,
    ]
    assert summarize.ratio(results, ours, "resident") == (pytest.approx(0.8), "")
    elsewhere = line(f"{work}:overspill-host", 45_000, run_name="later")
    assert summarize.ratio(results, elsewhere, "resident") == (pytest.approx(0.9), "*")
    clipped = line(f"{work}:overspill-host:clip", 25_000)
    assert summarize.ratio(results, clipped, "resident") == (pytest.approx(0.5), "c")
    assert summarize.ratio(results, clipped, "zero2") is None


def test_claims_are_met_missed_or_not_measured() -> None:
    work = "1.10B:1x8x2048"
    report = {"step_over_floor": 1.2, "dispatch_s": 0.01, "report_step_s": 0.5}
    results = [line(f"{work}:resident", 40_000), line(f"{work}:overspill-host", 36_000, **report)]
    target = {"claim": "it", "row": f"{work}:overspill-host", "of": "resident"}

    def verdict(**more: Any) -> str:
        merged = {**target, **more}
        if "figure" in more:
            del merged["of"]
        return str(summarize.verdict(summarize.figure_of(results, merged), merged))

    assert verdict(at_least=0.9) == "met" and verdict(at_least=0.91) == "missed" and verdict(at_least=None) == "no target"
    assert verdict(row="1.10B:2x8x2048:overspill-host", at_least=0.9) == "not measured"
    assert verdict(figure="step_over_floor", at_most=1.1) == "missed" and verdict(figure="dispatch_fraction", at_most=0.02) == "met"
    assert verdict(figure="device_gib", at_most=5) == "met" and verdict(figure="host_gib", at_most=3.9) == "missed"
    assert verdict(figure="floor_s", at_most=1) == "not measured"


def test_a_row_with_a_cap_is_held_against_the_one_without_unless_it_has_one_beside_it() -> None:
    results = [line("1.10B:1x8x2048:resident", 40_000), line("1.10B@8GiB:1x8x2048:overspill-host", 36_000)]
    assert summarize.ratio(results, results[1], "resident") == (0.9, "u")
    results.append(line("1.10B@8GiB:1x8x2048:resident", 30_000))
    assert summarize.ratio(results, results[1], "resident") == (1.2, "")
    results[2] = line("1.10B@9GiB:1x8x2048:resident", 30_000)
    assert summarize.ratio(results, results[1], "resident") == (0.9, "u"), "another cap's"
    elsewhere = {**line("1.10B@8GiB:1x8x2048:resident", 30_000), "run": "elsewhere"}
    clipped = [line("1.10B:1x8x2048:resident:clip", 20_000), line("1.10B@8GiB:1x8x2048:overspill-host:clip", 10_000)]
    assert summarize.ratio([elsewhere, *clipped], clipped[1], "resident") == (0.5, "u"), "clipping and run count more than the cap"
    assert summarize.ratio(results, results[1], "zero2") is None


def test_the_claims_on_file_are_of_rows_that_some_part_runs() -> None:
    planned = {name for names in rows.PARTS.values() for name in names}
    for target in summarize.read_targets(FOLDER / "targets.json"):
        assert target["row"] in planned, target["claim"]
        if target.get("of", "resident") != "resident":
            assert any(name.split(":")[2] == target["of"] for name in planned), target["claim"]


def test_the_table_shows_every_row_and_every_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: dict[str, dict[str, Any]]
) -> None:
    out = tmp_path / "out.jsonl"
    failed = {"run": "here", **run.describe_row(rows.parse_row(f"{LAYOUT}:zero3")), "error": "no | room"}
    out.write_text("\n".join(json.dumps(item) for item in [*lines.values(), failed]) + "\n")
    assert summarize.main([str(out), "--out", str(tmp_path / "out.md")]) == 0
    text = (tmp_path / "out.md").read_text()
    assert text == capsys.readouterr().out
    assert all(f"| {name} |" in text for name in lines) and "no / room" in text and "not measured" in text
    out.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no line of run.py"):
        summarize.main([str(out)])


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.jsonl"
    found = [line("8B@8GiB:1x8x2048:resident", 40_000), line("8B@8GiB:1x8x2048:overspill-host:clip", 30_000)]
    out.write_text("".join(json.dumps(item) + "\n" for item in found))
    done = script("plot.py", str(tmp_path / "plots"), str(out))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plots" / "throughput-8B-8GiB-1x8x2048.svg").stat().st_size > 1000


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_in(sys.executable, str(FOLDER / name), *arguments)


def run_in(program: str | Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`program` in the environment of this process, with its module path, plus `settings`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **settings}
    command = ["bash", str(program)] if str(program).endswith(".sh") else [str(program)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
