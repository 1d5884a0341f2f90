"""Claims about `overspill probe` and about who uses its file: kept, renewed, warned about, printed in any case."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from training_loop import make_batches
from typer.testing import CliRunner, Result

import overspill
from overspill.cli import app
from overspill.cli.failures import ExitCode
from overspill.probe import machine
from overspill.probe.cache import cache_path, load_hardware, read_machine_file, write_machine_file
from overspill.probe.identity import read_identity
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import FORMAT_VERSION, MachineFile, parse_machine_file

CPU = torch.device("cpu")
Probe = Callable[..., Result]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_path(read_identity(CPU, []))


@pytest.fixture
def probe(cache: Path) -> Probe:
    def call(*flags: object) -> Result:
        return CliRunner().invoke(app, ["probe", "--device", "cpu", *map(str, flags)], env={"COLUMNS": "200", "NO_COLOR": "1"})

    return call


@pytest.fixture
def num_probes(small_by_default: None, monkeypatch: pytest.MonkeyPatch, machine_file: MachineFile) -> Iterator[list[int]]:
    """Counts probes; each gives the made-up figures, as if of this machine."""
    made: list[int] = []

    def probe_machine(device: torch.device, places: Any, *, host_budget_bytes: int | None = None, **_: Any) -> MachineFile:
        made.append(1)
        found = dataclasses.replace(machine_file.capacities, host_budget_bytes=host_budget_bytes)
        return dataclasses.replace(machine_file, identity=read_identity(device, places), capacities=found)

    monkeypatch.setattr(machine, "probe_machine", probe_machine)
    yield made


def edit(path: Path, **changes: Any) -> None:
    """Change the identity in a machine file."""
    file = read_machine_file(path)
    write_machine_file(path, dataclasses.replace(file, identity=dataclasses.replace(file.identity, **changes)))


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.clock
def test_a_whole_probe_ends_within_30_s_leaves_nothing_and_says_what_bounds_a_step(probe: Probe, cache: Path, tmp_path: Path) -> None:
    """The real one, with all its sizes."""
    (tmp_path / "ssd").mkdir()
    begin_s = time.perf_counter()
    done = probe("--ssd-dir", tmp_path / "ssd")
    assert time.perf_counter() - begin_s < 26, "beside that, Python and torch start"
    assert done.exit_code == 0, done.output
    file = read_machine_file(cache)
    assert (
        not [note for note in file.notes if "was not measured" in note]
        and len(file.rates.link) == 2
        and len(file.rates.ssd) == 2
        and file.rates.compute is not None
    )
    assert done.stdout.splitlines()[-1].startswith("A typical step in format fp32 is bound by the ")
    assert "nothing of it is left" in done.stdout and "no GPU is used" in done.stderr
    assert list((tmp_path / "ssd").iterdir()) == [] and [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_figures_are_kept_and_measured_once(probe: Probe, cache: Path, num_probes: list[int]) -> None:
    first = probe()
    assert first.exit_code == 0 and len(num_probes) == 1 and f"kept in {cache}" in first.stderr
    second = probe()
    assert len(num_probes) == 1 and "from the cache, --renew measures again" in second.stdout
    assert probe("--renew").exit_code == 0 and len(num_probes) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"torch": "1.0"}, "the software has changed since (torch was 1.0, is "),
        ({"overspill": "0.0.1"}, "overspill was 0.0.1, is "),
        ({"cpu_model": "Another CPU"}, "it is another machine's (the CPU was Another CPU, is "),
        ({"num_cpus": 999}, "the number of cores was 999, is "),
    ],
)
def test_a_file_of_another_machine_or_of_other_software_is_warned_about_and_renewed(
    probe: Probe, cache: Path, num_probes: list[int], changes: dict[str, Any], reason: str
) -> None:
    probe()
    edit(cache, **changes)
    again = probe()
    assert len(num_probes) == 2 and f"warning: {cache} is measured anew: " in again.stderr and reason in again.stderr
    assert read_machine_file(cache).identity == read_identity(CPU, []), "and now it is this one's"


def test_another_drive_or_budget_is_measured_and_a_file_with_a_drive_serves_without_one(
    probe: Probe, cache: Path, num_probes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe()
    assert "its drives are none, now asked for are" in probe("--ssd-dir", tmp_path).stderr and len(num_probes) == 2
    probe()
    probe("--ssd-dir", tmp_path)
    assert len(num_probes) == 2
    assert "another --host-budget is given" in probe("--host-budget", "3GiB").stderr and len(num_probes) == 3
    assert read_machine_file(cache).capacities.host_usable_bytes == 3 << 30
    probe("--host-budget", "3GiB")
    assert len(num_probes) == 3


@pytest.mark.parametrize("content", ["{", '{"format_version": 99}', "\xff\xfe"], ids=["no JSON", "version 99", "no text"])
def test_a_file_that_cannot_be_read_is_renewed_with_a_warning(probe: Probe, cache: Path, num_probes: list[int], content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("latin-1"))
    done = probe()
    assert done.exit_code == 0 and len(num_probes) == 1 and "measuring anew" in done.stderr and str(cache) in done.stderr
    assert read_machine_file(cache).format_version == FORMAT_VERSION


def test_a_home_that_cannot_be_written_costs_a_warning_and_the_result_is_printed(
    probe: Probe, num_probes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    done = probe()
    assert done.exit_code == 0 and "A typical step" in done.stdout
    assert "warning: the figures are not kept" in done.stderr and "--out FILE" in done.stderr
    elsewhere = probe("--out", tmp_path / "sub" / "here.json")
    assert elsewhere.exit_code == 0 and f"written to {tmp_path / 'sub' / 'here.json'}" in elsewhere.stderr
    assert "not kept" not in elsewhere.stderr
    assert read_machine_file(tmp_path / "sub" / "here.json").identity == read_identity(CPU, [])


@pytest.mark.parametrize("home", ["", "relative"])
def test_an_empty_home_is_none_and_nothing_is_kept_at_the_root(
    probe: Probe, num_probes: list[int], monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    done = probe()
    assert done.exit_code == 0 and "there is no home directory for the cache" in done.output, done.output
    assert load_hardware(HardwareSpec(), CPU, []) == HardwareSpec()


def test_a_file_as_the_ssd_directory_is_refused_although_the_cache_has_figures(probe: Probe, num_probes: list[int], tmp_path: Path) -> None:
    assert probe().exit_code == 0
    (tmp_path / "file").touch()
    done = probe("--ssd-dir", tmp_path / "file")
    assert done.exit_code == ExitCode.WRONG_INPUT and "is a file and not a directory" in done.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_home_is_no_obstacle(probe: Probe, num_probes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(home))
    done = probe()
    assert done.exit_code == 0 and "EACCES" in done.stderr and "A typical step" in done.stdout


def test_a_place_that_was_named_and_cannot_be_written_is_an_error_after_the_result(
    probe: Probe, num_probes: list[int], tmp_path: Path
) -> None:
    (tmp_path / "blocked").touch()
    done = probe("--out", tmp_path / "blocked" / "x.json")
    assert done.exit_code == ExitCode.WORLD_FAILED and "cannot be written" in done.stderr and "to the device" in done.stdout


def test_json_prints_the_file_and_nothing_else(probe: Probe, cache: Path, num_probes: list[int]) -> None:
    assert parse_machine_file(probe("--json").stdout, "stdout") == read_machine_file(cache)
    assert json.loads(probe("--json").stdout)["format_version"] == FORMAT_VERSION, "from the cache too"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ssd-dir", "/nowhere/at/all"), "does not exist"),
        (("--host-budget", "much"), "is not a size"),
        (("--host-budget", "0"), "leaves nothing to measure with"),
    ],
)
def test_wrong_input_is_refused(probe: Probe, small_by_default: None, flags: tuple[str, ...], message: str) -> None:
    done = probe(*flags)
    assert done.exit_code == ExitCode.WRONG_INPUT and message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name(probe: Probe) -> None:
    done = CliRunner().invoke(app, ["probe", "--device", "cuda"])
    assert done.exit_code == ExitCode.WRONG_INPUT and "sees no CUDA device; use --device cpu" in done.stderr


def test_ctrl_c_ends_with_130_and_keeps_nothing(probe: Probe, cache: Path, monkeypatch: pytest.MonkeyPatch, small_by_default: None) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "adamw_updates", interrupted)
    done = probe()
    assert done.exit_code == ExitCode.INTERRUPTED and not cache.exists() and "Traceback" not in done.output


# -- who uses it -----------------------------------------------------------------------------------------------------

FREE = HardwareSpec(host_capacity_bytes=7 << 30)


def keep(file: MachineFile, path: Path, **changes: Any) -> MachineFile:
    """Put `file` there as this machine's, apart from the changes."""
    file = dataclasses.replace(file, identity=dataclasses.replace(read_identity(CPU, []), **changes))
    write_machine_file(path, file)
    return file


