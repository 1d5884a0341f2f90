"""CUDA graphs of blocks on a CUDA device: the bits of blocks that are launched kernel by kernel, beside lanes that copy and update."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from tiny_models import tiny_model

import overspill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
VOCAB, STEPS = 96, 7


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batches(step: int, *, length: int = 12, padded: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    result = []
    for index in range(4):
        ids = torch.randint(0, VOCAB, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, length - 1 - (index + step) % 5 :] = 0
        result.append({"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), **({"attention_mask": mask} if padded else {})})
    return result


def train(
    name: str, dtype: str, *, cuda_graphs: bool, padded: bool = False, lengths: tuple[int, ...] = (12,), **fields: object
) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, weights, number of replays."""
    model = tiny_model(name).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    defaults: dict[str, object] = {"parameters": "host", "states": "host", "boundaries": "device"}
    plan = overspill.PlanRequest(
        **{**defaults, **fields}, dtype=dtype, seq_len=12, micro_batch=2, accumulate=4, device="cuda"
    )  # type: ignore[arg-type]  # fmt: skip
    with overspill.Session(model, plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=3, cuda_graphs=cuda_graphs) as session:
        session.executor.graphs.is_wanted = cuda_graphs
        losses = []
        for step in range(STEPS * len(lengths)):
            losses.append(session.step(batches(step, length=lengths[step % len(lengths)], padded=padded)).loss)
        session.flush()
        return losses, {name: session.homes.read(name) for name in session.homes.names}, session.executor.graphs.num_replays


def assert_same_bits(name: str, dtype: str, *, replays: bool = True, **fields: object) -> None:
    plain, weights, _ = train(name, dtype, cuda_graphs=False, **fields)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        if replays:
            warnings.simplefilter("error")
        losses, recorded, num_replays = train(name, dtype, cuda_graphs=True, **fields)  # type: ignore[arg-type]
    assert (num_replays > 0) == replays
    assert losses == plain
    assert [key for key in weights if not torch.equal(weights[key], recorded[key])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields", [{}, {"clip": 1.0}, {"group_size": 2}, {"boundaries": "host"}, {"device_states_bytes": 200_000}], ids=str
)
def test_replays_on_cuda_change_no_bit(dtype: str, fields: dict[str, object]) -> None:
    assert_same_bits("llama", dtype, **fields)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox"])
def test_replays_of_other_blocks_change_no_bit(name: str) -> None:
    assert_same_bits(name, "bfloat16")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_replays_under_autocast_change_no_bit(name: str) -> None:
    """Weights are cast in the recording: a cast that an earlier micro-batch had left would be the recorded step's for ever."""
    with torch.autocast("cuda", torch.bfloat16):
        assert_same_bits(name, "float32", group_size=4)


def test_replays_with_masks_and_several_lengths_change_no_bit() -> None:
    assert_same_bits("llama", "bfloat16", padded=True)
    assert_same_bits("llama", "bfloat16", lengths=(12, 8))


def test_a_session_that_timed_templates_does_what_it_predicts_and_changes_no_bit() -> None:
    def run(is_timed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = tiny_model("llama").to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        plan = overspill.PlanRequest(
            parameters="host", states="host", boundaries="device", dtype="bfloat16", seq_len=12, micro_batch=2, accumulate=4, device="cuda"
        )
        with overspill.Session(model, plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=3, cuda_graphs=is_timed) as session:
            if is_timed:
                times = session.time_templates()
                assert times is not None and times.blocks[0].is_worth_replaying, "a tiny block is bound by launches anywhere"
            predicted = session.predict_plan()
            reports = [session.step(batches(step)) for step in range(STEPS)]
            assert reports[-1].num_replays == predicted.num_replays and (predicted.num_replays > 0) == is_timed
            assert (reports[0].num_replays > 0) == is_timed, "they are recorded in the first step"
            session.flush()
            return [report.loss for report in reports], {name: session.homes.read(name) for name in session.homes.names}

    losses, weights = run(False)
    replayed_losses, replayed = run(True)
    assert replayed_losses == losses
    assert [name for name in weights if not torch.equal(weights[name], replayed[name])] == []


def test_blocks_that_cannot_be_recorded_train_all_the_same() -> None:
    """A mixture of experts asks the device which tokens go where."""
    plain, weights, _ = train("mixtral", "bfloat16", cuda_graphs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses, recorded, _ = train("mixtral", "bfloat16", cuda_graphs=True)
    assert losses == plain
    assert [key for key in weights if not torch.equal(weights[key], recorded[key])] == []
    assert_same_bits("llama", "bfloat16")  # nothing of the failure stays behind
