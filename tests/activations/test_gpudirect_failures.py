"""GPUDirect Storage that fails, lies or is not there, by a stand-in: the right error, never a wrong gradient, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import SIZE, assert_nothing_left, assert_same_gradients, chain_step, offload, run_step, train_and_fail
from stand_in_kvikio import BROKEN, FULL, StandIn, away, direct, install, show, wait_a_little

from overspill.activations.direct_lane import DirectLane
from overspill.activations.drive import JobEnd
from overspill.errors import StorageError


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    return install(monkeypatch, tmp_path)


# -- drives that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FULL, BROKEN])
@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_transfer_that_fails_is_an_error_and_never_a_wrong_gradient(operation: str, kind: int, kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()
    active = direct(model, tmp_path, window=SIZE)

    def train() -> None:
        with active:
            if operation == "write":
                kvikio.failures = {2: kind}
                run_step(model, step)
                run_step(model, step)
            else:
                loss = away(active, step)
                kvikio.failures = dict.fromkeys(range(10, 20), kind)
                loss.backward()

    with pytest.raises(StorageError, match=f"{operation} of saved-tensors failed: wanted {SIZE} B at offset .*{errno.errorcode[kind]}"):
        train()
    assert_nothing_left(active)
    assert kvikio.num_open == 0 and os.listdir(tmp_path / "ssd") == []


def test_a_failure_that_no_errno_names_is_told_in_kvikios_words(kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()

    def fail(operation: str, number: int) -> None:
        raise RuntimeError("cuFile error at: stream.cpp:81: GPUDirect Storage\n driver is gone")

    kvikio.before = fail
    active = direct(model, tmp_path, window=SIZE)
    with (
        pytest.raises(StorageError, match=r"wrote 0 B \(RuntimeError: cuFile error at: .*GPUDirect Storage driver is gone\)") as caught,
        active,
    ):
        run_step(model, step)
    assert caught.value.__cause__ is not None and caught.value.__cause__.__traceback__ is None, "whose frames hold the record's bytes"
    del caught
    assert_nothing_left(active)


def test_short_transfers_are_gone_on_with_and_those_that_stop_are_errors(kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()
    expected = run_step(model, step)
    kvikio.results = {0: 4096, 1: 9000, 2: 8192, 10: 3 * 4096 + 1, 17: 5000}
    with direct(model, tmp_path, window=1) as active:
        away(active, step).backward()
        assert torch.equal(model.scale.grad, 2 * expected[1]["scale"])
    assert len(kvikio.log) == 16 + 5
    kvikio.log.clear()
    kvikio.results = {0: 8192, **dict.fromkeys(range(1, 99), 100)}
    active = direct(model, tmp_path, window=1)
    with pytest.raises(StorageError, match="short write of saved-tensors: wanted 65536 B at offset .* wrote (8192|0) B"), active:
        run_step(model, step)
    assert_nothing_left(active)


@pytest.mark.parametrize("lie", ["flipped", "forgotten"])
def test_a_drive_that_lies_is_found_by_its_sums(lie: str, kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()
    active = direct(model, tmp_path, window=1)
    with active:
        run_step(model, step)  # the file's pages hold something else than zeros
    kvikio.log.clear()
    kvikio.lies = dict.fromkeys(range(8, 16), lie) if lie == "flipped" else dict.fromkeys(range(8), lie)

    def train() -> None:
        with active:
            away(active, step).backward()

    with pytest.raises(StorageError, match="saved-tensors is damaged: block 0 of the record at offset .* adds up to"):
        train()
    assert_nothing_left(active)


@pytest.mark.parametrize("seed", range(6))
def test_a_drive_that_lies_at_any_time_gives_an_error_or_the_right_gradient(seed: int, kvikio: StandIn, tmp_path: Path) -> None:
    model, step = chain_step()
    expected = run_step(model, step)
    kvikio.lies = {3 * seed: "flipped", 3 * seed + 1: "forgotten", 3 * seed + 2: "flipped"}
    active = direct(model, tmp_path, window=SIZE)
    with contextlib.suppress(StorageError), active:
        for _ in range(3):
            assert_same_gradients(run_step(model, step)[1], expected[1])
    assert_nothing_left(active)


def test_bytes_beside_what_was_saved_may_change_while_they_are_written(kvikio: StandIn, tmp_path: Path) -> None:
    """The storage is written whole; what nobody saved of it is nobody's damage."""
    held = [torch.linspace(0, 1, SIZE // 4)]
    expected = held[0][:-64].sum().view(1, 1)

    def change(operation: str, number: int) -> None:
        if operation == "write":
            held.pop().data[-64:] += 1  # changes no version; and nothing keeps the storage on the device any more

    kvikio.before = change
    model = torch.nn.Linear(1, 1)
    with direct(model, tmp_path, window=1) as active:
        away(active, lambda: (model.weight * held[0][:-64]).sum()).backward()
        assert active.report().ssd_bytes == SIZE
    assert [operation for operation, _, _ in kvikio.log] == ["write", "read"]
    assert torch.equal(model.weight.grad, expected)


# -- exceptions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward", "between"])
def test_an_exception_leaves_nothing_behind(where: str, kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.before = wait_a_little(2, 0.001)
    model, step = chain_step()
    active = direct(model, tmp_path)

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        train_and_fail(active, model, step, where)
    assert_nothing_left(active)
    assert kvikio.num_open == 0 and os.listdir(tmp_path / "ssd") == []
    expected = run_step(model, step)
    with active:  # and it can be entered again
        assert_same_gradients(run_step(model, step)[1], expected[1])
    assert_nothing_left(active)


@pytest.mark.parametrize("owner, method", [(JobEnd, "wait"), (DirectLane, "reserve"), (DirectLane, "start_out"), (DirectLane, "start_in")])
def test_ctrl_c_in_any_wait_or_start_leaves_nothing_behind(
    owner: type, method: str, kvikio: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvikio.before = lambda operation, number: time.sleep(0.02)  # far longer than what computes, so that there is something to wait for
    model, step = chain_step(4)
    inner, calls = getattr(owner, method), [0]
    for num_calls in itertools.count(1):
        calls[0] = 0

        def once(self: Any, *arguments: Any, when: int = num_calls, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == when:
                raise KeyboardInterrupt
            return inner(self, *arguments, **more)

        monkeypatch.setattr(owner, method, once)
        active = direct(model, tmp_path, window=1)
        with contextlib.suppress(KeyboardInterrupt), active:
            step().backward()
        assert_nothing_left(active)
        if calls[0] < num_calls:
            break  # the step ended before its turn
    assert num_calls > 1


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_before_training(kvikio: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = chain_step()
    with pytest.raises(ValueError, match="there is no ssd_dir; give an ssd_dir"):
        offload(model, gpudirect=True)
    with pytest.raises(ValueError, match="open_store, which is no file"):
        offload(model, gpudirect=True, open_store=object, ssd_budget="1MiB")
    kvikio.has_nvidia_fs = False
    show(kvikio, monkeypatch)
    with pytest.raises(ValueError, match="kvikio finds no nvidia-fs kernel module.*pinned host memory"):
        direct(model, tmp_path)
    kvikio.has_nvidia_fs = True
    show(kvikio, monkeypatch)
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match="every transfer would wait for all of compute"):
        direct(model, tmp_path)
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(ValueError, match=r"there is no module named kvikio: pip install 'overspill\[gds\]'"):
        direct(model, tmp_path)
    monkeypatch.setattr("overspill.tiers.gpudirect.is_block_device", lambda place: True)
    monkeypatch.setattr("overspill.activations.settings.is_block_device", lambda place: True)
    with pytest.raises(ValueError, match="a block device: it was never tried"):
        direct(model, tmp_path)
    monkeypatch.setattr("overspill.tiers.gpudirect.DEVICE_TYPES", ("cuda",))
    with pytest.raises(ValueError, match="moves the memory of CUDA devices, and the model is on cpu"):
        direct(model, tmp_path)
    assert not (tmp_path / "ssd").exists()


def test_a_kvikio_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvikio: StandIn) -> None:
    monkeypatch.delitem(sys.modules, "kvikio")
    (tmp_path / "kvikio").mkdir()
    (tmp_path / "kvikio" / "__init__.py").write_text("raise OSError('libcufile.so.0: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be imported .OSError: libcufile.so.0: cannot open shared object file"):
        direct(chain_step()[0], tmp_path)


def test_a_file_system_that_the_gpu_cannot_reach_is_named_and_nothing_is_left(kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.refused_paths = True
    active = direct(chain_step()[0], tmp_path)
    with pytest.raises(StorageError, match=r"ssd cannot be reached from the GPU: .*not supported on current file; `gdscheck -p`"), active:
        pass
    assert os.listdir(tmp_path / "ssd") == [] and kvikio.mode == "auto"
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("overspill-saved")] == []


def test_nobody_who_does_not_ask_for_it_needs_kvikio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    model, step = chain_step()
    with offload(model, host_budget="256KiB", ssd_dir=tmp_path / "ssd", ssd_budget="4MiB") as active:
        run_step(model, step)
    assert active.report().ssd_bytes > 0
