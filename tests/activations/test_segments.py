"""Modules that are run again in backward: the same bits, fewer bytes, and nothing left on the model."""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import VOCAB, assert_nothing_left, assert_same_gradients, build, offload, run_step, settings_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointError

import overspill
from overspill.activations.segments import find_segments
from overspill.errors import UnsupportedModelError


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(self.down(nn.functional.gelu(self.up(hidden))))


class Blocks(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


ROWS = 8
INPUTS = torch.linspace(-2, 2, ROWS * 16).reshape(ROWS, 16)


def blocks_step(make: Callable[[], nn.Module] = Block) -> tuple[Blocks, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model = Blocks(make)
    return model, lambda: model(INPUTS).square().sum()


def build_trained(name: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """With dropout, and without a cache of keys."""
    model, step = build(name)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model.train(), step


def wrappers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module) or module._compiled_call_impl is not None]


@pytest.mark.parametrize(("tier", "is_autocast"), [("host", False), ("ssd", True)], ids=["host", "ssd-autocast"])
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("gpt2", ["transformer.h.*"]),
        ("gpt2", ["cheap", "transformer.h.*.mlp"]),
        ("llama", ["model.layers.*"]),
        ("llama", ("cheap", "model.layers.[1-3]")),
        ("bert", ["*.layer.*"]),
        ("t5", ["*.block.*"]),
        ("conv", ["layers"]),
    ],
)
def test_segments_give_the_gradients_of_plain_pytorch_bitwise_and_pack_fewer_bytes(
    name: str, recompute: Any, tier: str, is_autocast: bool, tmp_path: Path
) -> None:
    model, step = build_trained(name)
    expected = run_step(model, step, is_autocast=is_autocast)
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    settings = settings_of(tier, tmp_path)
    model, step = build_trained(name)
    with offload(model, **settings) as active:
        run_step(model, step, is_autocast=is_autocast)
        packed = active.report().packed_bytes
    model, step = build_trained(name)
    with offload(model, recompute=recompute, **settings) as active:
        found = run_step(model, step, is_autocast=is_autocast)
    report = active.report()
    assert found[0] == expected[0]
    assert_same_gradients(found[1], expected[1])
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers()), "a batch norm counts each batch once"
    assert report.host_bytes + report.ssd_bytes == report.packed_bytes > 0
    assert report.packed_bytes < 0.55 * packed, (report.packed_bytes, packed)
    assert (report.rebuilt_bytes > 0) == ("cheap" in recompute)
    assert report.num_segment_rebuilds == len(report.segments) > 0
    assert_nothing_left(active)
    assert not wrappers(model)


def test_of_a_segment_its_inputs_are_moved_and_nothing_else_is() -> None:
    model, step = blocks_step()
    with offload(model, recompute=["blocks.*"]) as active:
        step().backward()
        # What goes into the 3 blocks, and the last output, which square saves.
        assert active.report().host_bytes == active.report().packed_bytes == 4 * ROWS * 16 * 4
        assert active.report().segments == ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize("by_keyword", [False, True])
def test_the_device_lets_go_of_a_segments_inputs_until_backward(by_keyword: bool) -> None:
    model, _ = blocks_step()
    seen: list[StorageWeakRef] = []
    with offload(model, recompute=["blocks.*"]):
        hidden = INPUTS * model.blocks[0].up.bias[0]
        for block in model.blocks:
            seen.append(StorageWeakRef(hidden.untyped_storage()))
            hidden = block(hidden=hidden) if by_keyword else block(hidden)
        loss = hidden.sum()
        del hidden
        model(INPUTS)  # what comes after reaps the copies that have ended
        for _ in range(200):
            if all(storage.expired() for storage in seen):
                break
            time.sleep(0.01)
            model(INPUTS)
        assert all(storage.expired() for storage in seen)
        loss.backward()


