"""Gradients with saved tensors moved are those of plain PyTorch, to the bit: every kind of model, tier and way to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_nets import NAMES, assert_same_gradients, build, offload, run_step, settings_of
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("tier", ["host", "ssd"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_plain_pytorch_bitwise(name: str, tier: str, is_autocast: bool, tmp_path: Path) -> None:
    """With 256 KiB of host memory and staging for a quarter of it, most of the tensors go to the SSD and wait for each other."""
    model, step = build(name)
    expected = run_step(model, step, is_autocast=is_autocast)
    settings = settings_of(tier, tmp_path)
    model, step = build(name)  # running statistics as before
    with offload(model, **settings) as active:
        found = run_step(model, step, is_autocast=is_autocast)
        report = active.report()
    assert found[0] == expected[0]
    assert_same_gradients(found[1], expected[1])
    assert report.num_live == 0 and report.kept_bytes == 0
    assert report.left_alone.get("cast_of_parameter" if is_autocast else "parameter", 0) > 0
    assert report.host_bytes + report.ssd_bytes == report.packed_bytes > report.forwarded_bytes
    if tier == "ssd" and name not in ("conv", "shared"):
        assert report.ssd_bytes > 0


@pytest.mark.parametrize("amount", ["adaptive", "ssdtrain", "nothing"])
def test_six_rounds_of_every_amount_give_the_same_bits(amount: str, tmp_path: Path) -> None:
    model, step = build("llama")
    expected = run_step(model, step)
    with offload(model, amount=amount, host_budget="512KiB", ssd_dir=tmp_path / "ssd", ssd_budget="16MiB") as active:
        for _ in range(6):
            found = run_step(model, step)
            assert found[0] == expected[0]
            assert_same_gradients(found[1], expected[1])
    rounds = active.report().rounds
    assert [item.is_planned for item in rounds] == [False, False, *[amount in ("adaptive", "ssdtrain")] * 4]
    assert len({item.packed_bytes for item in rounds}) == 1
    if amount == "nothing":
        assert active.report().kept_bytes == active.report().packed_bytes


def test_autocast_with_fp32_parameters_packs_the_bytes_of_a_bf16_model() -> None:
    """Autocast makes a cast of every weight, which autograd saves; it is no activation."""

    def packed(dtype: torch.dtype, is_frozen: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
        if is_frozen:
            model[0].requires_grad_(False), model[2].requires_grad_(False)
        inputs = torch.randn(4, 6, 24, dtype=torch.bfloat16, requires_grad=True)
        with offload(model) as active, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            model(inputs).float().sum().backward()
        return active.report().packed_bytes

    for is_frozen in (False, True):
        assert packed(torch.float32, is_frozen) == packed(torch.bfloat16, is_frozen) > 0


def test_beyond_a_bf16_models_bytes_autocast_packs_what_it_computes_in_fp32_itself() -> None:
    """GPT-2's hidden states between blocks and its norms' statistics: fp32 there, bf16 in a bf16 model. All else is the same bytes."""

    def packed_and_fp32(dtype: torch.dtype) -> tuple[int, int]:
        model, step = build("gpt2")
        model.to(dtype)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        fp32: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype == torch.float32 and tensor.untyped_storage().data_ptr() not in weights:
                fp32[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
            return tensor

        is_autocast = dtype == torch.float32
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run_step(model, step, is_autocast=is_autocast)
        with offload(model) as active:
            run_step(model, step, is_autocast=is_autocast)
            return active.report().packed_bytes, sum(tensor.untyped_storage().nbytes() for tensor in fp32.values())

    (autocast, fp32_of_autocast), (bf16, fp32_of_bf16) = packed_and_fp32(torch.float32), packed_and_fp32(torch.bfloat16)
    assert autocast > bf16
    assert autocast - bf16 == (fp32_of_autocast - fp32_of_bf16) / 2


def test_a_graph_that_is_kept_can_be_run_backward_again_and_again() -> None:
    model, step = build("gpt2")
    torch.manual_seed(1)
    loss = step()
    for _ in range(3):
        loss.backward(retain_graph=True)
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    del loss
    model.zero_grad()
    with offload(model) as active:
        torch.manual_seed(1)
        loss = step()
        for _ in range(3):
            loss.backward(retain_graph=True)
            held = active.report()
            assert held.num_live > 0 and held.host_used_bytes > 0
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        del loss
        assert active.report().num_live == 0
    assert_same_gradients(found, expected)


def test_between_two_backwards_of_one_graph_the_device_holds_little() -> None:
    """What the first backward fetched is let go at its end; what never left stays."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(20)])
    with offload(model) as active:
        loss = model(torch.randn(64, 32)).sum()
        mover = active._cache().mover
        loss.backward(retain_graph=True)
        assert mover.device_bytes <= 4 * 64 * 32 * 4, "of 20 records those that were still on their way out"
        loss.backward()
        del loss
        assert mover.device_bytes == 0


