"""Recomputation, module by module: of a segment only what goes in is saved, and backward runs its forward once more.

    offload_activations(model, ..., recompute=["cheap", "model.layers.*.mlp"])

A **segment** is a module whose name matches a pattern. While the block is entered its forward runs inside `torch.utils.checkpoint` (the
variant without reentrant autograd). Checkpoint saves the tensors that go in outside of its own hooks, so ours pack them: they move like any
other saved tensor. What is saved inside is the segment's own: dropped in forward, made again in backward, never packed. The rebuild is
checkpoint's: it has the random numbers and the autocast of the forward, and the count, shapes, dtypes and devices of what it saves are
compared. Added here:

1. Patterns are `fnmatch`'s, of names as `model.named_modules()` gives them; a star matches dots too. Of matches inside of matches the
   outermost counts. The model itself is matched by no star.
2. All tensors of a call go in one by one, also keyword arguments and those in tuples and dicts (a pytree): checkpoint saves only those
   that are arguments themselves, and would hold the others on the device.
3. Buffers that forward changes would be changed twice. The running statistics of a batch norm do not enter into its result in training:
   a rebuild puts them back. Any other that changes (spectral norm's vectors) is an error at the first call. So is a cache of keys, and
   an input that is changed in place.
4. Forward and rebuild have the same parameters and modes: versions of the parameters are compared, as autograd would, and `training`.
5. The wrapper is the module's attribute `forward` (of a module that was compiled in place: its compiled call), put there on entering and
   taken away on leaving; classes are not touched. A wrapper that somebody else has taken a reference to only calls the plain forward then.
6. A copy of the model that is made inside has the plain forward, as an attribute.
7. An exception in a segment's forward is carried around checkpoint, which in older versions leaves its hooks active until the traceback
   dies.
8. With a `CallBook` patterns name what *may* be run again, and each call is asked for: it is a segment, or runs plainly, with the same
   refusals as long as the book may still choose it (to look for them takes longer than some of a module's kernels).

Costs: one more forward of each segment. Limits: what forward does beside its result and rule 3 (a counter in Python) is done twice, and not
seen. Only calls of the module are segments, not functions that use its weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError, checkpoint

from overspill.activations.identity import changed_in_place
from overspill.errors import UnsupportedModelError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of batch norms. `torch.native_batch_norm` changes them without counting a version, so they are known by name."""
_MOST_NAMES = 6
"""Of modules in an error. Chosen."""


# -- which modules ---------------------------------------------------------------------------------------------------


