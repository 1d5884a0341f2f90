"""What follows cheaply from other saved tensors is not stored, and rebuilt to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_nets import NAMES, assert_same_gradients, build, offload, run_step, settings_of
from torch import nn


@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("tier", ["host", "ssd"])
@pytest.mark.parametrize("name", NAMES)
def test_rebuilt_tensors_give_the_gradients_of_plain_pytorch_bitwise(name: str, tier: str, is_autocast: bool, tmp_path: Path) -> None:
    model, step = build(name)
    expected = run_step(model, step, is_autocast=is_autocast)
    settings = settings_of(tier, tmp_path)
    model, step = build(name)
    with offload(model, **settings) as active:
        run_step(model, step, is_autocast=is_autocast)
        stored = active.report().packed_bytes
    model, step = build(name)
    with offload(model, recompute="cheap", **settings) as active:
        found = run_step(model, step, is_autocast=is_autocast)
    report = active.report()
    assert found[0] == expected[0]
    assert_same_gradients(found[1], expected[1])
    assert report.packed_bytes + report.rebuilt_bytes <= stored * 1.001 and report.num_live == 0
    if name in ("gpt2", "llama", "bert", "t5"):
        assert report.rebuilt_bytes > 0.08 * stored, (report.rebuilt_bytes, stored)


class Gated(nn.Module):
    """Llama's MLP: of 4 wide tensors that are saved, 2 follow from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


@pytest.mark.parametrize("dims", [(32, 16), (4, 8, 16)])
def test_a_gated_mlp_stores_gate_and_up_and_rebuilds_their_product(dims: tuple[int, ...]) -> None:
    """The linear saves the product as a view of two dimensions."""
    torch.manual_seed(0)
    model, inputs = Gated(), torch.randn(dims)
    wide = 32 * 64 * 4
    expected = run_step(model, lambda: model(inputs).sum())
    with offload(model, recompute="cheap") as active:
        found = run_step(model, lambda: model(inputs).sum())
    assert_same_gradients(found[1], expected[1])
    assert active.report().rebuilt_bytes == 2 * wide
    assert active.report().packed_bytes == 2 * wide + 32 * 16 * 4


def test_a_layer_norms_result_is_rebuilt_from_its_input_and_its_modules_epsilon() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32, eps=1e-3), nn.Linear(32, 8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8))
    inputs = torch.randn(6, 32)
    expected = run_step(model, lambda: model(inputs).square().sum())
    with offload(model, recompute="cheap") as active:
        found = run_step(model, lambda: model(inputs).square().sum())
    assert_same_gradients(found[1], expected[1])
    assert active.report().rebuilt_bytes == 6 * 32 * 4 + 6 * 8 * 4
    shared = nn.LayerNorm(32, eps=1e-3)
    other = nn.LayerNorm(32, eps=1e-5)
    other.weight = shared.weight
    model = nn.Sequential(shared, nn.Linear(32, 32), other, nn.Linear(32, 8))
    with offload(model, recompute="cheap") as active:
        run_step(model, lambda: model(inputs).sum())
    assert active.report().rebuilt_bytes == 0, "one weight with two epsilons says nothing"


def test_what_several_ops_save_is_rebuilt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(32, 8) for _ in range(3))
    inputs = torch.randn(64, 32, requires_grad=True)
    runs: list[int] = []
    silu = nn.functional.silu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return silu(tensor)

    with offload(heads, recompute="cheap") as active:
        hidden = silu(inputs * 2.0)
        monkeypatch.setattr(nn.functional, "silu", counted)
        loss = sum(head(hidden).sum() for head in heads)
        del hidden
        assert active.report().rebuilt_bytes == 64 * 32 * 4
        loss.backward(retain_graph=True)
        first = inputs.grad.clone()
        assert len(runs) == 1
        inputs.grad = None
        loss.backward()
        assert len(runs) == 2, "once more for the second backward: between the two nothing is held"
        assert torch.equal(inputs.grad, first)


def test_a_frozen_factor_leaves_its_product_to_be_stored() -> None:
    """Autograd saves only what it needs: without a gradient for the weight the other factor is not there."""
    weight = nn.Parameter(torch.randn(64), requires_grad=False)
    layer = nn.Linear(64, 8)
    inputs = torch.randn(32, 64, requires_grad=True)
    with offload(layer, recompute="cheap") as active:
        layer(torch.tanh(inputs) * weight).sum().backward()
        assert active.report().rebuilt_bytes == 0
    found = inputs.grad.clone()
    inputs.grad = None
    layer(torch.tanh(inputs) * weight).sum().backward()
    assert torch.equal(found, inputs.grad)


