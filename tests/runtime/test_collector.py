"""A step leaves nothing to Python's cycle collector, which rests while a step runs: what a cycle holds stays until the step is over.

A function that called itself held every block's hidden states, 9 GiB at 14B, while losses, schedules and predictions were right.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NAMES, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from training_loop import make_batches

import overspill
from overspill.runtime.residency import Residency
from overspill.spec.schedule import Piece

MODES: dict[str, dict[str, Any]] = {
    "host": {},
    "clip": {"clip": 1.0},
    "boundaries-host": {"boundaries": "host"},
    "ssd": {"parameters": "ssd", "states": "ssd", "boundaries": "ssd"},
    "keep": {"activations": "keep"},
    "activations-host": {"activations": "host"},
}
"""Name -> what differs from a plan with all in host memory."""


def open_session(name: str, tmp_path: Path, *, accumulate: int = 2, num_blocks: int | None = None, **changes: Any) -> overspill.Session:
    fields = {"parameters": "host", "states": "host", "boundaries": "device", "ssd_dir": str(tmp_path)} | changes
    plan = overspill.PlanRequest(seq_len=12, micro_batch=2, accumulate=accumulate, device="cpu", **fields)
    model = tiny_model(name, **({"num_hidden_layers": num_blocks} if num_blocks else {}))
    return overspill.Session(model, plan=plan, optimizer=overspill.AdamW(lr=1e-3), seed=1, chunk_bytes=128 * 1024)


@pytest.fixture
def saved_garbage() -> Iterator[list[Any]]:
    """All that a collection finds from now on is kept here."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.parametrize(("name", "mode"), [*((name, "host") for name in NAMES), *(("llama", mode) for mode in MODES if mode != "host")])
def test_a_step_makes_no_cycles(name: str, mode: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with open_session(name, tmp_path, **MODES[mode]) as session:
        for step in range(2):  # the first ones build what stays
            session.step(make_batches(2, vocab_size=96, seed=step))
        garbage = request.getfixturevalue("saved_garbage")
        session.step(make_batches(2, vocab_size=96, seed=2))
        gc.collect()
        left = [item for item in garbage if type(item).__module__.split(".")[0] in ("torch", "overspill")]
        assert [(type(item).__name__, str(item)[:120]) for item in left] == []


@pytest.mark.parametrize("boundaries", ["host", "ssd"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_hidden_states_that_leave_the_device_are_given_back(
    boundaries: str, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0
    put_boundary = Residency.put_boundary

    def put(self: Residency, piece: Piece, value: torch.Tensor) -> None:
        nonlocal most
        put_boundary(self, piece, value)
        made.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in made))

    monkeypatch.setattr(Residency, "put_boundary", put)
    with open_session("llama", tmp_path, accumulate=accumulate, num_blocks=8, boundaries=boundaries) as session:
        session.step(make_batches(accumulate, vocab_size=96, seed=0))
        assert session.plan.group_size == accumulate
    assert len(made) == 2 * accumulate * 9
    assert most <= 3


def test_casts_that_autocast_makes_of_weights_go_with_their_op(tmp_path: Path) -> None:
    """Autocast keeps them until it is left, which a training loop inside of it never does: a model more with every pass."""
    alive: list[StorageWeakRef] = []
    after_each: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and result.dim() == 2 and result.dtype is torch.bfloat16:
                alive.append(StorageWeakRef(result.untyped_storage()))
            return result

    with torch.autocast("cpu", dtype=torch.bfloat16), open_session("llama", tmp_path, dtype="float32") as session:
        for step in range(3):
            with Casts():
                session.step(make_batches(2, vocab_size=96, seed=step))
            after_each.append(sum(not reference.expired() for reference in alive))
        session.evaluate(make_batches(2, vocab_size=96, seed=9))
    assert len(alive) > 3 * 2 * 3 * 7, "each block has seven matrices"
    assert max(after_each) < 7, after_each
