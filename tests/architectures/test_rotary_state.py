"""Rotary embeddings that write to themselves: each micro-batch's numbers are those of a model that sees it first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from fake_models import fake_model
from plain_loop import run_plain_step
from tiny_models import tiny_batch, tiny_model
from unit_major import run_unit_major_step

from overspill.errors import UnsupportedModelError
from overspill.huggingface import StreamedModel

LONG, SHORT = 20, 6
_LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[3.0] * 4, original_max_position_embeddings=8
)
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", dict(rope_parameters=_LONGROPE, original_max_position_embeddings=8, sliding_window=None)),
    "dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0), max_position_embeddings=8)),
}


def _model(kind: str) -> transformers.PreTrainedModel:
    name, changes = CHANGES[kind]
    return tiny_model(name, **changes).train()


def _batches() -> list[dict[str, torch.Tensor]]:
    """Between both lengths one that a rotary embedding which remembers the long one would get wrong."""
    return [tiny_batch(1, num_tokens=LONG), tiny_batch(2, num_tokens=SHORT), tiny_batch(3, num_tokens=12, padding=3)]


def _plain(model: transformers.PreTrainedModel, batches: list[dict[str, torch.Tensor]], *, fresh: bool):
    """The plain loop; `fresh`: with a new rotary embedding for each micro-batch."""
    new = copy.deepcopy(model.model.rotary_emb)

    def renew(module: torch.nn.Module, *args: Any) -> None:
        module.rotary_emb = copy.deepcopy(new)

    handle = model.model.register_forward_pre_hook(renew) if fresh else None
    plain = run_plain_step(model, batches, chunk_rows=7)
    if handle is not None:
        handle.remove()
        renew(model.model)
    return plain


def _differing(first: Any, second: Any) -> Iterator[str]:
    return (name for name, gradient in first.gradients.items() if not torch.equal(gradient, second.gradients[name]))


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_gradients_equal_those_of_fresh_embeddings_bitwise_in_any_order(kind: str, order: tuple[int, ...]) -> None:
    model = _model(kind)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = [_batches()[index] for index in order]
    plain = _plain(model, batches, fresh=True)
    streamed_model = StreamedModel(model)
    for _ in range(2):
        streamed = run_unit_major_step(streamed_model, weights, batches, chunk_rows=7)
        assert list(_differing(plain, streamed)) == []
        assert all(torch.equal(a, b) for a, b in zip(streamed.losses, plain.losses, strict=True))


def test_longrope_equals_the_plain_loop_as_it_is() -> None:
    model = _model("longrope")
    assert list(_differing(_plain(model, _batches(), fresh=True), _plain(model, _batches(), fresh=False))) == []


@pytest.mark.parametrize("kind", CHANGES)
def test_both_branches_of_the_embedding_are_met(kind: str) -> None:
    model = _model(kind)
    rotary = copy.deepcopy(model.model.rotary_emb)
    tables = [rotary(torch.zeros(1), torch.arange(length)[None])[0] for length in (SHORT, LONG)]
    assert not torch.equal(tables[0][0], tables[1][0, :SHORT])


@pytest.mark.parametrize("kind", CHANGES)
def test_inspection_and_earlier_use_leave_no_trace(kind: str) -> None:
    model = _model(kind)
    new = copy.deepcopy(model.model.rotary_emb)
    with torch.no_grad():
        model(input_ids=tiny_batch(1, num_tokens=LONG)["input_ids"])
    streamed = StreamedModel(model)
    rotary = model.model.rotary_emb
    assert int(rotary.max_seq_len_cached) == new.max_seq_len_cached
    assert torch.equal(rotary.inv_freq, new.inv_freq)
    assert rotary.inv_freq.data_ptr() != rotary.original_inv_freq.data_ptr(), "written in place, it would change both"
    assert streamed.to("cpu") == streamed.buffer_bytes


def test_an_ordinary_module_that_writes_to_its_buffers_is_still_refused() -> None:
    for replaces in (False, True):
        model = fake_model()
        model.model.register_buffer("calls", torch.zeros(()), persistent=False)

        def count(module: torch.nn.Module, *args: Any, replaces: bool = replaces) -> None:
            if replaces:
                module.calls = module.calls + 1
            else:
                module.calls.add_(1)

        model.model.register_forward_pre_hook(count)
        with pytest.raises(UnsupportedModelError, match="it writes to the buffer model.calls"):
            StreamedModel(model)
