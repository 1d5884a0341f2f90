"""Claims about predictions beside real runs: the same order, the same waits, the same bytes, and times where delays are known."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from training_loop import make_batches
from transformers import LlamaConfig, LlamaForCausalLM

import overspill
from overspill.planning.memory import segment_bytes
from overspill.report.memory import host_resident_bytes
from overspill.report.prediction import comparison_table, describe_largest_miss, describe_other_replays, prediction_table
from overspill.report.progress import MetricsFile, metrics_row
from overspill.runtime import predictions
from overspill.runtime.machine import PROCESS_GROWTH_BYTES
from overspill.runtime.predictions import SHARE, brings_mask, with_rates
from overspill.spec.hardware import HardwareSpec
from overspill.spec.prediction import COMPARED, MemoryTerm, compare
from overspill.spec.rates import LaneRates, LinkRates
from overspill.spec.report import Prediction, StepReport
from overspill.spec.schedule import Lane
from overspill.tiers import FakeStore
from overspill.units import MIB

FIXED = {"dtype": "float32", "device": "cpu", "seq_len": 24, "micro_batch": 2, "accumulate": 2, "ssd_dir": "fake"}
PLACEMENTS = [
    {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": 1.0, "group_size": 1},
    {"parameters": "ssd", "states": "ssd", "boundaries": "host"},
    {"parameters": "host", "states": "ssd", "boundaries": "device", "clip": 1.0},
    {"parameters": "host", "states": "host", "boundaries": "host"},
    {"parameters": "device", "states": "device", "boundaries": "device"},
]
RETAINING = [
    {"parameters": "host", "states": "host", "boundaries": "device", "activations": "keep", "clip": 1.0},
    {"parameters": "host", "states": "ssd", "boundaries": "host", "activations": "host"},
    {"parameters": "ssd", "states": "host", "boundaries": "device", "activations": "ssd", "group_size": 1},
]
"""Where what blocks save for their backward is not recomputed."""


def open_session(*, delay_s: float = 0.0, bytes_per_s: float | None = None, **request: object) -> overspill.Session:
    plan = overspill.PlanRequest(**{**FIXED, **request})  # type: ignore[arg-type]

    def open_store(directory: str, capacity: int, is_scratch: bool) -> FakeStore:
        return FakeStore(capacity, delay_s=delay_s, bytes_per_s=bytes_per_s)

    optimizer = overspill.AdamW(lr=1e-3)
    return overspill.Session(tiny_model("llama"), plan=plan, optimizer=optimizer, open_store=open_store, chunk_bytes=16 * 1024)


def batches(number: int = 2) -> list[dict[str, torch.Tensor]]:
    return make_batches(number, vocab_size=96, seed=0)


@pytest.mark.parametrize("placement", PLACEMENTS + RETAINING, ids=lambda placement: "-".join(map(str, placement.values())))
def test_the_order_on_every_lane_and_what_ops_wait_for_are_the_executors(placement: dict[str, object]) -> None:
    """A real op waits for nothing that the one on paper does not; what had ended before it was submitted is left out there."""
    with open_session(delay_s=0.001, **placement) as session:
        for _ in range(3):  # the pools of slots are full then
            prediction = session.predict(batches())
            session.step(batches())
        real, paper = session.executor.spans, {span.op: span for span in prediction.spans}
    assert [span.op for span in real] == list(paper)
    for lane in Lane:
        mine = sorted((span for span in paper.values() if span.lane is lane), key=lambda span: (span.start_s, span.op))
        theirs = sorted((span for span in real if span.lane is lane), key=lambda span: (span.start_s, span.op))
        assert [span.op for span in mine] == [span.op for span in theirs], lane
    for span in real:
        assert set(span.waits) <= set(paper[span.op].waits), session.executor.trace.op(span.op)
        assert span.num_bytes == paper[span.op].num_bytes


def test_a_step_bound_by_a_drive_of_known_speed_takes_the_time_that_was_predicted() -> None:
    rate = 2e6
    hardware = HardwareSpec(source="known", ssd_read_bytes_per_s=rate, ssd_write_bytes_per_s=rate, device_flops=1e12)
    with open_session(bytes_per_s=rate, parameters="ssd", states="ssd", boundaries="device", accumulate=1) as session:
        for _ in range(2):
            predicted = session.predict(batches(1), hardware=hardware).step_s
            measured = session.step(batches(1)).step_s
    assert predicted > 0.2
    assert 0.95 * predicted < measured < 1.4 * predicted + 0.1, "what is beside the drive's time is small"


@pytest.mark.parametrize("placement", PLACEMENTS + RETAINING, ids=lambda placement: "-".join(map(str, placement.values())))
def test_bytes_and_the_devices_peak_are_exact(placement: dict[str, object]) -> None:
    with open_session(**placement) as session:
        for _ in range(2):
            prediction = session.predict(batches())
            report = session.step(batches())
        compared = compare(prediction, report)
    for name in ("ssd_read_bytes", "ssd_written_bytes", "device_peak_bytes"):
        assert compared.missed_by[name] == 0 and compared.predicted[name] == compared.measured[name], name
    assert compared.predicted["step_s"] is None, "assumed rates are no prediction of time"
    assert prediction.host_peak_bytes > prediction.host_resident_peak_bytes


@pytest.mark.clock
def test_a_prediction_is_made_once_for_each_shape_and_costs_a_thousandth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "FREE_PROGRAMS", 1)
    with open_session(parameters="host", states="host", boundaries="device") as session:
        first = session.predict(batches())
        begun = time.perf_counter()
        for _ in range(100):
            assert session.predict(batches()) is first
        assert (time.perf_counter() - begun) / 100 < 0.01
        assert session.predict_if_cheap(batches(), trained_s=0.0) is first
        other = batches(1)
        assert session.predict_if_cheap(other, trained_s=0.0) is None
        trained_s = 1.01 * session._predictions.spent_s / SHARE
        assert session.predict_if_cheap(other, trained_s=trained_s) is not None


def test_templates_timed_here_replace_what_flops_would_say() -> None:
    with open_session(parameters="host", states="host", boundaries="device") as session:
        before = session.predict(batches())
        times = session.time_templates(limit_s=0.5)
        assert times is not None and times.tail.backward is not None
        after = session.predict(batches(), hardware=HardwareSpec(source="measured (m)"))
    assert "blocks timed on cpu" in after.source and not before.has_times and after.has_times
    share = sum(batch["input_ids"].numel() for batch in batches()) / (times.seq_len * times.micro_batch)
    expected = share * (3 * times.blocks[0].forward_backward_s + times.tail.backward.median_s)
    assert after.lane_busy_s["compute"] == pytest.approx(expected, rel=0.05), "the embedding is little beside it"


def test_once_a_step_has_been_loaded_the_process_is_what_it_holds_beside_homes_and_slots() -> None:
    with open_session(parameters="host", states="host", boundaries="device") as session:
        assert "process" in {term.name for term in session.predict_plan().host_terms}
        session.step(batches())
        session.flush()
        host, found = session.residency.host, session._predictions
        assert host.allocated_bytes * 0.9 <= host.resident_bytes() <= host.allocated_bytes, "all homes have been touched by a step"
        found.note_loaded_process()
        expected = host_resident_bytes() - host.resident_bytes() + PROCESS_GROWTH_BYTES
        assert found.loaded_process_bytes == pytest.approx(expected, abs=8 * MIB)
        terms = {term.name: term.num_bytes for term in session.predict_plan().host_terms}
        assert terms["process"] == found.loaded_process_bytes and "growth beside a GPU" not in terms


def test_templates_timed_before_the_first_step_tell_the_executor_which_blocks_to_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def decide(self: predictions.Predictions, **kwargs: object) -> frozenset[str]:
        asked.append(self.times is not None)
        return frozenset({"model.layers.0"})

    monkeypatch.setattr(predictions.Predictions, "choose_blocks", decide)
    with open_session(parameters="host", states="host", boundaries="device") as session:
        assert session.executor.graphs.chosen is None, "without templates it judges in the run"
        session.time_templates(limit_s=0.2)
        assert asked == [True] and session.executor.graphs.chosen == {"model.layers.0"}
        assert session.predict(batches()).num_replays == session.step(batches()).num_replays == 0, "a CPU has nothing to replay"


def test_as_long_as_nothing_is_decided_predictions_go_by_paper_and_then_by_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[frozenset[str] | None] = [None]
    monkeypatch.setattr(predictions.Predictions, "choose_blocks", lambda self, **kwargs: frozenset({"model.layers.0"}))
    with open_session(parameters="host", states="host", boundaries="device", activations="keep") as session:
        kept = dataclasses.replace(session.plan, activations={"model.layers.1": "keep"})
        found = predictions.Predictions(kept, session.model.config, session._programs, session.hardware, decided=lambda: decided[0])
        assert found.replayed_blocks() == {"model.layers.0"}
        decided[0] = frozenset()
        assert found.replayed_blocks() == frozenset()
        decided[0] = frozenset(session.model.block_names)
        assert found.replayed_blocks() == {"model.layers.0", "model.layers.2"}, (
            "a block whose graph is kept is not replayed, whatever was decided"
        )


def test_rates_that_a_session_measured_come_before_a_machine_files() -> None:
    link = LinkRates(up_bytes_per_s=5.0, down_bytes_per_s=4.0, up_duplex_bytes_per_s=6.0, down_duplex_bytes_per_s=3.0)
    rates = LaneRates(link=link, ssd=None, update_parameters_per_s=7.0)
    found = with_rates(HardwareSpec(source="measured (m)", ssd_read_bytes_per_s=9.0), rates)
    assert (found.h2d_bytes_per_s, found.d2h_bytes_per_s, found.h2d_duplex_bytes_per_s, found.d2h_duplex_bytes_per_s) == (5, 4, 5, 3)
    assert (found.ssd_read_bytes_per_s, found.host_update_parameters_per_s) == (9, 7)
    assert found.source == "measured (m); lanes as this session measured them"
    assert with_rates(found, None) is found


def test_of_a_drives_two_figures_the_lower_one_is_taken() -> None:
    """It had rested when the session looked at it for a moment."""
    ssd = LinkRates(up_bytes_per_s=9.0, down_bytes_per_s=2.0, up_duplex_bytes_per_s=4.0, down_duplex_bytes_per_s=1.0)
    rates = LaneRates(link=None, ssd=ssd, update_parameters_per_s=None)
    drive = {
        "ssd_read_bytes_per_s": 5.0,
        "ssd_write_bytes_per_s": 5.0,
        "ssd_read_mixed_bytes_per_s": 3.0,
        "ssd_write_mixed_bytes_per_s": 3.0,
    }
    found = with_rates(HardwareSpec(source="measured (m)", **drive), rates)  # type: ignore[arg-type]
    assert [getattr(found, name) for name in drive] == [5.0, 2.0, 3.0, 1.0]
    for hardware in (HardwareSpec(), HardwareSpec(source="measured (of another drive)")):
        other = with_rates(hardware, rates)
        assert [getattr(other, name) for name in drive] == [9.0, 2.0, 4.0, 1.0], "rates are assumed"


def test_padding_and_packing_bring_a_mask_and_full_rows_do_not() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ones = torch.ones(2, 4, dtype=torch.int64)
    assert not brings_mask([{"input_ids": ids, "attention_mask": ones}])
    assert brings_mask([{"input_ids": ids}, {"input_ids": ids, "attention_mask": ones.tril()}])
    assert brings_mask([{"input_ids": ids, "position_ids": ids}])


# -- comparison --------------------------------------------------------------------------------------------------------


def prediction(**changes: object) -> Prediction:
    values: dict[str, object] = {
        "step_s": 2.0,
        "lane_bytes": {"ssd_read": 100, "ssd_write": 0},
        "num_ops": 1,
        "device_resident_peak_bytes": 0,
        "host_resident_peak_bytes": 0,
        "ssd_resident_peak_bytes": 0,
        "lane_busy_s": {"compute": 1.5},
        "exposed_s": {"h2d": 0.5},
        "source": "measured",
        "has_times": True,
        "device_terms": (MemoryTerm(name="homes", num_bytes=30), MemoryTerm(name="CUDA context", num_bytes=10, is_assumed=True)),
        "host_terms": (MemoryTerm(name="homes", num_bytes=95),),
    }
    return Prediction(**{**values, **changes})  # type: ignore[arg-type]


def report(**changes: object) -> StepReport:
    values: dict[str, object] = {field.name: 0 for field in dataclasses.fields(StepReport) if field.default is dataclasses.MISSING}
    values |= {"lane_bytes": {"ssd_read": 100, "ssd_write": 0}, "step_s": 2.5, "skipped": False}
    values |= {"device_peak_bytes": 35, "device_context_bytes": 15, "host_peak_bytes": 100, "read_times": lambda: overspill_times()}
    return StepReport(**{**values, **changes})  # type: ignore[arg-type]


def overspill_times():  # type: ignore[no-untyped-def]
    from overspill.spec.report import StepTimes

    return StepTimes(lane_busy_s={}, exposed_s={}, floor=None, trace_s=0.0)


def test_misses_are_relative_to_what_was_measured_and_the_largest_is_named_with_its_parts() -> None:
    found = compare(prediction(), report())
    assert found.missed_by == {
        "step_s": pytest.approx(0.2),
        "device_peak_bytes": pytest.approx(0.2),
        "host_peak_bytes": pytest.approx(0.05),
        "ssd_read_bytes": 0,
        "ssd_written_bytes": 0,
    }
    found = compare(prediction(), report(device_peak_bytes=65))
    assert found.largest_miss == "device_peak_bytes"
    assert describe_largest_miss(found, prediction()) == "device peak was predicted as homes 30 B, CUDA context 10 B (assumed)"
    slow = compare(prediction(), report(step_s=8.0))
    assert describe_largest_miss(slow, prediction()) == "step time was predicted as compute 1.50 s, h2d 500.0 ms (measured)"
    assert comparison_table(found, step=1).row_count == 4 and prediction_table(prediction()).row_count == 3


def test_a_run_that_judged_launches_otherwise_than_predicted_says_so_and_names_the_part() -> None:
    unexpected = describe_other_replays(prediction(replays_bytes=3 * MIB), report(step=9, num_replays=48))
    assert unexpected == (
        "48 passes of blocks were replayed as CUDA graphs in step 9, which was not predicted: the part replayed graphs, about 3.00 MiB, is "
        "missing from the device peak, and compute takes less than was predicted"
    )
    missing = describe_other_replays(prediction(num_replays=48, replays_bytes=3 * MIB), report(step=2))
    assert missing.startswith("48 passes of blocks were predicted to be replayed as CUDA graphs, and none was in step 2: the part replayed")
    assert describe_other_replays(prediction(), report()) == ""
    assert describe_other_replays(prediction(num_replays=48), report(num_replays=40)) == ""


def test_what_rests_on_assumptions_alone_is_not_compared() -> None:
    found = compare(prediction(has_times=False, device_terms=(), host_terms=()), report())
    assert [found.predicted[name] for name in COMPARED] == [None, None, None, 100, 0]
    assert [found.missed_by[name] for name in COMPARED] == [None, None, None, 0, 0] and found.largest_miss == "ssd_read_bytes"
    assert describe_largest_miss(found, prediction()) == ""


def test_rows_of_the_metrics_file_have_what_was_predicted_and_missed(tmp_path: Path) -> None:
    alone = metrics_row(report())
    assert alone["predicted"] is None and alone["missed_by"] is None
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(report(step=1), prediction=prediction(), can_wait=True)
        metrics.write(report(step=2), prediction=prediction(has_times=False))
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["predicted"] == {
        "step_s": 2.0, "device_peak_bytes": 40, "host_peak_bytes": 95, "ssd_read_bytes": 100, "ssd_written_bytes": 0,
    }  # fmt: skip
    assert first["missed_by"]["device_peak_bytes"] == 0.2 and second["missed_by"]["step_s"] is None


# -- the allocator's sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "held"),
    [(1, 512), (MIB, MIB), (MIB + 1, 2 * MIB), (9 * MIB + 5, 10 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB), (64 * MIB, 64 * MIB)],
)
def test_requests_are_rounded_as_torchs_allocator_does(asked: int, held: int) -> None:
    assert segment_bytes(asked) == held


def test_a_run_goes_on_unpredicted_when_predicting_fails_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AttributeError("no such kernel")

    monkeypatch.setattr(predictions, "build_costs", fail)
    with open_session(parameters="host", states="host", boundaries="device") as session:
        with pytest.warns(RuntimeWarning, match="steps of this run are not predicted: AttributeError: no such kernel"):
            assert session.predict_if_cheap(batches(), trained_s=0.0) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert session.predict_if_cheap(batches(), trained_s=0.0) is None
        assert session.step(batches()).loss > 0


def test_a_first_step_does_not_wait_for_a_prediction_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "S_PER_OP", 0.1)
    with open_session() as session:
        needed_s = 0.1 * len(session.schedule(batches()).ops)
        assert needed_s > predictions.FREE_S
        assert session.predict_if_cheap(batches(), trained_s=0.0) is None
        assert session.predict_if_cheap(batches(), trained_s=0.99 * needed_s / predictions.LATE_SHARE) is None
        assert session.predict_if_cheap(batches(), trained_s=1.01 * needed_s / predictions.LATE_SHARE) is not None
        assert session.predict_if_cheap(batches(), trained_s=0.0) is not None, "it is known now"


def odd_model(hidden_size: int, *, is_tied: bool) -> torch.nn.Module:
    """None of its tensors ends on a page."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
            intermediate_size=51, max_position_embeddings=64, tie_word_embeddings=is_tied, use_cache=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: "-".join(map(str, placement.values())))
def test_a_plan_trains_within_budgets_of_exactly_its_predicted_peaks(placement: dict[str, object], is_tied: bool) -> None:
    """Pages that homes and slots are rounded up to are no reason to refuse what was predicted to fit."""
    request = overspill.PlanRequest(**{**FIXED, **placement})  # type: ignore[arg-type]

    def open_with(plan: overspill.PlanRequest | overspill.Plan) -> overspill.Session:
        model, optimizer = odd_model(40, is_tied=is_tied), overspill.AdamW(lr=1e-3)
        return overspill.Session(model, plan=plan, optimizer=optimizer, open_store=lambda d, c, s: FakeStore(c), chunk_bytes=16 * 1024)

    with open_with(request) as session:
        losses = [session.step(batches()).loss for _ in range(3)]
        found, plan = session.predict_plan(), session.plan
    exact = dataclasses.replace(
        plan, device_budget_bytes=found.device_resident_peak_bytes, host_budget_bytes=found.host_resident_peak_bytes
    )
    with open_with(exact) as session:
        assert [session.step(batches()).loss for _ in range(3)] == losses
