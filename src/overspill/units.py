"""Bytes and seconds as people write and read them.

Code counts in base units (`_bytes`, `_s`); GiB and ms exist only here, at the edge where text is parsed or printed.
"""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SUFFIXES = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "pb": 1000**5,
    "tbw": 1000**4,
    "pbw": 1000**5,
}


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as `8GiB`, `1.5 GB`, `4096`, or of a drive's endurance such as `600TBW`; an int passes through.

    Raises:
        ValueError: the text is no size, or is negative; the message lists the suffixes.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative, got {text}")
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    suffix = match.group(2).lower() if match else ""
    if match is None or suffix not in _SUFFIXES:
        raise ValueError(
            f"{text!r} is not a size; write a number and one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB, PB, such as 8GiB, or a whole number "
            "of bytes"
        )
    return round(float(match.group(1)) * _SUFFIXES[suffix])


_LIMITS = ((1024 * GIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))


def format_bytes(num_bytes: float) -> str:
    """A size for people: `1.50 GiB`, `12.0 MiB`, `512 B`."""
    for limit, suffix in _LIMITS:
        if abs(num_bytes) >= limit:
            return f"{num_bytes / limit:.2f} {suffix}"
    return f"{num_bytes:.0f} B"


def format_bytes_up(num_bytes: int) -> str:
    """A size for people that is no smaller when it is read again (`parse_bytes`): what a limit is to be raised by."""
    text, step = format_bytes(num_bytes), next((limit // 100 for limit, _ in _LIMITS if num_bytes >= limit), 1)
    return text if parse_bytes(text) >= num_bytes else format_bytes(num_bytes + step)


def format_seconds(seconds: float) -> str:
    """A duration for people: `1 h 02 min`, `3 min 20 s`, `1.53 s`, `12.5 ms`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms"


def align_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
