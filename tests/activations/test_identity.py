"""A saved tensor is known by its storage and its place in it: what is the same is moved once, what only has the same address is not."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import NAMES, assert_same_gradients, build, offload
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu

from overspill.activations import OffloadActivations
from overspill.activations.identity import Geometry, ParameterStorages, VersionWatch, byte_span, bytes_of


@pytest.fixture
def active() -> Iterator[OffloadActivations]:
    with offload(nn.Linear(2, 2)) as context:
        yield context


class Keep(torch.autograd.Function):
    """Saves its inputs as they are; its gradient is their sum of products with what was saved."""

    @staticmethod
    def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*tensors)
        return sum(tensor.double().sum() for tensor in tensors) * torch.ones((), requires_grad=True)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        Keep.seen = ctx.saved_tensors
        return tuple(torch.zeros_like(tensor) if tensor.is_floating_point() else None for tensor in ctx.saved_tensors)


def saved_and_back(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What backward gets of saved tensors."""
    leaf = torch.zeros((), requires_grad=True)
    (Keep.apply(leaf, *tensors)).backward()
    return list(Keep.seen[1:])


def packed_bytes(context: OffloadActivations) -> int:
    return context.report().packed_bytes


def test_views_and_transposes_of_one_storage_are_moved_once(active: OffloadActivations) -> None:
    base = torch.randn(6, 8, 10)
    views = [
        base,
        base.transpose(0, 2),
        base[1:5, ::2],
        base.view(48, 10).t(),
        base.flatten()[7:407],
        base.unsqueeze(0).expand(3, 6, 8, 10),
    ]
    before = packed_bytes(active)
    copies = [view.clone() for view in views]
    back = saved_and_back(*views)
    assert packed_bytes(active) - before == base.untyped_storage().nbytes() + 4  # and the scalar
    for found, view, copy in zip(back, views, copies, strict=True):
        assert torch.equal(found, copy) and found.stride() == view.stride() and found.dtype == view.dtype


@pytest.mark.parametrize("name", NAMES)
def test_no_byte_that_autograd_saves_is_packed_twice(name: str) -> None:
    """Against every storage that a hook of its own sees, once, and without those of parameters and buffers."""
    model, step = build(name)
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage())._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step()
    saved_bytes = sum(storage.nbytes() for storage in storages.values())
    del loss
    with offload(model) as active:
        step().backward()
        packed_bytes = active.report().packed_bytes
    assert packed_bytes <= saved_bytes, "less where a small part of a storage was saved"
    assert packed_bytes == saved_bytes or name not in ("llama", "bert", "t5")


def test_what_is_restored_has_the_alignment_it_had(active: OffloadActivations) -> None:
    leaf = torch.zeros((), requires_grad=True)
    for start in (3, 128, 1000):
        result = Keep.apply(leaf, torch.arange(4000.0).clone()[start : start + 300])
        result.backward()
        found = Keep.seen[1]
        assert torch.equal(found, torch.arange(start, start + 300.0))
        assert found.storage_offset() * 4 % 512 == start * 4 % 512


def test_a_small_part_of_a_large_storage_does_not_move_all_of_it(active: OffloadActivations) -> None:
    base = torch.randn(100_000)
    before = packed_bytes(active)
    (back,) = saved_and_back(base[50_000:50_100])
    assert packed_bytes(active) - before <= 400 + 512 + 4
    assert torch.equal(back, base[50_000:50_100])


def test_two_dtypes_of_one_storage_are_one_record(active: OffloadActivations) -> None:
    base = torch.randn(64)
    before = packed_bytes(active)
    back = saved_and_back(base, base.view(torch.int32), base.view(torch.uint8))
    assert packed_bytes(active) - before == 256 + 4
    assert torch.equal(back[1], base.view(torch.int32)) and torch.equal(back[2], base.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.int8, torch.float64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]
)
def test_every_dtype_comes_back_bit_for_bit(active: OffloadActivations, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 120, (24, 40), dtype=torch.uint8)
    tensor = raw.to(dtype)
    leaf = torch.zeros((), requires_grad=True)

    class Hold(torch.autograd.Function):
        @staticmethod
        def forward(ctx, leaf, saved):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(saved)
            return leaf * 1

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            (found,) = ctx.saved_tensors
            assert found.dtype == dtype and torch.equal(found.view(torch.uint8), expected)
            return gradient, None

    expected = tensor.view(torch.uint8).clone()
    result = Hold.apply(leaf, tensor)
    del tensor
    result.backward()
    assert active.report().host_bytes > 0


