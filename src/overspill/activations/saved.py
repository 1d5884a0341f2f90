"""What pack returns: objects that autograd holds for exactly as long as it may unpack them. More kinds are in `rebuild.py`, and in
`retaining.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from overspill.activations.identity import Geometry, changed_in_place, words
from overspill.activations.records import Record


class Bringer(Protocol):
    """The cache, as a saved view sees it."""

    @property
    def device(self) -> torch.device: ...
    def bring(self, record: Record, geometry: Geometry) -> torch.Tensor: ...
    def bury(self, record: Record) -> None: ...


class Saved:
    """What pack returned. The device is where it is wanted; `unpack` gives the tensor, on the device and ready for compute."""

    __slots__ = ()

    @property
    def device(self) -> torch.device:
        raise NotImplementedError(f"{type(self).__name__} has to say where it is wanted")

    def unpack(self) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to say what was saved")


class SavedAlone(Saved):
    """A saved tensor that stays as it is: a detached alias of it, and its version."""

    __slots__ = ("_restore", "_version", "alias")

    def __init__(self, tensor: torch.Tensor, restore: Callable[[], torch.Tensor] | None) -> None:
        self.alias, self._version, self._restore = tensor.detach(), tensor._version, restore

    @property
    def device(self) -> torch.device:
        return self.alias.device

    def unpack(self) -> torch.Tensor:
        alias = self.alias
        if self._restore is not None:  # its owner answers for versions
            refilled = self._restore().untyped_storage()
            return torch.empty(0, dtype=alias.dtype, device=refilled.device).set_(
                refilled, alias.storage_offset(), alias.size(), alias.stride()
            )
        if alias._version != self._version:
            raise changed_in_place(f"a saved tensor ({words(alias)})", self._version, alias._version)
        return alias


class SavedView(Saved):
    """A saved tensor that is a view of a record."""

    __slots__ = ("_cache", "geometry", "record")

    def __init__(self, cache: Bringer, record: Record, geometry: Geometry) -> None:
        self._cache, self.record, self.geometry = cache, record, geometry

    @property
    def device(self) -> torch.device:
        return self._cache.device

    def unpack(self) -> torch.Tensor:
        return self._cache.bring(self.record, self.geometry)

    def __del__(self) -> None:
        self._cache.bury(self.record)