class Nested(nn.Module):
    """Its tensors come by keyword, in a tuple and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, *, pair: Any, more: Any, scale: float) -> Any:
        return {"out": torch.tanh(self.linear(pair[0]) * pair[1] + more["bias"][0]) * scale, "none": None}


def test_tensors_in_keyword_arguments_tuples_and_dicts_are_moved_too() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"part": Nested()})
    leaves = [torch.randn(ROWS, 16, requires_grad=True) for _ in range(3)]

    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        one, two, three = (leaf * 2.0 for leaf in leaves)
        return model["part"](pair=(one, two), more={"bias": [three]}, scale=0.5)["out"].sum()

    expected = run_step(model, step)[1], [leaf.grad for leaf in leaves]
    with offload(model, recompute=["part"]) as active:
        found = run_step(model, step)[1], [leaf.grad for leaf in leaves]
        assert active.report().host_bytes == 3 * ROWS * 16 * 4
    assert_same_gradients(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


def test_random_numbers_of_a_segment_are_drawn_again_and_the_sequence_goes_on() -> None:
    model, step = blocks_step(lambda: Block(dropout=0.5))

    def two() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return run_step(model, lambda: step() + step())[1], torch.rand(3)

    expected = two()
    with offload(model, recompute=["blocks.[01]"]) as active:
        found = two()
    assert_same_gradients(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert active.report().num_segment_rebuilds == 4


def test_micro_batches_in_flight_and_accumulation_and_kept_graphs_give_the_same_bits() -> None:
    model, step = build_trained("gpt2")

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        first, second = step(), step()
        second.backward()
        first.backward(retain_graph=True)
        first.backward()
        step().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = run()
    with offload(model, recompute=["cheap", "transformer.h.*"]) as active:
        assert_same_gradients(run(), expected)
        assert active.report().num_segment_rebuilds == 2 * 4
    assert_nothing_left(active)


def test_a_graph_that_outlives_the_block_is_rebuilt_after_it() -> None:
    model, step = blocks_step()
    expected = run_step(model, step)
    model.zero_grad()
    with offload(model, recompute=["blocks.*"]) as active:
        loss = step()
    assert not wrappers(model)
    loss.backward()
    del loss
    assert_same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected[1])
    assert_nothing_left(active)


def test_double_backward_goes_through_segments() -> None:
    model, _ = blocks_step()
    inputs = INPUTS.clone().requires_grad_()

    def penalised() -> dict[str, torch.Tensor]:
        model.zero_grad()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = penalised()
    with offload(model, recompute=["blocks.*"]):
        assert_same_gradients(penalised(), expected)


def test_without_gradients_the_plain_forward_runs() -> None:
    model, step = blocks_step()
    with offload(model, recompute=["blocks.*"]) as active:
        with torch.no_grad():
            step()
        model.requires_grad_(False)
        assert not step().requires_grad
        model.blocks[2].requires_grad_(True)
        step().backward()
        assert active.report().num_segment_rebuilds == 1, "of the only block with a gradient"


def test_of_matches_inside_of_matches_the_outermost_counts() -> None:
    model, _ = blocks_step()
    assert list(find_segments(model, ["blocks.*"])) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_segments(model, ["*.up", "blocks.1"])) == ["blocks.0.up", "blocks.1", "blocks.2.up"]
    assert list(find_segments(model, ["blocks.[0-1].*", "blocks.0.up"]))[:3] == ["blocks.0.up", "blocks.0.down", "blocks.0.dropout"]


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        (["blocks.7"], r"recompute='blocks.7' matches no module of Blocks; there are 'blocks.\d'.*names as model.named_modules\(\)"),
        (["blocks.0", "attention"], "recompute='attention' matches no module of Blocks; there are 'blocks'"),
        (["blocks"], r"recompute names blocks, a ModuleList: it has no forward of its own.*with 'blocks.\*'"),
        ([""], "the whole model.*name parts of it, such as 'blocks', 'blocks.0'"),
        (["none", "blocks.*"], "'none' stands alone"),
        ([], r"recompute=\[\] is not known; choose one of 'none', 'cheap', or a list"),
        (["cheap", 3], "is not known; choose one of"),
        ("blocks.*", r"recompute='blocks.\*' is not known; choose one of 'none', 'cheap', or a list of"),
    ],
)
def test_patterns_that_name_nothing_that_runs_are_refused(recompute: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offload(Blocks(), recompute=recompute)
    with pytest.raises(ValueError, match="there are none in it"):
        offload(nn.Linear(2, 2), recompute=["*"])


class Counting(nn.Module):
    """Keeps a moving average that enters into its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("average", torch.zeros(16))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.average.mul_(0.5).add_(hidden.mean(0))
        return torch.tanh(self.linear(hidden - self.average))


