"""What a model does around its blocks, learnt by running it once on eight tokens; and what it must not do.

The run is the model's own forward on the CPU, in training mode, with every parameter a zero that takes no memory (pages of a private
mapping that are only read), without and with a padding mask. Stand-ins record its calls; one block of each kind runs for real.
A dispatch mode sees every operation of torch in between and knows whose storage it touches. So it is found and not guessed

* which parameters the embedding reads (before the first block) and which the tail (after the last);
* how blocks return their hidden states, in which dtype, and with which router logits;
* which recorded tensors depend on the embedding's parameters (side inputs);
* how many positions a table of position embeddings before the blocks has;

and a model is refused, by name and with the reason, whose forward

* operates on hidden states or reads parameters between its blocks, or reads an inner block's output after the last;
* lets the tail depend on what the embedding computed, other than through the blocks;
* writes to buffers (but for rotary embeddings outside the blocks, `rotary_state`), or, in a block, to the hidden states
  it was given or to a recorded argument;
* gives its blocks, or its head, hidden states of another shape than [B, T, hidden size];
and, in `blocks`, one that shares a parameter between blocks, or between a block and the rest; has an encoder; has several stacks.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from overspill.errors import UnsupportedModelError
from overspill.huggingface.rotary_state import RotaryStates
from overspill.huggingface.side_outputs import SideOutputTaps
from overspill.huggingface.stand_ins import CallRecorder, ReturnShape, StandInStack
from overspill.huggingface.tail import forward_replaced, last_hidden_state
from overspill.huggingface.templates import ParameterSlots, lazy_zeros

NUM_TOKENS = 8
"""Of the run; chosen, not tuned: more than one, and cheap at any width."""

_RECORDINGS = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Settings of a configuration that make a forward keep what passes by; arguments of the same names override them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the run showed."""

    embedding_names: frozenset[str]
    body_names: frozenset[str]
    """Read between the last block and `last_hidden_state`."""
    head_names: frozenset[str]
    """Read from `last_hidden_state` to the logits."""
    kinds: Mapping[str, str]
    """Block -> the first block of its kind."""
    returns: Mapping[str, ReturnShape]
    side_paths: frozenset[tuple[str, str]]
    num_side_outputs: Mapping[str, int]
    hidden_dtypes: Mapping[str, torch.dtype]
    """Unit -> dtype of the hidden states that it returns; the embedding's under "embedding"."""
    max_positions: int | None
    """Longest sequence that the tables of position embeddings before the blocks can take; None without such a table."""
    writes_inputs: bool
    """Whether its forward changes what it is called with in place: it is entered several times over one micro-batch."""


