"""What the model's own code asks of tensors is asked once a micro-batch; the tail and the embedding's backward get the same answers."""

from __future__ import annotations

import collections
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch.overrides import TorchFunctionMode
from training_loop import PlainTrainer, make_batches

import overspill
from overspill.huggingface import HostReads
from overspill.huggingface.host_reads import READS


class Asked(TorchFunctionMode):
    """Who really asks tensors: the source files."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in READS:
            self.files += [
                frame.filename for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith(("host_reads.py", "overrides.py"))
            ][-1:]
        return func(*args, **(kwargs or {}))

    def of_transformers(self) -> int:
        return sum("/transformers/" in file for file in self.files)


class ModelCode(torch.nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[bool, float]:
        return bool(first.all()), float(second.sum().item())


model_code = ModelCode()


def test_later_entries_get_what_the_first_one_read_and_ask_nothing() -> None:
    reads, zeros, ones = HostReads(), torch.zeros(3), torch.ones(3)
    with reads.noted():
        assert model_code(ones, ones) == (True, 3.0)
    with Asked() as asked, reads.answered():
        assert model_code(zeros, zeros) == (True, 3.0), "the answers of the first entry"
        assert asked.files == []
        assert not bool(zeros.all()), "what the first entry did not ask is asked"
    with reads.answered():
        assert model_code(zeros, zeros) == (True, 3.0), "and again"


def test_another_question_ends_the_answers() -> None:
    reads, zeros, ones = HostReads(), torch.zeros(3), torch.ones(3)
    with reads.noted():
        model_code(ones, ones)
    with reads.answered():
        assert zeros.sum().item() == 0.0, "not bool, which was first"
        assert model_code(zeros, zeros) == (False, 0.0)
    with reads.answered():
        assert not bool(torch.zeros((), dtype=torch.int64)), "another dtype than a mask's"
    with HostReads().answered():
        assert not bool(zeros.all()), "nothing was noted"


class AsksMoreWithGradients(torch.nn.Module):
    """Every answer is one bool."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and bool(torch.isfinite(values).all()):
            values = values * 1
        return values * 0.5 if bool((values > 1e9).any()) else values


def test_a_question_that_only_a_later_entry_asks_gets_no_answer_of_another_one() -> None:
    def built() -> Any:
        built = tiny_model("llama")
        built.model.embed_tokens.register_forward_hook(lambda module, args, output: asks(output))
        return built

    asks, batches, optimizer = AsksMoreWithGradients(), make_batches(2, vocab_size=96, seed=0), overspill.AdamW(lr=1e-2)
    fields = {"parameters": "host", "states": "host", "boundaries": "host", "dtype": "float32"}
    plan = overspill.PlanRequest(**fields, seq_len=12, micro_batch=2, accumulate=2)
    loss, norm, _ = PlainTrainer(built(), optimizer, clip=None, seed=7, chunk_rows=1024).step(batches)
    with overspill.Session(built(), plan=plan, optimizer=optimizer, seed=7) as session:
        report = session.step(batches)
    assert (report.loss, report.grad_norm) == (loss, norm)


def test_an_entry_that_failed_leaves_no_answers() -> None:
    reads, zeros = HostReads(), torch.zeros(3)
    with pytest.raises(KeyError), reads.noted():
        assert bool(torch.ones(3).all())
        raise KeyError
    with reads.answered():
        assert not bool(zeros.all())


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_asks_no_more_than_one_forward_of_the_plain_model_does(masked: bool) -> None:
    """Llama asks whether its positions are packed, or whether its mask is all ones."""
    plan = overspill.PlanRequest(parameters="host", states="host", boundaries="host", seq_len=12, micro_batch=2, accumulate=2)
    batches = make_batches(2, vocab_size=96, seed=0)
    if masked:
        batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    with Asked() as plain, torch.no_grad():
        for batch in batches:
            tiny_model("llama").model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    with overspill.Session(tiny_model("llama"), plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=7) as session:
        session.step(batches)
        with Asked() as asked:
            session.step(batches)
    assert 0 < asked.of_transformers() <= plain.of_transformers()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_a_gpu_waits_for_the_device_before_its_first_block_and_at_its_end() -> None:
    """In between the thread that launches can be ahead of the device."""
    count = 3
    plan = overspill.PlanRequest(
        parameters="host",
        states="host",
        boundaries="device",
        seq_len=2048,
        micro_batch=2,
        accumulate=count,
        device="cuda",
        dtype="bfloat16",
    )
    batches = [{name: torch.randint(96, (2, 64)) for name in ("input_ids", "labels")} for _ in range(count)]
    built = tiny_model("llama").to(torch.bfloat16)
    built.config.dtype = torch.bfloat16
    with overspill.Session(built, plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=7) as session:
        for _ in range(3):
            session.step(batches)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                session.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(f"{Path(found.filename).name}:{found.lineno}" for found in caught if "synchron" in str(found.message))
    files = {place.split(":")[0] for place in places}
    before = {"batches.py", "stand_ins.py"}  # checks of the batch; arguments that are equal are held once
    after = {"executor.py", "gradients.py", "streams.py"}  # losses, sums of squares, and the end of compute
    assert files <= {"host_reads.py"} | before | after, places
    assert sum(number for place, number in places.items() if place.startswith("host_reads.py")) == count, places
