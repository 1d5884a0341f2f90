"""Where machine files are kept, and which one holds here.

`$XDG_CACHE_HOME/overspill/machine-<key>.json` (`~/.cache` without the variable), a file for each machine and computing device, so that
machines which share a home do not overwrite each other's.

Rules:

1. A cached file of another machine (it was copied), or of other software, is warned about and not used. A run then predicts from assumed
   rates, and `overspill probe` measures again.
2. A file that the user names is used, and warned about where it is another machine's.
3. A cache that cannot be read or written costs a warning, never a run.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from overspill.errors import StorageError
from overspill.probe.identity import read_identity
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import (
    MachineFile,
    MachineIdentity,
    machine_differences,
    parse_machine_file,
    software_differences,
)
from overspill.spec.measured_hardware import hardware_from
from overspill.tiers.calls import OS_CALLS, SpacePolicy, SpaceWaiter, write_durably


def cache_path(identity: MachineIdentity) -> Path:
    """Where the file of this machine is, or would be.

    Raises:
        StorageError: there is neither a cache directory nor a home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if os.path.isabs(base) else _home() / ".cache"  # a relative one is to be ignored, says the XDG standard
    except RuntimeError as error:
        raise StorageError(f"there is no home directory for the cache ({error}); set XDG_CACHE_HOME, or name a file with --out") from error
    return folder / "overspill" / f"machine-{identity.key}.json"


def _home() -> Path:
    """The home directory.

    Raises:
        RuntimeError: there is none. An empty or relative HOME, which would mean the root or the working directory, is none.
    """
    home = Path.home()
    if not os.path.isabs(os.environ.get("HOME", str(home))):
        raise RuntimeError(f"HOME is {os.environ['HOME']!r}")
    return home


def read_machine_file(path: Path) -> MachineFile:
    """The machine file at `path`.

    Raises:
        ValueError: it is no machine file, or of another format version.
        StorageError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"there is no machine file {path}; make one with `overspill probe --out {path}`") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no machine file: it is not text ({error.reason})") from error
    except OSError as error:
        raise StorageError(f"the machine file {path} cannot be read: {error.strerror} (errno {error.errno})") from error
    return parse_machine_file(text, path)


def write_machine_file(path: Path, file: MachineFile) -> None:
    """Put `file` there, whole or not at all; folders are made.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, file.to_json().encode() + b"\n", calls=OS_CALLS, space=SpaceWaiter(SpacePolicy(max_wait_s=0)))
    except OSError as error:
        raise StorageError(
            f"the machine file {path} cannot be written: {error.strerror} (errno {error.errno}); write it elsewhere with --out FILE, and "
            "give that to --machine"
        ) from error


def staleness(file: MachineFile, here: MachineIdentity) -> str:
    """Why a file does not hold here, in words; empty: it does."""
    other = machine_differences(file, here)
    if other:
        return f"it is another machine's ({'; '.join(other)})"
    changed = software_differences(file, here)
    return f"the software has changed since ({'; '.join(changed)})" if changed else ""


def load_hardware(
    capacities: HardwareSpec,
    device: torch.device,
    ssd_places: Sequence[str],
    *,
    state_format: str = "fp32",
    machine: str | Path | None = None,
) -> HardwareSpec:
    """`capacities` with the rates of this machine's file, if there is one that holds; else as they are.

    Args:
        capacities: what is free now, with assumed rates.
        machine: a file to use in place of the cached one, also if it is another machine's.

    Raises:
        ValueError: the file that was named is no machine file.
        StorageError: it cannot be read.
    """
    here = read_identity(device, ssd_places)
    if machine is not None:
        file, path = read_machine_file(Path(machine)), Path(machine)
        reason = staleness(file, here)
        if reason:
            _warn(f"rates are those of {path}, as asked, although {reason}")
        if machine_differences(file, here):
            # Its memory says nothing about this one's.
            file = dataclasses.replace(
                file,
                footprint=None,
                capacities=dataclasses.replace(
                    file.capacities, host_budget_bytes=None, memory_total_after_bytes=file.capacities.memory_total_bytes
                ),
            )
    else:
        try:
            path = cache_path(here)
        except StorageError:
            return capacities  # no home: nothing can have been kept
        try:
            if not path.exists():
                return capacities
            file = read_machine_file(path)
        except (ValueError, OSError, StorageError) as error:
            _warn(f"{error}; times are predicted from assumed rates")
            return capacities
        reason = staleness(file, here)
        if reason:
            _warn(f"{path} is not used, because {reason}; times are predicted from assumed rates; `overspill probe` measures anew")
            return capacities
    return hardware_from(file, capacities, name=path.name, state_format=state_format, ssd=here.ssd)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
