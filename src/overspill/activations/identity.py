"""Which bytes a saved tensor is: its storage, its place in it, and whether somebody has changed it since.

* **storage**: what torch's `StorageImpl` owns; a tensor is a view of one. Two tensors are the same memory if they have the same storage
  and their spans meet. An address says nothing: the allocator gives it to the next tensor as soon as this one is dead.
* **span**: the bytes of a storage from a tensor's first to its last element.
* **version**: torch's count of in-place changes, shared by a tensor and all of its views. Not by all tensors of a storage: the pieces of
  `torch.unsafe_chunk` (a GRU's gates) and `tensor.data` have counts of their own, and equal numbers of two counts say nothing.

Rules:

1. A storage is known by a weak reference (`StorageWeakRef`). While one is held the object cannot be reborn as another storage, so its
   `_cdata` is an identity; and whether the storage is still alive can be asked without keeping it alive.
2. With saved-tensor hooks active autograd no longer looks at versions. So a version is noted when a tensor is packed and compared when it
   is unpacked, with a `VersionWatch`, which sees the count and holds none of the memory.
3. A span starts on a multiple of `ALIGNMENT_BYTES`, so what is rebuilt elsewhere has the alignment it had, and kernels that choose by
   alignment choose the same.
4. The model's parameters and buffers, their views, and casts of them are not activations: they are in memory anyway. Taken for one by
   mistake means that a tensor stays on the device, which is never wrong.

Limits: a change through `tensor.data` counts no version, here as in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT_BYTES = 512
"""What torch's CUDA allocator aligns storages to; on the CPU it is 64."""

PLAIN_KINDS = (torch.Tensor, nn.Parameter)
"""Tensors that are nothing but a view of a storage; subclasses may be more."""
_CASTS_AND_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("ToCopy", "Clone", "Alias", "AsStrided", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes"),
        *("Squeeze", "T", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
    )
) | {"SqueezeBackward1", "SqueezeBackward2", "MtBackward0"}
"""Autograd nodes after which a parameter is still the same values."""
_CAST_TO = (torch.bfloat16, torch.float16)
_MOST_NODES = 8
"""How far a chain of them is followed. Chosen: autocast's cast and a transposition are two."""


_MOST_FORMS = 64
"""Sizes and strides that are remembered: a block of Llama has 10, and its layers the same ones. Chosen."""

LEAST_KNOWN = 4096
"""Storages of parameters, before the dead among them are looked for. Chosen."""


def words(tensor: torch.Tensor) -> str:
    return words_of(tensor.dtype, tensor.shape)


def words_of(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"


def byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    """[first, last + 1) byte of a strided tensor in its storage; at least one element."""
    first, itemsize = int(tensor.storage_offset()), tensor.itemsize
    extent = max(1, tensor.numel()) if tensor.is_contiguous() else _extent(tensor.shape, tensor.stride())
    return first * itemsize, (first + extent) * itemsize


def aligned_start(start: int) -> int:
    """Where the record of a span begins (rule 3)."""
    return start - start % ALIGNMENT_BYTES


@functools.lru_cache(maxsize=_MOST_FORMS)
def _extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


def bytes_of(storage: torch.UntypedStorage, start: int, stop: int) -> torch.Tensor:
    """Bytes [start, stop) of a storage, uint8 [stop - start]; holds the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (stop - start,), (1,))


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """A view of a span."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start_bytes: int
    """After the span's first byte."""

    @staticmethod
    def of(tensor: torch.Tensor, span_start: int) -> Geometry:
        return _geometry(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()) * tensor.itemsize - span_start)

    def view(self, span: torch.Tensor) -> torch.Tensor:
        """The tensor in the bytes of a span (uint8, 1-D, aligned as rule 3 says)."""
        return self.within(span, int(span.storage_offset()))

    def within(self, tensor: torch.Tensor, span_start: int) -> torch.Tensor:
        """The tensor in the storage of another one, of any dtype, where the span begins at a byte.

        Called without a graph: the result is a view of a tensor of the same dtype.
        """
        start = (span_start + self.start_bytes) // self.dtype.itemsize
        if tensor.dtype == self.dtype:
            return tensor.as_strided(self.size, self.stride, start)
        empty = torch.empty(0, dtype=self.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), start, self.size, self.stride)


_geometry = functools.lru_cache(maxsize=_MOST_FORMS)(Geometry)
"""Equal ones are one: to look one up is faster than to make it."""


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def shed(tensor: torch.Tensor) -> None:
    """Let a tensor go on without its memory: its count of changes stays, and a leaf of a graph is differentiated by as before."""
    tensor.data = _nothing(tensor.dtype, tensor.device)


