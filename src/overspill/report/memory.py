"""Host memory of this process, as the kernel counts it.

`VmHWM` is the most resident memory so far: heap, pinned buffers, mapped files, the Python interpreter and torch's code. It
is what an out-of-memory killer goes by, so it is what a budget is held against. Linux only.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from overspill.units import KIB

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_host_peak() -> bool:
    """Let the peak start again from what is resident now; False where the kernel or a container does not permit it."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")
        return True
    return False


def host_peak_bytes() -> int:
    """Most resident bytes since the process started, or since `reset_host_peak` (VmHWM)."""
    return _status_bytes("VmHWM")


def host_resident_bytes() -> int:
    """Resident bytes now (VmRSS)."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise OSError(f"{_STATUS} has no {field}")