def find_segments(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The outermost modules that match, by name, in the model's order (rule 1).

    Raises:
        ValueError: a pattern matches nothing, the whole model, or a container that is never called.
        UnsupportedModelError: a match cannot be run again.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if "" in patterns:
        raise ValueError(
            "recompute names the whole model (''): nothing would be left to run beside the rebuild, which needs all of it at once; name "
            f"parts of it, such as {_some(modules)}"
        )
    matched: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(modules, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, modules, n=_MOST_NAMES, cutoff=0.5)
            raise ValueError(
                f"recompute={pattern!r} matches no module of {type(model).__name__}; there are {_some(near or modules)}: names as "
                "model.named_modules() gives them, where a star stands for any letters, dots too"
            )
        matched.update(found)
    segments = {name: module for name, module in modules.items() if name in matched and matched.isdisjoint(_ancestors(name))}
    for name, module in segments.items():
        _refuse(model, name, module, modules)
    return segments


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _some(names: Any) -> str:
    """A few of them."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(map(repr, names[:_MOST_NAMES])) or "none in it") + more


def _refuse(model: nn.Module, name: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raise if a module cannot be a segment, with the reason."""
    if type(module).forward is nn.Module.forward and "forward" not in vars(module):
        held = f"{name}.*"
        raise ValueError(
            f"recompute names {name}, a {type(module).__name__}: it has no forward of its own and is never called; name what it holds, as "
            f"with {held!r}"
        )
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{name} ({kind}) is a script, whose forward cannot be put inside of a checkpoint; leave it out")
    if isinstance(vars(module).get(_place_of(module)), Segment):
        raise RuntimeError(f"{name} is a segment of another offload_activations that is active; leave that one first")
    outside = [("", model), *((other, modules[other]) for other in _ancestors(name) if other in modules)]
    for other, ancestor in outside:
        if _is_compiled(ancestor):
            raise UnsupportedModelError(
                f"{name} is inside of {other or 'the model'}, which is compiled: its graph would have the checkpoint in it. Name {other} "
                "instead, or compile what is inside of the segment"
            )
    if getattr(module, "_compiled_call_impl", None) is not None and (module._forward_hooks or module._forward_pre_hooks):
        raise UnsupportedModelError(
            f"{name} ({kind}) was compiled in place and has forward hooks (as of FSDP2), which a rebuild would run again; use "
            "torch.compile(module), compile what it holds, or leave it out"
        )
    inside = ((f"{name}.{inner}" if inner else name, part) for inner, part in module.named_modules())
    for other, part in (*outside, *inside):
        if getattr(part, "gradient_checkpointing", False) is True or type(part).__name__ == "CheckpointWrapper":
            raise UnsupportedModelError(
                f"{name} cannot be a segment: {other or 'the model'} ({type(part).__name__}) checkpoints itself already, and its forward "
                "would run a third time. Call model.gradient_checkpointing_disable(), or leave the pattern out: the inputs of its own "
                "checkpoints are moved anyway"
            )


def _is_compiled(module: nn.Module) -> bool:
    """By name: importing dynamo takes a second."""
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__module__.startswith("torch._dynamo")


def _place_of(module: nn.Module) -> str:
    """The attribute that a call of the module goes through (rule 5)."""
    return "_compiled_call_impl" if getattr(module, "_compiled_call_impl", None) is not None else "forward"


# -- the wrapper -----------------------------------------------------------------------------------------------------


class Call(Protocol):
    """One call of a segment's module, from before its forward until backward is done with it."""

    @property
    def is_again(self) -> bool:
        """Whether backward runs it again; else it runs plainly."""
        ...

    @property
    def is_checked(self) -> bool:
        """Whether a plain run says what would keep backward from running it again (rule 8)."""
        ...

    def end(self) -> None:
        """Forward has returned or raised."""
        ...

    def running_again(self) -> contextlib.AbstractContextManager[None]:
        """What is around running it again."""
        ...


class CallBook(Protocol):
    """Says of every call whether backward runs it again (rule 8)."""

    def begin_call(self, inputs: Callable[[], Sequence[torch.Tensor]]) -> Call:
        """A call begins.

        Args:
            inputs: gives the tensors that go in.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _FixedCall:
    """Meets `Call`."""

    is_again: bool
    is_checked: bool = True

    def end(self) -> None:
        pass

    def running_again(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


PLAIN_CALL: Call = _FixedCall(is_again=False)


class EveryCall:
    """Backward runs all of them again. Meets `CallBook`."""

    def begin_call(self, inputs: Callable[[], Sequence[torch.Tensor]]) -> Call:
        return _FixedCall(is_again=True)


class Segments:
    """The segments of one model; rules 5 and 6."""

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        self._model, self._patterns = model, tuple(patterns)
        self._active: list[Segment] = []
        self.names: tuple[str, ...] = ()
        """Of the last time that they were put there."""
        self.num_rebuilds = 0
        self.book: CallBook = EveryCall()

    def install(self, device: torch.device, book: CallBook) -> None:
        """Wrap all, or none.

        Raises:
            ValueError: see `find_segments`; the model may have changed since.
        """
        if not self._patterns:
            return
        found = find_segments(self._model, self._patterns)
        self.names, self.book = tuple(found), book
        try:
            for name, module in found.items():
                self._active.append(Segment(self, name, module, device))
                self._active[-1].install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take all wrappers away; rebuilds of graphs that live go on working."""
        while self._active:
            self._active[-1].remove()
            self._active.pop()


class Segment:
    """Stands for a module's forward, and runs it inside of a checkpoint."""

    def __init__(self, owner: Segments, name: str, module: nn.Module, device: torch.device) -> None:
        self.owner, self.name, self.module, self.device = owner, name, module, device
        self._place = _place_of(module)
        self._had_own = self._place in vars(module)
        self.plain: Callable[..., Any] = getattr(module, self._place)
        self.__wrapped__ = self.plain  # for those who ask for the signature
        self._is_active = True
        self.parts = list(module.modules())

    def install(self) -> None:
        vars(self.module)[self._place] = self

    def remove(self) -> None:
        self._is_active = False
        attributes = vars(self.module)
        if attributes.get(self._place) is self:
            if self._had_own:
                attributes[self._place] = self.plain
            else:
                del attributes[self._place]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._had_own:
            return operator.getitem, ((self.plain,), 0)  # rule 6
        return getattr, (self.module, self._place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_active or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)

        def inputs() -> list[torch.Tensor]:
            return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

        if not any(tensor.requires_grad for tensor in self.parameters()) and not any(tensor.requires_grad for tensor in inputs()):
            return self.plain(*args, **kwargs)
        noted = self.owner.book.begin_call(inputs)
        try:
            if not noted.is_again and not noted.is_checked:
                return self.plain(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            call = _Call(self, noted, leaves, spec)
            del leaves
            return self._run(call, tensors) if noted.is_again else call.run_plainly(tensors)
        finally:
            noted.end()

    def _run(self, call: _Call, tensors: list[torch.Tensor]) -> Any:
        """As a segment."""
        if self.device.type != "cpu" and all(tensor.device != self.device for tensor in tensors):
            tensors.append(torch.empty(0, device=self.device))  # whose random numbers are put back follows from what goes in
        result = checkpoint(call, *tensors, use_reentrant=False, preserve_rng_state=True, determinism_check="default")
        error, call.error = call.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # which refers to this frame
        return result

    def parameters(self) -> Iterator[torch.Tensor]:
        for part in self.parts:
            for parameter in part._parameters.values():
                if parameter is not None:
                    yield parameter

    def buffers(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        for part in self.parts:
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    yield part, name, buffer


@dataclasses.dataclass(frozen=True)
class _Hole:
    """Where a tensor goes."""

    index: int


class _Call:
    """One call of a segment: run once in forward, and once for each backward that wants its saved tensors. Holds no tensor that goes in."""

    def __init__(self, segment: Segment, noted: Call, leaves: list[Any], spec: Any) -> None:
        self._segment, self._noted, self._spec = segment, noted, spec
        self._leaves: list[Any] = []
        num_tensors = 0
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                leaf, num_tensors = _Hole(num_tensors), num_tensors + 1
            elif _is_cache(leaf):
                raise UnsupportedModelError(
                    f"{segment.name} was called with a cache of keys and values ({type(leaf).__name__}), which its rebuild would fill a "
                    "second time; call the model with use_cache=False, or set that in its config"
                )
            self._leaves.append(leaf)
        self._is_training = [part.training for part in segment.parts]
        self._parameters = [(parameter, _version_of(parameter)) for parameter in segment.parameters()]
        self._statistics: list[tuple[nn.Module, str]] = []
        """Buffers that a rebuild puts back (rule 3)."""
        self._has_run = False
        self.error: BaseException | None = None
        """Of the forward (rule 7)."""

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self._has_run:
            return self._rebuild(*self._arguments(tensors))
        self._has_run = True
        try:
            with _explained(self._segment.name):
                return self.run_plainly(tensors)
        except BaseException as error:
            self.error = error
            return None

    def run_plainly(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Forward, for the first time.

        Raises:
            UnsupportedModelError: it could not be run again (rule 3).
        """
        versions = [_version_of(tensor) for tensor in tensors]
        result = self._first(*self._arguments(tensors))
        if [_version_of(tensor) for tensor in tensors] != versions:
            raise UnsupportedModelError(
                f"forward of {self._segment.name} changes a tensor that goes into it in place, which it would need again in "
                "backward; do that out of place (such as inplace=False), or leave this module out of recompute"
            )
        return result

    def _arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        leaves = [tensors[leaf.index] if isinstance(leaf, _Hole) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def _first(self, args: Any, kwargs: Any) -> Any:
        segment = self._segment
        before = [(part, name, buffer, _version_of(buffer)) for part, name, buffer in segment.buffers()]
        result = segment.plain(*args, **kwargs)
        for part, name, buffer, version in before:
            is_same, is_changed = part._buffers.get(name) is buffer, _version_of(buffer) != version
            if is_same and name in _STATISTICS and (not is_changed or _is_torchs_norm(part) or name == "num_batches_tracked"):
                self._statistics.append((part, name))
            elif not is_same or is_changed:
                raise UnsupportedModelError(
                    f"forward of {segment.name} changes the buffer {name!r} of a {type(part).__name__} in it, so running it again in "
                    "backward would give something else; leave this module out of recompute"
                )
        return result

    def _rebuild(self, args: Any, kwargs: Any) -> Any:
        segment = self._segment
        segment.owner.num_rebuilds += 1
        now = list(segment.parameters())
        if len(now) != len(self._parameters) or any(one is not other for one, (other, _) in zip(now, self._parameters, strict=True)):
            raise RuntimeError(
                f"parameters of {segment.name} are others than in forward, which backward has to run again: its gradients would be wrong. "
                "Replace them after backward"
            )
        for parameter, version in self._parameters:
            if _version_of(parameter) != version:
                what = f"a parameter of {segment.name}, {tuple(parameter.shape)}, whose forward backward has to run again,"
                raise changed_in_place(what, version, _version_of(parameter))
        if [part.training for part in segment.parts] != self._is_training:
            raise RuntimeError(
                f"{segment.name} was switched between train() and eval() after its forward, which backward has to run again: its result "
                "would be another one. Switch after backward"
            )
        buffers = [buffer for part, name in self._statistics if (buffer := part._buffers[name]) is not None]
        values = [buffer.clone() for buffer in buffers]
        with torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):  # they have the same values afterwards
            try:
                with self._noted.running_again():
                    return segment.plain(*args, **kwargs)
            finally:
                with torch.no_grad():
                    for buffer, value in zip(buffers, values, strict=True):
                        buffer.copy_(value)


def _is_torchs_norm(part: nn.Module) -> bool:
    """Whether its running statistics do not enter into what it gives in training."""
    return isinstance(part, _NormBase) and type(part).forward.__module__.startswith("torch.")


def _is_cache(leaf: Any) -> bool:
    """Whether it is one of transformers' caches; by name, for it need not be there."""
    return any(base.__name__ == "Cache" and base.__module__.startswith("transformers.") for base in type(leaf).__mro__)


def _version_of(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _explained(name: str) -> Any:
    """Hooks over checkpoint's that say of which segment its error is, and what to change."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in every torch
    hooks = top(True) if top is not None else None
    if hooks is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(hooks[0], functools.partial(_unpack, hooks[1], name))


def _unpack(unpack: Callable[[Any], torch.Tensor], name: str, packed: Any) -> torch.Tensor:
    try:
        return unpack(packed)
    except CheckpointError as error:
        error.add_note(
            f"This was the segment {name} of offload_activations(recompute=...). Its forward did something else when it ran again. "
            "Let it depend on nothing but its inputs, parameters and torch's random numbers, or leave it out of recompute."
        )
        raise