class VersionWatch:
    """Sees in-place changes of a tensor, and of its views, from now on (rule 2).

    Args:
        holds: it keeps the tensor's memory as well, as `alias`, until `let_go`.
    """

    __slots__ = ("_counter", "_root", "version")

    def __init__(self, tensor: torch.Tensor, *, holds: bool = False) -> None:
        self._counter = tensor.detach()  # shares the count
        if not holds:
            shed(self._counter)
        self.version = tensor._version
        self._root = weakref.ref(root_of(tensor))

    @property
    def alias(self) -> torch.Tensor:
        """The tensor without its graph, while its memory is held."""
        return self._counter

    def let_go(self) -> None:
        """Hold no memory any more."""
        shed(self._counter)

    def counting(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor without a graph, with this count of changes: what a graph of second order saves of it sees what was done to the
        tensor that was packed."""
        counted = self._counter.detach()
        counted.data = tensor
        return counted

    @property
    def now(self) -> int:
        return self._counter._version

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether it sees this tensor's changes as well, and there was none.

        Views of one tensor share its count; of others it is found by counting one and taking it back. Nobody else may look at the count
        meanwhile.
        """
        if not self.version == self.now == tensor._version:
            return False
        if self._root() is root_of(tensor):
            return True
        with torch.autograd._unsafe_preserve_version_counter(tensor):
            torch.autograd.graph.increment_version(tensor)
            return self.is_changed

    @property
    def is_changed(self) -> bool:
        return self.now != self.version

    def check(self, what: str) -> None:
        """Raise RuntimeError, as autograd does, if there was a change."""
        if self.is_changed:
            raise changed_in_place(what, self.version, self.now)


def root_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that it is a view of, or itself."""
    base = tensor._base if tensor._is_view() else None
    return tensor if base is None else base


def changed_in_place(what: str, packed: int, now: int) -> RuntimeError:
    """The error of a saved tensor that has another version than when it was packed."""
    return RuntimeError(
        f"{what} has been modified by an inplace operation after it was saved for backward: it is at version {now}, saved was version "
        f"{packed}; its gradient would be wrong. Do the operation out of place, or on a clone"
    )


class ParameterStorages:
    """The storages that are no activations (rule 4). Not thread-safe; its cache locks."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Callable[[], torch.Tensor] | None]] = {}
        self._forget_beyond = LEAST_KNOWN
        self._dtypes: dict[tuple[int, ...], set[torch.dtype]] = {}
        """Of the matrices, by their sorted sizes."""

    def add_model(self, model: nn.Module) -> None:
        """All parameters and buffers."""
        self.add_all(model.parameters())
        self.add_all(model.buffers())

    def add_all(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor, restore: Callable[[], torch.Tensor] | None = None) -> None:
        """The storage of a tensor, of which no view is packed from now on.

        Args:
            restore: for memory that holds something else by the time of backward: gives a tensor with the same bytes in the same places
                of its storage. Versions of such memory are its owner's business. None: the storage itself, versions checked.
        """
        local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's own part
        if local.dim() >= 2:
            self._dtypes.setdefault(tuple(sorted(local.shape)), set()).add(local.dtype)
        try:
            storage = local.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor subclass without one storage
            return
        self._known[storage._cdata] = (StorageWeakRef(storage), restore)
        if len(self._known) > self._forget_beyond:
            self._forget_dead()

    def _forget_dead(self) -> None:
        """Of a model that makes parameters as it goes."""
        self._known = {cdata: entry for cdata, entry in self._known.items() if not entry[0].expired()}
        self._forget_beyond = max(LEAST_KNOWN, 2 * len(self._known))

    def holds(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        """Whether a tensor is a parameter or a view of one; a parameter that is met for the first time is added."""
        if storage._cdata in self._known:
            return True
        base = root_of(tensor)
        if base.grad_fn is not None or not isinstance(base, nn.Parameter):
            return False
        self.add(base)  # such as FSDP2's gathered parameters, which are made in forward
        return True

    def __contains__(self, identity: int) -> bool:
        """Whether a storage with this `_cdata` is known already."""
        return identity in self._known

    def restorer(self, storage: torch.UntypedStorage) -> Callable[[], torch.Tensor] | None:
        """See `add`."""
        entry = self._known.get(storage._cdata)
        return entry[1] if entry is not None else None

    def is_cast(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter in another dtype, or a view or copy of that.

        Autocast makes such casts. With a gradient, autograd's graph says so. Of a frozen parameter it does not: a tensor without history,
        in the shape of one of the parameters or its transposition and in a 16-bit dtype that this has not, is taken for one. (Whether
        autocast is on cannot be asked in a hook: it switches itself off while it calls an op.)
        """
        base = root_of(tensor)
        node = base.grad_fn
        if node is None:
            dtypes = self._dtypes.get(tuple(sorted(base.shape)))
            return dtypes is not None and not base.requires_grad and tensor.dtype in _CAST_TO and tensor.dtype not in dtypes
        for _ in range(_MOST_NODES):
            if node is None:
                return False
            if node.name() == "torch::autograd::AccumulateGrad":
                parameter = node.variable  # type: ignore[attr-defined]
                return isinstance(parameter, nn.Parameter) or self.holds(parameter, parameter.untyped_storage())
            if node.name() not in _CASTS_AND_VIEWS:
                return False
            node = node.next_functions[0][0]
        return False
