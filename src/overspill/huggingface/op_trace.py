"""Watches one unit run on tensors without values: every operation, whose memory it reads and writes, and what autograd saves.

Words:

* **storage**: the memory behind a tensor and all its views. It is told apart by a weak reference, never by an address alone: while the
  reference lives, the address is not used again.
* **given**: a storage that was there before (parameters, buffers, the boundary, the call's arguments). All others are made by operations.

Rules:

1. An operation whose results share the storage of its arguments, and that writes to none of them, is a view and costs nothing.
2. Memory is replayed: a storage counts from the operation that makes it to the moment in which nobody refers to it, which is when torch
   would give it back. Storages that die are seen before the next operation.
3. Operations run by a node of autograd's graph belong to the gradients, all others to the forward (or recomputation).
4. What is saved passes through pack hooks; which node saved it, and as what, is asked of the graph afterwards. Views of one storage
   are told apart by their geometry; the first one has the bytes.
5. A saved tensor's recomputation is every operation that wrote to its storage, and, as far as their arguments are neither given nor
   saved, the operations that wrote to those.
6. What depends on sizes alone (positions, padding) is computed for real beside the trace, up to a size: parameters, buffers and all that
   comes of them have no values. A model that looks at positions, to see whether it needs a mask, gets the answer that it would get, and one
   that draws a number, to see whether it skips a layer (with a probability of 0), gets a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from overspill.huggingface.device_kernels import keep_statistics, multiply_groups
from overspill.huggingface.op_costs import cost_of, has_unknown_cost, is_allocation, is_random, name_of, tensors_in
from overspill.spec.workload import Alias, Pass, SavedTensor, Work

_GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default
_VALUES = "_overspill_values"
"""Attribute of a fake tensor that holds its values (rule 6)."""


@dataclasses.dataclass(kw_only=True)
class _Storage:
    number: int
    reference: StorageWeakRef
    num_bytes: int
    given_as: str | None
    """Name, of what was there before; `parameter:` or `input:` in front."""
    written_by: list[int] = dataclasses.field(default_factory=list)
    """Operations, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedOp:
    """One operation that is no view."""

    name: str
    module: str
    is_gradient: bool
    cost: Work
    reads: tuple[int, ...]
    """Numbers of storages."""
    is_random: bool


@dataclasses.dataclass(kw_only=True)
class _Packed:
    tensor: Tensor
    storage: int
    saved_by: list[str] = dataclasses.field(default_factory=list)


