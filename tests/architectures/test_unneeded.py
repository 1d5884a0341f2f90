"""Products that a recomputation leaves out: the right ones, with the bits of the whole recomputation, and none that a gradient reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from overspill.huggingface.unneeded import UnneededProducts


class Mlp(nn.Module):
    """Residual block; `last` is applied to the second product, which decides whether that is needed."""

    def __init__(self, last: Callable[[Tensor], Tensor], *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)
        self.last = last
        self.norm = nn.LayerNorm(8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.last(self.down(torch.tanh(self.up(hidden))))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.one(torch.sin(hidden)) + self.two(torch.cos(hidden))


def differentiate(block: nn.Module, hidden: Tensor) -> Sequence[Tensor | None]:
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = block(leaf)
    return torch.autograd.grad([output], [leaf, *block.parameters()], [torch.ones_like(hidden) * 0.3], allow_unused=True)


def decide(block: nn.Module) -> tuple[UnneededProducts, Tensor]:
    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    unneeded.decide("a", lambda: differentiate(block, hidden))
    return unneeded, hidden


@pytest.mark.parametrize("bias", [False, True])
def test_the_last_product_is_left_out_with_the_same_gradients_and_the_forward_is_whole(bias: bool) -> None:
    block = Mlp(nn.Identity(), bias=bias)
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    before, output = differentiate(block, hidden), block(hidden).detach()
    unneeded, hidden = decide(block)
    assert unneeded.is_decided("a") and unneeded.left_out == {"a": ("down",)}
    assert block(hidden.requires_grad_()).detach().sub(output).abs().max() > 0.01, "it is still made"
    for one, other in zip(before, differentiate(block, hidden), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(block(hidden), output)


def test_both_ends_of_a_parallel_block_are_left_out() -> None:
    block = Parallel()
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    before = differentiate(block, hidden)
    unneeded, _ = decide(block)
    assert set(unneeded.left_out["a"]) == {"one", "two"}
    assert all(torch.equal(one, other) for one, other in zip(before, differentiate(block, hidden), strict=True))


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(nn.LayerNorm(8), id="a norm after it saves it"),
        pytest.param(torch.relu, id="a rectifier saves its sign, which hides NaN"),
        pytest.param(lambda x: x * torch.sigmoid(x), id="an activation saves it"),
        pytest.param(lambda x: x.clamp(-0.1, 0.1), id="a clamp saves a mask"),
        pytest.param(lambda x: x if bool(x.sum() > 1e9) else x * x, id="code that looks at it"),
    ],
)
def test_a_product_that_a_gradient_reads_is_made(last: Callable[[Tensor], Tensor]) -> None:
    block = Mlp(last)
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    before = differentiate(block, hidden)
    unneeded, _ = decide(block)
    assert unneeded.left_out == {"a": ()}
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(before, differentiate(block, hidden), strict=True))


def test_all_blocks_of_a_kind_leave_out_what_one_of_them_was_tried_for() -> None:
    blocks = {"a": Mlp(nn.Identity()), "b": Mlp(nn.Identity()), "c": Mlp(torch.relu)}
    unneeded = UnneededProducts(blocks, {"a": "a", "b": "a", "c": "c"})
    hidden = torch.randn(2, 3, 8)
    unneeded.decide("b", lambda: differentiate(blocks["b"], hidden))
    assert unneeded.is_decided("a") and not unneeded.is_decided("c")
    assert all("forward" in vars(blocks[name].down) for name in "ab") and "forward" not in vars(blocks["c"].down)


def test_gradients_that_show_nothing_decide_nothing() -> None:
    block = Mlp(nn.Identity())
    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    hidden = torch.randn(2, 3, 8)
    unneeded.decide("a", lambda: [torch.zeros_like(item) for item in differentiate(block, hidden) if item is not None])
    assert not unneeded.is_decided("a")
    unneeded.decide("a", lambda: [item * float("inf") for item in differentiate(block, hidden) if item is not None])
    assert not unneeded.is_decided("a") and "forward" not in vars(block.down)


def test_an_interrupted_trial_leaves_nothing_on_the_block_and_too_little_memory_leaves_it_whole() -> None:
    block = Mlp(nn.Identity())
    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    hidden = torch.randn(2, 3, 8)
    runs = 0

    def fail(error: BaseException) -> Sequence[Tensor | None]:
        nonlocal runs
        runs += 1
        if runs == 2:
            raise error
        return differentiate(block, hidden)

    with pytest.raises(KeyboardInterrupt):
        unneeded.decide("a", lambda: fail(KeyboardInterrupt()))
    assert "forward" not in vars(block.down) and not unneeded.is_decided("a")
    runs = 0
    unneeded.decide("a", lambda: fail(torch.OutOfMemoryError("none")))
    assert unneeded.left_out == {"a": ()} and "forward" not in vars(block.down)
