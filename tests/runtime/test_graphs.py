"""Recorded blocks give the bits of blocks that are run, and are replayed only where nothing that they depend on has changed.

On the CPU a recorder stands in that keeps the launches and repeats them: everything around the CUDA graph is the real code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import overspill
from overspill.runtime import graphs, predictions
from overspill.runtime.compute import UnitRunner
from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import WAITED_FROM
from overspill.spec.schedule import Compute
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes

VOCAB, STEPS = 96, 6
BLOCKS = [f"model.layers.{index}" for index in range(3)]


class RepeatingRecorder:
    """Records by keeping what is to be launched."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.num_recorded = 0

    def record(self, run: Callable[[], None]) -> graphs.Replay:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_recorded += 1
        return run

    def random_state(self) -> bytes:
        return bytes(torch.get_rng_state().numpy())


class TapeOfOneDtype(RepeatingRecorder):
    """Replays under the autocast that it recorded under, as kernels do."""

    def record(self, run: Callable[[], None]) -> graphs.Replay:
        super().record(run)
        dtype = torch.get_autocast_dtype("cpu")

        def replay() -> None:
            with torch.autocast("cpu", dtype=dtype):
                run()

        return replay


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(5)
    size = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**size))
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**size, num_key_value_heads=2, num_local_experts=4, output_router_logits=True))
    dropout = 0.1 if name == "gpt2-dropout" else 0.0
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=2, embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout
        )
    )


def open_session(name: str, **fields: object) -> overspill.Session:
    defaults: dict[str, object] = {
        "dtype": "float32", "seq_len": 12, "micro_batch": 2, "accumulate": 4, "device": "cpu", "parameters": "host", "states": "host",
        "boundaries": "device",
    }  # fmt: skip
    plan = overspill.PlanRequest(**{**defaults, **fields})  # type: ignore[arg-type]
    return overspill.Session(make_model(name), plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=3)