def test_double_backward_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.randn(5, 8, requires_grad=True)

    def penalised() -> list[torch.Tensor]:
        model.zero_grad()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        (slope.square().sum() + model(inputs).square().sum()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = penalised()
    with offload(model) as active:
        found = penalised()
        assert active.report().left_alone["in_backward"] > 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("settings", [{}, {"storage": "bf16"}, {"amount": "nothing"}, {"amount": "nothing", "recompute": "cheap"}])
@pytest.mark.parametrize("behind", [lambda hidden: hidden, nn.functional.silu, lambda hidden: hidden.to(torch.bfloat16).float(), torch.t])
def test_a_change_in_place_between_two_backwards_of_second_order_raises(
    behind: Callable[[torch.Tensor], torch.Tensor], settings: dict[str, str]
) -> None:
    """What the second graph saves is what was unpacked for the first backward, and counts the changes of what was packed."""
    torch.manual_seed(0)
    linear, inputs = nn.Linear(64, 64), torch.randn(64, 64)

    def step(*, is_changed: bool, is_alive: bool = True) -> torch.Tensor:
        linear.zero_grad()
        hidden = behind(linear(inputs))
        (slope,) = torch.autograd.grad(hidden.pow(3).sum(), hidden, create_graph=True)
        if is_changed:
            with torch.no_grad():
                hidden.mul_(2)
        if not is_alive:
            del hidden
        slope.square().sum().backward()
        assert linear.weight.grad is not None
        return linear.weight.grad.clone()

    expected = [step(is_changed=False, is_alive=is_alive) for is_alive in (True, False)]
    with offload(linear, **settings) as active:
        for _ in range(6):
            found = [step(is_changed=False, is_alive=is_alive) for is_alive in (True, False)]
            if "storage" not in settings:
                assert all(map(torch.equal, found, expected))
            for is_alive in (True, False):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    step(is_changed=True, is_alive=is_alive)
        assert active.report().num_live == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_segments_inputs_move_and_what_it_saves_again_stays(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4))
    inputs = torch.randn(8, 16, requires_grad=True)

    def step() -> torch.Tensor:
        hidden = inputs * 1.0
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=use_reentrant)
        return hidden.square().sum()

    expected = run_step(blocks, step)
    with offload(blocks) as active:
        found = run_step(blocks, step)
    assert_same_gradients(found[1], expected[1])
    report = active.report()
    assert report.packed_bytes <= 5 * 8 * 16 * 4 + 64, "only borders of segments were packed in forward"
    if use_reentrant:
        assert report.left_alone["in_backward"] > 0


class Block(nn.Module):
    """Not an `nn.Sequential`, which dynamo leaves to eager PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Broken(nn.Module):
    """A block that is compiled in two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.linear(hidden)).sin()
        torch._dynamo.graph_break()
        return hidden.exp() * hidden


def test_of_hooks_that_compiled_blocks_call_nothing_is_compiled() -> None:
    """As many frames as without hooks, whatever the shapes; and the hooks run as they are."""
    from torch._dynamo.utils import counters

    found = []
    for is_inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Broken(), Broken())
        for block in model:
            block.compile(backend="aot_eager")
        torch._dynamo.reset()
        counters.clear()
        with offload(model, min_bytes=1, amount="everything") if is_inside else contextlib.nullcontext() as active:
            for rows in (3, 4, 5, 4):
                model(torch.ones(rows, 8)).sum().backward()
        assert active is None or active.report().host_bytes > 0
        found.append((dict(counters["frames"]), [parameter.grad for parameter in model.parameters()]))
    (plain, wanted), (own, gradients) = found
    assert plain == own and plain["total"] > 0
    assert all(torch.equal(one, other) for one, other in zip(wanted, gradients, strict=True))


def test_compiled_blocks_give_the_bits_of_compiled_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    for block in model:
        block.compile(backend="aot_eager")
    inputs = torch.randn(8, 16)

    def step() -> torch.Tensor:
        return model(inputs).square().sum()

    expected = run_step(model, step)
    with offload(model) as active:
        for _ in range(2):
            found = run_step(model, step)
            assert_same_gradients(found[1], expected[1])
    assert active.report().host_bytes > 0 and active.report().left_alone["parameter"] > 0


def test_gradient_accumulation_adds_up_to_the_same_bits() -> None:
    model, step = build("llama")

    def accumulate() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        for _ in range(3):
            (step() / 3).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = accumulate()
    with offload(model):
        assert_same_gradients(accumulate(), expected)
