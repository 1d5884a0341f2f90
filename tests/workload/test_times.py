"""Times of templates: what is measured, within what, and what is said of the rest. On the CPU; `test_gpu_workload` has the GPU."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from overspill import describe_workload
from overspill.report.workload import _describe_launches
from overspill.runtime import template_repetitions, template_timing
from overspill.runtime.template_repetitions import MOST_IN_DOUBT, build_sizes
from overspill.runtime.template_runs import BlockRun, Sample
from overspill.runtime.template_timing import MOST_HELD_UP, choose_best, mean_of_most, time_templates
from overspill.spec.documents import from_json, from_plain, to_json
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes

SIZES = dict(seq_len=24, micro_batch=2, dtype="float32")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mamba2"])
def test_every_class_of_blocks_and_the_tail_are_timed(name: str) -> None:
    spec = describe_workload(tiny_config(name), **SIZES, device="cpu")
    times = time_templates(tiny_config(name), **SIZES, device="cpu", limit_s=10.0, spec=spec)
    assert [item.name for item in times.blocks] == [item.name for item in spec.classes[1:-1]]
    for item in times.blocks:
        assert (item.micro_batch, item.seq_len, item.note) == (2, 24, "")
        assert item.forward is not None and item.backward is not None
        assert item.forward_backward_s == item.forward.median_s + item.backward.median_s > item.forward_s > 0
        assert 1 < item.forward.num_repetitions <= MOST_IN_DOUBT and item.backward.spread_s >= 0
    assert times.tail.forward is None and times.tail.backward is not None
    assert times.elapsed_s < 10
    assert from_json(TemplateTimes, times.to_json()) == times


@pytest.mark.clock
def test_what_does_not_fit_the_time_is_measured_smaller_and_said() -> None:
    config = LlamaConfig(vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8)
    times = time_templates(config, device="cpu", seq_len=8192, micro_batch=8, dtype="float32", limit_s=1.5)
    (block,) = times.blocks
    assert block.backward is not None and block.micro_batch * block.seq_len < 8 * 8192
    assert f"measured at {block.micro_batch} x {block.seq_len} tokens" in block.note and "were left" in block.note
    assert times.elapsed_s < 3.5, times  # a first run cannot be cut short


def test_what_cannot_even_begin_in_time_is_not_measured_and_said() -> None:
    config = LlamaConfig(vocab_size=2048, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32)
    times = time_templates(config, device="cpu", seq_len=64, micro_batch=1, limit_s=0.5)
    assert times.blocks[0].backward is None and times.blocks[0].forward is None
    assert "not measured: one run takes about" in times.blocks[0].note
    assert times.elapsed_s < 2.5


def test_no_size_is_begun_for_which_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SIZES | dict(seq_len=48)
    spec = describe_workload(tiny_config("llama"), **sizes, device="cpu")
    block = spec.classes[1]
    assert block.backward is not None
    enough_for_40 = 2 * block.parameter_bytes + 4 * block.num_parameters + block.backward.peak_bytes * 40 // 96

    class Memory:
        available = enough_for_40 / template_timing.ROOM_SHARE

    monkeypatch.setattr(template_timing.psutil, "virtual_memory", Memory)
    (found,) = time_templates(tiny_config("llama"), **sizes, device="cpu", spec=spec).blocks
    assert (found.micro_batch, found.seq_len) == (1, 32) and found.backward is not None
    assert "measured at 1 x 32 tokens: 1 x 48 takes about" in found.note and "are free on cpu" in found.note


def test_running_out_of_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from overspill.huggingface import StreamedModel

    run_block = StreamedModel.run_block

    def scarce(self: StreamedModel, unit: str, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        if hidden.numel() > 32 * 32:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")
        return run_block(self, unit, hidden, *args, **kwargs)

    sizes = SIZES | dict(seq_len=48)
    spec = describe_workload(tiny_config("llama"), **sizes, device="cpu")
    monkeypatch.setattr(StreamedModel, "run_block", scarce)
    (block,) = time_templates(tiny_config("llama"), **sizes, device="cpu", spec=spec).blocks
    assert (block.micro_batch, block.seq_len) == (1, 32) and block.backward is not None
    assert "1 x 48 ran out of memory (tried to allocate 3 GiB)" in block.note
    monkeypatch.setattr(template_repetitions, "SMALLEST_TOKENS", 64)
    (block,) = time_templates(tiny_config("llama"), **sizes, device="cpu", spec=spec).blocks
    assert block.backward is None and block.note == "out of memory: tried to allocate 3 GiB"


def test_what_a_recomputation_leaves_out_is_left_out_of_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    from overspill.huggingface.unneeded import UnneededProducts

    made: list[UnneededProducts] = []
    decide = UnneededProducts.decide

    def noted(self: UnneededProducts, unit: str, differentiate: Callable[[], Sequence[torch.Tensor | None]]) -> None:
        made.append(self)
        decide(self, unit, differentiate)

    monkeypatch.setattr(UnneededProducts, "decide", noted)
    monkeypatch.setattr(template_timing, "UNNEEDED_SHARE", 1.0)
    times = time_templates(tiny_config("llama"), **SIZES, device="cpu", limit_s=10.0)
    assert [found.left_out for found in made] == [{"model.layers.0": ("mlp.down_proj",)}]
    assert times.blocks[0].backward is not None
    made.clear()
    monkeypatch.setattr(template_timing, "UNNEEDED_SHARE", 0.0)
    time_templates(tiny_config("llama"), **SIZES, device="cpu", limit_s=1.0)
    assert not made, "there was no time to find out"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_timing_leaves_generators_and_the_model_alone(dropout: float) -> None:
    """The embedding is run with values to find the blocks' arguments, which draws where it has a dropout."""
    config = tiny_config("gpt2")
    config.embd_pdrop = dropout
    model = AutoModelForCausalLM.from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    time_templates(model, **SIZES, device="cpu", limit_s=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_under_autocast_each_pass_casts_the_weights_itself_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no cast is left behind that the caller's autocast would hold."""
    matrices: list[weakref.ref[torch.UntypedStorage]] = []
    numbers: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and made.dim() == 2:
                matrices.append(weakref.ref(made.untyped_storage()))
            return made

    def counted(self: BlockRun) -> Sample:
        number = len(matrices)
        sample = run(self)
        numbers.append(len(matrices) - number)
        return sample

    run = BlockRun.__call__
    monkeypatch.setattr(BlockRun, "__call__", counted)
    with torch.autocast("cpu", dtype=torch.bfloat16), Casts():
        time_templates(tiny_config("llama"), **SIZES, device="cpu", limit_s=0.5)
        assert matrices and not any(storage() is not None for storage in matrices)
    assert len(numbers) > 2 and min(numbers) >= 2 * 7, "seven matrices, forward and again in backward"


def test_sizes_grow_to_what_was_asked_for() -> None:
    assert build_sizes((8, 2048)) == [(1, 32), (1, 128), (1, 512), (1, 2048), (4, 2048), (8, 2048)]
    assert build_sizes((1, 20)) == [(1, 20)]
    assert build_sizes((2, 20)) == [(1, 20), (2, 20)]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_s must be positive, got 0"):
        time_templates(tiny_config("llama"), **SIZES, device="cpu", limit_s=0)
    spec = describe_workload(tiny_config("llama"), seq_len=8, micro_batch=1, device="cpu")
    with pytest.raises(ValueError, match="the spec is of 1 x 8 tokens in bfloat16, asked for were 2 x 24 in float32"):
        time_templates(tiny_config("llama"), **SIZES, device="cpu", spec=spec)


# -- launches and replays, by clocks of a device that works while the host goes on ----------------------------------------


class ApartClock:
    """The host launches in the time that the CPU computes; the device takes `factor` times that."""

    is_apart = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return self.factor * (end - start)


class KeepingRecorder:
    """Records by keeping what is to be launched."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.num_recorded, self.num_replayed = fails, 0, 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            run()

        return replay

    def random_state(self) -> bytes:
        return bytes(torch.get_rng_state().numpy())


def time_apart(name: str, factor: float, *, fails: bool = False, replays: bool = True, **config: object) -> tuple[UnitTimes, list]:
    made: list[KeepingRecorder] = []

    def recorder() -> KeepingRecorder:
        made.append(KeepingRecorder(fails=fails))
        return made[-1]

    times = time_templates(
        tiny_config(name, **config), **SIZES, device="cpu", limit_s=2.0, clock=ApartClock(factor), recorder=recorder, replays=replays
    )
    assert times.tail.replayed_backward is None and times.tail.launch_s > 0
    return times.blocks[0], made


@pytest.mark.clock
def test_a_block_that_launches_bound_is_recorded_and_its_replays_are_timed() -> None:
    block, made = time_apart("llama", 1.0)
    assert block.is_worth_replaying and block.is_replayable and block.launch_s <= MOST_HELD_UP * block.forward_backward_s
    assert block.replayed_forward is not None and block.replayed_backward is not None
    assert block.replayed_backward.num_repetitions > 1 and made[-1].num_recorded == 2
    assert made[-1].num_replayed == 2 * (block.replayed_backward.num_repetitions + 1), "the first replay does not count"
    assert from_json(UnitTimes, to_json(block)) == block
    assert "so it is replayed as CUDA graphs, in" in _describe_launches(block)


@pytest.mark.clock
def test_a_block_that_the_device_bounds_is_not_recorded_nor_one_of_a_run_without_graphs() -> None:
    for factor, replays in ((5.0, True), (1.0, False)):
        block, made = time_apart("llama", factor, replays=replays)
        assert block.is_worth_replaying == (factor == 1.0) and block.is_replayable and not made
        assert block.replayed_forward is None and block.replayed_backward is None


@pytest.mark.parametrize(
    ("name", "config", "fails"),
    [("gpt2", {"resid_pdrop": 0.1}, False), ("mixtral", {"output_router_logits": True}, False), ("llama", {}, True)],
    ids=["draws", "side outputs", "fails"],
)
def test_blocks_that_the_executor_does_not_record_have_no_replays(name: str, config: dict[str, object], fails: bool) -> None:
    block, made = time_apart(name, 1.0, fails=fails, **config)
    assert not block.is_replayable and block.replayed_backward is None and block.backward is not None
    assert sum(item.num_recorded for item in made) == 0
    assert ("it cannot be recorded as a CUDA graph: operation not permitted" in block.note) == fails


def test_of_two_rounds_the_larger_size_counts_and_of_one_size_the_quicker() -> None:
    def timed(seconds: float, *, tokens: int = 64, replay_s: float | None = None) -> UnitTimes:
        part = Timing(median_s=seconds, spread_s=0.0, num_repetitions=3)
        replay = Timing(median_s=replay_s, spread_s=0.0, num_repetitions=3) if replay_s is not None else None
        return UnitTimes(
            name="b", seq_len=tokens, micro_batch=1, forward=part, backward=part, replayed_forward=replay, replayed_backward=replay
        )

    nothing = UnitTimes(name="b", seq_len=64, micro_batch=1, forward=None, backward=None, note="out of memory")
    assert choose_best([timed(1.0), timed(9.0, tokens=128)]).seq_len == 128
    assert choose_best([timed(1.0), nothing]) == choose_best([nothing, timed(1.0)]) == timed(1.0)
    quicker = choose_best([timed(0.3, replay_s=0.1), timed(0.01)])
    assert quicker.forward_s == 0.01 and quicker.replayed_forward is not None and quicker.replayed_forward.median_s == 0.1
    assert quicker.note == "another round of repetitions, which does not count, took 600.0 ms, this one 20.0 ms"
    assert choose_best([timed(0.3), timed(0.2)]).note == ""
    assert choose_best([nothing, nothing]) == nothing
    third = choose_best([timed(2.0), timed(0.2), timed(0.15)])
    assert third.forward_s == 0.15 and third.note.endswith("took 4.00 s, this one 300.0 ms"), "a third round does not forget the first"


@pytest.mark.parametrize("is_apart", [True, False])
def test_kernels_that_the_first_block_loads_say_nothing_of_how_long_a_large_tail_takes(
    monkeypatch: pytest.MonkeyPatch, is_apart: bool
) -> None:
    """The tail has 37 times the block's parameters. Where the host computes, a first run touches pages, and is believed."""
    run, calls = BlockRun.__call__, []

    def loading(self: BlockRun) -> Sample:
        calls.append(self)
        if len(calls) == 1:
            time.sleep(0.4)
        return run(self)

    monkeypatch.setattr(BlockRun, "__call__", loading)
    config = LlamaConfig(vocab_size=16384, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    clock = ApartClock(3.0) if is_apart else None
    times = time_templates(config, **SIZES, device="cpu", limit_s=6.0, clock=clock)
    assert times.blocks[0].backward is not None
    assert (times.tail.backward is not None) == is_apart and ("not measured: one run takes" in times.tail.note) != is_apart


def test_launching_counts_in_the_mean_and_one_repetition_that_was_held_up_counts_little() -> None:
    often = [1.0, 1.0, 1.0, 2.0, 2.0]
    assert mean_of_most(often) == pytest.approx(1.4) and mean_of_most([2.0]) == 2.0
    assert mean_of_most([1.0] * 19 + [50.0]) == pytest.approx(1 + (MOST_HELD_UP - 1) / 20)
    samples = [Sample(forward_s=1.0, backward_s=3.0, forward_issue_s=0.5, backward_issue_s=item) for item in often]
    described = template_timing._describe("b", (1, 8), samples, "")
    assert described.launch_s == pytest.approx(0.5 + 1.4) and described.forward_backward_s == 4.0


def test_a_result_that_flops_and_bytes_contradict_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round of the block is disturbed all along."""
    rounds: list[str] = []
    describe = template_timing._describe

    def disturbed(unit: str, size: tuple[int, int], samples: Sequence[Sample], note: str) -> UnitTimes:
        rounds.append(unit)
        slow = [Sample(forward_s=2.0, backward_s=2.0)] * 4 if len(rounds) == 1 else samples
        return describe(unit, size, slow, note)

    monkeypatch.setattr(template_timing, "_describe", disturbed)
    monkeypatch.setattr(template_timing, "LAUNCH_S", 1e-3)  # so that this machine is not doubted
    times = time_templates(tiny_config("llama"), **SIZES, device="cpu", limit_s=60.0, clock=ApartClock(3.0))
    assert rounds[:3] == ["model.layers.0", "tail", "model.layers.0"]
    (block,) = times.blocks
    assert block.forward_backward_s < 1 and "another round of repetitions, which does not count, took 4.00 s" in block.note


def test_times_that_were_saved_before_launches_were_timed_are_read() -> None:
    old = {
        "name": "b", "seq_len": 8, "micro_batch": 1, "note": "",
        "forward": {"median_s": 1.0, "spread_s": 0.0, "num_repetitions": 3},
        "backward": {"median_s": 2.0, "spread_s": 0.0, "num_repetitions": 3},
    }  # fmt: skip
    found = from_plain(UnitTimes, old)
    assert found.launch_s == 0 and not found.is_worth_replaying and found.is_replayable and found.replayed_backward is None
