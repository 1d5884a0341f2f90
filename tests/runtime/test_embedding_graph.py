"""Claims about the embedding's graph: it is kept from forward to backward where it stores next to nothing, and changes no bit."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_models import FakeConfig, FakeForCausalLM
from test_retained import build_model, train, whole_batches
from tiny_models import tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import overspill
from overspill.huggingface import StreamedModel
from overspill.runtime import retained as retained_module
from overspill.runtime.compute import UnitRunner
from overspill.runtime.retained import RetainedGraph, RetainedGraphs
from overspill.tiers import FakeStore


def open_session(model: Any, **request: Any) -> overspill.Session:
    fields = {"dtype": "float32", "device": "cpu", "seq_len": 12, "micro_batch": 2, "accumulate": 3, "parameters": "host", "states": "host"}
    plan = overspill.PlanRequest(**{**fields, **request})
    return overspill.Session(
        model, plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=7, open_store=lambda directory, size, is_scratch: FakeStore(size)
    )


def keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retained_module, "EMBEDDING_SHARE", -1)
    monkeypatch.setattr(retained_module, "EMBEDDING_BYTES", -1)


def count_embeddings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every run of the model's code before the blocks: whether it made a graph."""
    runs: list[bool] = []
    embed = StreamedModel.embed

    def counted(self: StreamedModel, *args: Any, **named: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return embed(self, *args, **named)

    monkeypatch.setattr(StreamedModel, "embed", counted)
    return runs


def make_model(name: str) -> Any:
    if name not in ("side-input", "plain"):
        return build_model(name, "float32")
    torch.manual_seed(0)
    config = FakeConfig(name.replace("-", " "))
    config.vocab_size = 96
    return FakeForCausalLM(config)


MODELS = ["llama", "llama_tied", "gemma", "gpt2-dropout", "opt", "bloom", "mixtral", "side-input"]


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_that_is_kept_gives_the_gradients_of_one_made_again(name: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-ups, scales, positions and dropout, a projection, a norm behind the look-up, and what blocks read beside the hidden states."""
    found, num_runs = [], []
    for is_kept in (True, False):
        with monkeypatch.context() as patch:
            runs = count_embeddings(patch)
            if not is_kept:
                keep_none(patch)
            with open_session(make_model(name), group_size=group_size) as session:
                runs.clear()
                found.append(train(session))
                num_runs.append(len(runs))
    assert num_runs == [6, 12], "of two steps of three micro-batches"
    assert found[0][0] == found[1][0]
    for parameter, tensor in found[1][1].items():
        assert torch.equal(found[0][1][parameter], tensor), parameter


def test_one_that_stores_more_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's mask is a quarter of what it drops in fp32."""
    monkeypatch.setattr(retained_module, "EMBEDDING_BYTES", 0)
    for dropout, times in ((0.0, 1), (0.1, 2)):
        runs = count_embeddings(monkeypatch)
        model = tiny_model("gpt2", embd_pdrop=dropout, n_embd=256)  # positions are 1/32 of these hidden states
        with open_session(model, micro_batch=8, accumulate=1) as session:
            runs.clear()
            session.step([{key: value.repeat(4, 1) for key, value in whole_batches(0, 1)[0].items()}])
        assert len(runs) == times, dropout


def test_evaluation_and_a_frozen_embedding_make_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_embeddings(monkeypatch)
    frozen = tiny_model("llama")
    frozen.model.embed_tokens.weight.requires_grad_(False)
    with open_session(tiny_model("llama")) as trained, open_session(frozen) as session:
        runs.clear()
        trained.evaluate(whole_batches(0))
        trained.generate([[1, 2]], max_new_tokens=1)
        session.evaluate(whole_batches(0))
        assert len(runs) == 7 and not any(runs)
        session.step(whole_batches(0))
        assert not any(runs[:10]), "the forwards"


def test_no_graph_outlives_its_backward_or_a_step_that_fails_and_none_holds_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    refs: list[weakref.ref[RetainedGraph]] = []
    most, held = [0], list[int]()
    embed, run = RetainedGraphs.embed, UnitRunner.run

    def noted(self: RetainedGraphs, number: int, *args: Any, **named: Any) -> Any:
        values = embed(self, number, *args, **named)
        assert not values.hidden.requires_grad
        refs.append(weakref.ref(self._embeddings[number]))
        return values

    def alive() -> list[RetainedGraph]:
        return [graph for ref in refs if (graph := ref()) is not None]

    def watched(self: UnitRunner, op: Any, *args: Any) -> None:
        most[0] = max(most[0], len(alive()))
        if op.unit == "tail":
            held.extend(leaf.untyped_storage().nbytes() for graph in alive() for leaf in graph.leaves)
        if op.unit == "model.layers.1" and fails[0]:
            raise ValueError("stopped by the test")
        run(self, op, *args)

    fails = [False]
    monkeypatch.setattr(RetainedGraphs, "embed", noted)
    monkeypatch.setattr(UnitRunner, "run", watched)
    with open_session(tiny_model("llama")) as session:
        session.step(whole_batches(0))
        assert most[0] == 3 and alive() == [], "no graph waits for the collector"
        assert held and set(held) == {0}, "slots are refilled between forward and backward"
        fails[0] = True
        with pytest.raises(ValueError, match="stopped by the test"):
            session.step(whole_batches(1))
        assert alive() == []
        fails[0] = False
        session.step(whole_batches(1))


def test_a_backward_without_memory_half_way_makes_the_graph_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(tiny_model("llama")) as session:
        expected = train(session)
    differentiate, numbers = RetainedGraph.differentiate, iter(range(10**6))

    def scarce(self: RetainedGraph, *args: Any) -> Any:
        found = differentiate(self, *args)
        if next(numbers) % 3 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(RetainedGraph, "differentiate", scarce)
    runs = count_embeddings(monkeypatch)
    with open_session(tiny_model("llama")) as session:
        runs.clear()
        found = train(session)
    assert found[0] == expected[0] and all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
    assert len(runs) == 6 + 2


# -- what may stand before the blocks --------------------------------------------------------------------------------


class LookUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(96, 16) / 2), nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight) * self.scale


