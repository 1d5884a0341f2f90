"""The book of a graph: what is given, fixed, rebuilt and stored, and how what is stored leaves and comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overspill.activations.retaining import HIDDEN, Book, find_epsilons, shed

DEVICE_BYTES = 512


def leaves_in_one_slot() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two weights that lie beside each other in one slot."""
    slot = torch.randn(2 * 16 * 16)
    views = {"one": slot[:256].view(16, 16), "other": slot[256:].view(16, 16)}
    return slot, {name: view.detach().requires_grad_() for name, view in views.items()}


def forward(hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    wide = torch.nn.functional.silu(hidden @ weights["one"].t()) * (hidden @ weights["other"])
    return hidden + wide @ weights["one"]


def test_gradients_are_right_after_the_slot_was_refilled_elsewhere_and_the_leaves_were_shed() -> None:
    torch.manual_seed(0)
    slot, weights = leaves_in_one_slot()
    hidden = torch.randn(8, 16)
    leaf = hidden.clone().requires_grad_()
    expected = torch.autograd.grad(forward(leaf, weights).square().sum(), [leaf, *weights.values()])
    values = slot.clone()
    leaf = hidden.clone().requires_grad_()
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        output = forward(leaf, weights).square().sum()
    edge = torch.autograd.graph.get_gradient_edge(output)
    above = torch.ones_like(output)
    inputs = [leaf, *weights.values()]
    del output
    for tensor in inputs:
        shed(tensor)
    slot.fill_(float("nan"))
    elsewhere = torch.cat([torch.empty(7), values])[7:]
    again = {"one": elsewhere[:256].view(16, 16), "other": elsewhere[256:].view(16, 16)}
    with book.bound({HIDDEN: hidden, **again}):
        found = torch.autograd.grad([edge], inputs, [above])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_activations_that_left_and_came_back_give_the_same_gradients_and_without_them_backward_is_a_mistake() -> None:
    torch.manual_seed(0)
    _, weights = leaves_in_one_slot()
    hidden = torch.randn(8, 16)
    given = {HIDDEN: hidden, **weights}

    def run() -> tuple[Book, torch.Tensor, list[torch.Tensor]]:
        leaf = hidden.clone().requires_grad_()
        book = Book({**given, HIDDEN: leaf}, (), epsilons={})
        with book.saving():
            return book, forward(leaf, weights).sum(), [leaf, *weights.values()]

    book, output, inputs = run()
    with book.bound(given):
        expected = torch.autograd.grad(output, inputs)
    book, output, inputs = run()
    assert book.lay_out(10**9) == book.stored_bytes > 0 and book.rebuilt_bytes > 0
    away = torch.empty(book.stored_bytes, dtype=torch.uint8)
    book.copy_out(away)
    book.let_go()
    assert all(item.payload is None for item in book.stored)
    back = away.clone()
    book.land(back)
    with book.bound(given):
        found = torch.autograd.grad(output, inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    book, output, inputs = run()
    book.lay_out(10**9)
    book.let_go()
    with book.bound(given), pytest.raises(AssertionError, match="wanted and not on the device"):
        torch.autograd.grad(output, inputs)


def test_what_does_not_fit_its_copy_stays() -> None:
    _, weights = leaves_in_one_slot()
    leaf = torch.randn(8, 16).requires_grad_()
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        output = forward(leaf, weights).sum()
    sizes = [item.aligned_bytes for item in book.stored]
    assert len(sizes) >= 2 and book.lay_out(sizes[0]) == sizes[0]
    book.let_go()
    assert [item.payload is None for item in book.stored] == [True] + [False] * (len(sizes) - 1)
    del output


def test_a_norm_in_fp32_of_a_sum_in_bf16_stores_the_sum_in_bf16() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.bfloat16).requires_grad_()
    hidden = torch.randn(32, 64, dtype=torch.bfloat16)

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)

    def block(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + norm(hidden) @ weight
        return hidden + norm(hidden) @ weight

    leaf = hidden.clone().requires_grad_()
    expected = torch.autograd.grad(block(leaf).float().square().sum(), [leaf, weight])
    leaf = hidden.clone().requires_grad_()
    book = Book({HIDDEN: leaf, "weight": weight}, (), epsilons={})
    with book.saving():
        output = block(leaf)
    sums = [item for item in book.stored if item.num_bytes >= hidden.nbytes]
    assert [item.num_bytes for item in sums] == [hidden.nbytes], "one sum in bf16; the boundary's own norm stores nothing of this size"
    with book.bound({HIDDEN: hidden, "weight": weight}):
        found = torch.autograd.grad(output.float().square().sum(), [leaf, weight])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_change_in_place_of_what_was_saved_is_an_error_as_in_plain_autograd() -> None:
    _, weights = leaves_in_one_slot()
    leaf = torch.randn(8, 16).requires_grad_()
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        wide = (leaf @ weights["one"]).exp()
        output = wide.sum() + (wide * 2).sum()
    with torch.no_grad():
        wide.add_(1)
    with book.bound({HIDDEN: leaf, **weights}), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, [leaf])
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), book.saving():
        leaf @ weights["one"]
        with torch.no_grad():
            weights["one"].add_(1)


def test_a_view_over_several_weights_of_a_slot_is_refused() -> None:
    slot, weights = leaves_in_one_slot()
    leaf = torch.randn(8, 16).requires_grad_()
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        leaf @ slot.view(16, 32)
    assert book.refusal is not None and "memory of its weights" in book.refusal


def test_layer_norms_are_rebuilt_by_their_own_epsilon_and_not_where_one_weight_has_two() -> None:
    norms = nn.ModuleList([nn.LayerNorm(8, eps=1e-3), nn.LayerNorm(8, eps=1e-5)])
    parameters = dict(norms.named_parameters())
    assert find_epsilons(norms, parameters) == {"0.weight": 1e-3, "1.weight": 1e-5}
    norms[1].weight = norms[0].weight
    assert find_epsilons(norms, parameters) == {}