def fixed_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """What every call of the model's forward gets, so that its configuration can stay as it is: no cache, no recorded intermediates.

    Router logits are collected by `side_outputs` and not by the model.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    configs = (model.config, model.config.get_text_config())
    switched_on = [name for name in _RECORDINGS if any(getattr(config, name, False) for config in configs)]
    return {"use_cache": False} | {name: False for name in switched_on if takes_any or name in names}


def inspect_model(
    model: PreTrainedModel,
    owner: PreTrainedModel,
    stack: StandInStack,
    taps: SideOutputTaps,
    *,
    kinds: Mapping[str, str],
    outer: ParameterSlots,
    slots: Mapping[str, ParameterSlots],
    rotary: RotaryStates,
) -> Inspection:
    """Run `model` on eight tokens and see (the module's docstring).

    Args:
        owner: the module whose forward loops over the blocks.
        stack: installed in their place.
        kinds: as `blocks.find_kinds` gave them.
        outer: parameters of everything but the blocks.
        slots: parameters of each block.
        rotary: reset before each pass and at the end.
    """
    run = _InspectionRun(model, owner, stack, taps, kinds, outer, slots, rotary)
    modes = {module: module.training for module in (*model.modules(), *(m for block in stack.blocks for m in block.modules()))}
    model.train()
    try:
        with torch.random.fork_rng(devices=[]), _without_flash_attention(model):
            for attention_mask in (None, torch.tensor([[0, 0] + [1] * (NUM_TOKENS - 2)])):
                run.run(attention_mask)
    except (UnsupportedModelError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be streamed: its forward failed on {NUM_TOKENS} tokens: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.__dict__["training"] = mode
        rotary.reset()
    return run.result()


class _InspectionRun:
    def __init__(
        self,
        model: PreTrainedModel,
        owner: PreTrainedModel,
        stack: StandInStack,
        taps: SideOutputTaps,
        kinds: Mapping[str, str],
        outer: ParameterSlots,
        slots: Mapping[str, ParameterSlots],
        rotary: RotaryStates,
    ) -> None:
        self.rotary = rotary
        self.max_positions: int | None = None
        self.writes_inputs = False
        self.model, self.owner, self.stack, self.taps, self.outer, self.slots = model, owner, stack, taps, outer, slots
        self.touched: dict[str, set[str]] = {"prefix": set(), "body": set(), "head": set()}
        self.returns: dict[str, ReturnShape] = {}
        self.side_paths: set[tuple[str, str]] = set()
        self.num_side_outputs: dict[str, int] = {}
        self.hidden_dtypes: dict[str, torch.dtype] = {}
        self.kinds = kinds

    def run(self, attention_mask: Tensor | None) -> None:
        zeros = {name: lazy_zeros(self.outer.placeholder(name)) for name in self.outer.places}
        floating = {name: tensor.requires_grad_() for name, tensor in zeros.items() if tensor.is_floating_point()}
        watcher = _Watcher(self.model, zeros)
        trainable = [tensor for name, tensor in floating.items() if self.outer.placeholder(name).requires_grad]
        visitor = _InspectionVisitor(self, watcher, _InspectionRecorder(self.stack, trainable, watcher))
        forward = self.owner.forward

        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            watcher.phase = "head"
            self.validate_shape("its head", last_hidden_state(output), any_size=True)
            return output

        self.rotary.reset()
        buffers = [
            (f"{path}.{name}", module, name, buffer, buffer._version)
            for path, module in self.model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and module not in self.rotary.modules
        ]
        inputs = {
            **fixed_inputs(self.model),
            "input_ids": torch.arange(NUM_TOKENS).remainder(2).unsqueeze(0),
            "attention_mask": attention_mask,
        }
        with (
            torch.enable_grad(),
            self.outer.filled(zeros),
            self.stack.visited_by(visitor),
            forward_replaced(self.owner, watched_forward),
            watcher,
        ):
            output = self.model(**inputs, return_dict=True)
        self.writes_inputs |= any(tensor._version for tensor in inputs.values() if isinstance(tensor, Tensor))
        if watcher.phase != "head" or len(visitor.recorder.calls) != len(self.stack.names):
            _refuse(self.model, f"it ran {len(visitor.recorder.calls)} of its {len(self.stack.names)} blocks")
        for path, module, name, buffer, version in buffers:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                _refuse(self.model, f"it writes to the buffer {path}")
        if attention_mask is None:  # positions count from 0 to 7
            self.max_positions = min(watcher.table_rooms, default=None)
        for phase, names in self.touched.items():
            names |= watcher.touched[phase]
        self._refuse_shortcuts(output.logits, floating)
        self.side_paths |= visitor.recorder.side_paths

    def _refuse_shortcuts(self, logits: Tensor, floating: Mapping[str, Tensor]) -> None:
        tail = self.touched["body"] | self.touched["head"]
        prefix_only = [name for name in floating if name in self.touched["prefix"] - tail]
        if not prefix_only or not logits.requires_grad:
            return
        gradients = torch.autograd.grad(logits.sum(), [floating[name] for name in prefix_only], allow_unused=True)
        for name, gradient in zip(prefix_only, gradients, strict=True):
            if gradient is not None:
                _refuse(self.model, f"its tail reads what was computed from {name} before the blocks")

    def validate_shape(self, reader: str, hidden: Any, *, any_size: bool = False) -> None:
        size = hidden.shape[-1:] if any_size else (self.model.config.get_text_config().hidden_size,)
        wanted = (1, NUM_TOKENS, *size)
        if not isinstance(hidden, Tensor) or tuple(hidden.shape) != wanted:
            what = f"hidden states of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
            _refuse(self.model, f"{reader} gets {what} for {NUM_TOKENS} tokens where {wanted} is expected (several streams?)")

    def learn_block(self, unit: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run one block of a kind for real; note how it returns."""
        zeros = {name: lazy_zeros(self.slots[unit].placeholder(name)) for name in self.slots[unit].places}
        block = self.stack.blocks[self.stack.names.index(unit)]
        given = {"the hidden states": hidden, **{f"argument {k}": leaf for k, leaf in enumerate(tree_leaves((args, kwargs)))}}
        written = {name: tensor for name, tensor in {**given, **dict(block.named_buffers())}.items() if isinstance(tensor, Tensor)}
        versions = {name: tensor._version for name, tensor in written.items()}
        with torch.no_grad(), self.slots[unit].filled(zeros), self.taps.listening() as side_outputs:
            output = block(*args, **kwargs)
        for name, tensor in written.items():
            if tensor._version != versions[name] or (name in dict(block.named_buffers()) and block.get_buffer(name) is not tensor):
                _refuse(self.model, f"{unit} writes to {name}")
        returned = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(returned, Tensor) or returned.shape != hidden.shape:
            what = f"hidden states of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else f"a {type(returned).__name__}"
            _refuse(self.model, f"{unit} gets hidden states of shape {tuple(hidden.shape)} and returns {what}")
        extras = tuple(item is not None for item in output[1:]) if isinstance(output, tuple) else None
        self.returns[unit] = ReturnShape(extras=extras)
        self.num_side_outputs[unit] = len(side_outputs)
        self.hidden_dtypes[unit] = returned.dtype

    def result(self) -> Inspection:
        return Inspection(
            embedding_names=frozenset(self.touched["prefix"]),
            body_names=frozenset(self.touched["body"]),
            head_names=frozenset(self.touched["head"]),
            kinds=self.kinds,
            returns={name: self.returns[first] for name, first in self.kinds.items()},
            side_paths=frozenset(self.side_paths),
            num_side_outputs={name: self.num_side_outputs[first] for name, first in self.kinds.items()},
            hidden_dtypes=self.hidden_dtypes | {name: self.hidden_dtypes[first] for name, first in self.kinds.items()},
            max_positions=self.max_positions,
            writes_inputs=self.writes_inputs,
        )


class _InspectionRecorder(CallRecorder):
    """Finds side inputs instead of knowing them."""

    def __init__(self, stack: StandInStack, trainable: list[Tensor], watcher: _Watcher) -> None:
        super().__init__(stack)
        self.side_paths: set[tuple[str, str]] = set()
        self._trainable = trainable
        self._watcher = watcher

    def is_side_input(self, unit: str, path: str, tensor: Tensor) -> bool:
        if self._watcher.is_block_output(tensor):
            self.stack.refuse(f"{unit} gets another block's hidden states as {path}")
        if not tensor.requires_grad or not self._trainable:
            return False
        gradients = torch.autograd.grad(tensor.sum(), self._trainable, allow_unused=True, retain_graph=True)
        is_side = any(gradient is not None for gradient in gradients)
        if is_side:
            self.side_paths.add((unit, path))
        return is_side


class _InspectionVisitor:
    """Records, runs one block of each kind, returns fresh hidden states so that every use of them shows."""

    def __init__(self, run: _InspectionRun, watcher: _Watcher, recorder: _InspectionRecorder) -> None:
        self.run, self.watcher, self.recorder = run, watcher, recorder

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.watcher.phase = None
        unit = self.run.stack.names[index]
        hidden = self.recorder.record(index, args, kwargs).detach()
        first = self.run.kinds[unit]
        if index == 0:
            self.run.validate_shape(unit, hidden)
            self.run.hidden_dtypes["embedding"] = hidden.dtype
        if first not in self.run.returns:
            self.run.learn_block(unit, hidden, *self.recorder.block_arguments().rebuilt(unit, hidden))
        # No leaf, so that an operation in place gets as far as the watcher.
        fresh = torch.zeros_like(hidden, dtype=self.run.hidden_dtypes[first], requires_grad=True).clone()
        self.watcher.watch_output(index, fresh)
        self.recorder.returned(fresh)
        self.watcher.phase = "between" if index < len(self.run.stack.names) - 1 else "body"
        return self.run.returns[first].mirrored(fresh)


class _Watcher(TorchDispatchMode):
    """Sees every operation: which parameters and which hidden states it touches, in which phase of the forward."""

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.phase: str | None = "prefix"
        """"prefix" | "between" | "body" | "head"; None while a stand-in works."""
        self.touched: dict[str, set[str]] = {"prefix": set(), "body": set(), "head": set()}
        self.table_rooms: list[int] = []
        """Longest sequence for each table that was read row by row, at one position after the other, before the blocks."""
        self._owner_of = {_address(tensor): name for name, tensor in parameters.items() if tensor.numel()}
        self._outputs: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an address is not used twice while its tensor lives

    def watch_output(self, index: int, hidden: Tensor) -> None:
        self._outputs[_address(hidden)] = index
        self._kept.append(hidden)

    def is_block_output(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.phase is not None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._look_at(func, tensor)
            if self.phase == "prefix" and func in (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor):
                self._look_for_positions(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look_for_positions(self, table: Tensor, index: Any) -> None:
        rows = index[0] if isinstance(index, list | tuple) and len(index) == 1 else index
        if not (isinstance(rows, Tensor) and table.dim() == 2 and table.is_floating_point() and rows.numel() == NUM_TOKENS):
            return
        first, *others = rows.flatten().tolist()
        if others == list(range(first + 1, first + NUM_TOKENS)):  # the tokens' own rows alternate between 0 and 1
            self.table_rooms.append(table.shape[0] - first)

    def _look_at(self, func: Any, tensor: Tensor) -> None:
        address = _address(tensor)
        output, parameter = self._outputs.get(address), self._owner_of.get(address)
        if self.phase == "between" and (output is not None or parameter is not None):
            what = f"the hidden states of block {output}" if output is not None else f"the parameter {parameter}"
            _refuse(self.model, f"it computes between its blocks ({func} on {what})")
        if output is not None and output != len(self._outputs) - 1:
            _refuse(self.model, f"it reads the output of block {output} after its last block ({func})")
        if parameter is not None and self.phase is not None:
            self.touched[self.phase].add(parameter)


@contextmanager
def _without_flash_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention kernels that only a GPU has give way to eager attention: what the blocks return is the same."""
    configs: dict[int, Any] = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values() if "flash" in (config._attn_implementation or "")]
    for config, _ in before:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"{type(model).__name__} cannot be streamed: {reason}")
