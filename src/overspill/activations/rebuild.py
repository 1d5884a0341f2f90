"""Recomputation, op by op: a saved tensor that follows cheaply from others that are saved anyway is not stored but rebuilt.

Autograd saves a product's factors, an activation's input, a layer norm's input; and the linear layer behind them saves the result
again, in the largest size there is. The result is dropped here: what is packed is a *recipe*, the op and the saved objects of its inputs,
and unpack runs the op on what they unpack to, which may be recipes in turn. Of Llama's MLP, down(silu(gate) * up):

    gate (saved by SiLU) and up (by the product)     silu(gate) (saved by the product)     the product (saved by the linear)
    stored                                           rebuilt                               rebuilt

Rules:

1. Only ops whose result follows from their saved inputs alone, without random numbers, bit for bit: products of two tensors, SiLU, GELU,
   layer norms of the model's own modules, and a cast behind one of these. None of them is slower than copying its result.
   A cast of a leaf that somebody keeps anyway (`leaf_of`) is another one.
   What takes more passes over memory than `most_passes` (`spec.retention`) is packed like any other.
2. The inputs are held by the op's own node anyway, which backward runs after all that use the result. So a recipe holds no memory of its
   own. It holds the inputs' saved objects: what backward lets go of in the node is no matter to it. The node itself tells whether another
   tensor is of the same result.
3. The result of several saved views is rebuilt once, and let go with the last of them, or at the end of a backward that keeps its graph.
4. A recipe runs without autocast, for its inputs have been cast already. Its result must have the shape, dtype and device that was saved;
   strides are restored, because kernels choose by them. Versions are checked, of the result and of the inputs.
5. Where a tensor is stored already, its op lacks an input (that of a frozen factor is not saved), or somebody changed the result in place
   before it was saved (its version tells; its node would not, if that was done without a gradient), it is packed like any other.
6. A widening cast of something that is not there (a norm in fp32 of bf16 hidden states) is stored in the dtype that it was cast from, if
   there is somebody to store it (`store`): the values are the same. The tensor cache stores such results in that dtype itself, one by one
   (`cast_from`).
7. A layer norm's epsilon is not saved, so it is its module's, and the rebuilt norm's 1/σ has to be the one that autograd saved. That is
   looked at each time on the CPU; on a GPU, which would have to be waited for, once for each weight.

Limits: what is changed through `tensor.data` (or numpy, or its storage), the result of a cast too, or without a gradient between an op and
the cast behind it (rule 1), counts nowhere that can be seen from here; such models want recompute='none'.

How the inputs are found: `grad_fn._raw_saved_self.data` is what pack returned for it, read without unpacking. What other hooks packed
(`torch.utils.checkpoint` inside) is none of our objects, and such an op has no recipe.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from overspill.activations.identity import Geometry, VersionWatch, root_of, words_of
from overspill.activations.saved import Saved, SavedAlone

_PLAIN = (torch.Tensor, FakeTensor)
"""The second has no values, and the sizes of the first."""
_HALVES, _WIDER = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


class Rebuild:
    """One result and its recipe, shared by all saved views of it (rule 3)."""

    def __init__(self, base: torch.Tensor, storage: torch.UntypedStorage, node: Any, recipe: Recipe) -> None:
        self.weak, self.num_bytes = StorageWeakRef(storage), storage.nbytes()
        self._like, self._stride = (base.shape, base.dtype, base.device), base.stride()
        self.watch = VersionWatch(base)
        self._node = node
        self._run, self._sources, self.moved_bytes = recipe
        self._value: torch.Tensor | None = None
        self._lock = threading.Lock()
        self.timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """What is around a rebuild, to measure it."""

    @property
    def device(self) -> torch.device:
        return self._like[2]

    @property
    def name(self) -> str:
        return f"a rebuilt tensor ({self._node.name()}, {words_of(self._like[1], self._like[0])})"

    def is_of(self, tensor: torch.Tensor, base: torch.Tensor) -> bool:
        """Whether a tensor of its storage, a view of `base`, is a view of what would be rebuilt.

        What is made by the same node, and was not changed since, is. Of what has no history the counts of changes tell.
        """
        with self._lock:
            if base.grad_fn is self._node:
                return not self.watch.is_changed
            return self.watch.covers(tensor)

    def result(self) -> torch.Tensor:
        """What was saved: at the start of a storage of its own, in its dtype.

        Raises:
            RuntimeError: the result or an input was changed in place, or the op gives something else than what was saved.
        """
        with self._lock:
            if self.watch.is_changed:
                self.watch.check(self.name)
            if self._value is None:
                with self.timed():
                    self._value = self._rebuild()
            return self._value

    def forget(self) -> None:
        """Let go of the result; it can be rebuilt again."""
        with self._lock:
            self._value = None

    def _rebuild(self) -> torch.Tensor:
        shape, dtype, device = self._like
        alive = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        if alive is not None and alive.nbytes() == self.num_bytes:
            return torch.empty(0, dtype=dtype, device=device).set_(alive, 0, shape, self._stride)
        inputs = [source.unpack() if source is not None else None for source in self._sources]
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                result = self._run(*inputs)
        else:
            result = self._run(*inputs)
        if (result.shape, result.dtype, result.device) != self._like:
            raise RuntimeError(
                f"{self.name} was {dtype} of shape {tuple(shape)} on {device} when it was saved, and rebuilding it gave {result.dtype} of "
                f"shape {tuple(result.shape)} on {result.device}; leave recompute at 'none' for this model"
            )
        if result.stride() != self._stride or result.storage_offset() or result.untyped_storage().nbytes() != self.num_bytes:
            whole = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
            return torch.empty(0, dtype=dtype, device=device).set_(whole.untyped_storage(), 0, shape, self._stride).copy_(result)
        return result


class SavedRebuilt(Saved):
    """A saved tensor that is a view of a rebuilt result."""

    __slots__ = ("geometry", "rebuild")

    def __init__(self, rebuild: Rebuild, geometry: Geometry | None) -> None:
        """Without a geometry it is all of the result."""
        self.rebuild, self.geometry = rebuild, geometry

    @property
    def device(self) -> torch.device:
        return self.rebuild.device

    def unpack(self) -> torch.Tensor:
        result = self.rebuild.result()
        return self.rebuild.watch.counting(result if self.geometry is None else self.geometry.within(result, 0))


class Recipe(NamedTuple):
    """How a result is made again."""

    run: Callable[..., torch.Tensor]
    sources: tuple[Saved | None, ...]
    """What it is run on."""
    moved_bytes: int
    """That its ops read and write."""


class Rebuilder:
    """Finds recipes (rules 1, 5 and 6).

    Args:
        epsilon_of: what is saved of a layer norm's weight -> the norm's epsilon, which autograd does not save; None: not known.
        leaf_of: a leaf -> what gives it again in backward; None: nothing does.
        store: keeps a tensor that nobody saved; None: rule 6 does not apply.
        is_first: whether the norm with this weight is the first of its weight (rule 7).
        most_passes: of what is rebuilt (rule 1).
        is_of_one_forward: it is dropped when a forward is over, and may hold the recipes until then; else they die with their users.
    """

    def __init__(
        self,
        epsilon_of: Callable[[Saved], float | None],
        *,
        leaf_of: Callable[[torch.Tensor], Saved | None] = lambda leaf: None,
        store: Callable[[torch.Tensor], Saved] | None = None,
        is_first: Callable[[Saved], bool] = lambda weight: False,
        most_passes: float = math.inf,
        is_of_one_forward: bool = False,
    ) -> None:
        self._epsilon_of, self._leaf_of, self._store, self._is_first = epsilon_of, leaf_of, store, is_first
        self._most_passes = most_passes
        self._known: MutableMapping[int, Rebuild] = {} if is_of_one_forward else weakref.WeakValueDictionary()

    @classmethod
    def of_model(cls, model: nn.Module) -> Rebuilder:
        """Knows the model's layer norms by their weights."""
        epsilons: dict[int, float | None] = {}
        for module in model.modules():
            if is_plain_norm(module) and module.weight is not None:
                identity = getattr(module.weight, "_local_tensor", module.weight).untyped_storage()._cdata
                known = epsilons.setdefault(identity, module.eps)
                if known != module.eps:
                    epsilons[identity] = None  # one weight, two norms
        unseen = set(epsilons)

        def epsilon_of(weight: Saved) -> float | None:
            return epsilons.get(weight.alias.untyped_storage()._cdata) if isinstance(weight, SavedAlone) else None

        def is_first(weight: Saved) -> bool:
            identity = weight.alias.untyped_storage()._cdata if isinstance(weight, SavedAlone) else -1
            is_unseen = identity in unseen
            unseen.discard(identity)
            return is_unseen

        return cls(epsilon_of, is_first=is_first)

    def knows(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage is dropped already."""
        return storage._cdata in self._known

    def cast_from(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.dtype | None:
        """The dtype of fewer bytes that all of a tensor's storage was cast from (rule 6); None: it was not, or was changed since."""
        base = root_of(tensor)
        node = base.grad_fn
        if node is None or node.name() != "ToCopyBackward0" or base._version or type(base) not in _PLAIN or tensor.dtype != base.dtype:
            return None
        inner, number = node.next_functions[0]
        narrow = _output_dtype(inner, number) if inner is not None else None
        is_whole = tensor.numel() * tensor.itemsize == storage.nbytes()
        return narrow if is_whole and narrow in _HALVES and tensor.dtype in _WIDER else None

    def pack(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, is_wanted: Callable[[int], bool] = lambda moved_bytes: True
    ) -> tuple[SavedRebuilt, bool] | None:
        """A saved object that rebuilds the tensor, and whether its result is new; None: it has no recipe, or is not to be rebuilt.

        Args:
            is_wanted: of a new one, told what its ops read and write.
        """
        base = root_of(tensor)
        known = self._known.get(storage._cdata)
        if known is not None and known.is_of(tensor, base):
            return SavedRebuilt(known, None if tensor is base else Geometry.of(tensor, 0)), False
        node = base.grad_fn
        if node is None or base.output_nr != 0 or base.storage_offset() != 0 or base._version or type(base) not in _PLAIN:
            return None  # rule 5
        recipe = self._recipe_of(node, base)
        if recipe is None or recipe.moved_bytes > self._most_passes * base.nbytes:
            return None
        for source in recipe.sources:
            if source is not None and source.device != base.device:
                return None
        if not is_wanted(recipe.moved_bytes):
            return None
        rebuild = self._known[storage._cdata] = Rebuild(base, storage, node, recipe)
        return SavedRebuilt(rebuild, None if tensor is base else Geometry.of(tensor, 0)), True

    def forget_results(self) -> None:
        """At the end of a backward that may have kept its graph (rule 3)."""
        for rebuild in list(self._known.values()):
            rebuild.forget()

    def _recipe_of(self, node: Any, result: torch.Tensor) -> Recipe | None:
        return self._cast(node, result) if node.name() == "ToCopyBackward0" else self._direct_recipe(node, result.nbytes)

    def _cast(self, node: Any, result: torch.Tensor) -> Recipe | None:
        """Of something that has a recipe, of a leaf, or (rule 6) of what is stored for it."""
        inner, number = node.next_functions[0]
        if inner is None:
            return None
        dtype, num_bytes = result.dtype, result.nbytes
        source_dtype = _output_dtype(inner, number) or torch.float32
        read_bytes = num_bytes // dtype.itemsize * source_dtype.itemsize
        found = self._direct_recipe(inner, read_bytes) if number == 0 else None
        if found is not None:
            run = found.run
            return Recipe(lambda *tensors: run(*tensors).to(dtype), found.sources, found.moved_bytes + read_bytes + num_bytes)
        is_leaf = inner.name() == "torch::autograd::AccumulateGrad"
        source = self._leaf_of(inner.variable) if is_leaf else None
        if source is None and not is_leaf and self._store is not None:
            narrow = _output_dtype(inner, number)
            if narrow in _HALVES and dtype in _WIDER:
                source = self._store(result.detach().to(narrow))
        return Recipe(lambda tensor: tensor.to(dtype), (source,), read_bytes + num_bytes) if source is not None else None

    def _direct_recipe(self, node: Any, num_bytes: int) -> Recipe | None:
        """Of an op whose result has so many bytes."""
        match node.name():
            case "MulBackward0":
                one, other = node._raw_saved_self.data, node._raw_saved_other.data
                return Recipe(torch.mul, (one, other), 3 * num_bytes) if isinstance(one, Saved) and isinstance(other, Saved) else None
            case "SiluBackward0":
                source = node._raw_saved_self.data
                return Recipe(nn.functional.silu, (source,), 2 * num_bytes) if isinstance(source, Saved) else None
            case "GeluBackward0":
                source, approximate = node._raw_saved_self.data, node._saved_approximate
                if not isinstance(source, Saved):
                    return None
                return Recipe(lambda tensor: nn.functional.gelu(tensor, approximate=approximate), (source,), 2 * num_bytes)
            case "NativeLayerNormBackward0":
                return self._layer_norm(node, num_bytes)
        return None

    def _layer_norm(self, node: Any, num_bytes: int) -> Recipe | None:
        source, weight, bias = node._raw_saved_input.data, node._raw_saved_weight.data, node._raw_saved_bias.data
        if not isinstance(source, Saved) or not isinstance(weight, Saved) or not (bias is None or isinstance(bias, Saved)):
            return None
        inverse, epsilon = node._raw_saved_result2.data, self._epsilon_of(weight)
        if epsilon is None or not isinstance(inverse, Saved):
            return None
        shape = tuple(node._saved_normalized_shape)
        looks = source.device.type == "cpu" or self._is_first(weight)

        def run(tensor: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            result, _, found = torch.native_layer_norm(tensor, shape, weight, bias, epsilon)
            if looks and not _is_same(found, inverse.unpack()):
                raise RuntimeError(
                    f"a layer norm over {shape} ran with another epsilon than its module's {epsilon}, and its result cannot be rebuilt: "
                    "use the module's epsilon, or leave recompute at 'none' for this model"
                )
            return result

        return Recipe(run, (source, weight, bias), 2 * num_bytes)


def is_plain_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether a module is a layer norm that runs as torch's does, with its own epsilon."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have the same values, where a NaN is like any other."""
    return found.shape == expected.shape and bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def _output_dtype(node: Any, number: int) -> torch.dtype | None:
    """Of a node's output; None where this torch does not say."""
    metadata = getattr(node, "_input_metadata", None)  # of the inputs of its backward
    return metadata[number].dtype if metadata is not None and number < len(metadata) else None


def can_read_saved() -> bool:
    """Whether this torch says what pack returned."""
    return hasattr(torch._C._autograd.SavedTensor, "data")


RECOMPUTE = ("none", "cheap")
"""The words that `offload_activations` takes: nothing, or all that rule 1 names. Beside them names of modules (`segments.py`)."""
