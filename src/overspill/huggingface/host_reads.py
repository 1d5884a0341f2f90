"""What a model's own code asks a tensor for on its way to the blocks: `if mask.all()`, `positions.item()`.

On a GPU each such read waits for all that was launched before it, and what comes after it is launched while the device has nothing to do
(1.10B on an H100: the tail and the embedding's backward took 5 of 200 ms longer). The forward of one micro-batch is entered three times,
for its embedding, its tail, and the embedding's backward, with the same inputs: the second and the third time the model gets the answers
that the first one read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as module_calls
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack, _pop_mode, _push_mode

READS = frozenset({Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item})
Place = tuple[tuple[CodeType, int], ...]
Question = tuple[Place, Callable[..., Any], torch.Size, torch.dtype, torch.device]
"""By which it is told whether a later entry still asks what the first one did; most tensors that are asked are a single bool."""
_OURS = str(Path(__file__).parent)


class HostReads:
    """The reads of one micro-batch's forward.

    with reads.noted():  # the first time
        model(**inputs)
    with reads.answered():  # later, with the same inputs
        model(**inputs)
    """

    def __init__(self) -> None:
        self._found: list[tuple[Question, Any]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Ask, and write down; what was written down before is forgotten."""
        found: list[tuple[Question, Any]] = []
        with _Noting(found):
            yield
        self._found = found

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Answer, in order, as long as the same is asked for; after that, and where nothing was noted, tensors are asked as ever."""
        if not self._found:
            yield
            return
        with _Answering(self._found):
            yield


class _Reading(TorchFunctionMode):
    def __exit__(self, *error: object) -> None:
        if _get_current_function_mode() is self:  # `leave` may have been there first
            _pop_mode()


def leave() -> None:
    """After an interruption, which may come between any two lines: nobody's reads are noted or answered on this thread."""
    modes = _get_current_function_mode_stack()
    if any(isinstance(mode, _Reading) for mode in modes):
        for _ in modes:
            _pop_mode()
        for mode in modes:
            if not isinstance(mode, _Reading):
                _push_mode(mode)


def pause() -> TorchFunctionMode | None:
    """Before what is ours within a model's code; no context manager, which an interruption could have end after `leave`."""
    mode = _get_current_function_mode()
    if not isinstance(mode, _Reading):
        return None
    _pop_mode()
    return mode


def resume(mode: TorchFunctionMode | None) -> None:
    if mode is not None:
        _push_mode(mode)


class _Noting(_Reading):
    def __init__(self, found: list[tuple[Question, Any]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in READS:
            self._found.append((_question(func, args[0]), result))
        return result


class _Answering(_Reading):
    def __init__(self, found: Sequence[tuple[Question, Any]]) -> None:
        super().__init__()
        self._left = list(reversed(found))

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in READS:
            question, answer = self._left.pop() if self._left else (None, None)
            if question == _question(func, args[0]):
                return answer
            self._left.clear()
        return func(*args, **(kwargs or {}))


def _question(func: Callable[..., Any], tensor: Tensor) -> Question:
    return _place(), func, tensor.shape, tensor.dtype, tensor.device


def _place() -> Place:
    """Where the model asks: the instruction, and those that led to it since its module was called."""
    found = []
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename != module_calls.__file__:
        if not frame.f_code.co_filename.startswith(_OURS):  # the tail stands around the owner's forward
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)
