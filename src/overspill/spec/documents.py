"""Frozen documents as JSON and back.

Everything that crosses a layer is a frozen dataclass; this file writes any of them as JSON with sorted, indented keys (so
that two files diff line by line) and reads them back by their type hints. Understood are dataclasses, enums, tuples,
mappings with string keys, optionals, unions of dataclasses (told apart by a constant field `name`), and plain numbers, strings
and booleans: nothing else belongs into a document.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Document = TypeVar("Document")


def to_plain(value: Any) -> Any:
    """Dicts, lists and scalars that `json` can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    return json.dumps(to_plain(value), indent=2, sort_keys=True)


def from_json(kind: type[Document], text: str) -> Document:
    """A document of type `kind` from its JSON.

    Raises:
        ValueError: the text is not JSON, or a field is unknown or missing; the message names it.
    """
    return from_plain(kind, json.loads(text))


def from_plain(kind: type[Document], plain: Any) -> Document:
    """A document of type `kind` from what `to_plain` made of it.

    Raises:
        ValueError: a field is unknown or missing; the message names it.
    """
    return _build(kind, plain, kind.__name__)


def _build(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(_pick([item for item in arguments if item is not type(None)], value), value, where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if origin is tuple:
        item = arguments[0]
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(item, element, where) for element in value)
        return tuple(_build(item, element, where) for item, element in zip(arguments, value, strict=True))
    if origin in (dict, Mapping):
        return {key: _build(arguments[1], element, f"{where}[{key}]") for key, element in value.items()}
    return value


def _pick(kinds: list[Any], value: Any) -> Any:
    """Which member of a union `value` is: the dataclass whose constant field `name` it has; else the first."""
    for kind in kinds:
        if isinstance(value, dict) and "name" in value and value["name"] == _constants(kind).get("name"):
            return kind
    return kinds[0]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _given(kind: Any) -> frozenset[str]:
    """Fields that an object is made with."""
    return frozenset(field.name for field in dataclasses.fields(kind) if field.init)


@functools.cache
def _constants(kind: Any) -> dict[str, Any]:
    """Fields that are written but not given: they say which dataclass it is."""
    return {field.name: field.default for field in dataclasses.fields(kind) if not field.init} if dataclasses.is_dataclass(kind) else {}


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with the fields of {kind.__name__}, got {type(value).__name__}")
    hints, names, constants = _hints(kind), _given(kind), _constants(kind)
    for name, constant in constants.items():
        if value.get(name, constant) != constant:
            raise ValueError(f"{where}.{name}: {value[name]!r} is not a {kind.__name__}, whose {name} is {constant!r}")
    value = {name: item for name, item in value.items() if name not in constants}
    unknown = sorted(set(value) - names)
    if unknown:
        raise ValueError(f"{where}: unknown field(s) {', '.join(unknown)}; {kind.__name__} has {', '.join(sorted(names))}")
    try:
        return kind(**{name: _build(hints[name], value[name], f"{where}.{name}") for name in value})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