def test_an_address_that_is_used_again_is_another_tensor(active: OffloadActivations) -> None:
    """The device lets go of what has left, so the allocator gives the same address to later tensors of the same forward."""
    leaf = torch.ones((), requires_grad=True)
    results, addresses, expected = [], [], []
    for number in range(2000):  # what is let go, and when, depends on a thread: until an address comes again
        if number >= 50 and len(set(addresses)) < len(addresses):
            break
        tensor = torch.full((1000,), float(number))
        addresses.append(tensor.data_ptr())
        expected.append(float(number))
        results.append(leaf * tensor)
        del tensor
    assert len(set(addresses)) < len(addresses), "the test needs an allocator that uses addresses again"
    for result, number in zip(reversed(results), reversed(expected), strict=True):
        leaf.grad = None
        result.sum().backward()
        assert leaf.grad is not None and leaf.grad.item() == number * 1000


def test_a_tensor_that_somebody_else_holds_is_not_copied_back(active: OffloadActivations) -> None:
    held = torch.randn(5000)
    (back,) = saved_and_back(held)
    assert back.data_ptr() == held.data_ptr()


def test_parameters_their_views_and_aliases_are_left_alone() -> None:
    layer = nn.Linear(40, 40)
    with offload(layer) as context:
        weight = layer.weight
        saved_and_back(weight, weight.t(), weight[:5], weight.detach(), weight.detach().t()[3:], weight.data)
        assert context.report().left_alone["parameter"] == 6
        assert context.report().packed_bytes == 4


def test_a_changed_parameter_is_an_error_as_in_plain_pytorch() -> None:
    layer = nn.Linear(4, 4)
    with offload(layer):
        result = layer(torch.randn(2, 4, requires_grad=True)).sum()
        with torch.no_grad():
            layer.weight.add_(1.0)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 2, saved was version 1"):
            result.backward()


@pytest.mark.parametrize("amount", ["everything", "nothing"])
@pytest.mark.parametrize("num_elements", [3, 3000])
@pytest.mark.parametrize("is_view_changed", [False, True], ids=["itself", "a view"])
def test_a_change_in_place_after_packing_is_an_error(amount: str, num_elements: int, is_view_changed: bool) -> None:
    with offload(nn.Linear(2, 2), amount=amount, min_bytes=100):
        leaf = torch.ones(num_elements, requires_grad=True)
        saved = leaf * 2.0
        result = saved.square().sum()
        with torch.no_grad():
            (saved[:2] if is_view_changed else saved).mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_what_is_saved_again_after_a_change_has_its_own_record(active: OffloadActivations) -> None:
    buffer = torch.ones(1000)
    leaf = torch.ones((), requires_grad=True)
    first = leaf * buffer.clone()
    buffer.mul_(5.0)
    second = leaf * buffer
    buffer_now = buffer.clone()
    second.sum().backward()
    assert leaf.grad is not None and leaf.grad.item() == buffer_now.sum().item()
    leaf.grad = None
    first.sum().backward()
    assert leaf.grad is not None and leaf.grad.item() == 1000


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("own_count", ["unsafe_chunk", "data"])
def test_tensors_of_one_storage_that_count_their_changes_apart_are_apart(own_count: str, recompute: str) -> None:
    """Equal numbers of two counts say nothing. The first is on its way before the second, in the same storage, is changed and saved."""
    leaf = torch.linspace(-1, 1, 2000, requires_grad=True)

    def chunks() -> torch.Tensor:
        left, right = (leaf * 1.0).unsafe_chunk(2)
        left = left.sigmoid_()  # saves its result, in a storage of which it is one half
        time.sleep(0.01)
        return (left + right.tanh_()).sum()  # so does this, by then changed as often

    def data() -> torch.Tensor:
        known = torch.ones(2000)
        first = leaf * known
        time.sleep(0.01)
        known.data.mul_(5.0)
        return first.detach().sum() + (leaf * known.data).sum()  # what is saved here was never changed, says its count

    def step() -> torch.Tensor:
        leaf.grad = None
        (chunks() if own_count == "unsafe_chunk" else data()).backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = step()
    with offload(nn.Linear(2, 2), recompute=recompute):
        assert torch.equal(step(), expected)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_whose_gates_share_a_storage_get_the_gradients_of_plain_pytorch(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = kind(16, 16, batch_first=True)
    inputs = torch.randn(3, 6, 16)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(inputs)[0].tanh().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = step()
    for _ in range(10):
        with offload(model):
            assert_same_gradients(step(), expected)


def test_tensors_on_other_devices_and_of_other_kinds_are_left_alone(active: OffloadActivations) -> None:
    torch.sparse.mm(torch.eye(4).to_sparse(), torch.randn(4, 4, requires_grad=True)).sum().backward()
    assert active.report().left_alone["unsupported"] > 0
    rows = [torch.randn(length, 4, requires_grad=True) for length in (5, 3)]
    ragged = torch.nested.as_nested_tensor(rows)  # strided, and without a shape
    assert ragged.layout is torch.strided
    torch.nested.to_padded_tensor(torch.nn.functional.gelu(ragged), 0.0).sum().backward()
    alone = [row.detach().clone().requires_grad_() for row in rows]
    sum(torch.nn.functional.gelu(row).sum() for row in alone).backward()
    assert all(torch.equal(row.grad, other.grad) for row, other in zip(rows, alone, strict=True))
    before = packed_bytes(active)
    values = torch.randn(8, dtype=torch.complex64, requires_grad=True)
    (values.conj() * values).abs().sum().backward()
    assert packed_bytes(active) > before


def test_zero_tensors_of_forward_mode_differentiation_have_no_memory_to_move() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    inputs = torch.randn(4, 8)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with forward_ad.dual_level():
            output, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(inputs, torch.ones_like(inputs))))
            (output.sum() + tangent.square().sum()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = step()
    with offload(model) as active:
        assert_same_gradients(step(), expected)
    assert active.report().left_alone["unsupported"] > 0


def test_small_tensors_are_left_alone() -> None:
    with offload(nn.Linear(2, 2), min_bytes=4000) as context:
        leaf = torch.ones(999, requires_grad=True)
        (leaf * 2.0).square().sum().backward()
        assert context.report().packed_bytes == 0 and context.report().left_alone["small"] > 0
        leaf = torch.ones(1000, requires_grad=True)
        (leaf * 2.0).square().sum().backward()
        assert context.report().packed_bytes == 4000


def test_a_registered_buffer_is_no_activation_and_may_be_filled_anew() -> None:
    """As a slot into which weights are fetched: in backward it holds them again, at another address and version."""
    slot, other = torch.randn(16, 16), torch.empty(16, 16)
    weights = slot.clone()
    with offload(nn.Linear(2, 2)) as context:
        context.register_parameter_storage(slot, restore=lambda: other)
        leaf = torch.randn(3, 16, requires_grad=True)
        result = (leaf @ slot.t()).sum()
        assert context.report().left_alone["parameter"] == 1 and context.report().packed_bytes == 0
        slot.zero_()
        other.copy_(weights)
        result.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones(3, 16) @ weights)
    with offload(nn.Linear(2, 2)) as context:
        context.register_parameter_storage(slot)
        result = (leaf @ slot.t()).sum()
        slot.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_other_hooks_inside_take_what_they_see_and_the_rest_is_ours(active: OffloadActivations) -> None:
    leaf = torch.randn(1000, requires_grad=True)
    hidden = (leaf * 1.5).square()
    before = packed_bytes(active)
    with save_on_cpu():
        hidden = hidden.square()
    assert packed_bytes(active) == before
    hidden.square().sum().backward()
    value = (leaf.detach() * 1.5) ** 2
    torch.testing.assert_close(leaf.grad, 4 * value**3 * 2 * leaf.detach() * 1.5 * 1.5)


