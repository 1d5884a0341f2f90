"""The native core (csrc/bindings/native.cpp): addresses as integers, lengths in elements. Callers: `optim.native`, `tiers.checksums`."""

def update_adamw(
    *,
    parameter_dtype: str,
    gradient_dtype: str,
    num_elements: int,
    parameter: int,
    gradient: int,
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    gradient_scale: float,
    decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    bias_correction2_sqrt: float,
    eps: float,
    num_threads: int = 0,
    isa: str = "",
) -> None: ...
def all_finite(data: int, *, dtype: str, num_elements: int, num_threads: int = 0, isa: str = "") -> bool: ...
def crc32c_blocks(data: int, num_bytes: int, *, block_bytes: int, portable: bool = False) -> list[int]: ...
def supported_isas() -> list[str]: ...
def default_num_threads() -> int: ...