class OwnNorm(nn.BatchNorm1d):
    """Its running statistics enter into the result."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(hidden.mean(0), 0.1)
        return nn.functional.gelu((hidden - self.running_mean) * self.weight)


def test_running_statistics_that_enter_into_the_result_are_refused_and_others_are_put_back() -> None:
    model, step = blocks_step(lambda: OwnNorm(16))
    with offload(model, recompute=["blocks.1"]), pytest.raises(UnsupportedModelError, match="the buffer 'running_mean' of a OwnNorm in it"):
        step()
    model, step = blocks_step(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)))
    with offload(model, recompute=["blocks.1"]), pytest.raises(UnsupportedModelError, match="the buffer '_u' of a _SpectralNorm in it"):
        step()
    for make in (lambda: nn.BatchNorm1d(16, momentum=None), lambda: nn.InstanceNorm1d(ROWS, track_running_stats=True, affine=True)):
        model, step = blocks_step(make)
        statistics = [(expected := run_step(model, step)[1]), *(buffer.clone() for buffer in model.buffers())][1:]
        model, step = blocks_step(make)
        with offload(model, recompute=["blocks.*"]):
            assert_same_gradients(run_step(model, step)[1], expected)
        assert all(map(torch.equal, model.buffers(), statistics))


def test_modules_that_cannot_be_run_again_are_refused_with_the_reason() -> None:
    model, step = blocks_step(Counting)
    with offload(model, recompute=["blocks.1"]), pytest.raises(UnsupportedModelError, match="changes the buffer 'average' of a Counting"):
        step()
    assert not wrappers(model)
    model, step = blocks_step(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 16)))
    with offload(model, recompute=["blocks.1"]), pytest.raises(UnsupportedModelError, match="blocks.1 changes a tensor that goes into it"):
        step()
    model, step = build("llama")
    with offload(model, recompute=["model.layers.*"]), pytest.raises(UnsupportedModelError, match="cache of keys.*use_cache=False"):
        step()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp cannot be a segment: .* checkpoints itself already"):
        offload(model, recompute=["*.mlp"])
    compiled = Blocks()
    compiled.blocks[1].compile(backend="aot_eager")
    with pytest.raises(UnsupportedModelError, match="blocks.1.up is inside of blocks.1, which is compiled"):
        offload(compiled, recompute=["*.up"])
    compiled.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="compiled in place and has forward hooks"):
        offload(compiled, recompute=["blocks.1"])


@pytest.mark.parametrize("how", ["in place", "as a module"])
def test_compiled_blocks_can_be_segments(how: str) -> None:
    model, step = blocks_step(lambda: Block(dropout=0.5))
    for index in range(3):
        if how == "in place":
            model.blocks[index].compile(backend="aot_eager")
        else:
            model.blocks[index] = torch.compile(model.blocks[index], backend="aot_eager")
    before = [vars(block).get("forward", block._compiled_call_impl) for block in model.blocks]
    expected = run_step(model, step)
    with offload(model, recompute=["blocks.*"]) as active:
        for _ in range(2):
            assert_same_gradients(run_step(model, step)[1], expected[1])
        assert active.report().packed_bytes == 2 * 4 * ROWS * 16 * 4
        other = copy.deepcopy(model)
        assert_same_gradients(run_step(other, lambda: other(INPUTS).square().sum())[1], expected[1])
        assert active.report().num_segment_rebuilds == 2 * 3, "none of the copy's"
    assert [vars(block).get("forward", block._compiled_call_impl) for block in model.blocks] == before


class Fickle(nn.Module):
    """Does something else every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(16, 16), "shape"
        self.num_calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        if self.num_calls % 2 == 0:
            if self.kind == "shape":
                hidden = hidden[:3]
            elif self.kind == "count":
                return hidden * 1.0
            else:
                raise OSError("no more of it")
        return torch.tanh(self.linear(hidden)).exp()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("shape", CheckpointError, "different metadata"),
        ("count", CheckpointError, "different number of tensors"),
        ("raises", OSError, "no more of it"),
    ],
)
def test_a_rebuild_that_differs_is_checkpoints_error_with_what_to_change(kind: str, error: type[Exception], message: str) -> None:
    model, step = blocks_step(Fickle)
    for block in model.blocks:
        block.kind = kind
    active = offload(model, recompute=["blocks.*"])
    with pytest.raises(error, match=message) as caught, active:
        step().backward()
    if error is CheckpointError:
        assert "This was the segment blocks.2 of offload_activations" in "".join(caught.value.__notes__)
        assert "leave it out of recompute" in "".join(caught.value.__notes__)
    del caught
    assert not wrappers(model)
    assert_nothing_left(active)


