"""Weights into their homes, and out of them again, one tensor at a time.

In: the tensor as it is on file (or in a live model) is rounded to the parameter's dtype; with bf16 parameters and format
`fp32`, what the rounding cut off goes into the remainder, and with fp16 the fp32 value is the master, so an fp32 file loses
nothing. In the narrow formats a bf16 parameter has no master: it is the nearest bf16, and the rest is lost. Optimizer states
start as zeros, which a new allocation already reads as: nothing is written for them.

Out: the parameters as the model reads them. A file in master precision is not written here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from overspill.errors import ModelFolderError
from overspill.optim import split_master
from overspill.runtime.residency import Residency
from overspill.runtime.visit import TORCH_DTYPES
from overspill.spec.plan import Plan
from overspill.spec.schedule import Role
from overspill.spec.tensors import Bundle, TensorSlot

SLICE_BYTES = 64 * 1024 * 1024
"""Most bytes written to a home at a time. Chosen, not tuned."""


class Homes:
    """Reads and writes whole tensors where they rest; only between steps."""

    def __init__(self, plan: Plan, residency: Residency) -> None:
        self.plan, self.residency = plan, residency
        self._slots: dict[str, tuple[Bundle, TensorSlot]] = {
            slot.tensor.name: (bundle, slot) for bundle in plan.bundles.values() for slot in bundle.slots
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor of the model home, exactly.

        Args:
            tensor: any floating dtype, the tensor's shape, any device.

        Raises:
            ModelFolderError: another shape than the model's.
        """
        bundle, slot = self._slots[name]
        if tuple(tensor.shape) != slot.tensor.shape:
            raise ModelFolderError(f"{name} has shape {tuple(tensor.shape)}, the model expects {slot.tensor.shape}")
        flat = tensor.detach().to("cpu").reshape(-1)
        step = SLICE_BYTES // 4
        for start in range(0, flat.numel(), step):
            self._write_part(bundle, slot.offset + start, flat[start : start + step])

    def _write_part(self, bundle: Bundle, first: int, values: torch.Tensor) -> None:
        dtype = TORCH_DTYPES[bundle.dtype]
        master = values.float()
        remainder = None
        if bundle.dtype == "bfloat16":
            parameter, remainder = split_master(master)
        else:
            parameter = master.to(dtype)
        self.residency.write_home(bundle.name, Role.PARAMETER, first * bundle.element_bytes, _as_bytes(parameter))
        if not bundle.trainable or values.dtype == dtype:
            # The remainder of a bf16 value is zero, as is the home already; an fp16 master still must be written.
            remainder = None
        if bundle.trainable and remainder is not None:
            self._write_state(bundle, "remainder", first, remainder)
        if bundle.trainable and bundle.dtype == "float16":
            self._write_state(bundle, "master", first, master)

    def _write_state(self, bundle: Bundle, field: str, first: int, values: torch.Tensor) -> None:
        """A state field is contiguous only inside its chunk's record."""
        state_format = self.plan.state_layout(bundle.name)
        if field not in {item.name for item in state_format.fields}:
            return
        for chunk in bundle.chunks:
            start, end = max(first, chunk.start), min(first + values.numel(), chunk.end)
            if start < end:
                part = values[start - first : end - first]
                field_start = state_format.field_ranges(chunk.num_elements)[field][0]
                offset = self.plan.state_record_start(bundle.name, chunk.index) + field_start + (start - chunk.start) * part.element_size()
                self.residency.write_home(bundle.name, Role.STATE, offset, _as_bytes(part))

    def read(self, name: str) -> torch.Tensor:
        """One tensor as the model reads it, on the CPU."""
        bundle, slot = self._slots[name]
        flat = self.residency.read_home(
            bundle.name, Role.PARAMETER, slot.offset * bundle.element_bytes, slot.tensor.num_elements * bundle.element_bytes
        )
        return flat.view(TORCH_DTYPES[bundle.dtype]).view(slot.tensor.shape)

    def read_state(self, name: str, field: str) -> torch.Tensor:
        """One state field of one tensor, on the CPU, as it is stored (`exp_avg`, `exp_avg_sq`, ...).

        In the tensor's shape; a field with one value per block of elements (`exp_avg_exponent`) is 1-D.

        Raises:
            ValueError: the tensor's format has no such field.
        """
        bundle, slot = self._slots[name]
        state_format = self.plan.state_layout(bundle.name)
        found = {item.name: item for item in state_format.fields}
        if field not in found or not bundle.trainable:
            has = (", ".join(found) or "none") if bundle.trainable else "none, it is frozen"
            raise ValueError(f"{name} has no state {field!r}; it has {has}")
        layout = found[field]
        parts = []
        for chunk in bundle.chunks:
            start, end = max(slot.offset, chunk.start), min(slot.end, chunk.end)
            if start < end:
                field_start = state_format.field_ranges(chunk.num_elements)[field][0]
                record = self.plan.state_record_start(bundle.name, chunk.index)
                offset = record + field_start + layout.num_values(start - chunk.start) * layout.itemsize
                parts.append(self.residency.read_home(bundle.name, Role.STATE, offset, layout.num_values(end - start) * layout.itemsize))
        values = torch.cat(parts).view(TORCH_DTYPES[layout.dtype])
        return values.view(slot.tensor.shape) if layout.block_elements == 1 else values

    def outgoing(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]]:
        """(name, shape, dtype, read) of every tensor, in the model's order, for the export."""
        for name, (bundle, slot) in self._slots.items():
            yield name, slot.tensor.shape, TORCH_DTYPES[bundle.dtype], functools.partial(self.read, name)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
