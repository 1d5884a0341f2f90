"""What a trace asks of whoever keeps graphs: how many bytes a block's graph stores (`spec.retention`).

The layer `activations`, which keeps graphs, stands beside this one: it is given to `describe_workload` by those above, so that a trace
runs the very code that runs on the device, on tensors without values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn


class RetentionBook(Protocol):
    """What autograd saves in a forward, booked by who keeps its graph (`activations.retaining.Book`)."""

    refusal: str | None
    moved_bytes: int
    num_rebuilt: int

    @property
    def stored_bytes(self) -> int: ...
    def saving(self) -> AbstractContextManager[None]: ...


class OpenBook(Protocol):
    """Opens a book for a block on tensors without values: its module, boundary, weights, and tensors that stay where they are;
    and from how many passes on what follows from others is not rebuilt (`spec.retention`)."""

    def __call__(
        self, block: nn.Module, hidden: Tensor, parameters: Mapping[str, Tensor], fixed: Iterable[Tensor], *, most_passes: float
    ) -> RetentionBook: ...