def test_predictions_use_this_machines_file_without_a_word(machine_file: MachineFile, cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_hardware(FREE, CPU, []) == FREE, "there is none yet"
        keep(machine_file, cache)
        hardware = load_hardware(FREE, CPU, [], state_format="bf16")
    assert hardware.source.startswith(f"measured ({cache.name}, 2026-11-22)")
    assert (hardware.h2d_bytes_per_s, hardware.host_update_parameters_per_s) == (50e9, 10e9)
    assert hardware.host_capacity_bytes == 7 << 30


@pytest.mark.parametrize("changes", [{"cpu_model": "Another CPU"}, {"torch": "1.0"}], ids=["machine", "software"])
def test_a_cached_file_that_does_not_hold_here_is_warned_about_and_not_used(
    machine_file: MachineFile, cache: Path, changes: dict[str, str]
) -> None:
    keep(machine_file, cache, **changes)
    with pytest.warns(RuntimeWarning, match=r"is not used, because .* was .* assumed rates; `overspill probe` measures anew"):
        assert load_hardware(FREE, CPU, []) == FREE


def test_a_cached_file_that_cannot_be_read_costs_a_warning_and_no_run(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    with pytest.warns(RuntimeWarning, match="not JSON.*assumed rates"):
        assert load_hardware(FREE, CPU, []) == FREE


def test_another_machines_file_is_used_if_it_is_named_and_its_memory_is_not_ours(
    machine_file: MachineFile, cache: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(machine_file, capacities=dataclasses.replace(machine_file.capacities, host_budget_bytes=1 << 40))
    write_machine_file(tmp_path / "other.json", other)
    with pytest.warns(RuntimeWarning, match=r"rates are those of .*other.json, as asked, although it is another machine's \(the CPU was A"):
        hardware = load_hardware(FREE, CPU, [], machine=tmp_path / "other.json")
    assert hardware.h2d_bytes_per_s == 50e9 and hardware.host_capacity_bytes == FREE.host_capacity_bytes
    with pytest.raises(ValueError, match="there is no machine file .*overspill probe --out"):
        load_hardware(FREE, CPU, [], machine=tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{"format_version": 0}')
    with pytest.raises(ValueError, match="format version 0, this overspill reads version 1"):
        load_hardware(FREE, CPU, [], machine=tmp_path / "broken.json")


def test_a_session_predicts_from_the_file_and_moves_the_same_bytes(machine_file: MachineFile, cache: Path) -> None:
    request = overspill.PlanRequest(dtype="float32", seq_len=12, micro_batch=2, device="cpu", accumulate=2)

    def predict(**settings: Any) -> overspill.Prediction:
        with overspill.Session(tiny_model("llama"), plan=request, optimizer=overspill.AdamW(lr=1e-3), **settings) as session:
            return session.predict(make_batches(2, vocab_size=96, seed=0))

    assumed = predict()
    keep(machine_file, cache)
    measured = predict()
    assert assumed.source == "assumed" and measured.source.startswith("measured")
    assert measured.lane_bytes == assumed.lane_bytes and measured.step_s < assumed.step_s
    assert measured.lane_busy_s["h2d"] == pytest.approx(assumed.lane_busy_s["h2d"] * HardwareSpec().h2d_bytes_per_s / 50e9)
    cache.unlink()
    with pytest.raises(ValueError, match="there is no machine file"):
        predict(machine="nowhere.json")
