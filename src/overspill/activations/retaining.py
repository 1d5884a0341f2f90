"""What the graph of one block saves for one micro-batch, when the graph lives from forward to backward (`spec.retention`).

Words:

* **given**: tensors that backward will have again, perhaps elsewhere: the block's weights, whose slots are refilled in between, and the
  hidden states that enter. Known by storage *and* span, because slots are parts of one arena.
* **fixed**: storages that stay where they are: masks and tables of the call, buffers.
* **stored**: the bytes of a storage that the block's ops have made, once, however many saved tensors are views of it.

Rules:

1. With hooks active autograd does not look at versions. A given tensor is packed as (name, geometry) and unpacked as that view of what has
   the name in backward; nothing here refers to its memory. Fixed and stored ones have their versions compared.
2. What follows cheaply from others is rebuilt (`rebuild.py`); what is a widened half is stored as the half.
3. A stored tensor is a detached alias of its storage. `let_go` drops it, `land` gives it other bytes; unpacking in between is a mistake.
   The alias itself goes on without memory: it shares the count of in-place changes.
4. Saved objects refer to the book, the book to nothing of the graph: when the graph dies, all of it goes.
5. What cannot be told (a view into a slot that is none of the given tensors) is a `refusal`: the caller drops the graph.
6. Without values (`huggingface.workload` traces so) the same code says how many bytes are stored: `stored_bytes`, `moved_bytes`.

Cost: a block of Llama saves 38 tensors, and the hooks run in the thread that feeds the device, 5 to 15 us to pack one and 1 to 5 us to
unpack it (on a CPU; its recipes' ops come on top). So nothing is made here that only an error's text needs, and what was saved first of a
storage is unpacked as the alias itself.

Limits: a custom autograd function that keeps a weight by itself, not through `save_for_backward`, is seen by no hook.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from overspill.activations.identity import PLAIN_KINDS, Geometry, byte_span, bytes_of, changed_in_place, shed, words, words_of
from overspill.activations.rebuild import Rebuilder, can_read_saved, is_plain_norm
from overspill.activations.saved import Saved, SavedAlone
from overspill.spec.retention import STORED_ALIGNMENT_BYTES
from overspill.units import align_up

HIDDEN = "hidden states that enter"
"""Name of the boundary among the given tensors; no weight has a name with spaces."""
_REAL = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool))
"""Dtypes of most saved tensors: neither quantized nor ever conjugated, so nobody has to ask."""


class Stored:
    """The bytes of one storage (rule 3)."""

    def __init__(self, storage: torch.UntypedStorage, tensor: torch.Tensor) -> None:
        self.num_bytes = storage.nbytes()
        self._alias, self._version = tensor.detach(), tensor._version  # the alias shares the count of changes
        self.here: torch.Tensor | None = self._alias
        """A tensor of the storage where the bytes are, from `start_bytes` on; None: they are not on the device."""
        self.start_bytes = 0
        self._first: Geometry | None = None
        """The view that the alias was, once it has no memory."""
        self.offset: int | None = None
        """Where it is in the copy that left; None: it has not left."""

    @property
    def aligned_bytes(self) -> int:
        """What it takes in a copy."""
        return align_up(self.num_bytes, STORED_ALIGNMENT_BYTES)

    @property
    def device(self) -> torch.device:
        return self._alias.device

    @property
    def name(self) -> str:
        return f"a saved tensor ({words_of(self._alias.dtype, self._alias.shape if self._first is None else self._first.size)})"

    @property
    def payload(self) -> torch.Tensor | None:
        """The bytes, uint8 [num_bytes]; None: they are not on the device."""
        if self.here is None:
            return None
        return bytes_of(self.here.untyped_storage(), self.start_bytes, self.start_bytes + self.num_bytes)

    @property
    def is_changed(self) -> bool:
        """In place, since it was saved."""
        return self._alias._version != self._version

    def tensor(self, geometry: Geometry | None) -> torch.Tensor:
        """A view of the bytes; None: the one that was saved first.

        Raises:
            RuntimeError: they were changed in place.
        """
        assert self.here is not None, f"{self.name} is wanted and not on the device"
        if self.is_changed:
            raise changed_in_place(self.name, self._version, self._alias._version)
        if geometry is None:
            if self._first is None:
                return self._alias
            geometry = self._first
        return geometry.within(self.here, self.start_bytes)

    def let_go(self) -> None:
        """Hold no bytes."""
        if self._first is None:
            self._first = Geometry.of(self._alias, 0)
        self.here = None
        shed(self._alias)

    def land(self, source: torch.Tensor, start: int) -> None:
        """The bytes are in `source`, uint8 of a storage, from `start` on."""
        self.here, self.start_bytes = source, int(source.storage_offset()) + start


class SavedStored(Saved):
    """A saved tensor that is a view of a stored one."""

    __slots__ = ("geometry", "stored")

    def __init__(self, stored: Stored, geometry: Geometry | None) -> None:
        self.stored, self.geometry = stored, geometry

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def unpack(self) -> torch.Tensor:
        return self.stored.tensor(self.geometry)


class SavedGiven(Saved):
    """A saved tensor that is a view of a given one (rule 1)."""

    __slots__ = ("_book", "geometry", "name")

    def __init__(self, book: Book, name: str, geometry: Geometry) -> None:
        self._book, self.name, self.geometry = book, name, geometry

    @property
    def device(self) -> torch.device:
        return self._book.device

    def unpack(self) -> torch.Tensor:
        tensor = self._book.given_now(self.name)
        return self.geometry.within(tensor, int(tensor.storage_offset()) * tensor.itemsize)


class Book:
    """What one graph saved.

    Args:
        given: name -> tensor, as they are in forward: contiguous.
        fixed: tensors whose storages stay.
        epsilons: name of a layer norm's weight -> the norm's epsilon, which autograd does not save.
        most_passes: what takes more of them to rebuild is stored in place of rule 2 (`spec.retention`); 0: all that is not there anyway.
        has_values: False for tensors without (rule 6).
    """

    def __init__(
        self,
        given: Mapping[str, torch.Tensor],
        fixed: Iterable[torch.Tensor],
        *,
        epsilons: Mapping[str, float],
        most_passes: float = math.inf,
        has_values: bool = True,
    ) -> None:
        self.device = next(iter(given.values())).device
        self.stored: list[Stored] = []
        self.num_rebuilt = 0
        self.moved_bytes = 0
        """That rebuilding reads and writes."""
        self.refusal: str | None = None
        self._has_values, self._is_open = has_values, True
        # Held while the book is open, so that what they are known by is theirs alone.
        self._given, self._versions = dict(given), [tensor._version for tensor in given.values()]
        self._given_spans: dict[int, list[tuple[int, int, str]]] = {}
        for name, tensor in given.items():
            self._given_spans.setdefault(tensor.untyped_storage()._cdata, []).append((*byte_span(tensor), name))
        self._names = {id(tensor): name for name, tensor in given.items()}
        self._fixed = {tensor.untyped_storage()._cdata: tensor for tensor in fixed}
        self._by_storage: dict[int, Stored] = {}
        self._bound: Mapping[str, torch.Tensor] | None = None

        def epsilon(weight: Saved) -> float | None:
            return epsilons.get(weight.name) if isinstance(weight, SavedGiven) else None

        self._rebuilder: Rebuilder | None = None
        if most_passes and can_read_saved():
            self._rebuilder = Rebuilder(epsilon, leaf_of=self._leaf, store=self._store, most_passes=most_passes, is_of_one_forward=True)

    @property
    def stored_bytes(self) -> int:
        """Of all stored tensors beside each other."""
        return sum(item.aligned_bytes for item in self.stored)

    # -- forward -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves inside is in the book.

        Raises:
            RuntimeError: a given tensor was changed in place after it was saved.
        """
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._is_open = False
            given = tuple(self._given.values())
            self._rebuilder, self._given, self._names, self._fixed, self._by_storage = None, {}, {}, {}, {}
        for tensor, version in zip(given, self._versions, strict=True):
            if tensor._version != version:
                raise changed_in_place(f"a tensor that backward needs ({words(tensor)})", version, tensor._version)

    def _pack(self, tensor: torch.Tensor) -> Saved:
        """Nothing here or in what it calls has a graph: all is detached, or made of bytes. Ctrl-C may have left the hooks in place when
        the forward was over; they do no harm then."""
        if not self._is_open or (type(tensor) not in PLAIN_KINDS and self._has_values):
            return SavedAlone(tensor, None)
        if tensor.device != self.device or tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_neg():
            return SavedAlone(tensor, None)
        if tensor.dtype not in _REAL and (tensor.is_conj() or tensor.is_quantized):
            return SavedAlone(tensor, None)
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._given_spans:
            return self._pack_given(tensor, identity)
        if identity in self._fixed:
            return SavedAlone(tensor, None)
        if self._rebuilder is not None and identity not in self._by_storage:
            rebuilt = self._rebuilder.pack(tensor, storage)
            if rebuilt is not None:
                self.num_rebuilt += rebuilt[1]
                self.moved_bytes += rebuilt[0].rebuild.moved_bytes * rebuilt[1]
                return rebuilt[0]
        return self._view(tensor, storage)

    def _pack_given(self, tensor: torch.Tensor, identity: int) -> Saved:
        start, stop = byte_span(tensor)
        for first, last, name in self._given_spans[identity]:
            if first <= start and stop <= last:
                return SavedGiven(self, name, Geometry.of(tensor, first))
        self.refusal = f"{words(tensor)} lies in the memory of its weights and is none of them"
        return SavedAlone(tensor, None)

    def _view(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> SavedStored:
        stored = self._by_storage.get(storage._cdata)
        if stored is None:
            stored = self._by_storage[storage._cdata] = Stored(storage, tensor)
            self.stored.append(stored)
            return SavedStored(stored, None)
        if stored.is_changed:
            self.refusal = f"{stored.name} was changed in place between two ops that save it"
        return SavedStored(stored, Geometry.of(tensor, 0))

    def _store(self, tensor: torch.Tensor) -> SavedStored:
        return self._view(tensor, tensor.untyped_storage())

    def _leaf(self, leaf: torch.Tensor) -> Saved | None:
        name = self._names.get(id(leaf))
        return SavedGiven(self, name, Geometry.of(leaf, byte_span(leaf)[0])) if name is not None else None

    # -- between -----------------------------------------------------------------------------------------------------

    def lay_out(self, room_bytes: int) -> int:
        """Decide what leaves for a copy of at most so many bytes, and where in it; the bytes that it takes."""
        end = 0
        for item in self.stored:
            if end + item.aligned_bytes <= room_bytes:
                item.offset, end = end, end + item.aligned_bytes
        return end

    def copy_out(self, target: torch.Tensor) -> None:
        """Copy what leaves to where it was laid out in `target`, uint8."""
        for item in self.stored:
            if item.offset is not None and (payload := item.payload) is not None:
                target[item.offset : item.offset + item.num_bytes].copy_(payload, non_blocking=True)

    def let_go(self) -> None:
        """Hold nothing of what has left."""
        for item in self.stored:
            if item.offset is not None:
                item.let_go()

    def land(self, source: torch.Tensor) -> None:
        """What has left is in `source`, uint8 on the device, where it was laid out."""
        for item in self.stored:
            if item.offset is not None:
                item.land(source, item.offset)

    # -- backward ----------------------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Leave stored tensors to the graph alone: each goes with the last node that reads it."""
        self.stored = []

    @contextlib.contextmanager
    def bound(self, given: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Backward runs inside, where the given tensors are these."""
        self._bound = given
        try:
            yield
        finally:
            self._bound = None

    def given_now(self, name: str) -> torch.Tensor:
        assert self._bound is not None, f"{name} is wanted outside of its unit's backward"
        return self._bound[name]


def find_epsilons(block: nn.Module, parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Name of the weight -> epsilon of a block's layer norms, but for weights that norms with several epsilons share.

    Args:
        parameters: what the block is bound to.
    """
    names = {id(tensor): name for name, tensor in parameters.items()}
    found: dict[str, set[float]] = {}
    for module in block.modules():
        if is_plain_norm(module) and (name := names.get(id(module.weight))) is not None:
            found.setdefault(name, set()).add(module.eps)
    return {name: epsilons.pop() for name, epsilons in found.items() if len(epsilons) == 1}


def book_without_values(
    block: nn.Module, hidden: torch.Tensor, parameters: Mapping[str, torch.Tensor], fixed: Iterable[torch.Tensor], *, most_passes: float
) -> Book:
    """The book of a block whose tensors have no values (rule 6)."""
    epsilons = find_epsilons(block, parameters)
    return Book({HIDDEN: hidden, **parameters}, (*fixed, *block.buffers()), epsilons=epsilons, most_passes=most_passes, has_values=False)


def _unpack(saved: Saved) -> torch.Tensor:
    if not torch.is_grad_enabled():  # as ever in a backward that makes no graph of its own
        return saved.unpack()
    with torch.no_grad():
        return saved.unpack()
