"""What everything that talks to a CUDA device asks for."""

from __future__ import annotations

import contextlib
import os

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where users choose settings of torch's allocator."""


def cuda_index(device: torch.device) -> int:
    """Number of a CUDA device; of `cuda` alone, the current one's."""
    return torch.cuda.current_device() if device.index is None else device.index


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on `device`, in the order of its current stream; nobody waits.

    From pageable memory a copy to CUDA would wait for what the device has to do before. torch keeps the pinned copy while it is read.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def forget_workspaces() -> None:
    """Let the matrix library's workspaces go: each stream has one of its own, of tens of MiB, which outlives it. Where work goes on, the
    next product gets a new one."""
    with contextlib.suppress(AttributeError):  # private to torch; one without it keeps them
        torch._C._cuda_clearCublasWorkspaces()


def give_back_unused() -> None:
    """Let torch return the device memory that nobody uses, the matrix library's workspaces too."""
    forget_workspaces()
    torch.cuda.empty_cache()


def let_segments_grow() -> bool:
    """Let torch's allocator extend what it has reserved of a GPU, page for page, and not reserve in pieces of fixed size; of the process.

    Pieces of fixed size leave holes that no later request fits, 9 % of what a session of 1.10B took. What the user has chosen stays:
    `PYTORCH_ALLOC_CONF=expandable_segments:False` keeps pieces, and an allocator that is not torch's own is left alone. Settings that are
    not told again go back to torch's defaults (`max_split_size_mb`, and others), so all that were chosen are told with this one.

    Returns:
        Whether it was asked for here. A platform that cannot do it warns, and goes on as before.
    """
    told = [os.environ.get(name, "") for name in ALLOCATOR_VARIABLES]
    current = getattr(torch._C, "_accelerator_getAllocatorSettings", None)  # of 2.13; in 2.11 what was chosen in code is not known
    chosen = current() if current is not None else next(filter(None, told), "")
    if any("expandable_segments" in one for one in (chosen, *told)) or torch.cuda.get_allocator_backend() != "native":
        return False
    # torch 2.11 has the second alone, 2.13 warns of it. The first allocation of a process may be long past: later segments grow.
    choose = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    choose(",".join(filter(None, (chosen.strip(" ,"), "expandable_segments:True"))))
    return True
