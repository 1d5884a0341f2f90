"""What a session promises around its steps: fresh weights in any order, counted bytes, clear refusals, nothing half-done."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from training_loop import PlainTrainer, make_batches
from transformers import AutoModelForCausalLM, PreTrainedModel

import overspill
from overspill.errors import BudgetError, NonFiniteError, StorageError
from overspill.huggingface.tail import forward_replaced
from overspill.planning.place import predict_step
from overspill.runtime.compute import UnitRunner
from overspill.runtime.gradients import Gradients
from overspill.runtime.visit import Visit
from overspill.scheduling import render_timeline
from overspill.spec.hardware import HardwareSpec
from overspill.spec.schedule import Lane, Phase, Piece, Role
from overspill.spec.tensors import Tier
from overspill.tiers import FakeStore
from overspill.tiers.wear import COUNTER_NAME

VOCAB = 96
OPTIMIZER = overspill.AdamW(lr=1e-2)


def llama(*, tied: bool = True) -> PreTrainedModel:
    return tiny_model("llama_tied" if tied else "llama")


def plan(tmp_path: Path | None, **fields: object) -> overspill.PlanRequest:
    defaults: dict[str, object] = {"dtype": "float32", "seq_len": 12, "micro_batch": 2, "device": "cpu", "accumulate": 2}
    return overspill.PlanRequest(**{**defaults, "ssd_dir": str(tmp_path) if tmp_path else None, **fields})  # type: ignore[arg-type]


def open_session(tmp_path: Path | None, model: PreTrainedModel | Path | None = None, **fields: object) -> overspill.Session:
    return overspill.Session(model if model is not None else llama(), plan=plan(tmp_path, **fields), optimizer=OPTIMIZER)


def batches(seed: int = 0, count: int = 2) -> list[dict[str, torch.Tensor]]:
    return make_batches(count, vocab_size=VOCAB, seed=seed)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_evaluate_save_and_step_in_any_order_see_flushed_weights(clip: float | None, tmp_path: Path) -> None:
    """After each step the plain loop's weights are what evaluate, save and generate work with."""
    trainer = PlainTrainer(llama(), OPTIMIZER, clip=clip, seed=0, chunk_rows=4096)
    with open_session(tmp_path / "ssd", parameters="ssd", states="host", clip=clip) as session:
        for number, order in enumerate(itertools.permutations(["evaluate", "save", "generate"])):
            trainer.step(batches(number))
            session.step(batches(number))
            for action in order:
                if action == "evaluate":
                    with torch.no_grad():
                        batch = batches(99, 1)[0]
                        logits = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                        labels = batch["labels"][:, 1:].reshape(-1)
                        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels)
                    assert session.evaluate([batch]).loss == pytest.approx(float(loss), rel=1e-6)
                    trainer.model.train()
                elif action == "save":
                    loaded = AutoModelForCausalLM.from_pretrained(session.save_pretrained(tmp_path / "model"))
                    for name, parameter in loaded.named_parameters():
                        assert torch.equal(parameter, trainer.parameters[name]), name
                else:
                    ids = torch.tensor([[5, 6, 7]])
                    expected = trainer.model.eval()(input_ids=ids).logits[0, -1].argmax()
                    assert session.generate([[5, 6, 7]], max_new_tokens=1) == [[int(expected)]]
                    trainer.model.train()


def test_generation_continues_prompts_of_different_length_as_the_model_does() -> None:
    model = llama().eval()
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=2)
        tokens = out[0, len(prompt) :].tolist()
        expected.append(tokens[: tokens.index(2)] if 2 in tokens else tokens)
    with open_session(None, model, parameters="host", states="host") as session:
        assert session.generate(prompts, max_new_tokens=5, eos_token_id=2) == expected
        with pytest.raises(ValueError, match="at least one prompt"):
            session.generate([[]], max_new_tokens=1)


