"""Two things that everything which talks to a CUDA device asks for."""

from __future__ import annotations

import torch


def cuda_index(device: torch.device) -> int:
    """Number of a CUDA device; of `cuda` alone, the current one's."""
    return torch.cuda.current_device() if device.index is None else device.index


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on `device`, in the order of its current stream; nobody waits.

    From pageable memory a copy to CUDA would wait for what the device has to do before. torch keeps the pinned copy while it is read.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
