"""Hooks with which every saved tensor is gone at once, and comes back at the moment it is wanted: for the least peak that a net has.

Nothing is stored: what comes back has the sizes and the order of strides, and zeros. So the gradients are no gradients, the times no times,
and no update may follow; but what is allocated, and in which order, is what backward cannot do without. Rules:

1. Left alone is what a real tool leaves alone as well: parameters and views of them, small tensors, and numbers that are no floats.
2. What two nodes saved comes back for each. It is let go with the node; so nothing is counted twice but what one op wants twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class _Sizes(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class JustInTime(torch.autograd.graph.saved_tensors_hooks):
    """For one net; tensors below `min_bytes` are left alone."""

    def __init__(self, net: nn.Module, min_bytes: int) -> None:
        self._min_bytes = min_bytes
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in self._parameters:
            return tensor
        if tensor.numel() * tensor.itemsize < self._min_bytes or not tensor.is_floating_point():
            return tensor.detach()  # not the tensor itself: one that knows its own graph would keep it alive
        return _Sizes(tuple(tensor.shape), _dense(tensor), tensor.dtype, tensor.device)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Sizes):
            return packed
        return torch.empty_strided(packed.size, packed.stride, dtype=packed.dtype, device=packed.device).zero_()


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides in the same order without holes: what a view of a part needs by itself."""
    stride, step = [0] * tensor.dim(), 1
    for axis in sorted(range(tensor.dim()), key=lambda axis: (tensor.stride(axis), -axis)):
        stride[axis], step = step, step * max(1, tensor.shape[axis])
    return tuple(stride)