def test_measured_link_bytes_do_not_depend_on_accumulation_within_one_group() -> None:
    moved = {}
    for count in (1, 4):
        with open_session(None, parameters="host", states="host", boundaries="device", accumulate=count, group_size=count) as session:
            report = session.step(batches(0, count))
            moved[count] = (report.lane_bytes["h2d"], report.lane_bytes["d2h"])
    assert moved[1] == moved[4] and min(moved[1]) > 0


def test_a_folder_and_a_live_model_start_from_the_same_weights(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    losses = []
    for model in (llama(), tmp_path / "model"):
        with open_session(None, model, parameters="host", states="host") as session:
            losses.append([session.step(batches(step)).loss for step in range(3)])
    assert losses[0] == losses[1]


def test_an_fp32_file_keeps_all_bits_under_bf16_parameters(tmp_path: Path) -> None:
    """hi is what the model reads, and hi with the remainder is the file's value."""
    from overspill.optim import merge_master

    model = llama(tied=False)
    originals = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "model")
    with open_session(None, tmp_path / "model", dtype="bfloat16", parameters="host", states="host") as session:
        for name, original in originals.items():
            high, remainder = session.homes.read(name), session.homes.read_state(name, "remainder")
            assert torch.equal(merge_master(high, remainder), original), name


def test_bf16_masters_follow_the_fp32_trajectory() -> None:
    """Small updates must not be lost in bf16: the masters move as fp32 AdamW moves them under the same gradients."""
    with overspill.Session(
        llama(), plan=plan(None, dtype="bfloat16", parameters="host", states="host"), optimizer=overspill.AdamW(lr=1e-6)
    ) as session:
        name = "model.layers.0.mlp.up_proj.weight"
        before, low = session.homes.read(name), session.homes.read_state(name, "remainder")
        for step in range(3):
            session.step(batches(step))
        after, low_after = session.homes.read(name), session.homes.read_state(name, "remainder")
        assert torch.equal(before, after) or (before != after).float().mean() < 0.05
        assert (low != low_after).float().mean() > 0.9


def test_fp16_overflow_skips_the_step_and_changes_nothing_but_the_scale() -> None:
    with open_session(None, dtype="float16", parameters="host", states="host") as session:
        names = session.homes.names
        before = {name: session.homes.read_state(name, "master") for name in names}
        assert session.loss_scale is not None
        session.loss_scale = type(session.loss_scale)(value=2.0**30)
        report = session.step(batches())
        assert report.skipped and session.step_number == 0 and session.loss_scale.value == 2.0**29
        session.flush()
        assert all(torch.equal(session.homes.read_state(name, "master"), before[name]) for name in names)
        session.loss_scale = type(session.loss_scale)(value=8.0)
        report = session.step(batches())
        session.flush()
        assert not report.skipped and session.step_number == 1
        assert any(not torch.equal(session.homes.read_state(name, "master"), before[name]) for name in names)


def poisoned(model: PreTrainedModel, name: str = "model.layers.1.mlp.up_proj.weight") -> PreTrainedModel:
    model.get_parameter(name).data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_a_loss_that_is_not_finite_stops_before_any_update(clip: float | None) -> None:
    with open_session(None, poisoned(llama()), parameters="host", states="host", clip=clip) as session:
        before = {name: session.homes.read(name) for name in session.homes.names}
        with pytest.raises(NonFiniteError, match="loss of step 1, micro-batch 0 is nan; no weight was changed"):
            session.step(batches())
        assert all(
            torch.equal(
                session.homes.read(name),
                before[name],
            )
            or "up_proj" in name
            for name in before
        )
        assert session.step_number == 0


