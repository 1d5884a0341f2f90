"""`--config FILE.yaml`: the flags of a command in a file, by their names.

    model: Qwen/Qwen2.5-0.5B
    data: pairs.jsonl
    out: runs/first
    lr: 2e-5
    micro-batch: 4
    packing: true

Rule 1. Every argument and flag may stand in the file, with `-` or `_` in its name; one on the command line wins, and `--no-packing` there
        undoes `packing: true` here.
Rule 2. A value is checked as its flag is. An unknown key, a key twice, or anything but a plain value (rule 3 apart) is refused.
Rule 3. A flag that may be repeated takes a list, or one value.
Rule 4. `null` is the same as leaving the key out.

How: the file becomes the command's default map before its other parameters are looked at, so there is one place that knows the flags.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from overspill.cli.failures import failures_as_exit_codes
from overspill.errors import StorageError
from overspill.report.progress import replace_text

_NOT_IN_A_FILE = {"config", "help"}


def use_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """The eager callback of `--config`: what the file says is the default of every parameter that is not on the command line."""
    if path is not None:
        parameters = context.command.params
        known = [str(parameter.name) for parameter in parameters]
        several = [str(parameter.name) for parameter in parameters if getattr(parameter, "multiple", False)]
        with failures_as_exit_codes(Console(stderr=True), debug=False):
            context.default_map = {**(context.default_map or {}), **read_config(path, known, several)}
    return path


def read_config(path: Path, known: Iterable[str], several: Iterable[str] = ()) -> dict[str, Any]:
    """Parameter name -> value, of a YAML file.

    Args:
        known: names of the parameters, with underscores.
        several: those of them that may be given more than once: a list, or one value.

    Raises:
        ValueError: no such file, no YAML, an unknown key (with the nearest known one), a value that is a list or mapping.
    """
    import yaml

    known = [name for name in known if name not in _NOT_IN_A_FILE]
    try:
        with path.open("rb") as file:
            node = yaml.SafeLoader(file).get_single_node()
    except OSError as error:
        raise ValueError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ValueError(f"--config {path} is a YAML {node.id}, expected `flag: value` lines")
    config: dict[str, Any] = {}
    seen: set[str] = set()
    for key_node, value in node.value if node is not None else ():
        key = str(key_node.value)
        name = key.replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"--config {path}: unknown key {key!r}; the nearest is {_spelled(nearest)!r}")
        if name in seen:
            raise ValueError(f"--config {path}: {_spelled(name)!r} stands there twice; leave one out")
        seen.add(name)
        if name in several and isinstance(value, yaml.SequenceNode):
            if not all(isinstance(item, yaml.ScalarNode) for item in value.value):
                raise ValueError(f"--config {path}: {key!r} is a list of something else than plain values")
            config[name] = [item.value for item in value.value]
            continue
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"--config {path}: {key!r} is a {value.id}, expected one value")
        if value.tag != "tag:yaml.org,2002:null":
            config[name] = (
                [value.value] if name in several else value.value
            )  # as written: what `2e-5` or `010` means is the flag's to say, not YAML's
    return config


def write_config(path: Path, options: Any) -> None:
    """Write the fields of a dataclass so that `--config` reads them back: the run's record of its own flags.

    Raises:
        StorageError: the file cannot be written.
    """
    import yaml

    plain = {
        _spelled(field.name): _plain(value)
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) is not None and value != []
    }
    try:
        replace_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror} (errno {error.errno})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _spelled(name: str) -> str:
    return name.replace("_", "-")
