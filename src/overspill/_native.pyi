"""The native core (csrc/bindings/native.cpp): addresses as integers, lengths in elements. Callers: `optim.native`, and `tiers`."""

from collections.abc import Callable, Sequence

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
    piece_elements: int = ...,
    prefetch_elements: int = ...,
    is_contiguous: bool = ...,
) -> tuple[int, float]: ...
def start_update_ranges(
    memory: object,
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
    piece_elements: int = ...,
    prefetch_elements: int = ...,
    is_contiguous: bool = ...,
) -> StartedUpdate:
    """`update_ranges` that returns when the core's threads have been given the work; `memory` is whatever owns the arrays."""

class StartedUpdate:
    """Holds the memory until `wait` has returned; dropping it waits as well. Ends after those that were started before it."""

    @property
    def is_done(self) -> bool: ...
    def wait(self) -> None:
        """Without the GIL; raises only what a signal's handler raises."""
    @property
    def began_s(self) -> float:
        """By `time.perf_counter`, and not before the end of the update before it; 0 before the end."""
    @property
    def ended_s(self) -> float:
        """By `time.perf_counter`; 0 before the end."""
    @property
    def stats(self) -> tuple[int, float]:
        """What `update_ranges` returns, when it has ended."""

def all_finite(data: int, *, dtype: str, num_elements: int, num_threads: int = 0, isa: str = "") -> bool: ...
def scale_in_place(
    data: int, *, num_elements: int, factor: float, summand: float, num_arrays: int = 1, num_threads: int = 0, isa: str = ""
) -> None: ...
def crc32c_blocks(data: int, num_bytes: int, *, block_bytes: int, portable: bool = False) -> list[int]: ...
def has_io_uring() -> bool: ...

class FaultTable:
    """Faults as (kind, call index, calls, delay in seconds, bytes that a short call moves or -1); csrc/include/overspill/faults.hpp."""

    def __init__(self, faults: Sequence[tuple[str, int, int, float, int]]) -> None: ...
    def next(self, operation: str) -> tuple[str, int, int, float, int]: ...
    @property
    def log(self) -> list[str]: ...

class IoTransfer:
    @property
    def is_done(self) -> bool: ...
    def wait(self) -> None:
        """Without the GIL; raises only what a signal's handler raises."""
    @property
    def failure(self) -> tuple[int, int, int, int, int] | None:
        """(file, offset, wanted bytes, done bytes, errno or 0)"""
    @property
    def mismatch(self) -> tuple[int, int, int] | None:
        """(block, expected, found)"""
    @property
    def is_cancelled(self) -> bool: ...
    @property
    def ended_s(self) -> float:
        """By `time.perf_counter`; 0 before the end."""
    @property
    def checksums(self) -> list[int]: ...

class IoEngine:
    """csrc/include/overspill/io.hpp; `files` are (descriptor, offset of the first byte). Memory is the caller's until a transfer ends."""

    def __init__(
        self,
        *,
        files: Sequence[tuple[int, int]],
        stripe_bytes: int = 0,
        alignment: int,
        part_bytes: int,
        num_threads: int,
        backend: str = "threads",
        faults: FaultTable | None = None,
        on_full: Callable[[int, int, float], bool] | None = None,
    ) -> None: ...
    def submit(
        self, is_write: bool, address: int, data: int, num_bytes: int, block_bytes: int = 0, expected: Sequence[int] | None = None
    ) -> IoTransfer: ...
    def cancel(self, transfer: IoTransfer) -> bool: ...
    def close(self) -> None: ...
    def locate(self, address: int) -> tuple[int, int]: ...
    @property
    def counters(self) -> tuple[int, int, int, int]:
        """(bytes read, bytes written, bytes copied, calls)"""
    def start_trace(self) -> None: ...
    def take_trace(self) -> list[tuple[float, float, int, bool, int]]:
        """(start, end, bytes, is a write, file) of each request"""
    def register_memory(self, data: int, num_bytes: int) -> None: ...

def let_helpers_give_way() -> None: ...
def supported_isas() -> list[str]: ...
