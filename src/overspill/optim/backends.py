"""Whether the fused kernels (`fused`, `fused_squares`) can be used on a device, found out once and said once if not.

They need Triton, which CUDA builds of torch bring along, an NVIDIA GPU, and what Triton itself needs (a C compiler for its launcher).
Where one of these is missing, plain torch operations do the same to the same bits, in some twenty times as many passes over memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from overspill.tiers.cuda import cuda_index


def is_fused(device: torch.device | str) -> bool:
    """Whether tensors on `device` are updated by the fused kernels. The first call for a CUDA device compiles and runs a small one."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _works(cuda_index(device))


@functools.cache
def _works(index: int) -> bool:
    """Asks the device itself; warns with the reason if the answer is no."""
    reason = _find_obstacle(torch.device("cuda", index))
    if reason is not None:
        warnings.warn(
            f"the optimizer's fused kernels cannot be used on cuda:{index} ({reason}); updates and gradient norms there take plain torch "
            "operations: the same results, many times slower",
            stacklevel=2,
        )
    return reason is None


def _find_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "they were tested on NVIDIA GPUs only"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        from overspill.optim.fused_squares import sums_of_squares_fused

        found = sums_of_squares_fused([torch.full((3,), 2.0, device=device)]).item()
    except Exception as error:  # Triton's ways to fail are its own: no compiler, no headers, a GPU too old; all are told above
        return f"{type(error).__name__}: {error}"[:300]
    return None if found == 12.0 else f"a trial gave {found}, not 12"
