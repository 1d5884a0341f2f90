"""What a user meets: bad input, models that cannot be served, reports, Trainer, DDP, FSDP2, a thousand steps."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import gc
import io
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from loaded_python import run_loaded
from small_nets import INPUTS, VOCAB, assert_nothing_left, assert_same_gradients, build, chain_step, offload, run_step
from torch import nn

import overspill
from overspill.errors import BudgetError, UnsupportedModelError
from overspill.spec.activations import MOST_ROUNDS
from overspill.spec.documents import from_json, to_json
from overspill.tiers import FakeStore, extent_file

LAYER = nn.Linear(4, 4)
Usage = collections.namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"host_budget": 0}, BudgetError, "host_budget is 0 B: and there is no ssd_dir, so there is nowhere to move"),
        ({"host_budget": 4095}, BudgetError, "host_budget is 4095 B: and there is no ssd_dir, so there is nowhere to move"),
        ({"host_budget": "0GiB", "ssd_dir": "."}, BudgetError, "host_budget is 0 B: the SSD is reached through host memory"),
        ({"host_budget": "100KiB", "ssd_dir": "."}, BudgetError, "at least 65536 B; give at least 262144 B"),
        ({"host_budget": "900TiB"}, BudgetError, r"host_budget is 900.00 TiB but this machine has"),
        ({"host_budget": "1 banana"}, ValueError, "is not a size"),
        ({"host_budget": -5}, ValueError, "cannot be negative"),
        ({"host_budget": 1e9}, ValueError, "1000000000.0 is not a size.*or a whole number of bytes"),
        ({"ssd_budget": "1GiB"}, ValueError, "ssd_budget has no effect without ssd_dir"),
        ({"ssd_dir": ".", "ssd_budget": 100}, BudgetError, "ssd_budget is 100 B, less than one page"),
        ({"ssd_dir": "/nowhere/at/all"}, ValueError, "/nowhere/at is no directory"),
        ({"ssd_dir": ""}, ValueError, "ssd_dir is a directory, or a list of directories, got ''"),
        ({"ssd_dir": [".", ""]}, ValueError, r"got \['.', ''\]"),
        ({"ssd_dir": 5}, ValueError, "ssd_dir is a directory, or a list of directories, got 5"),
        ({"amount": "most"}, ValueError, "amount='most' is not known; choose one of 'adaptive', 'everything', 'ssdtrain', 'nothing'"),
        ({"storage": "fp4"}, ValueError, "storage='fp4' is not known; choose one of 'as_is', 'bf16', 'int8'"),
        ({"amount": overspill.activations.Everything}, ValueError, "is not known; .*or an object with leaves, needs_profile"),
        ({"amount": None}, ValueError, "amount=None is not known"),
        ({"storage": 8}, ValueError, "storage=8 is not known; .*or an object with applies, encode, decode"),
        ({"recompute": "norms"}, ValueError, "recompute='norms' is not known; choose one of 'none', 'cheap'"),
        ({"open_store": FakeStore}, ValueError, "open_store needs ssd_budget"),
        ({"recompute": "cheap", "throughput": 97}, ValueError, "throughput=97 is a share of plain PyTorch's, above 0 and at most 1"),
        ({"recompute": "cheap", "throughput": 0.0}, ValueError, "throughput=0.0 is a share"),
        ({"recompute": "cheap", "throughput": True}, ValueError, "throughput=True is a share"),
        ({"recompute": "cheap", "throughput": float("nan")}, ValueError, "throughput=nan is a share"),
        ({"recompute": "cheap", "throughput": "0.97"}, ValueError, "throughput='0.97' is a share"),
        ({"throughput": 0.97}, ValueError, "says how much may be recomputed, and recompute='none'; name what may be"),
        ({"recompute": ["none"], "throughput": 0.97}, ValueError, r"and recompute=\['none'\]"),
        ({"recompute": "cheap", "throughput": 0.97, "amount": "everything"}, ValueError, "measured rounds, which amount='everything' does"),
    ],
)
def test_bad_settings_are_refused_with_the_numbers_and_the_cure(settings: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        overspill.offload_activations(LAYER, **{"host_budget": "1GiB", **settings})  # type: ignore[arg-type]


def test_a_directory_in_ram_is_refused_unless_it_is_insisted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent_file, "filesystem_of", lambda folder: "tmpfs")
    with pytest.raises(ValueError, match=r"is in RAM \(tmpfs\).*raise host_budget instead"):
        overspill.offload_activations(LAYER, host_budget="1GiB", ssd_dir=tmp_path)
    with pytest.warns(RuntimeWarning, match="is in RAM"), offload(LAYER, ssd_dir=tmp_path, ssd_budget="1MiB"):
        pass


def test_the_ssd_budget_that_nobody_gave_is_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 8 << 20))
    active = offload(LAYER, ssd_dir=[tmp_path / "a", tmp_path / "b"])
    assert active._settings.ssd_budget_bytes == 8 << 20
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 1 << 20))
    with pytest.raises(BudgetError, match=r"1.00 MiB free, half of which is too little"):
        offload(LAYER, ssd_dir=tmp_path / "a")


def test_models_that_cannot_be_served_are_refused_with_the_reason() -> None:
    def refused(model: object) -> str:
        with pytest.raises(ValueError) as caught:
            overspill.offload_activations(model, host_budget="1GiB")  # type: ignore[arg-type]
        return str(caught.value)

    assert "needs a torch.nn.Module, got function" in refused(lambda: None)
    assert "has no parameters and no buffers" in refused(nn.Identity())
    assert "on the meta device: load its weights first" in refused(nn.Linear(2, 2, device="meta"))
    assert "threads of its own" in refused(nn.DataParallel(LAYER))
    compiled = nn.Linear(2, 2)
    compiled.compile()
    assert "compiled as a whole" in refused(compiled) and "Compile its blocks" in refused(compiled)
    assert "compiled as a whole" in refused(torch.compile(nn.Linear(2, 2)))
    assert "1 is an RReLU" in refused(nn.Sequential(nn.Linear(2, 2), nn.RReLU()))
    assert issubclass(UnsupportedModelError, ValueError)


def test_a_machine_without_a_gpu_is_told_that_host_memory_frees_none() -> None:
    with pytest.warns(RuntimeWarning, match="is on the CPU: moving its saved tensors to host memory frees none; give an ssd_dir"):
        active = overspill.offload_activations(LAYER, host_budget="1MiB")
    with active:
        pass
    assert active.report().pinned_bytes == 0


def test_foreign_hooks_that_are_active_already_are_refused_by_name() -> None:
    active = offload(LAYER)
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(RuntimeError, match=r"other saved-tensor hooks are active here \(save_on_cpu"),
        active,
    ):
        pass
    with active:
        with pytest.raises(RuntimeError, match="already active"), active:
            pass
        with pytest.raises(RuntimeError, match="other saved-tensor hooks are active"), offload(LAYER):
            pass
        with pytest.raises(RuntimeError, match="already active"):
            active.attach()
        with pytest.raises(RuntimeError, match="outside of the block"):
            active.measure_gradient_error(lambda: None)
    with pytest.raises(RuntimeError, match="is not active: enter the block first"):
        active.next_micro_batch()


@pytest.mark.parametrize("is_attached", [False, True], ids=["block", "attached"])
def test_a_copy_of_the_model_made_inside_is_a_plain_model(is_attached: bool) -> None:
    """As for an average of weights, or for keeping the best model."""
    model, step = chain_step()
    active = offload(model)
    with contextlib.ExitStack() as stack:
        if is_attached:
            active.attach()
            stack.callback(active.detach)
        else:
            stack.enter_context(active)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
        micro_batches = active._tiers.cache._micro_batch
        for other in copies:
            run_step(other, lambda other=other: other(INPUTS))
        assert active._tiers.cache._micro_batch == micro_batches, "their forward is none of the model's"
        expected = run_step(model, step)[1]
        assert active.report().num_rounds > 0
    for other in copies:
        assert_same_gradients(run_step(other, lambda other=other: other(INPUTS))[1], expected)


def test_leaving_in_another_thread_is_refused_and_the_block_goes_on() -> None:
    model, step = chain_step()
    expected = run_step(model, step)
    with offload(model) as active:
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="left in another thread than entered it"):
            pool.submit(active.__exit__, None, None, None).result()
        assert_same_gradients(run_step(model, step)[1], expected[1])
    assert_nothing_left(active)


def test_tensors_saved_outside_of_any_module_are_moved_too() -> None:
    with offload(LAYER) as active:
        leaf = torch.randn(5000, requires_grad=True)
        (leaf * 2).square().sum().backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, leaf.detach() * 2 * 2 * 2)
        assert active.report().host_bytes >= 20000


def test_a_report_is_a_document_that_adds_up() -> None:
    model, step = build("gpt2")
    active = offload(model, amount="adaptive")
    assert active.report().num_rounds == 0
    with active:
        for _ in range(5):
            run_step(model, step)
    report = active.report()
    assert from_json(overspill.ActivationReport, to_json(report)) == report
    assert report.num_rounds == 5 and [item.round for item in report.rounds] == [1, 2, 3, 4, 5]
    for name in (
        "packed_bytes",
        "kept_bytes",
        "host_bytes",
        "ssd_bytes",
        "stored_bytes",
        "rebuilt_bytes",
        "forwarded_bytes",
        "cancelled_bytes",
    ):
        assert getattr(report, name) == sum(getattr(item, name) for item in report.rounds), name
    assert report.packed_bytes == report.kept_bytes + report.host_bytes + report.ssd_bytes
    assert report.rates.d2h_bytes_per_s is not None and report.rates.d2h_bytes_per_s > 0
    assert report.device_peak_bytes == max(item.device_peak_bytes for item in report.rounds) > 0


def test_entering_again_goes_on_counting_and_with_what_was_decided() -> None:
    model, step = build("gpt2")
    active = offload(model, amount="adaptive")
    for _ in range(5):
        with active:
            run_step(model, step)
        assert active._tiers is not None and active._tiers.memory.allocated_bytes == 0
    assert [item.is_planned for item in active.report().rounds] == [False, False, True, True, True]
    assert active.report().num_rounds == 5


def test_a_thousand_steps_grow_nothing(tmp_path: Path) -> None:
    """Of every kind: records, ranges, extents, objects, threads, files, resident memory."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))
    generator = torch.Generator().manual_seed(0)
    process = psutil.Process()

    def step() -> None:
        rows = int(torch.randint(8, 64, (), generator=generator))
        model(torch.randn(rows, 64)).square().sum().backward()
        model.zero_grad()

    def figures() -> tuple[int, ...]:
        gc.collect()
        cache = active._cache()
        books = (
            len(cache.fetching._moved), len(cache.fetching._ends), len(cache._by_storage),
            len(cache.fetching._fetched), len(cache._dead), len(cache.mover._busy),
            len(cache.mover._under_way), len(cache.mover._leaving), len(cache.parameters._known), cache.mover.device_bytes,
            sum(len(segment.pending) for arena in (active._tiers.host, active._tiers.staging) for segment in arena._segments),
        )  # fmt: skip
        return books

    with offload(model, amount="adaptive", host_budget="512KiB", ssd_dir=tmp_path / "ssd", ssd_budget="8MiB") as active:
        for _ in range(120):
            step()
        before, objects, resident = figures(), len(gc.get_objects()), process.memory_info().rss
        num_threads, num_files = threading.active_count(), process.num_fds()
        for _ in range(1000):
            step()
        after = figures()
        assert all(now <= then + 20 for now, then in zip(after, before, strict=True)), (before, after)
        assert threading.active_count() <= num_threads + 10, "the pools' threads, which start when they are needed"
        assert process.num_fds() == num_files and active._tiers.memory.allocated_bytes <= 512 * 1024
        assert len(gc.get_objects()) <= objects + 200
        assert process.memory_info().rss <= resident + 8 * 2**20
        report = active.report()
        assert (report.num_live, report.host_used_bytes, report.ssd_used_bytes) == (0, 0, 0)
        assert report.num_rounds == 1120 and len(report.rounds) == MOST_ROUNDS


