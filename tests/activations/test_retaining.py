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
    assert book.lay_out(10**9) == book.stored_bytes > 0 and book.moved_bytes > 0
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


class SavesViews(torch.autograd.Function):
    """Saves a tensor, and views of it: turned, a part, and its bits in another dtype; the gradient depends on all of them."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor, tensor.t(), tensor[1:3, 2:], tensor.view(torch.int16))
        return tensor * 1.0

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> torch.Tensor:
        tensor, turned, part, bits = ctx.saved_tensors
        return gradients[0] * (tensor + turned.t() * part.sum() + bits[:, ::2] % 7)


def test_views_of_a_stored_tensor_are_cut_from_its_bytes_at_home_and_after_they_came_back() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(8, 16)

    def run(leaf: torch.Tensor) -> torch.Tensor:
        return SavesViews.apply(leaf.exp())

    leaf = hidden.clone().requires_grad_()
    expected = torch.autograd.grad(run(leaf).sum(), [leaf])[0]
    for leaves in (False, True):
        leaf = hidden.clone().requires_grad_()
        book = Book({HIDDEN: leaf}, (), epsilons={})
        with book.saving():
            output = run(leaf).sum()
        assert [item.num_bytes for item in book.stored] == [hidden.nbytes]
        if leaves:
            book.lay_out(10**9)
            back = torch.empty(DEVICE_BYTES + book.stored_bytes, dtype=torch.uint8)[DEVICE_BYTES:]
            book.copy_out(back)
            book.let_go()
            assert book.stored[0].payload is None
            book.land(back)
        with book.bound({HIDDEN: hidden}):
            assert torch.equal(torch.autograd.grad(output, [leaf])[0], expected)


def test_what_was_changed_before_it_left_is_an_error_after_it_came_back() -> None:
    leaf = torch.randn(8, 16).requires_grad_()
    book = Book({HIDDEN: leaf}, (), epsilons={})
    with book.saving():
        wide = leaf.exp()
        output = wide.sum()
    book.lay_out(10**9)
    back = torch.empty(book.stored_bytes, dtype=torch.uint8)
    with torch.no_grad():
        wide.add_(1)
    book.copy_out(back)
    book.let_go()
    book.land(back)
    with book.bound({HIDDEN: leaf}), pytest.raises(RuntimeError, match=r"float32 of shape \(8, 16\)\) has been modified by an inplace"):
        torch.autograd.grad(output, [leaf])


def test_views_of_one_result_share_its_recipe_and_what_has_other_counts_of_changes_is_stored() -> None:
    _, weights = leaves_in_one_slot()
    leaf = torch.randn(8, 16).requires_grad_()
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        product = torch.nn.functional.silu(leaf) * torch.nn.functional.silu(leaf * 2)
        output = product @ weights["one"] + product.view(2, 4, 16).flatten(0, 1) @ weights["other"]
        one_recipe = book.num_rebuilt, book.stored_bytes
        output = output + product.detach() @ weights["one"]
        assert (book.num_rebuilt, book.stored_bytes) == one_recipe, "a detached alias shares the count"
        output = output + product.data @ weights["one"]
        assert (book.num_rebuilt, book.stored_bytes) == (one_recipe[0], one_recipe[1] + DEVICE_BYTES)
    with book.bound({HIDDEN: leaf, **weights}):
        found = torch.autograd.grad(output.sum(), [leaf, *weights.values()], retain_graph=True)
    for again in range(2):
        with book.bound({HIDDEN: leaf, **weights}):
            repeated = torch.autograd.grad(output.sum(), [leaf, *weights.values()], retain_graph=not again)
        assert all(torch.equal(one, other) for one, other in zip(found, repeated, strict=True))


def test_a_result_that_was_changed_between_two_ops_that_save_it_is_not_one_result_and_its_first_value_is_an_error() -> None:
    _, weights = leaves_in_one_slot()
    leaf = torch.randn(8, 16).requires_grad_()
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        product = torch.nn.functional.silu(leaf)
        output = product @ weights["one"]
        with torch.no_grad():
            product.add_(1)
        output = output + product @ weights["other"]
    with book.bound({HIDDEN: leaf, **weights}), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), [weights["one"], weights["other"]])


@pytest.mark.parametrize("how", ["a graph of its own", "autocast"])
def test_a_backward_that_makes_a_graph_or_runs_in_autocast_gives_the_gradients_of_plain_autograd(how: str) -> None:
    torch.manual_seed(0)
    _, weights = leaves_in_one_slot()
    leaf = torch.randn(8, 16).requires_grad_()
    inputs = [leaf, *weights.values()]

    def differentiate(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return torch.autograd.grad(output, inputs, create_graph=how != "autocast")

    expected = differentiate(forward(leaf, weights).sum())
    book = Book({HIDDEN: leaf, **weights}, (), epsilons={})
    with book.saving():
        output = forward(leaf, weights).sum()
    assert book.num_rebuilt
    with book.bound({HIDDEN: leaf, **weights}):
        found = differentiate(output)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
