"""Products that a recomputation leaves out: the right ones, with the bits of the whole recomputation, and none that a gradient reads."""

from __future__ import annotations

import itertools
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


MIX = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
"""Fixed: gradients through it do not depend on what is multiplied."""


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


class Experts(nn.Module):
    """A router, and a loop over experts that also runs those without tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Parameter(torch.randn(2, 8))
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def chosen(self, rows: Tensor) -> Tensor:
        return (rows @ self.router.T).argmax(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, 8)
        weights, chosen = (rows @ self.router.T).softmax(-1), self.chosen(rows)
        out = rows
        for index, expert in enumerate(self.experts):
            mine = torch.where(chosen == index)[0]
            out = out.index_add(0, mine, expert(rows[mine]) * weights[mine, index, None])
        return out.reshape(hidden.shape)


def test_an_expert_that_had_no_tokens_in_the_trial_is_made_when_it_has_some() -> None:
    block = Experts()
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    only_first = rows[block.chosen(rows) == 0][None]
    expected = differentiate(block, rows[None])
    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    unneeded.decide("a", lambda: differentiate(block, only_first))
    assert unneeded.left_out == {"a": ()}
    for one, other in zip(expected, differentiate(block, rows[None]), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize(
    ("last", "shift"),
    [
        pytest.param(torch.relu, 10.0, id="a rectifier that lets all pass, and would let no zero pass"),
        pytest.param(lambda x: torch.maximum(x, torch.tensor(0.5)), 10.0, id="a floor that nothing reaches"),
        pytest.param(lambda x: torch.where(x > 3.0, 2 * x, x), 0.0, id="a threshold that nothing reaches"),
        pytest.param(
            lambda x: torch.where(x @ MIX > 50.0, x @ MIX * 2, x @ MIX), 0.0, id="a threshold behind sums that make NaN of infinity"
        ),
    ],
)
def test_a_comparison_that_shows_nothing_in_the_trials_batch_is_seen(last: Callable[[Tensor], Tensor], shift: float) -> None:
    block = Mlp(last, bias=True)
    with torch.no_grad():
        block.down.bias.add_(shift)
    unneeded, hidden = decide(block)
    assert unneeded.left_out == {"a": ()}


@pytest.mark.parametrize(
    "last", [torch.relu, lambda x: 0.01 * torch.relu(x), lambda x: x.sort(-1).values], ids=["mask", "weak mask", "order"]
)
def test_a_gradient_that_changes_its_direction_and_not_its_size_is_seen(last: Callable[[Tensor], Tensor]) -> None:
    """Where only adapters elsewhere are trained there is the gradient of the hidden states alone, mostly that of the residual stream."""
    block = Mlp(last).requires_grad_(False)
    hidden = torch.randn(64, 16, 8, generator=torch.Generator().manual_seed(1))
    expected = differentiate_by_hidden(block, hidden)
    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    unneeded.decide("a", lambda: differentiate_by_hidden(block, hidden))
    assert unneeded.left_out == {"a": ()}
    assert torch.equal(expected[0], differentiate_by_hidden(block, hidden)[0])


def differentiate_by_hidden(block: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = block(leaf)
    return torch.autograd.grad([output], [leaf], [torch.linspace(0.1, 1.0, output.numel()).view(output.shape)])


def test_a_block_that_never_gives_the_same_bits_twice_is_held_to_a_tolerance() -> None:
    block = Mlp(nn.Identity())
    noise = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

    def noisy() -> Sequence[Tensor | None]:
        found = differentiate(block, hidden)
        return [None if item is None else item * (1 + 1e-3 * torch.randn(item.shape, generator=noise)) for item in found]

    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    unneeded.decide("a", noisy)
    assert unneeded.left_out == {"a": ("down",)}


@pytest.mark.parametrize(("last", "left_out"), [(nn.Identity(), ("down",)), (torch.relu, ())], ids=["unread", "read"])
def test_a_gradient_that_is_mostly_noise_is_held_to_its_own_noise_and_hides_nothing_in_others(
    last: Callable[[Tensor], Tensor], left_out: tuple[str, ...]
) -> None:
    """Attention's gradients by queries and keys, early in training: little but rounding, and another one each time."""
    block = Mlp(last)
    noise = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

    def noisy() -> Sequence[Tensor | None]:
        found = list(differentiate(block, hidden))
        assert found[1] is not None
        found[1] = found[1] * (1 + 0.1 * torch.randn(found[1].shape, generator=noise))
        return found

    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    unneeded.decide("a", noisy)
    assert unneeded.left_out == {"a": left_out}


def test_bits_that_are_the_same_by_chance_are_not_asked_for_where_nobody_promises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU two runs often agree in all that is looked at, and the next ones do not."""
    block, calls = Mlp(nn.Identity()), itertools.count()
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

    def lucky() -> Sequence[Tensor | None]:
        off = 1e-4 if next(calls) > 2 else 0.0
        return [None if item is None else item * (1 + off) for item in differentiate(block, hidden)]

    monkeypatch.setattr("overspill.huggingface.unneeded._repeats", lambda device: False)
    unneeded = UnneededProducts({"a": block}, {"a": "a"})
    unneeded.decide("a", lucky)
    assert unneeded.left_out == {"a": ("down",)}