def test_attached_to_forward_it_is_active_there_and_nowhere_else() -> None:
    model, step = build("llama")
    expected = run_step(model, step)
    active = offload(model)
    active.attach()
    found = run_step(model, step)
    assert_same_gradients(found[1], expected[1])
    packed = active.report().packed_bytes
    leaf = torch.randn(5000, requires_grad=True)
    (leaf * 2).square().sum().backward()
    assert active.report().packed_bytes == packed > 0
    with pytest.raises(ValueError):
        model(input_ids=None)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert_same_gradients(run_step(model, step)[1], expected[1])
    active.detach()
    active.detach()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_the_trainer_trains_the_same_weights_with_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCAB, (16, 12), generator=torch.Generator().manual_seed(0))]

    def train(callbacks: list[object], *, is_checkpointed: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        model, _ = build("llama")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=is_checkpointed, seed=3,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
        return model.state_dict(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    for is_checkpointed in (False, True):
        expected = train([], is_checkpointed=is_checkpointed)
        callback = overspill.OffloadActivationsCallback(host_budget="16MiB", min_bytes=1, window=4096, amount="everything")
        with pytest.raises(RuntimeError, match="nothing was trained"):
            callback.report()
        with pytest.warns(RuntimeWarning, match="is on the CPU"):
            found = train([callback], is_checkpointed=is_checkpointed)
        assert found[1] == expected[1]
        assert_same_gradients(found[0], expected[0])
        assert callback.report().host_bytes > 0 and callback.report().num_live == 0


def test_a_training_that_was_broken_off_gives_all_back_when_its_callback_dies_or_trains_again() -> None:
    model, step = chain_step()

    def begin(callback: Any) -> Any:
        with pytest.warns(RuntimeWarning, match="is on the CPU"):
            callback.on_train_begin(None, None, None, model=model)
        run_step(model, step)
        assert callback.report().host_bytes > 0
        return callback._offload

    callback = overspill.OffloadActivationsCallback(host_budget="16MiB", min_bytes=1, amount="everything")
    first = begin(callback)
    second = begin(callback)  # the first never ended
    assert first._tiers.memory.allocated_bytes == 0 < second._tiers.memory.allocated_bytes
    del callback
    assert_nothing_left(second)
    assert not model._forward_hooks


def test_ddp_and_fsdp2_on_two_ranks_give_the_same_bits(tmp_path: Path) -> None:
    script = Path(__file__).parent / "two_ranks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "USE_LIBUV": "0", "GLOO_SOCKET_IFNAME": "lo"}
    start = (
        "import subprocess, sys; logs = [open(sys.argv[2] + str(rank), 'w') for rank in range(2)]\n"
        "starts = [[sys.executable, *sys.argv[1:], str(rank)] for rank in range(2)]\n"
        "ranks = [subprocess.Popen(start, stdout=log, stderr=log) for start, log in zip(starts, logs)]\n"
        "sys.exit(sum(abs(rank.wait()) for rank in ranks))\n"
    )
    done = run_loaded("-c", start, script, tmp_path / "rendezvous", env=environment, timeout=120)
    outputs = [(tmp_path / f"rendezvous{rank}").read_text() for rank in range(2)]
    assert done.returncode == 0, outputs
    for output in outputs:
        assert "ddp equal" in output and "fsdp2 equal" in output
        assert "ddp segments equal" in output and "fsdp2 segments equal" in output