@pytest.mark.parametrize("which", ["result", "input"])
def test_a_change_in_place_of_a_result_or_an_input_is_an_error(which: str) -> None:
    layer = nn.Linear(64, 8)
    inputs = torch.randn(32, 64, requires_grad=True)
    with offload(layer, recompute="cheap"):
        source = inputs * 1.0
        result = nn.functional.silu(source)
        loss = layer(result).sum()
        with torch.no_grad():
            (result if which == "result" else source).mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_result_that_was_changed_before_it_was_saved_is_what_is_saved() -> None:
    """The graph knows the change, and so does the recipe."""
    layer = nn.Linear(64, 8)
    inputs, factor = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)

    def step() -> torch.Tensor:
        inputs.grad = factor.grad = None
        hidden = nn.functional.gelu(inputs * 1.0).mul_(factor)
        return layer(hidden.add_(1.0) * factor).sum() + layer(hidden[:, ::1].t().contiguous().t()).sum()

    expected = run_step(layer, step)[1], inputs.grad, factor.grad
    with offload(layer, recompute="cheap"):
        found = run_step(layer, step)[1], inputs.grad, factor.grad
    assert_same_gradients(found[0], expected[0])
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


@pytest.mark.parametrize("how", ["no_grad", "detach", "view"])
@pytest.mark.parametrize("op", ["product", "silu", "gelu", "norm"])
def test_a_result_that_was_changed_without_a_gradient_before_it_was_saved_is_what_is_saved(op: str, how: str) -> None:
    """The graph does not know that change: its node is the same, only the version tells."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": nn.LayerNorm(64), "linear": nn.Linear(64, 8)})
    inputs, factor = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    source = {
        "product": lambda: inputs * factor,
        "silu": lambda: nn.functional.silu(inputs * 1.0),
        "gelu": lambda: nn.functional.gelu(inputs * 1.0),
        "norm": lambda: model["norm"](inputs * 1.0),
    }[op]

    def step() -> torch.Tensor:
        result = source()
        if how == "detach":
            result.detach().clamp_(max=0.1)
        with torch.no_grad():
            if how == "no_grad":
                result.mul_(2.0)
            if how == "view":
                result[3:5].zero_()
        return model["linear"](result).square().sum()

    expected = run_step(model, step)[1]
    with offload(model, recompute="cheap"):
        assert_same_gradients(run_step(model, step)[1], expected)


class OwnNorm(nn.LayerNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(hidden, self.normalized_shape, self.weight, self.bias, 1000 * self.eps)


def test_a_layer_norm_with_another_epsilon_than_its_modules_is_stored_or_an_error_and_never_a_wrong_gradient() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 32) / 100
    model = nn.Sequential(OwnNorm(32), nn.Linear(32, 8))
    expected = run_step(model, lambda: model(inputs).square().sum())[1]
    with offload(model, recompute="cheap") as active:
        assert_same_gradients(run_step(model, lambda: model(inputs).square().sum())[1], expected)
    assert active.report().rebuilt_bytes == 0, "a forward of its own may do anything"
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8))

    def step() -> torch.Tensor:
        return model[1](nn.functional.layer_norm(inputs, (32,), model[0].weight, model[0].bias, 1e-3)).square().sum()

    with offload(model, recompute="cheap"), pytest.raises(RuntimeError, match="another epsilon than its module's 1e-05"):
        run_step(model, step)
    with offload(model, recompute="cheap"):  # what is not a number is not another epsilon
        inputs[2, 3] = float("nan")
        assert run_step(model, lambda: model(inputs).square().sum())[1]["1.weight"].isnan().all()


def test_strides_of_a_result_are_those_that_were_saved() -> None:
    layer = nn.Linear(8, 4)
    inputs = torch.randn(8, 6, requires_grad=True)

    def step() -> torch.Tensor:
        inputs.grad = None
        return layer(nn.functional.silu(inputs.t() * 1.0)).square().sum()

    expected = run_step(layer, step)[1], inputs.grad
    with offload(layer, recompute="cheap") as active:
        found = run_step(layer, step)[1], inputs.grad
    assert active.report().rebuilt_bytes == 8 * 6 * 4
    assert_same_gradients(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_an_op_that_gives_something_else_is_an_error_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 8)
    inputs = torch.randn(32, 64, requires_grad=True)
    with offload(layer, recompute="cheap") as active:
        rebuilder = active._cache().rebuilder
        direct = rebuilder._direct_recipe

        def wrong(node, num_bytes):  # type: ignore[no-untyped-def]
            recipe = direct(node, num_bytes)
            return recipe and recipe._replace(run=lambda tensor: tensor[:3])

        monkeypatch.setattr(rebuilder, "_direct_recipe", wrong)
        loss = layer(nn.functional.silu(inputs)).sum()
        with pytest.raises(RuntimeError, match=r"shape \(32, 64\) on cpu when it was saved, and rebuilding it gave .* \(3, 64\)"):
            loss.backward()


def test_double_backward_goes_through_what_was_rebuilt() -> None:
    torch.manual_seed(0)
    model, inputs = Gated(), torch.randn(5, 16, requires_grad=True)

    def penalised() -> list[torch.Tensor]:
        model.zero_grad()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = penalised()
    with offload(model, recompute="cheap"):
        assert all(map(torch.equal, penalised(), expected))