class OpTrace(TorchDispatchMode):
    """Entered inside a `FakeTensorMode`."""

    def __init__(self, *, is_cuda: bool, most_values: int) -> None:
        """
        Args:
            most_values: elements of a tensor whose values are computed (rule 6).
            is_cuda: results have the dtypes and strides that they have on CUDA (`device_kernels`, rules 3 and 4).
        """
        super().__init__()
        self.is_cuda, self.most_values = is_cuda, most_values
        self.ops: list[TracedOp] = []
        self.unknown: list[str] = []
        """Operations whose FLOPs no formula counts, each once."""
        self.peak_bytes = 0
        self.live_bytes = 0
        self._storages: list[_Storage] = []
        self._known: dict[int, _Storage] = {}
        self._live: list[_Storage] = []
        self._packed: list[_Packed] = []
        self._asked: list[_Packed] | None = None
        self._modules: list[str] = [""]
        self._without_values: set[int] = set()
        """Storages that were written to: their values are not followed."""

    # -- what is there ------------------------------------------------------------------------------------------------

    def give(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Name what was there before.

        Args:
            kind: `parameter` or `input`.
        """
        for name, tensor in tensors.items():
            storage = self._storage_of(tensor)
            if storage is None:
                self._remember(tensor, f"{kind}:{name}")
            elif storage.given_as is None:
                storage.given_as = f"{kind}:{name}"
                if storage in self._live:
                    self._live.remove(storage)
                    self.live_bytes -= storage.num_bytes

    def forget_peak(self) -> None:
        """A new pass begins: what lives now of the pass before stays counted, its peak does not."""
        self._bury()
        self.peak_bytes = self.live_bytes

    def _storage_of(self, tensor: Tensor) -> _Storage | None:
        found = self._known.get(tensor.untyped_storage()._cdata)
        return None if found is None or found.reference.expired() else found

    def _remember(self, tensor: Tensor, given_as: str | None) -> _Storage:
        memory = tensor.untyped_storage()
        storage = _Storage(number=len(self._storages), reference=StorageWeakRef(memory), num_bytes=memory.nbytes(), given_as=given_as)
        self._storages.append(storage)
        self._known[memory._cdata] = storage
        return storage

    def _bury(self) -> None:
        """Rule 2."""
        dead = [storage for storage in self._live if storage.reference.expired()]
        if dead:
            self._live = [storage for storage in self._live if not storage.reference.expired()]
            self.live_bytes -= sum(storage.num_bytes for storage in dead)

    # -- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        self._bury()
        read: dict[int, _Storage] = {}
        for tensor in tensors_in(args, kwargs):
            known = self._storage_of(tensor) or self._remember(tensor, "input:")
            read[known.number] = known
        if func is torch.ops.aten._local_scalar_dense.default and self._has_values(args[0]):
            with _disable_current_modes():
                return _values_of(args[0]).item()
        out = self._run(func, args, kwargs)
        self._compute_values(func, args, kwargs, out)
        made = [tensor for tensor in tensors_in(out) if self._storage_of(tensor) is None]
        written = [storage for tensor in _written(func, args, kwargs) if (storage := self._storage_of(tensor)) is not None]
        if not made and not written:
            return out  # rule 1
        for tensor in made:
            if self._storage_of(tensor) is None:  # else two results share it
                storage = self._remember(tensor, None)
                self._live.append(storage)
                self.live_bytes += storage.num_bytes
                written.append(storage)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._note(func, args, kwargs, out, read, written)
        return out

    def _note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        read: Mapping[int, _Storage],
        written: Sequence[_Storage],
    ) -> None:
        for storage in written:
            storage.written_by.append(len(self.ops))
        is_kernel = not is_allocation(func)
        if is_kernel and has_unknown_cost(func) and str(func) not in self.unknown:
            self.unknown.append(str(func))
        self.ops.append(
            TracedOp(
                name=name_of(func),
                module=self._modules[-1],
                is_gradient=torch._C._current_autograd_node() is not None,
                cost=cost_of(func, args, kwargs, out) if is_kernel else Work(),
                reads=tuple(read),
                is_random=is_random(func, args, kwargs),
            )
        )

    def _compute_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Rule 6."""
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                if (storage := self._storage_of(tensor)) is not None:
                    self._without_values.add(storage.number)
            return
        results = list(tensors_in(out))
        if not results or any(tensor.numel() > self.most_values for tensor in results):
            return
        given = list(tensors_in(args, kwargs))
        is_drawn = is_random(func, args, kwargs) and any(tensor.dim() > 0 for tensor in results)
        if is_drawn or is_allocation(func) or not all(self._has_values(tensor) for tensor in given):
            return
        with _disable_current_modes():
            values = func(*tree_map_only(Tensor, _values_of, args), **tree_map_only(Tensor, _values_of, kwargs))
        for tensor, value in zip(results, tensors_in(values), strict=True):
            setattr(tensor, _VALUES, value)

    def _has_values(self, tensor: Tensor) -> bool:
        storage = self._storage_of(tensor)
        is_known = not isinstance(tensor, FakeTensor) or hasattr(tensor, _VALUES)
        return is_known and (storage is None or storage.number not in self._without_values)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation, without values; `device_kernels` has the exceptions."""
        if func is _GROUPED_PRODUCT:
            return multiply_groups(args[0], args[1], *_grouped_options(*args[2:], **kwargs), is_cuda=self.is_cuda)
        if func is torch.ops.aten.bincount.default and len(args) > 2:  # as many as there may be: what is counted are experts
            return torch.empty(args[2], dtype=torch.int64 if args[1] is None else args[1].dtype)
        out = func(*args, **kwargs)
        return keep_statistics(out) if self.is_cuda and func is torch.ops.aten.native_layer_norm.default else out

    def pass_of(self, *, is_gradient: bool, start: int = 0) -> Pass:
        """Work of the operations from number `start` on (rule 3), and the peak since `forget_peak`."""
        chosen = (op.cost for op in self.ops[start:] if op.is_gradient == is_gradient)
        return Pass(work=sum(chosen, Work()), peak_bytes=self.peak_bytes)

    @contextmanager
    def inside(self, root: nn.Module) -> Iterator[None]:
        """Operations carry the path of the submodule of `root` that runs them."""
        paths = {id(module): path for path, module in root.named_modules()}

        def enter(module: nn.Module, args: Any) -> None:
            self._modules.append(paths.get(id(module), self._modules[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._modules.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            self._modules = [""]
            for handle in handles:
                handle.remove()

    # -- what autograd saves ------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves inside is seen."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Packed:
        storage = self._storage_of(tensor) or self._remember(tensor, "input:")
        packed = _Packed(tensor=tensor, storage=storage.number)
        self._packed.append(packed)
        return packed

    def _unpack(self, packed: _Packed) -> Tensor:
        if self._asked is not None:
            self._asked.append(packed)
        return packed.tensor

    def saved_tensors(self, outputs: Sequence[Tensor], hidden: Tensor) -> tuple[SavedTensor, ...]:
        """What autograd keeps for the backward of `outputs`, before that runs; forgets it.

        Args:
            hidden: what the unit returns to the next one.
        """
        self._ask_graph(outputs)
        kept: dict[tuple[Any, ...], _Packed] = {}
        for packed in self._packed:
            if packed.saved_by:  # else no graph holds it
                first = kept.setdefault(_geometry(packed), packed)
                if first is not packed:
                    first.saved_by += packed.saved_by
        storage = self._storage_of(hidden)
        returned = -1 if storage is None else storage.number
        owners: dict[int, int] = {}
        described = [self._describe(number, packed, owners, returned) for number, packed in enumerate(kept.values())]
        self._packed = []
        return tuple(
            self._with_recompute(tensor, packed, owners, returned) for tensor, packed in zip(described, kept.values(), strict=True)
        )

    def _ask_graph(self, outputs: Sequence[Tensor]) -> None:
        """Rule 4: the name of every slot in which a packed tensor is."""
        todo = [output.grad_fn for output in outputs if output.grad_fn is not None]
        seen = set(todo)
        while todo:
            node = todo.pop()
            for slot in dir(node):
                if not slot.startswith("_saved_") and slot != "saved_tensors":
                    continue
                self._asked = []
                try:
                    getattr(node, slot)
                finally:
                    asked, self._asked = self._asked, None
                for packed in asked:
                    packed.saved_by.append(f"{node.name()}.{slot.removeprefix('_saved_')}")
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    todo.append(following)

    def _describe(self, number: int, packed: _Packed, owners: dict[int, int], returned: int) -> SavedTensor:
        storage, tensor = self._storages[packed.storage], packed.tensor
        alias, alias_of = Alias.OWN, ""
        if storage.given_as is not None:
            kind, _, alias_of = storage.given_as.partition(":")
            alias = Alias(kind)
        elif storage.number == returned:
            alias = Alias.OUTPUT
        elif storage.number in owners:
            alias, alias_of = Alias.SAVED, str(owners[storage.number])
        else:
            owners[storage.number] = number
        maker = self.ops[storage.written_by[0]] if storage.written_by and storage.given_as is None else None
        return SavedTensor(
            module=maker.module if maker is not None else "",
            op=maker.name if maker is not None else "",
            saved_by=tuple(packed.saved_by),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            num_bytes=tensor.numel() * tensor.dtype.itemsize,
            kept_bytes=storage.num_bytes if alias is Alias.OWN else 0,
            alias=alias,
            alias_of=alias_of,
        )

    def _with_recompute(self, tensor: SavedTensor, packed: _Packed, owners: Mapping[int, int], returned: int) -> SavedTensor:
        """Rule 5."""
        if tensor.alias is not Alias.OWN:
            return tensor
        todo, ops, read = [packed.storage], set[int](), set[int]()
        seen = {packed.storage, returned}
        while todo:
            for op in self._storages[todo.pop()].written_by:
                ops.add(op)
                for number in self.ops[op].reads:
                    if number in seen:
                        continue
                    seen.add(number)
                    if number in owners:
                        read.add(owners[number])
                    elif self._storages[number].given_as is None:
                        todo.append(number)
        return dataclasses.replace(
            tensor,
            recompute=sum((self.ops[op].cost for op in ops), Work()),
            recompute_reads=tuple(sorted(read)),
            is_random=any(self.ops[op].is_random for op in ops),
        )


def _grouped_options(
    offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor | None, torch.dtype | None]:
    """What of `_grouped_mm`'s further arguments its result's sizes depend on."""
    return offs, out_dtype


def _values_of(tensor: Tensor) -> Tensor:
    return getattr(tensor, _VALUES) if isinstance(tensor, FakeTensor) else tensor


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that an operation writes to, by its schema."""
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def _geometry(packed: _Packed) -> tuple[Any, ...]:
    tensor = packed.tensor
    return (packed.storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