def test_weights_and_modes_that_changed_before_backward_are_errors_and_no_gradients() -> None:
    model, step = blocks_step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with offload(model, recompute=["blocks.*"]):
        run_step(model, step)
        loss = step()
        optimizer.step()
        with pytest.raises(RuntimeError, match="a parameter of blocks.2, .* has been modified by an inplace operation"):
            loss.backward()
        loss = step()
        model.eval()
        with pytest.raises(RuntimeError, match="blocks.2 was switched between train"):
            loss.backward()
        loss = step()
        model.blocks[2].up.weight = nn.Parameter(torch.zeros(64, 16))
        with pytest.raises(RuntimeError, match="parameters of blocks.2 are others than in forward"):
            loss.backward()


class Failing(Block):
    error: type[BaseException] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(hidden)
        if self.error is not None:
            raise self.error("broken off")
        return hidden


@pytest.mark.parametrize("is_attached", [False, True], ids=["block", "attached"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_segments_forward_leaves_no_wrapper_and_no_hook(error: type[BaseException], is_attached: bool) -> None:
    model, step = blocks_step(Failing)
    expected = run_step(model, step)
    model.blocks[1].error = error
    active = offload(model, recompute=["blocks.*"])
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(pytest.raises(error, match="broken off"))
        if is_attached:
            active.attach()
            stack.callback(active.detach)
        else:
            stack.enter_context(active)
        step()
    # The traceback is still held here: old versions of checkpoint leave their hooks active as long.
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert caught.value is not None and not wrappers(model)
    del caught
    assert_nothing_left(active)
    model.blocks[1].error = None
    assert_same_gradients(run_step(model, step)[1], expected[1])
    with active:
        assert_same_gradients(run_step(model, step)[1], expected[1])
        assert len(wrappers(model)) == 3
    assert not wrappers(model)


def test_entering_twice_and_a_second_context_are_refused_and_the_first_goes_on() -> None:
    model, step = blocks_step()
    expected = run_step(model, step)
    active = offload(model, recompute=["blocks.*"])
    active.attach()
    with pytest.raises(RuntimeError, match="already active"), active:
        pass
    with pytest.raises(RuntimeError, match="blocks.0 is a segment of another offload_activations"):
        offload(model, recompute=["blocks.0"])
    assert_same_gradients(run_step(model, step)[1], expected[1])
    assert active.report().num_segment_rebuilds == 3
    active.detach()
    active.detach()
    assert not wrappers(model)
    assert_nothing_left(active)


def test_a_copy_made_inside_runs_plainly_and_does_not_reach_back() -> None:
    model, step = blocks_step()
    expected = run_step(model, step)[1]
    with offload(model, recompute=["blocks.*"]) as active:
        file = io.BytesIO()
        torch.save(model, file)
        copies = [copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
        copies.append(copy.deepcopy(copies[1]))
        for other in copies:
            with torch.no_grad():
                other.blocks[0].up.weight.mul_(2.0)
            run_step(other, lambda other=other: other(INPUTS).square().sum())
            assert not torch.equal(other.blocks[0].up.weight.grad, model.blocks[0].up.weight.grad)
        assert active.report().num_segment_rebuilds == 0
        assert b"overspill.activations.segments" not in file.getvalue(), "it can be read where there is no overspill"
        assert_same_gradients(run_step(model, step)[1], expected)


def test_the_trainer_trains_the_same_weights_with_segments(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))]

    def train(callbacks: list[Any]) -> dict[str, torch.Tensor]:
        model, _ = build_trained("llama")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
        assert not wrappers(model)
        return model.state_dict()

    expected = train([])
    callback = overspill.OffloadActivationsCallback(
        host_budget="16MiB", min_bytes=1, window=4096, amount="everything", recompute=["cheap", "model.layers.*"]
    )
    with pytest.warns(RuntimeWarning, match="is on the CPU"):
        assert_same_gradients(train([callback]), expected)
    assert callback.report().segments == ("model.layers.0", "model.layers.1") and callback.report().num_segment_rebuilds == 2 * 2 * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_segment_inside_of_somebody_elses_checkpoint_gives_the_same_bits(use_reentrant: bool) -> None:
    model, _ = blocks_step(lambda: Block(dropout=0.5))
    inputs = INPUTS.clone().requires_grad_()

    def step() -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, inputs * 1.0, use_reentrant=use_reentrant).square().sum()

    expected = run_step(model, step)
    with offload(model, recompute=["blocks.*"]) as active:
        assert_same_gradients(run_step(model, step)[1], expected[1])
    assert_nothing_left(active)
