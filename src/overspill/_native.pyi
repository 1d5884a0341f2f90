"""The native core (csrc/bindings/native.cpp): addresses as integers, lengths in elements. Callers: `optim.native`, `tiers.checksums`."""

from collections.abc import Sequence

def update_ranges(
    *,
    rule: str,
    state_format: str,
    parameter_dtype: str,
    gradient_dtype: str,
    num_elements: int,
    parameter: int,
    gradient: int,
    master: int,
    moments: Sequence[int],
    exponents: Sequence[int],
    ranges: int,
    num_ranges: int,
    scalars: Sequence[Sequence[float]],
    num_threads: int = 0,
    isa: str = "",
    with_stats: bool = True,
) -> tuple[int, float]: ...
def all_finite(data: int, *, dtype: str, num_elements: int, num_threads: int = 0, isa: str = "") -> bool: ...
def scale_in_place(data: int, *, num_elements: int, factor: float, summand: float, num_threads: int = 0, isa: str = "") -> None: ...
def crc32c_blocks(data: int, num_bytes: int, *, block_bytes: int, portable: bool = False) -> list[int]: ...
def supported_isas() -> list[str]: ...
def default_num_threads() -> int: ...
