"""Compiled blocks: one code a kind of block, gradients of the same function."""

from __future__ import annotations

import pytest
import torch
from test_graphs import assert_same, make_even_batches, open_session, plain, train
from torch._dynamo.utils import counters

from overspill.errors import UnsupportedModelError


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", ["llama", "gpt2-dropout"])
def test_traced_blocks_change_no_bit_and_blocks_of_a_kind_share_their_code(name: str) -> None:
    """The backend runs what was traced as it is: seeds, placeholders, views of slots and autograd go through the compiler."""
    with open_session(name) as session:
        session.model.compile("aot_eager")
        assert_same(train(session, None), plain(name, None))
    assert counters["stats"]["unique_graphs"] == 2, "forward without a graph and recomputation, for all three blocks together"


def test_traced_blocks_can_be_recorded() -> None:
    from test_graphs import RepeatingRecorder

    with open_session("llama") as session:
        session.model.compile("aot_eager")
        assert_same(train(session, RepeatingRecorder()), plain("llama", None))
        assert session.executor.graphs.num_replays > 0


def test_blocks_with_router_logits_are_refused_by_name() -> None:
    with open_session("mixtral") as session, pytest.raises(UnsupportedModelError, match="router logits.*leave --compile out"):
        session.model.compile()


@pytest.mark.slow
def test_compiled_blocks_train_as_the_models_own_code_does() -> None:
    """By loss and norm of the first step; later ones go apart, because Adam makes a whole step of a gradient's last bit."""
    with open_session("llama") as session:
        session.model.compile()
        reports = [session.step(make_even_batches(step)) for step in range(6)]
    (loss, norm), *_, (last, _) = plain("llama", None)[0]
    assert reports[0].loss == pytest.approx(loss, rel=1e-6) and reports[0].grad_norm == pytest.approx(norm, rel=1e-5)
    assert reports[-1].loss == pytest.approx(last, rel=1e-3)
