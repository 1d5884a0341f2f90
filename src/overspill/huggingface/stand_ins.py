"""Stand-ins: a model's own forward runs, and tells what it would have called its blocks with.

Every block in the model's ModuleList is replaced by a stand-in that passes attribute look-ups on to the block. What a call does
is decided by the current *visitor*: the recorder of `embed` writes the call down and hands the hidden states through; the
tail's visitor ends the stack with hidden states of its own. So the model still makes its masks, rotary tables, position
numbers and scales itself, and the stack can be run later in any order.

Rules (each is checked on every forward; `inspection` checks more of it, once, on eight tokens):

1. Caches are refused: recomputation would append to them (the loss stays right, the gradients do not).
2. The hidden states that reach stand-in i are the very object that stand-in i-1 returned, and no other argument is. Each
   stand-in returns a fresh alias, so that the check bites. Everything else means that the model computes between its blocks.
3. A recorded tensor that depends on the embedding's trainable parameters is a *side input*: its gradients are summed over blocks by
   whoever runs them and enter the embedding's backward beside the hidden states' gradient. Every other tensor is a constant.
4. Other arguments are immutable values. Lists, dictionaries and unknown objects could carry something from block to block
   and are refused by name.
5. Every block is called once, in order. A model that skips layers at random is refused.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from overspill.errors import UnsupportedModelError
from overspill.huggingface import host_reads

_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, slice)


@dataclasses.dataclass(frozen=True)
class HiddenPlace:
    """Where a call takes the hidden states."""


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a call takes `BlockArguments.tensors[index]`."""

    index: int


@dataclasses.dataclass(frozen=True)
class SideInputPlace:
    """Where a call takes side input `index`."""

    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One block's call, with places where its tensors go."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    side_inputs: tuple[int, ...]
    """Indices of the side inputs that this block reads, ascending, each once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockArguments:
    """What the model calls its blocks with for one micro-batch; equal tensors are held once, none has a graph."""

    tensors: tuple[Tensor, ...]
    """Constants: masks, rotary tables, positions."""
    side_inputs: tuple[Tensor, ...]
    """Values of the side inputs, detached (rule 3)."""
    calls: Mapping[str, RecordedCall]
    """Unit name -> its call."""

    def rebuilt(self, unit: str, hidden: Tensor, side_inputs: Sequence[Tensor] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of `unit`'s call.

        Args:
            side_inputs: what to use in place of the detached values: leaves, one for each of `self.side_inputs`.
        """
        if side_inputs is not None and len(side_inputs) != len(self.side_inputs):
            raise ValueError(f"this model has {len(self.side_inputs)} side inputs, got {len(side_inputs)}")
        sides = self.side_inputs if side_inputs is None else side_inputs
        call = self.calls[unit]
        args = tuple(self._fill(value, hidden, sides) for value in call.args)
        return args, {name: self._fill(value, hidden, sides) for name, value in call.kwargs.items()}

    def _fill(self, value: Any, hidden: Tensor, sides: Sequence[Tensor]) -> Any:
        """Not a function inside of `rebuilt`: one that calls itself is a cycle, and would hold `hidden` until the next collection."""
        match value:
            case HiddenPlace():
                return hidden
            case TensorPlace(index):
                return self.tensors[index]
            case SideInputPlace(index):
                return sides[index]
            case tuple():
                return tuple(self._fill(item, hidden, sides) for item in value)
        return value

    def replace_tensors(self, tensors: Sequence[Tensor]) -> BlockArguments:
        """The same calls over other constants: moved, or shared with another micro-batch."""
        assert len(tensors) == len(self.tensors)
        return dataclasses.replace(self, tensors=tuple(tensors))

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages held."""
        storages = [tensor.untyped_storage() for tensor in (*self.tensors, *self.side_inputs)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def share_equal_tensors(new: BlockArguments, known: Sequence[BlockArguments]) -> BlockArguments:
    """`new` over the tensors of `known` where they are equal to its own, and each equal one of its own once.

    Micro-batches of one shape have the same causal mask and the same rotary tables: held once, they cost one micro-batch's memory.
    Equal means to the last bit, in shape, strides, dtype and place, so that sharing changes no number; side inputs are not
    shared. Metadata is compared first: a comparison of values (on a GPU: a wait) comes only where it fits.
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = {}

    def shared(tensor: Tensor) -> Tensor:
        candidates = alike.setdefault((tensor.shape, tensor.stride(), tensor.dtype, tensor.device), [])
        found = next((other for other in candidates if other is tensor), None)
        if found is None:
            found = next((other for other in candidates if _equal_bits(other, tensor)), None)
        if found is None:
            candidates.append(tensor)
            return tensor
        return found

    for arguments in known:
        for tensor in arguments.tensors:
            candidates = alike.setdefault((tensor.shape, tensor.stride(), tensor.dtype, tensor.device), [])
            if not any(other is tensor for other in candidates):
                candidates.append(tensor)
    return new.replace_tensors([shared(tensor) for tensor in new.tensors])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape, dtype and place are equal to the last bit: 0.0 is not -0.0, a NaN is itself."""
    if first.data_ptr() == second.data_ptr():
        return True  # strides are equal too: the same view
    integers = _INTEGERS.get(first.dtype.itemsize)
    if integers is None or any(tensor.is_conj() or tensor.is_neg() for tensor in (first, second)):
        return False  # complex128 and views that conjugate lazily: none is met in models, and not sharing is always right
    return torch.equal(first.view(integers), second.view(integers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReturnShape:
    """How a block hands its hidden states back."""

    extras: tuple[bool, ...] | None
    """None: as a tensor. Else: first in a tuple; for each further element whether it is something (and not None)."""

    def mirrored(self, hidden: Tensor) -> Any:
        """`hidden` returned the way the block would."""
        if self.extras is None:
            return hidden
        return (hidden, *(UnreadOutput() if is_something else None for is_something in self.extras))


class UnreadOutput:
    """Stands where a block returned more than hidden states; a model that reads it cannot be streamed and learns so here."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedModelError(f"the model reads .{name} of something that its blocks return beside the hidden states")


