"""No two ops touch the same bytes unless waits order them, on every placement; and the watch finds the races that once were."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from happens_before import watch
from tiny_models import tiny_model
from training_loop import make_batches

import overspill
from overspill.runtime.landing import Landing
from overspill.runtime.residency import Residency
from overspill.spec.schedule import Piece, Role
from overspill.spec.tensors import Tier
from overspill.tiers import Arena, FakeStore

TIERS = ["device", "host", "ssd"]


def open_session(dtype: str = "bfloat16", name: str = "llama", **fields: object) -> overspill.Session:
    model = tiny_model(name).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    defaults: dict[str, object] = {"seq_len": 12, "micro_batch": 2, "device": "cpu", "accumulate": 4, "ssd_dir": "fake"}
    return overspill.Session(
        model,
        plan=overspill.PlanRequest(dtype=dtype, **{**defaults, **fields}),  # type: ignore[arg-type]
        optimizer=overspill.AdamW(lr=1e-2),
        chunk_bytes=32 * 1024,
        open_store=lambda directory, capacity_bytes, is_scratch: FakeStore(capacity_bytes),
    )


def train(session: overspill.Session, *, num_steps: int = 2) -> None:
    for step in range(num_steps):
        session.step(make_batches(session.plan.accumulate, vocab_size=96, seed=step))
    session.evaluate(make_batches(2, vocab_size=96, seed=9))
    session.step(make_batches(session.plan.accumulate, vocab_size=96, seed=10))


@pytest.mark.parametrize(("parameters", "states"), list(itertools.product(TIERS, TIERS)))
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_waits_order_everything_that_shares_bytes(
    parameters: str, states: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = TIERS.index(parameters) + 2 * TIERS.index(states) + (clip is not None)
    fields = {"boundaries": TIERS[position % 3], "group_size": [4, 2, 1, 3][position % 4], "clip": clip}
    dtype, name = [("bfloat16", "llama"), ("float32", "llama_tied")][position % 2]
    with open_session(dtype, name, parameters=parameters, states=states, **fields) as session:
        with watch(session, monkeypatch) as races:
            train(session)
        assert races.found == []
        assert races.num_ops > 200 and races.num_pairs > 300, "the watch saw hardly anything"
        assert races.num_across > 50 or clip is not None or parameters == states == "device"


@pytest.mark.parametrize(
    ("activations", "fields"),
    [("keep", {"boundaries": "host"}), ("host", {"clip": 1.0}), ("ssd", {"group_size": 2, "states": "ssd"})],
    ids=["keep", "host", "ssd"],
)
def test_waits_order_everything_where_activations_are_kept(
    activations: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(parameters="host", **{"states": "host", **fields}, activations=activations) as session:
        with watch(session, monkeypatch) as races:
            train(session)
        assert races.found == []
        assert len(session.plan.activations) == 3


def lend_by_size(session: overspill.Session) -> None:
    """As where the device budget has no room for an arena."""
    session.residency.device_pool.follow = lambda places, *, num_bytes: False  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(4))
def test_waits_order_everything_in_random_plans(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(seed)
    for _ in range(3):
        fields: dict[str, object] = {
            "parameters": choose.choice(TIERS), "states": choose.choice(TIERS), "boundaries": choose.choice(TIERS),
            "clip": choose.choice([None, 1.0]), "group_size": choose.choice([1, 2, 3, 4]), "accumulate": choose.choice([1, 2, 4]),
            "device_states_bytes": choose.choice([None, 0, 60_000, 200_000]),
        }  # fmt: skip
        if choose.random() < 0.25:
            fields |= {"parameters": "host", "states": "host", "device_states_bytes": 0, "deferred_updates": choose.choice([1, 2])}
        with open_session(choose.choice(["bfloat16", "float32"]), choose.choice(["llama", "llama_tied", "gpt2"]), **fields) as session:
            if choose.random() < 0.5:
                lend_by_size(session)
            with watch(session, monkeypatch) as races:
                train(session, num_steps=1)
        assert races.found == [], fields


def test_the_watch_finds_a_sum_given_back_before_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 2026-11-22 `compress` dropped partial gradients without the cast that reads them."""
    drop = Residency.drop

    def forgetful(self: Residency, piece: Piece, tier: Tier, work: object = ()) -> None:
        drop(self, piece, tier, () if piece.role is Role.PARTIAL_GRADIENT else work)  # type: ignore[arg-type]

    monkeypatch.setattr(Residency, "drop", forgetful)
    with open_session(parameters="host", states="host", boundaries="device") as session:
        lend_by_size(session)  # the arena's places need not have a fetch where the sum was
        with watch(session, monkeypatch) as races:
            train(session)
        assert any("compress" in race and "h2d" in race for race in races.found)


@pytest.mark.parametrize(("parameters", "states"), [("host", "host"), ("ssd", "ssd"), ("device", "host")])
def test_the_watch_finds_a_home_that_is_read_before_the_step_before_has_landed(
    parameters: str, states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Landing, "before", lambda self, op: [])
    with open_session(parameters=parameters, states=states, boundaries="device") as session:
        with watch(session, monkeypatch) as races:
            train(session)
        found = [race for race in races.found if race.startswith("of the step before")]
        wrote = {"host": "update", "ssd": "ssd_write", "device": "h2d"}[parameters]
        reads = {"host": "h2d", "ssd": "ssd_read", "device": "forward"}[parameters]
        assert any(wrote in race and reads in race for race in found), races.found
        assert len(found) == len(races.found)


@pytest.mark.parametrize("by_size", [False, True])
def test_the_watch_finds_slots_lent_without_the_work_that_uses_them(by_size: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Arena.acquire

    def forgetful(self: Arena, num_bytes: int):  # type: ignore[no-untyped-def]
        slot = acquire(self, num_bytes)
        slot.after = ()  # compute is done when it is dispatched here: nothing is harmed
        return slot

    monkeypatch.setattr(Arena, "acquire", forgetful)
    with open_session(parameters="host", states="host", boundaries="device") as session:
        if by_size:
            lend_by_size(session)
        with watch(session, monkeypatch) as races:
            train(session)
        assert any("h2d" in race and "forward" in race for race in races.found)