def test_a_gradient_that_is_not_finite_names_tensor_and_updated_units(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = UnitRunner._run_block_backward

    def overflowing(self, op, position, visit, micro_batch, context, gradients):  # type: ignore[no-untyped-def]
        backward(self, op, position, visit, micro_batch, context, gradients)
        if op.unit == "model.layers.0":
            gradients.residency.region(op.unit, Role.PARTIAL_GRADIENT, op.unit).view(torch.float32)[0] = float("inf")

    monkeypatch.setattr(UnitRunner, "_run_block_backward", overflowing)
    with open_session(None, llama(tied=False), parameters="host", states="host") as session:
        with pytest.raises(
            NonFiniteError, match=r"gradient of model.layers.0.* not finite in step 1; already updated.*tail, model.layers.2"
        ):
            session.step(batches())
        with pytest.raises(RuntimeError, match="half-way"):
            session.step(batches())
    with open_session(None, llama(tied=False), parameters="host", states="host", clip=1.0) as session:
        before = {name: session.homes.read(name) for name in session.homes.names}
        with pytest.raises(NonFiniteError, match="no weight was changed"):
            session.step(batches())
        session.flush()
        assert all(torch.equal(session.homes.read(name), before[name]) for name in before)
        monkeypatch.undo()
        session.step(batches())


def fake_stores(**settings: object):  # type: ignore[no-untyped-def]
    made: list[FakeStore] = []

    def open_store(directory: str, capacity_bytes: int, is_scratch: bool) -> FakeStore:
        made.append(FakeStore(capacity_bytes, **settings))  # type: ignore[arg-type]
        return made[-1]

    return open_store, made


def test_the_fake_tier_gives_the_same_losses_however_slow() -> None:
    losses = []
    for delay_s in (0.0, 0.002):
        open_store, made = fake_stores(delay_s=delay_s)
        request = plan(None, parameters="ssd", states="ssd", boundaries="ssd", ssd_dir="fake")
        with overspill.Session(llama(), plan=request, optimizer=OPTIMIZER, open_store=open_store) as session:
            losses.append([session.step(batches(step)).loss for step in range(2)])
        assert len(made) == 2
    assert losses[0] == losses[1]


class OneFailure:
    """A failure rule that fails the n-th transfer of a kind, counted from when it is armed."""

    def __init__(self, operation: str, after: int) -> None:
        self.operation, self.left, self.is_armed = operation, after, False

    def __call__(self, operation: str, call_index: int, name: str) -> int | None:
        if not self.is_armed or operation != self.operation:
            return None
        self.left -= 1
        return errno.EIO if self.left == 0 else None


def session_with_failure(rule: OneFailure) -> overspill.Session:
    open_store, _ = fake_stores(failures=rule)
    request = plan(None, parameters="ssd", states="ssd", ssd_dir="fake")
    session = overspill.Session(llama(), plan=request, optimizer=OPTIMIZER, open_store=open_store)
    rule.is_armed = True
    return session


def test_a_transfer_that_fails_among_updates_closes_the_session_for_further_steps() -> None:
    with session_with_failure(OneFailure("write", after=4)) as session:
        with pytest.raises(StorageError, match="EIO"):
            session.step(batches())
        with pytest.raises(RuntimeError, match="half-way.*StorageError"):
            session.step(batches())


def test_a_transfer_that_fails_before_any_update_changes_nothing_and_the_session_goes_on() -> None:
    with open_session(None, parameters="host", states="host") as session:
        expected = [session.step(batches(step)).loss for step in range(3)]
    with session_with_failure(OneFailure("read", after=3)) as session:
        with pytest.raises(StorageError, match="EIO"):
            session.step(batches(0))
        assert [session.step(batches(step)).loss for step in range(3)] == expected


@pytest.mark.parametrize("max_new_tokens", [0, -1, 1.5])
def test_a_generation_of_no_tokens_is_refused_before_anything_is_done(max_new_tokens: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(None, parameters="host", states="host", clip=1.0) as session:
        monkeypatch.setattr(session, "flush", lambda: pytest.fail("the weights were flushed"))
        with pytest.raises(ValueError, match=f"generate makes at least 1 token, got max_new_tokens={max_new_tokens}"):
            session.generate([[5]], max_new_tokens=max_new_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("group_size", "2"), ("accumulate", 1.5), ("host_budget_bytes", 8e9), ("seq_len", None), ("micro_batch", True)]
)
def test_a_count_that_is_no_whole_number_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be a whole number, got {value!r}"):
        overspill.PlanRequest(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["device", "host", "pinned", "ssd"])
def test_a_negative_budget_is_refused(tier: str) -> None:
    with pytest.raises(ValueError, match=f"--{tier}-budget cannot be negative, got -1 B"):
        overspill.PlanRequest(**{f"{tier}_budget_bytes": -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [0.0, -1.0, 1e39, 1e-60, float("inf"), float("nan")])
def test_a_clip_that_bounds_nothing_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=f"--clip must be positive and finite.*got {re.escape(str(clip))}; leave it out"):
        plan(None, clip=clip)


@pytest.mark.parametrize("ssd_dir", ["", ("",), ("/nvme", "")])
def test_a_place_without_a_name_is_refused(ssd_dir: object) -> None:
    """It would be the folder that the program was started in."""
    with pytest.raises(ValueError, match="--ssd-dir .* has an empty name; name a directory"):
        plan(None, ssd_dir=ssd_dir)
    with pytest.raises(ValueError, match="the directory of checkpoints has an empty name"):
        overspill.CheckpointPolicy(directory="")


def test_an_interrupted_evaluation_leaves_the_session_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(None, parameters="host", states="host", clip=1.0) as session:
        session.step(batches(0))

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(UnitRunner, "_run_tail", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.evaluate(batches(1))
        losses = [session.step(batches(step)).loss for step in range(1, 3)]
    with open_session(None, parameters="host", states="host", clip=1.0) as session:
        assert losses == [session.step(batches(step)).loss for step in range(3)][1:]


def test_a_live_model_is_untouched_by_a_refused_plan_and_hollow_after_an_accepted_one() -> None:
    model = llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(BudgetError):
        open_session(None, model, parameters="host", states="host", host_budget_bytes=4096)
    with pytest.raises(ValueError, match="state format"):
        open_session(None, model, state_format="int9")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with open_session(None, model, parameters="host", states="host") as session:
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        assert all(torch.equal(session.homes.read(name), before[name]) for name in before)
    with pytest.raises(ValueError, match="no values.*load it again"):
        open_session(None, model, parameters="host", states="host")


def test_a_model_object_in_evaluation_mode_trains_with_its_dropout() -> None:
    losses = []
    for mode in (True, False):
        model = tiny_model("gpt2", resid_pdrop=0.3).train(mode)
        with open_session(None, model, parameters="host", states="host") as session:
            losses.append(session.step(batches()).loss)
    assert losses[0] == losses[1]


def test_fp16_gradients_that_never_become_finite_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(None, dtype="float16", parameters="host", states="host") as session:
        monkeypatch.setattr("overspill.runtime.session.global_norm", lambda sums: float("nan"))
        with pytest.raises(NonFiniteError, match="smallest loss scale"):
            for _ in range(40):
                assert session.step(batches()).skipped
        assert session.step_number == 0


def test_equal_masks_of_a_group_are_stored_once() -> None:
    seen: set[int] = set()
    with open_session(None, parameters="host", states="host", accumulate=4, group_size=4) as session:
        tail = session.executor.units._run_tail

        def look(op, visit, micro_batch, *rest):  # type: ignore[no-untyped-def]
            seen.update(tensor.data_ptr() for tensor in micro_batch.arguments.tensors)
            seen.add(-len(micro_batch.arguments.tensors))
            tail(op, visit, micro_batch, *rest)

        session.executor.units._run_tail = look  # type: ignore[method-assign]
        padded = make_batches(2, vocab_size=VOCAB)[1]
        session.step([padded] * 4)
        (count,) = (-value for value in seen if value < 0)
        assert len([value for value in seen if value > 0]) <= count


def test_samples_longer_than_learned_positions_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="learned positions for 32; lower --seq-len"):
        open_session(None, tiny_model("gpt2"), seq_len=64)


def test_the_saved_config_is_the_models_own(tmp_path: Path) -> None:
    model = llama()
    model.config.use_cache = True
    with open_session(None, model, parameters="host", states="host") as session:
        saved = AutoModelForCausalLM.from_pretrained(session.save_pretrained(tmp_path / "model"))
    assert saved.config.use_cache is True and saved.config.architectures == ["LlamaForCausalLM"]


def test_programs_of_many_shapes_do_not_pile_up() -> None:
    with open_session(None, parameters="host", states="host") as session:
        for length in range(3, 12):
            ids = torch.ones(2, length, dtype=torch.long)
            session.step([{"input_ids": ids, "labels": ids}])
        assert len(session._programs) <= 3


def test_a_closed_session_says_so() -> None:
    with open_session(None, parameters="host", states="host") as session:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        session.step(batches())


def test_out_of_memory_is_retried_at_the_failing_op(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(None, parameters="host", states="host") as session:
        expected = session.step(batches()).loss
    run = UnitRunner.run
    failures = iter([True, False, False, True] + [False] * 1000)

    def short_of_memory(self, *args):  # type: ignore[no-untyped-def]
        if next(failures):
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        run(self, *args)

    monkeypatch.setattr(UnitRunner, "run", short_of_memory)
    with open_session(None, parameters="host", states="host") as session:
        assert session.step(batches()).loss == expected


def test_a_graph_kept_across_a_refilled_slot_is_refused_by_autograd() -> None:
    """Design 6: one slot for all units. A graph from the forward must not go backward over another unit's weights."""
    with open_session(None, llama(tied=False), parameters="host", states="host") as session:
        kept: list[torch.Tensor] = []
        forward = session.executor.units._run_forward

        def keep_graph(op, position, visit, micro_batch, context):  # type: ignore[no-untyped-def]
            if op.unit == "model.layers.0":
                hidden = session.residency.boundary(session.executor.units._boundary(op.unit, op)).clone().requires_grad_()
                kept.append(session.model.run_block(op.unit, hidden, micro_batch.arguments).hidden)
            forward(op, position, visit, micro_batch, context)

        session.executor.units._run_forward = keep_graph  # type: ignore[method-assign]
        session.step(batches(0, 1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept[0].sum().backward()


def test_a_visit_restores_placeholders_also_after_an_error() -> None:
    with open_session(None, llama(tied=False), parameters="device", states="device") as session:
        with pytest.raises(KeyError, match="stop"), Visit(session.plan, session.model, session.residency, "model.layers.0"):
            raise KeyError("stop")
        with pytest.raises(RuntimeError, match="no weights here"):
            session.model.run_block("model.layers.0", torch.zeros(1, 2, 32), None)  # type: ignore[arg-type]
        session.step(batches())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 40, dtype=torch.long), "labels": torch.zeros(2, 40, dtype=torch.long)}, "2 x 40 tokens.* 2 x 12"),
        ({"labels": torch.zeros(2, 5, dtype=torch.long)}, "labels has shape"),
        ({"labels": torch.full((2, 12), -100)}, "no target"),
        ({"input_ids": torch.full((2, 12), VOCAB)}, "vocabulary from 0 to 95"),
        ({"labels": torch.zeros(2, 12)}, "labels must be integers"),
        ({"input_ids": torch.zeros(0, 12, dtype=torch.long), "labels": torch.zeros(0, 12, dtype=torch.long)}, "is empty"),
        ({"token_type_ids": torch.zeros(2, 12, dtype=torch.long)}, "has keys"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    batch = {key: value for key, value in tiny_batch(0).items() if key != "attention_mask"}
    with open_session(None, parameters="device", states="device") as session, pytest.raises(ValueError, match=message):
        session.step([{**batch, **change}])


def test_budgets_that_cannot_hold_the_model_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="--host-budget"):
        open_session(tmp_path / "ssd", parameters="host", states="host", host_budget_bytes=4096)
    with pytest.raises(BudgetError, match="--ssd-budget"):
        open_session(tmp_path / "ssd", parameters="ssd", states="ssd", ssd_budget_bytes=4096)
    assert not (tmp_path / "ssd").exists()


def test_a_plan_can_be_kept_and_used_again_but_not_for_another_model() -> None:
    with open_session(None, parameters="host", states="host") as session:
        kept = session.plan
        expected = session.step(batches()).loss
    with overspill.Session(llama(), plan=kept, optimizer=OPTIMIZER) as session:
        assert session.step(batches()).loss == expected
    with pytest.raises(ValueError, match="this model differs"):
        overspill.Session(tiny_model("gpt2"), plan=kept, optimizer=OPTIMIZER)


def test_the_timeline_and_the_predicted_step_are_there_before_the_step() -> None:
    with open_session(None, parameters="host", states="host") as session:
        lines = render_timeline(session.schedule(batches()))
        assert f"{Phase.BACKWARD} model.layers.2" in lines and "update shared[0] on host" in lines
        assert session.predict(batches()).source == "assumed"


def test_the_users_random_generator_is_left_alone() -> None:
    with open_session(None, parameters="device", states="device") as session:
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        session.step(batches())
        assert torch.equal(torch.rand(3), expected)


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    import threading

    threads = threading.active_count()
    with open_session(tmp_path / "ssd", parameters="ssd", states="ssd", boundaries="ssd") as session:
        session.step(batches())
        assert any((tmp_path / "ssd").iterdir())
    assert [path.name for path in (tmp_path / "ssd").iterdir()] == [COUNTER_NAME]  # wear outlives the data
    assert threading.active_count() == threads


def test_the_slot_of_a_summed_gradient_is_lent_with_the_work_that_reads_it() -> None:
    """On a GPU the cast of the sum is under way when the slot is free: a fetch into it that does not wait would change the gradient."""

    class Reading:
        lane = Lane.COMPUTE
        is_done = False
        num_waits = 0

        def settle(self) -> None: ...

        def wait_on(self, stream: object) -> None:
            Reading.num_waits += 1

        def wait(self) -> None: ...

    model = llama(tied=False).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    request = overspill.PlanRequest(
        parameters="host", states="host", boundaries="device", dtype="bfloat16", seq_len=12, micro_batch=2, accumulate=2, device="cpu"
    )
    with overspill.Session(model, plan=request, optimizer=overspill.AdamW(lr=1e-2)) as session:
        lent: list[bool] = []
        drop = session.residency.drop

        def watched(piece: Piece, tier: Tier, work: Sequence[object] = ()) -> None:
            if piece.role is Role.PARTIAL_GRADIENT:
                lent.append(any(isinstance(item, Reading) for item in work))
            drop(piece, tier, ())

        session.residency.device_work = lambda: (Reading(),)  # type: ignore[assignment,return-value]
        session.residency.device_pool._fresh_work = tuple
        session.residency.drop = watched  # type: ignore[method-assign,assignment]
        session.step(batches(0, 1))
        assert lent and all(lent), "partial gradients were given back without what reads them"


def test_what_an_interrupted_run_has_bound_and_replaced_is_put_back_and_stays_so() -> None:
    """Ctrl-C may leave context managers half-way; they are collected some time later, perhaps during another visit."""
    with open_session(None, llama(tied=False), parameters="device", states="device") as session:
        model = session.model
        expected = session.evaluate(batches()).loss
        visit = Visit(session.plan, model, session.residency, "embedding").__enter__()
        outer = model.bound("model.layers.0", Visit(session.plan, model, session.residency, "model.layers.0").parameters)
        outer.__enter__()
        replaced = forward_replaced(model._tail.owner, lambda *args, **kwargs: None)
        replaced.__enter__()
        model.unbind()
        with Visit(session.plan, model, session.residency, "model.layers.0") as current:
            outer.__exit__(None, None, None)
            visit.__exit__(None, None, None)
            replaced.__exit__(None, None, None)
            assert model._bound["model.layers.0"] is current.parameters
            weight = model._blocks["model.layers.0"].self_attn.q_proj._parameters["weight"]
            assert weight is current.parameters["model.layers.0.self_attn.q_proj.weight"]
        assert session.evaluate(batches()).loss == expected


def test_a_session_leaves_the_last_product_of_each_block_out_of_its_recomputations() -> None:
    """That the gradients keep their bits is for test_exactness.py and test_architectures.py: it is so in every session there."""
    with open_session(None, llama(tied=False), parameters="host", states="host") as session:
        session.step(batches())
        assert session.model.unneeded is not None
        assert session.model.unneeded.left_out == {"model.layers.0": ("mlp.down_proj",)}


@pytest.mark.parametrize("device_states_bytes", [0, 10**9], ids=["host", "device"])
def test_a_bad_loss_changes_no_weight_wherever_states_are_and_the_session_goes_on(
    device_states_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(None, llama(tied=False), parameters="host", states="host", device_states_bytes=device_states_bytes) as session:
        before = {name: session.homes.read(name) for name in session.homes.names}
        run_tail = session.model.run_tail

        def spoilt(*args: object, **kwargs: object) -> object:
            output = run_tail(*args, **kwargs)  # type: ignore[arg-type]
            return dataclasses.replace(output, loss=output.loss * float("nan"))

        with monkeypatch.context() as patch:
            patch.setattr(session.model, "run_tail", spoilt)
            with pytest.raises(NonFiniteError, match="no weight was changed"):
                session.step(batches())
        assert session.executor.updated == []
        assert all(torch.equal(session.homes.read(name), value) for name, value in before.items())
        session.step(batches())
        assert any(not torch.equal(session.homes.read(name), value) for name, value in before.items())


def test_a_gradient_that_is_not_finite_stops_its_update_on_the_device_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(None, llama(tied=False), parameters="host", states="host", device_states_bytes=10**9) as session:
        assert session.plan.placements["model.layers.0"].update_tier is Tier.DEVICE
        add = Gradients.add

        def spoilt(self: Gradients, bundle: str, reader: str, name: str, gradient: torch.Tensor) -> None:
            add(self, bundle, reader, name, gradient * float("inf") if name == "model.layers.0.mlp.up_proj.weight" else gradient)

        before = session.homes.read("model.layers.0.mlp.up_proj.weight")
        monkeypatch.setattr(Gradients, "add", spoilt)
        with pytest.raises(NonFiniteError, match=r"gradient of model.layers.0.mlp.up_proj.weight is not finite .*already updated.*tail"):
            session.step(batches())
        assert torch.equal(session.homes.read("model.layers.0.mlp.up_proj.weight"), before)
        assert "model.layers.0" not in session.executor.updated and "tail" in session.executor.updated
        with pytest.raises(RuntimeError, match="half-way through an update"):
            session.step(batches())


def test_a_step_runs_whatever_was_predicted_before_it() -> None:
    """Few programs are kept; the one that runs is among them."""
    with open_session(None, llama(tied=False), parameters="host", states="host") as session:
        shorter = [[{key: value[:, :length] for key, value in batch.items()} for batch in batches()] for length in (9, 8, 7)]
        for batch in shorter:
            session.predict(batch)
        assert session.step(shorter[0]).loss > 0


@pytest.mark.parametrize("slack_bytes", range(0, 20_001, 4000))
def test_a_device_budget_that_just_fits_holds_all_shapes_in_any_order(slack_bytes: int) -> None:
    """Whether the arena of a full step fits decides for all steps: gradients wait for the next one where the last one put them."""
    fields: dict[str, object] = {"parameters": "host", "states": "device", "boundaries": "device", "clip": 1.0, "accumulate": 1}
    whole = batches()[:1]
    short = [{key: value[:, :4] for key, value in batch.items()} for batch in whole]
    with open_session(None, llama(tied=False), **fields) as session:
        plan, expected = session.plan, [session.step(batch).loss for batch in (short, whole, short)]
    budget = predict_step(plan, HardwareSpec()).device_resident_peak_bytes + slack_bytes
    plan = dataclasses.replace(plan, device_budget_bytes=budget)
    with overspill.Session(llama(tied=False), plan=plan, optimizer=OPTIMIZER) as session:
        assert [session.step(batch).loss for batch in (short, whole, short)] == expected
        assert session.residency.device.peak_bytes <= budget