def test_a_version_watch_holds_no_memory() -> None:
    tensor = torch.randn(1000)
    watch = VersionWatch(tensor[2:5])
    weak = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="x has been modified"):
        watch.check("x")
    del tensor
    gc.collect()
    assert weak.expired()


def test_parameters_that_come_and_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overspill.activations.identity.LEAST_KNOWN", 50)
    known = ParameterStorages()
    for _ in range(1000):
        weight = nn.Parameter(torch.randn(4))
        assert known.holds(weight, weight.untyped_storage())
    assert len(known._known) <= 51


def test_a_dead_storage_is_no_parameter_even_at_the_same_address() -> None:
    known = ParameterStorages()
    for _ in range(100):
        weight = torch.randn(50)
        known.add(weight)
        identity = weight.untyped_storage()._cdata
        del weight
        assert torch.randn(50).untyped_storage()._cdata != identity, "a weak reference keeps the identity from being used again"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_view_is_rebuilt_from_the_bytes_of_its_span(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    base = torch.randint(0, 100, data.draw(st.tuples(*[st.integers(1, 5)] * 3))).to(dtype)
    view = base
    for _ in range(data.draw(st.integers(0, 3))):
        action = data.draw(st.sampled_from(["transpose", "slice", "select", "expand"]))
        if action == "transpose" and view.dim() >= 2:
            view = view.transpose(0, -1)
        elif action == "slice" and view.dim() and view.shape[0] > 1:
            view = view[data.draw(st.integers(0, view.shape[0] - 1)) :: data.draw(st.integers(1, 2))]
        elif action == "select" and view.dim() >= 2:
            view = view.select(1, data.draw(st.integers(0, view.shape[1] - 1)))
        elif action == "expand":
            view = view.unsqueeze(0).expand(2, *view.shape)
    start, stop = byte_span(view)
    assert 0 <= start < stop <= base.untyped_storage().nbytes()
    aligned = start - start % 512
    copy = bytes_of(base.untyped_storage(), aligned, stop).clone()
    rebuilt = Geometry.of(view, aligned).view(copy)
    assert torch.equal(rebuilt, view) and rebuilt.stride() == view.stride()