def make_even_batches(step: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    tokens = [torch.randint(0, VOCAB, (2, length), generator=generator) for _ in range(4)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def train(session: overspill.Session, recorder: graphs.LaunchRecorder | None, *, lengths: tuple[int, ...] = (12,)) -> tuple[list, dict]:
    session.executor.graphs.recorder = recorder
    session.executor.graphs.is_wanted = recorder is not None
    losses = []
    for step in range(STEPS):
        length = lengths[step % len(lengths)]
        batches = make_even_batches(step, length)
        report = session.step(batches)
        losses.append((report.loss, report.grad_norm))
    session.flush()
    return losses, {name: session.homes.read(name) for name in session.homes.names}


@cache
def plain(name: str, clip: float | None, lengths: tuple[int, ...] = (12,)) -> tuple[list, dict]:
    with open_session(name, clip=clip) as session:
        return train(session, None, lengths=lengths)


def assert_same(one: tuple[list, dict], other: tuple[list, dict]) -> None:
    assert one[0] == other[0]
    for name, weight in one[1].items():
        assert torch.equal(weight, other[1][name]), name


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("group_size", [4, 2, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_replays_change_no_bit(name: str, group_size: int, clip: float | None) -> None:
    recorder = RepeatingRecorder()
    with open_session(name, clip=clip, group_size=group_size) as session:
        result = train(session, recorder)
        assert session.executor.graphs.num_replays > 0.4 * STEPS * 4 * 3 * 2, "hardly any block was replayed"
        assert recorder.num_recorded == len(session.executor.graphs)
    assert_same(result, plain(name, clip))


def test_in_a_steady_state_nothing_more_is_recorded() -> None:
    recorder = RepeatingRecorder()
    with open_session("llama") as session:
        train(session, recorder)
        recorded = recorder.num_recorded
        train(session, recorder)
        assert recorder.num_recorded == recorded <= 3 * 3 * 3


def test_each_length_has_its_own_recordings() -> None:
    recorder = RepeatingRecorder()
    with open_session("llama", seq_len=12) as session:
        result = train(session, recorder, lengths=(12, 7))
        assert session.executor.graphs.num_replays > 0
    assert_same(result, plain("llama", None, (12, 7)))


@pytest.mark.parametrize("name", ["gpt2-dropout", "mixtral"])
def test_blocks_with_random_numbers_or_side_outputs_are_not_recorded(name: str) -> None:
    recorder = RepeatingRecorder()
    with open_session(name) as session:
        result = train(session, recorder)
        assert recorder.num_recorded == 0
    assert_same(result, plain(name, None))


def test_a_dropout_that_an_evaluation_turned_off_is_not_recorded_for_training() -> None:
    recorder = RepeatingRecorder()
    with open_session("gpt2-dropout") as session:
        session.executor.graphs.recorder = recorder
        session.executor.graphs.is_wanted = True
        for _ in range(4):
            session.evaluate(make_even_batches(9))
        assert recorder.num_recorded > 0
        replays = session.executor.graphs.num_replays
        result = train(session, recorder)
        assert session.executor.graphs.num_replays == replays
    assert_same(result, plain("gpt2-dropout", None))


def test_a_recording_that_fails_ends_recording_and_changes_no_bit() -> None:
    with open_session("llama") as session:
        with pytest.warns(UserWarning, match="kernel by kernel"):
            result = train(session, RepeatingRecorder(fails=True))
        assert session.executor.graphs.recorder is None
    assert_same(result, plain("llama", None))


def test_other_masks_are_copied_in_before_a_replay() -> None:
    """Samples of many lengths in one padded shape: each micro-batch has a mask of its own."""

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        result = make_even_batches(step)
        for index, batch in enumerate(result):
            length = batch["input_ids"].shape[1]
            mask = torch.ones_like(batch["input_ids"])
            mask[0, length - 1 - (index + step) % 5 :] = 0
            batch["attention_mask"] = mask
            batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
        return result

    results = []
    for recorder in (None, RepeatingRecorder()):
        with open_session("llama") as session:
            session.executor.graphs.recorder = recorder
            session.executor.graphs.is_wanted = recorder is not None
            losses = [session.step(batches(step)).loss for step in range(STEPS)]
            results.append((losses, {name: session.homes.read(name) for name in session.homes.names}))
            assert recorder is None or session.executor.graphs.num_replays > 0
    assert_same(*results)


def test_a_full_device_keeps_blocks_launched_kernel_by_kernel() -> None:
    recorder = RepeatingRecorder()
    with open_session("llama") as session:
        session.executor.graphs._has_room = lambda: False
        train(session, recorder)
        assert recorder.num_recorded == 0


def test_blocks_are_recorded_once_a_settled_step_was_bound_by_launches() -> None:
    with open_session("llama") as session:
        wanted = graphs.BlockGraphs(session.model, RepeatingRecorder())
        for _ in range(graphs.STEPS_UNJUDGED):
            wanted.judge(waited_s=1.0, device_s=1.0)
        assert not wanted.is_wanted, "loading code in the first steps is no launching"
        wanted.judge(waited_s=WAITED_FROM, device_s=1.0)
        assert not wanted.is_wanted
        wanted.judge(waited_s=WAITED_FROM + 0.01, device_s=1.0)
        assert wanted.is_wanted
        without = graphs.BlockGraphs(session.model, None)
        for _ in range(4):
            without.judge(waited_s=1.0, device_s=1.0)
        assert not without.is_wanted


def test_only_launches_that_the_device_waits_for_are_counted() -> None:
    """(launched from, to), (device from, to), one clock."""
    ahead = [((0.0, 2.0), (2.5, 4.5)), ((2.0, 5.0), (5.5, 7.5))]
    waited_for = [((5.0, 8.0), (5.25, 8.25)), ((8.0, 9.0), (8.5, 10.0))]
    never_ran = ((0.0, 0.0), (0.0, 0.0))
    assert graphs.waited_for_s(*zip(*ahead, strict=True)) == 0, "a full queue makes launching slow, and nothing waits"
    assert graphs.waited_for_s(*zip(*ahead, *waited_for, never_ran, strict=True)) == 4.0


def test_blocks_chosen_before_the_first_step_are_recorded_in_it_and_no_others() -> None:
    recorder = RepeatingRecorder()
    with open_session("llama") as session:
        session.executor.graphs.recorder = recorder
        assert session.executor.graphs.choose(["model.layers.1"]) and not session.executor.graphs.wants_judgement()
        reports = [session.step(make_even_batches(step)) for step in range(STEPS)]
        assert recorder.num_recorded == len(session.executor.graphs) > 0 and reports[0].num_replays > 0
        assert {key[0] for key in session.executor.graphs._recordings} == {"model.layers.1"}
        assert reports[-1].num_replays == 2 * 4, "forward and backward of each micro-batch"
        session.flush()
        result = [(report.loss, report.grad_norm) for report in reports], {name: session.homes.read(name) for name in session.homes.names}
    assert_same(result, plain("llama", None))


def test_a_recording_under_autocast_casts_the_weights_itself() -> None:
    """A cast that autocast had kept from an op before would be the first step's weights in every replay."""
    matrices: list[tuple[int, ...]] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].dim() == 2:
                matrices.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    class Looking(RepeatingRecorder):
        def record(self, run: Callable[[], None]) -> graphs.Replay:
            if not self.num_recorded:  # a forward, after others of the same visit
                with Casts():
                    run()
            return super().record(run)

    with torch.autocast("cpu", dtype=torch.bfloat16), open_session("llama") as session:
        session.executor.graphs.recorder = Looking()
        assert session.executor.graphs.choose(["model.layers.0"])
        session.step(make_even_batches(0))
        assert len(session.executor.graphs) > 0
    assert sorted(matrices) == sorted([(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)])


def test_a_recording_under_one_autocast_is_not_replayed_under_another() -> None:
    def evaluate(dtype: torch.dtype) -> float:
        with torch.autocast("cpu", dtype=dtype):
            return session.evaluate(make_even_batches(9)).loss

    with open_session("llama") as session:
        expected = {dtype: evaluate(dtype) for dtype in (torch.bfloat16, torch.float16)}
        assert len(set(expected.values())) == 2
        session.executor.graphs.recorder = TapeOfOneDtype()
        assert session.executor.graphs.choose(BLOCKS)
        for _ in range(3):
            for dtype, loss in expected.items():
                assert evaluate(dtype) == loss
        assert session.executor.graphs.num_replays > 0


def test_what_is_chosen_again_holds_from_then_on() -> None:
    """Templates can be timed again, when other steps have been made: what is replayed is what was chosen last."""
    recorder, chosen = RepeatingRecorder(), (["model.layers.0", "model.layers.1"], ["model.layers.1"], [])
    with open_session("llama") as session:
        session.executor.graphs.recorder = recorder
        found = []
        for step in range(STEPS):
            if step % 2 == 0:
                assert session.executor.graphs.choose(chosen[step // 2])
            report = session.step(make_even_batches(step))
            found.append((report.loss, report.grad_norm))
            if step % 2 and step > 1:
                assert report.num_replays == 2 * 4 * len(chosen[step // 2])
        session.flush()
        result = found, {name: session.homes.read(name) for name in session.homes.names}
    assert_same(result, plain("llama", None))


def test_what_a_run_has_judged_for_itself_stays() -> None:
    with open_session("llama") as session:
        wanted = graphs.BlockGraphs(session.model, RepeatingRecorder())
        wanted.is_wanted = True
        assert not wanted.choose([]) and wanted.chosen is None
        none = graphs.BlockGraphs(session.model, RepeatingRecorder())
        assert none.choose([])
        for _ in range(graphs.STEPS_UNJUDGED + 1):
            assert not none.wants_judgement(), "it is decided"


# -- one decision for the run and its predictions ----------------------------------------------------------------------

PASSES = 2 * 4
"""Of one block in a step: forward and backward of each micro-batch."""


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> frozenset[str]:
    """What timed templates choose, on a device that has nothing to record; timing them takes no time."""
    part = Timing(median_s=1e-3, spread_s=0.0, num_repetitions=9)
    unit = UnitTimes(name="model.layers.0", seq_len=12, micro_batch=2, forward=part, backward=part)
    times = TemplateTimes(model="M", dtype="float32", device="a GPU", seq_len=12, micro_batch=2, blocks=(unit,), tail=unit, elapsed_s=0.0)
    units = frozenset({"model.layers.1"})
    monkeypatch.setattr(predictions, "time_templates", lambda *args, **kwargs: times)
    monkeypatch.setattr(predictions.Predictions, "choose_blocks", lambda self, **kwargs: units if self.times else frozenset())
    return units


def let_launches_bind(monkeypatch: pytest.MonkeyPatch, *, binds: bool) -> None:
    monkeypatch.setattr(graphs, "do_waits_bind", lambda **seconds: binds)


def make_first_steps(session: overspill.Session) -> None:
    """As many as a pass must have run before it is recorded that each step has once: a backward that begins a gradient."""
    for number in range(graphs.RUNS_BEFORE):
        session.step(make_even_batches(number))


def step_as_predicted(session: overspill.Session, number: int) -> int:
    """Make step `number`; passes that it replays, which are those that were predicted."""
    batches = make_even_batches(number)
    predicted = session.predict(batches).num_replays
    report = session.step(batches)
    assert report.num_replays == predicted, f"step {number}"
    return report.num_replays


def test_a_session_that_judges_and_then_times_templates_does_what_it_predicts(
    chosen: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_launches_bind(monkeypatch, binds=True)
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        found = [step_as_predicted(session, number) for number in range(STEPS)]
        judged = graphs.STEPS_UNJUDGED + 1
        assert found == [0] * judged + [3 * PASSES] * (STEPS - judged)
        session.time_templates()
        assert "blocks timed on a GPU" in session.predict(make_even_batches(9), hardware=HardwareSpec(source="measured (m)")).source
        assert step_as_predicted(session, STEPS) == 3 * PASSES, "what it has found itself stays"


def test_a_session_that_times_templates_and_could_judge_then_does_what_it_predicts(
    chosen: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_launches_bind(monkeypatch, binds=True)
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        session.time_templates()
        make_first_steps(session)
        assert [step_as_predicted(session, number) for number in range(3)] == [len(chosen) * PASSES] * 3
        assert not session.executor.graphs.is_wanted


def test_templates_that_could_not_be_timed_leave_the_decision_to_the_steps(chosen: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is full of weights has no room for a block beside them."""
    let_launches_bind(monkeypatch, binds=True)
    timed = predictions.time_templates(None, device="cpu", seq_len=12, micro_batch=2)
    full = dataclasses.replace(timed.blocks[0], forward=None, backward=None, note="out of memory: CUDA out of memory")
    times = dataclasses.replace(timed, blocks=(*timed.blocks, full))
    monkeypatch.setattr(predictions, "time_templates", lambda *args, **kwargs: times)
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        assert session.time_templates() is times and session.executor.graphs.replayed is None
        for number in range(graphs.STEPS_UNJUDGED + 1):
            session.step(make_even_batches(number))
        assert step_as_predicted(session, 3) == 3 * PASSES


def test_templates_decide_where_steps_have_not_found_launches_to_bind(chosen: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    let_launches_bind(monkeypatch, binds=False)
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        assert [step_as_predicted(session, number) for number in range(4)] == [0] * 4
        session.time_templates()
        assert [step_as_predicted(session, number) for number in range(4, 6)] == [len(chosen) * PASSES] * 2


def test_before_anybody_has_decided_predictions_are_of_paper_and_a_judgement_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions.Predictions, "choose_blocks", lambda self, **kwargs: frozenset(BLOCKS))
    let_launches_bind(monkeypatch, binds=False)
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        for number in range(graphs.STEPS_UNJUDGED + 1):
            assert session.executor.graphs.replayed is None
            assert session.predict(make_even_batches(number)).num_replays == 3 * PASSES
            session.step(make_even_batches(number))
        assert session.executor.graphs.replayed == frozenset()
        assert step_as_predicted(session, 5) == 0
        let_launches_bind(monkeypatch, binds=True)
        assert step_as_predicted(session, 6) == 0
        assert step_as_predicted(session, 7) == 3 * PASSES


@pytest.mark.parametrize("name", ["gpt2-dropout", "mixtral"])
def test_what_the_executor_will_not_record_is_not_predicted_to_be_replayed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_launches_bind(monkeypatch, binds=True)
    with open_session(name) as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        assert [step_as_predicted(session, number) for number in range(STEPS)] == [0] * STEPS


def test_nor_what_it_has_no_room_for_or_could_not_record(chosen: frozenset[str]) -> None:
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        session.executor.graphs._has_room = lambda: False
        session.time_templates()
        assert [step_as_predicted(session, number) for number in range(3)] == [0] * 3
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder(fails=True)
        session.time_templates()
        with pytest.warns(UserWarning, match="kernel by kernel"):
            session.step(make_even_batches(0))
        assert step_as_predicted(session, 1) == 0


def test_a_block_that_was_recorded_once_is_replayed_whatever_another_shape_has_no_room_for(chosen: frozenset[str]) -> None:
    with open_session("llama") as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        session.time_templates()
        make_first_steps(session)
        assert step_as_predicted(session, 2) == len(chosen) * PASSES
        session.executor.graphs._has_room = lambda: False
        for number in range(3, 6):
            session.step(make_even_batches(number, length=7))
        assert step_as_predicted(session, 6) == len(chosen) * PASSES


def test_only_training_steps_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens of a text that is generated are bound by launches anywhere."""
    let_launches_bind(monkeypatch, binds=True)
    with open_session("llama", clip=1.0) as session:
        session.executor.graphs.recorder = RepeatingRecorder()
        session.generate([[1, 2, 3]], max_new_tokens=6)
        for number in range(graphs.STEPS_UNJUDGED):
            session.evaluate(make_even_batches(9))
            session.step(make_even_batches(number))
            session.flush()
        assert session.executor.graphs.replayed is None and not session.executor.graphs.is_wanted
        session.step(make_even_batches(5))
        assert session.executor.graphs.is_wanted


@pytest.mark.parametrize("group_size", [4, 1])
def test_memory_that_runs_out_around_a_replay_adds_no_gradient_twice(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is run again then, so a replay that has added to gradients must be the last thing that could fail."""
    failures = []

    class FullDevice(RepeatingRecorder):
        """After some replays there is no memory, until that was noticed."""

        num_replays, is_full = 0, False

        def record(self, run: Callable[[], None]) -> graphs.Replay:
            super().record(run)

            def replay() -> None:
                run()
                self.num_replays += 1
                self.is_full = self.num_replays % 7 == 0

            return replay

    recorder = FullDevice()

    def failing(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: object, **kwargs: object) -> torch.Tensor:
            if recorder.is_full:
                recorder.is_full = False
                failures.append(original)
                raise torch.OutOfMemoryError("no memory left")
            return original(*args, **kwargs)

        return allocate

    with open_session("llama", group_size=group_size) as session:
        monkeypatch.setattr(graphs.torch, "empty_like", failing(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "clone", failing(torch.Tensor.clone))
        result = train(session, recorder)
        num_failures = len(failures)
        assert step_as_predicted(session, 9) == 3 * PASSES, "what is run again is counted once"
        monkeypatch.undo()
    assert len(failures) > num_failures > 0
    assert_same(result, plain("llama", None))


@pytest.mark.parametrize("part", ["__init__", "load_arguments"])
def test_a_device_without_room_for_static_tensors_has_its_blocks_launched_kernel_by_kernel(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs.Static, part, fail)
    with open_session("llama") as session:
        with pytest.warns(UserWarning, match="kernel by kernel from now on: recording one failed: CUDA out of memory"):
            result = train(session, RepeatingRecorder())
        assert session.executor.graphs.replayed == frozenset() and not session.executor.graphs._static
    assert_same(result, plain("llama", None))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_some_blocks_are_kept_while_the_others_are_replayed(clip: float | None) -> None:
    """A device that has room for some graphs, on a host that launches slowly."""
    with open_session("llama", activations="keep", clip=clip) as session:
        whole = session.plan
    last = whole.units[-2].name
    plan = dataclasses.replace(whole, activations={last: whole.activations[last]}, stored_bytes={last: whole.stored_bytes[last]})
    recorder = RepeatingRecorder()
    with overspill.Session(make_model("llama"), plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=3) as session:
        losses, weights = train(session, recorder)
        assert session.executor.graphs.num_replays > 0 and len(session.executor.units.retained) == 0
        assert last not in {key[0] for key in session.executor.graphs._recordings}
    expected, plain_weights = plain("llama", clip)
    assert losses == expected
    assert [name for name in weights if not torch.equal(weights[name], plain_weights[name])] == []


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_recordings_are_given_up_before_anything_else_for_an_op_that_has_no_memory_beside_them(
    activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failures = UnitRunner.run, list[str]()

    def scarce(self: UnitRunner, op: Compute, *args: Any) -> None:
        if op.unit == "tail" and len(self.graphs):
            failures.append(op.unit)
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, op, *args)

    with open_session("llama", activations=activations) as session:
        whole = session.plan
    kept = dict(list(whole.activations.items())[-1:])
    plan = dataclasses.replace(whole, activations=kept, stored_bytes={unit: whole.stored_bytes[unit] for unit in kept})
    monkeypatch.setattr(UnitRunner, "run", scarce)
    with overspill.Session(make_model("llama"), plan=plan, optimizer=overspill.AdamW(lr=1e-2), seed=3) as session:
        with pytest.warns(RuntimeWarning, match="not replayed as CUDA graphs any more: the device has no memory left beside"):
            result = train(session, RepeatingRecorder())
        assert len(session.executor.graphs) == 0 and session.executor.graphs.replayed == frozenset()
        assert not session.executor.units.retained._recomputed, "what autograd keeps stays"
    assert len(failures) == 2, "with the room that is idle first; and not again once they are gone"
    assert_same(result, plain("llama", None))