class Visitor(Protocol):
    """Decides what a call of a stand-in does."""

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block `index` was called; return what it would."""


class StandInStack:
    """The stand-ins of one model, and the visitor that they ask."""

    def __init__(self, model_name: str, blocks: Mapping[str, nn.Module], container: nn.ModuleList) -> None:
        """Replaces every block in `container`; `blocks` are its elements by unit name, in order."""
        self.model_name = model_name
        self.names = tuple(blocks)
        self.blocks = tuple(blocks.values())
        self.argument_names = tuple(_positional_names(block) for block in self.blocks)
        self._visitor: Visitor | None = None
        for index, block in enumerate(self.blocks):
            container[index] = StandIn(self, index, block)

    @contextmanager
    def visited_by(self, visitor: Visitor) -> Iterator[None]:
        before, self._visitor = self._visitor, visitor
        try:
            yield
        finally:
            self._visitor = before

    def call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._visitor is None:
            raise RuntimeError(f"the blocks of this {self.model_name} are streamed; run it through its StreamedModel")
        reading = host_reads.pause()
        try:
            return self._visitor.visit(index, args, kwargs)
        finally:
            host_reads.resume(reading)

    def refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.model_name} cannot be streamed: {reason}")


class StandIn(nn.Module):
    """Takes a block's place in the model."""

    def __init__(self, stack: StandInStack, index: int, block: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: what walks over the model must not find the block, which has no weights now.
        self.__dict__.update(_stack=stack, _index=index, _block=block, training=block.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._stack.call(self._index, args, kwargs)

    def train(self, mode: bool = True) -> StandIn:
        self._block.train(mode)
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_block" in self.__dict__ and name != "training":
            self._stack.refuse(f"it sets .{name} on {self._stack.names[self._index]} while it runs")
        super().__setattr__(name, value)


class AllRecorded(BaseException):
    """Ends a model's forward at its last stand-in. Not an Exception: no handler in a model may catch it."""


class CallRecorder:
    """Writes the calls of one forward down, checking rules 1 to 5."""

    def __init__(self, stack: StandInStack, side_paths: Set[tuple[str, str]] = frozenset()) -> None:
        """
        Args:
            side_paths: (unit, argument) of every side input, as the inspection found them.
        """
        self.stack = stack
        self.side_paths = side_paths
        self.first_hidden: Tensor | None = None
        """What reached the first stand-in, with its graph."""
        self.tensors: list[Tensor] = []
        self.side_inputs: list[Tensor] = []
        """With their graphs."""
        self.calls: dict[str, RecordedCall] = {}
        self._expected: Tensor | None = None
        self._places: dict[tuple[Any, ...], TensorPlace | SideInputPlace] = {}

    def is_side_input(self, unit: str, path: str, tensor: Tensor) -> bool:
        """Whether the tensor argument `path` of `unit` is a side input (rule 3)."""
        if (unit, path) in self.side_paths:
            return True
        if tensor.requires_grad:
            self.stack.refuse(f"{unit} gets {path}, which needs a gradient now and did not when the model was inspected")
        return False

    def record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Write the call of block `index` down; returns its hidden states."""
        unit = self.stack.names[index]
        if index != len(self.calls):
            self.stack.refuse(
                f"it called {unit} where {self.stack.names[len(self.calls) % len(self.stack.names)]} was due (layer skipping?)"
            )
        named = [(self._name(index, position), value) for position, value in enumerate(args)] + list(kwargs.items())
        path = self._hidden_path(unit, named)
        hidden = dict(named)[path]
        used: set[int] = set()
        places = {name: HiddenPlace() if name == path else self._place(unit, name, value, used) for name, value in named}
        self.calls[unit] = RecordedCall(
            args=tuple(places[self._name(index, position)] for position in range(len(args))),
            kwargs={name: places[name] for name in kwargs},
            side_inputs=tuple(sorted(used)),
        )
        if index == 0:
            self.first_hidden = hidden
        return hidden

    def returned(self, hidden: Tensor) -> None:
        """The stand-in just recorded returns `hidden`, and the next one must get that very object."""
        self._expected = hidden

    def block_arguments(self) -> BlockArguments:
        return BlockArguments(
            tensors=tuple(self.tensors), side_inputs=tuple(tensor.detach() for tensor in self.side_inputs), calls=self.calls
        )

    def _name(self, index: int, position: int) -> str:
        names = self.stack.argument_names[index]
        return names[position] if position < len(names) else f"argument {position}"

    def _hidden_path(self, unit: str, named: Sequence[tuple[str, Any]]) -> str:
        if self._expected is None:
            candidates = [name for name, value in named if isinstance(value, Tensor) and value.is_floating_point()]
            if "hidden_states" in candidates:
                return "hidden_states"
            if not candidates:
                self.stack.refuse(f"no argument of {unit} is hidden states")
            return candidates[0]
        paths = [name for name, value in named if value is self._expected]
        if len(paths) != 1:
            before = self.stack.names[len(self.calls) - 1]
            what = "does not reach" if not paths else f"reaches {len(paths)} arguments of"
            self.stack.refuse(f"what {before} returns {what} {unit}: the model computes between its blocks")
        return paths[0]

    def _place(self, unit: str, path: str, value: Any, used: set[int]) -> Any:
        if isinstance(value, Tensor):
            place = self._tensor_place(unit, path, value)
            if isinstance(place, SideInputPlace):
                used.add(place.index)
            return place
        if isinstance(value, _IMMUTABLE):
            return value
        if type(value) is tuple or isinstance(value, torch.Size):
            return tuple(self._place(unit, f"{path}[{position}]", item, used) for position, item in enumerate(value))
        if isinstance(value, Cache):
            self.stack.refuse(f"{unit} gets a cache ({type(value).__name__}) as {path}; training keeps none, call the model without one")
        self.stack.refuse(f"{unit} gets {path}, a {type(value).__name__}, which could carry something from block to block")

    def _tensor_place(self, unit: str, path: str, tensor: Tensor) -> TensorPlace | SideInputPlace:
        # The recorder holds every tensor that it has seen, so an address is not used twice while it lives.
        is_side = self.is_side_input(unit, path, tensor)
        # The storage's own address, which tensors without memory have too.
        key = (is_side, tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._places:
            if is_side:
                self._places[key] = SideInputPlace(len(self.side_inputs))
                self.side_inputs.append(tensor)
            else:
                self._places[key] = TensorPlace(len(self.tensors))
                self.tensors.append(tensor.detach())
        return self._places[key]


class RecordingVisitor:
    """`embed`: record every call, hand the hidden states through, stop the model at its last block."""

    def __init__(self, recorder: CallRecorder, returns: Mapping[str, ReturnShape]) -> None:
        self.recorder = recorder
        self.returns = returns

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.recorder.stack.names
        hidden = self.recorder.record(index, args, kwargs)
        if index == len(names) - 1:
            raise AllRecorded
        alias = hidden.view_as(hidden)
        self.recorder.returned(alias)
        return self.returns[names[index]].mirrored(alias)


def _positional_names(block: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in inspect.signature(block.forward).parameters.items() if parameter.kind in kinds)