class Bounded(LookUp):
    """Changes its weights in place."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight, max_norm=1.0)


class Shifted(LookUp):
    """Changes its input in place, whenever the model is entered."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.add_(1).remainder_(96))


class Counting(LookUp):
    """Changes a tensor of its own, which the graph of the micro-batch before has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.ones(16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.mean.copy_(ids.float().mean() / 50)


class Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.hidden, ctx.scale = hidden, scale
        return hidden * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return gradient * ctx.scale, (gradient * ctx.hidden).sum((0, 1))


class OfPython(LookUp):
    """Has a function that keeps a weight by itself."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = Scaling.apply(F.embedding(ids, self.weight), self.scale)  # type: ignore[no-untyped-call]
        return hidden


class Checkpointed(LookUp):
    """Runs once more in its backward, over a weight that it has got hold of in its forward."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        hidden: torch.Tensor = checkpoint(lambda found: torch.tanh(found * scale), F.embedding(ids, self.weight), use_reentrant=False)
        return hidden


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(
    ("kind", "is_kept"), [(LookUp, True), (Shifted, True), *((kind, False) for kind in (Bounded, Counting, OfPython, Checkpointed))]
)
def test_any_code_may_stand_before_the_blocks(kind: type[LookUp], is_kept: bool, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against a session whose embedding's forward makes no graph."""

    def without_graph(self: UnitRunner, op: Any, visit: Any, micro_batch: Any, *, trains: bool) -> Any:
        return self.model.embed(micro_batch.batch, reading=micro_batch.reads.noted())

    found = []
    for makes_graph in (True, False):
        model = make_model("plain")
        model.model.embed_tokens = kind()
        with monkeypatch.context() as patch:
            runs = count_embeddings(patch)
            if not makes_graph:
                patch.setattr(UnitRunner, "_embed", without_graph)
            with open_session(model, group_size=group_size, parameters="ssd", ssd_dir="fake", clip=1.0) as session:
                train(session, 1)
                runs.clear()
                found.append(train(session))
                assert len(runs) == (6 if is_kept and makes_graph else 12)
    assert found[0][0] == found[1][0]
    for parameter, tensor in found[1][1].items():
        assert torch.equal(found[0][1][parameter], tensor), parameter


def test_a_model_that_changes_its_input_in_place_has_the_gradients_of_one_that_does_not() -> None:
    """The tail and a graph that is made again enter the model once more."""
    found = []
    for kind in (Shifted, LookUp):
        model = make_model("plain")
        torch.manual_seed(1)
        model.model.embed_tokens = kind()
        batches = whole_batches(0)
        if kind is LookUp:
            batches = [{**batch, "input_ids": (batch["input_ids"] + 1).remainder(96)} for batch in batches]
        with open_session(model) as session:
            session.step(batches)
            found.append({name: session.homes.read(name) for name in session.homes.names})
    for parameter, tensor in found[1].items():
        assert torch.equal(found[0][parameter], tensor), parameter
