"""Where every piece is right now: the buffers behind the copies that a schedule talks about.

A copy of a piece is one of four things:

| tier | home (between steps) | borrowed (within a step) |
|---|---|---|
| device | a part of its bundle's *region*, one contiguous allocation | the same, from the device pool; a boundary is a torch tensor |
| host | a part of its bundle's region in (pinned) host memory | a slot of the host pool |
| ssd | a range of the bundle's extent in the store | a range of an extent in scratch, whose file has no name on disk |

Rules:

1. Parameters, gradients and partial gradients of a bundle are contiguous on the device, so that tensors are views; the
   region is borrowed when its first chunk is created and given back when its last chunk is dropped.
2. `create` makes a copy with undefined content; whoever executes the op fills it before anybody reads it.
3. Bytes are counted per piece, as the schedule's rules count them, so predicted and measured peaks must be equal.
4. Extents of scratch are made once, at the plan's largest sizes, and used again by every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from overspill.spec.plan import Plan
from overspill.spec.schedule import Piece, Role, initial_copies
from overspill.spec.tensors import Tier
from overspill.tiers import DeviceMemory, HostMemory, SlotPool, Store, Transfer
from overspill.units import align_up

BUNDLE_ROLES = (Role.PARAMETER, Role.STATE, Role.GRADIENT, Role.PARTIAL_GRADIENT)
RegionKey = tuple[str, Role, str]
"""Bundle, role, and the reader of a partial gradient."""


@dataclasses.dataclass
class _Region:
    """One contiguous allocation for all chunks of a role of a bundle."""

    tensor: torch.Tensor
    """uint8 [bytes of the whole role]."""
    release: Callable[[], None]
    pieces: set[Piece]
    is_home: bool = False


@dataclasses.dataclass
class _Copy:
    num_bytes: int
    tensor: torch.Tensor | None = None
    """uint8 view of the bytes; None on the SSD."""
    value: torch.Tensor | None = None
    """A boundary on the device, in its own shape and dtype."""
    release: Callable[[], None] | None = None
    extent: tuple[Store, str, int] | None = None
    """Store, extent, first byte."""


class Residency:
    """All copies of all pieces of one session.

    Args:
        store: keeps parameters and states that rest on the SSD; None if nothing does.
        scratch: keeps gradients and boundaries that rest on the SSD; None if nothing does.
    """

    def __init__(self, plan: Plan, *, device: DeviceMemory, host: HostMemory, store: Store | None, scratch: Store | None) -> None:
        self.plan = plan
        self.device, self.host, self.store, self.scratch = device, host, store, scratch
        self.device_pool = SlotPool(device, "device")
        self.host_pool = SlotPool(host, "host")
        self._copies: dict[tuple[Piece, Tier], _Copy] = {}
        self._regions: dict[tuple[RegionKey, Tier], _Region] = {}
        self._scratch_extents: set[str] = set()
        self._positions = {unit.name: position for position, unit in enumerate(plan.units)}
        self.resident_bytes = dict.fromkeys(Tier, 0)
        self.peak_bytes = dict.fromkeys(Tier, 0)
        for (piece, tier), size in initial_copies(plan, pending=False).items():
            self._create_home(piece, tier, size)
        self.reset_peaks()

    # -- copies ------------------------------------------------------------------------------------------------------

    def has(self, piece: Piece, tier: Tier) -> bool:
        return (piece, tier) in self._copies

    def create(self, piece: Piece, tier: Tier, num_bytes: int) -> None:
        """Make room for a copy; a home that exists is kept and will be overwritten (rule 2)."""
        if (piece, tier) in self._copies:
            return
        if piece.role not in BUNDLE_ROLES:
            copy = self._create_boundary(piece, tier, num_bytes)
        elif tier is Tier.DEVICE:
            copy = self._create_in_region(piece, num_bytes)
        elif tier is Tier.HOST:
            slot = self.host_pool.acquire(num_bytes)
            copy = _Copy(num_bytes=num_bytes, tensor=slot.tensor, release=slot.release)
        else:
            copy = _Copy(num_bytes=num_bytes, extent=self._scratch_extent(piece, num_bytes))
        self._add(piece, tier, copy)

    def put_boundary(self, piece: Piece, value: torch.Tensor) -> None:
        """Take a hidden state that the device has computed."""
        value = value.contiguous()
        self._add(piece, Tier.DEVICE, _Copy(num_bytes=value.nbytes, tensor=_bytes_of(value), value=value))

    def drop(self, piece: Piece, tier: Tier) -> None:
        """Give a copy's buffer back."""
        copy = self._copies.pop((piece, tier))
        self.resident_bytes[tier] -= copy.num_bytes
        if copy.release is not None:
            copy.release()
        elif tier is Tier.DEVICE and piece.role in BUNDLE_ROLES:
            self._leave_region(piece)

    def bytes_of(self, piece: Piece, tier: Tier) -> torch.Tensor:
        """The copy's bytes, uint8; host or device."""
        tensor = self._copies[piece, tier].tensor
        assert tensor is not None, f"{piece} on {tier} has no memory"
        return tensor

    def boundary(self, piece: Piece) -> torch.Tensor:
        """A hidden state on the device, [samples, tokens, hidden]."""
        value = self._copies[piece, Tier.DEVICE].value
        assert value is not None
        return value

    def fill_boundary(self, piece: Piece, shape: torch.Size, dtype: torch.dtype) -> None:
        """Give a boundary created on the device its shape; its bytes come from a fetch."""
        copy = self._copies[piece, Tier.DEVICE]
        assert copy.tensor is not None
        copy.value = copy.tensor.view(dtype).view(shape)

    def region(self, bundle: str, role: Role, reader: str = "") -> torch.Tensor:
        """All chunks of a role of a bundle on the device, uint8, contiguous."""
        return self._regions[(bundle, role, reader), Tier.DEVICE].tensor

    def start_read(self, piece: Piece, buffer: torch.Tensor) -> Transfer:
        """From the SSD into host memory; `buffer` is lent until the transfer is waited for."""
        extent = self._copies[piece, Tier.SSD].extent
        assert extent is not None
        store, name, offset = extent
        return store.start_read(name, offset, buffer)

    def start_write(self, piece: Piece, buffer: torch.Tensor) -> Transfer:
        """From host memory to the SSD; `buffer` is lent until the transfer is waited for."""
        extent = self._copies[piece, Tier.SSD].extent
        assert extent is not None
        store, name, offset = extent
        return store.start_write(name, offset, buffer)

    def turn_into_gradient(self, bundle: str, reader: str, pieces: list[tuple[Piece, Piece]]) -> None:
        """A partial gradient that is already the gradient: its region changes hands, nothing is copied."""
        region = self._regions.pop(((bundle, Role.PARTIAL_GRADIENT, reader), Tier.DEVICE))
        for partial, gradient in pieces:
            self._copies[gradient, Tier.DEVICE] = self._copies.pop((partial, Tier.DEVICE))
        region.pieces = {gradient for _, gradient in pieces}
        self._regions[(bundle, Role.GRADIENT, ""), Tier.DEVICE] = region

    def keep_as_home(self, piece: Piece, tier: Tier) -> bool:
        """Whether (piece, tier) is where a parameter or state rests between steps."""
        region = self._regions.get((_key(piece), tier))
        return region is not None and region.is_home

    def drop_all_but_homes(self) -> None:
        """After a failed step: give back everything that was borrowed."""
        homes = initial_copies(self.plan, pending=False)
        for piece, tier in [key for key in self._copies if key not in homes]:
            self.drop(piece, tier)

    # -- outside of steps --------------------------------------------------------------------------------------------

    def write_home(self, bundle: str, role: Role, offset: int, source: torch.Tensor) -> None:
        """Copy uint8 CPU bytes into a home at byte `offset` of the role."""
        tier = self._home_tier(bundle, role)
        if tier is Tier.SSD:
            assert self.store is not None
            self.store.start_write(_extent_name(bundle, role), offset, source).wait()
        else:
            self._regions[(bundle, role, ""), tier].tensor[offset : offset + source.numel()].copy_(source)

    def read_home(self, bundle: str, role: Role, offset: int, num_bytes: int) -> torch.Tensor:
        """Bytes of a home as a new uint8 CPU tensor."""
        tier = self._home_tier(bundle, role)
        if tier is Tier.SSD:
            assert self.store is not None
            target = torch.empty(num_bytes, dtype=torch.uint8)
            self.store.start_read(_extent_name(bundle, role), offset, target).wait()
            return target
        return self._regions[(bundle, role, ""), tier].tensor[offset : offset + num_bytes].to("cpu", copy=True)

    def reset_peaks(self) -> None:
        self.peak_bytes = dict(self.resident_bytes)

    def trim(self) -> int:
        """Free idle slots of both pools; their bytes."""
        return self.device_pool.trim() + self.host_pool.trim()

    def close(self) -> None:
        """Give all memory and files back."""
        self._copies.clear()
        self._regions.clear()
        self.device.close()
        self.host.close()
        for store in (self.scratch, self.store):
            if store is not None:
                store.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _add(self, piece: Piece, tier: Tier, copy: _Copy) -> None:
        assert (piece, tier) not in self._copies, f"{piece} is already on {tier}"
        self._copies[piece, tier] = copy
        self.resident_bytes[tier] += copy.num_bytes
        self.peak_bytes[tier] = max(self.peak_bytes[tier], self.resident_bytes[tier])

    def _bytes_per_element(self, piece: Piece, num_bytes: int) -> int:
        chunk = self.plan.bundles[piece.owner].chunks[piece.index]
        return num_bytes // chunk.num_elements

    def _create_home(self, piece: Piece, tier: Tier, num_bytes: int) -> None:
        bundle = self.plan.bundles[piece.owner]
        per_element = self._bytes_per_element(piece, num_bytes)
        offset = bundle.chunks[piece.index].start * per_element
        name = _extent_name(piece.owner, piece.role)
        if tier is Tier.SSD:
            assert self.store is not None, f"{piece} rests on the SSD but there is no store"
            if piece.index == 0:
                self.store.allocate(name, bundle.num_elements * per_element)
            self._add(piece, tier, _Copy(num_bytes=num_bytes, extent=(self.store, name, offset)))
            return
        memory = self.device if tier is Tier.DEVICE else self.host
        key = (_key(piece), tier)
        if key not in self._regions:
            tensor = memory.allocate(name, bundle.num_elements * per_element)
            self._regions[key] = _Region(tensor=tensor, release=lambda: memory.free(name), pieces=set(), is_home=True)
        region = self._regions[key]
        region.pieces.add(piece)
        self._add(piece, tier, _Copy(num_bytes=num_bytes, tensor=region.tensor[offset : offset + num_bytes]))

    def _create_in_region(self, piece: Piece, num_bytes: int) -> _Copy:
        bundle = self.plan.bundles[piece.owner]
        per_element = self._bytes_per_element(piece, num_bytes)
        key = (_key(piece), Tier.DEVICE)
        if key not in self._regions:
            slot = self.device_pool.acquire(bundle.num_elements * per_element)
            if piece.role is Role.PARTIAL_GRADIENT:
                slot.tensor.zero_()
            self._regions[key] = _Region(tensor=slot.tensor, release=slot.release, pieces=set())
        region = self._regions[key]
        region.pieces.add(piece)
        offset = bundle.chunks[piece.index].start * per_element
        return _Copy(num_bytes=num_bytes, tensor=region.tensor[offset : offset + num_bytes])

    def _leave_region(self, piece: Piece) -> None:
        key = (_key(piece), Tier.DEVICE)
        region = self._regions[key]
        region.pieces.discard(piece)
        if not region.pieces:
            del self._regions[key]
            region.release()

    def _create_boundary(self, piece: Piece, tier: Tier, num_bytes: int) -> _Copy:
        if tier is Tier.DEVICE:
            return _Copy(num_bytes=num_bytes, tensor=torch.empty(num_bytes, dtype=torch.uint8, device=self.device.device))
        if tier is Tier.HOST:
            slot = self.host_pool.acquire(num_bytes)
            return _Copy(num_bytes=num_bytes, tensor=slot.tensor, release=slot.release)
        return _Copy(num_bytes=num_bytes, extent=self._scratch_extent(piece, num_bytes))

    def _scratch_extent(self, piece: Piece, num_bytes: int) -> tuple[Store, str, int]:
        """Rule 4. Only two units' boundary gradients exist at a time, so they take turns."""
        assert self.scratch is not None, f"{piece} rests on the SSD but there is no scratch store"
        offset = 0
        if piece.role in BUNDLE_ROLES:
            name = f"{piece.owner}@{piece.reader}.{piece.role.value}"
            per_element = self._bytes_per_element(piece, num_bytes)
            bundle = self.plan.bundles[piece.owner]
            size, offset = bundle.num_elements * per_element, bundle.chunks[piece.index].start * per_element
        else:
            owner = piece.owner if piece.role is Role.BOUNDARY else str(self._positions[piece.owner] % 2)
            name = f"{owner}.{piece.role.value}.{piece.index % self.plan.group_size}"
            size = max(self.plan.boundary_bytes(unit.name) for unit in self.plan.units[1:])
        if name not in self._scratch_extents:
            self.scratch.allocate(name, size)
            self._scratch_extents.add(name)
        return self.scratch, name, offset

    def _home_tier(self, bundle: str, role: Role) -> Tier:
        placement = self.plan.placements[bundle]
        return placement.parameters if role is Role.PARAMETER else placement.states


def scratch_bytes(plan: Plan) -> int:
    """Bytes of all extents that scratch may need under `plan`, each on a 4096-byte boundary."""
    total = 0
    for name, bundle in plan.bundles.items():
        if bundle.trainable and plan.placements[name].gradients is Tier.SSD:
            total += bundle.parameter_bytes
            total += sum(name in unit.bundles for unit in plan.units) * bundle.num_elements * 4
    if plan.boundaries is Tier.SSD:
        largest = max(plan.boundary_bytes(unit.name) for unit in plan.units[1:])
        total += (len(plan.units) + 2) * plan.group_size * align_up(largest, 4096)
    return total


def store_bytes(plan: Plan) -> int:
    """Bytes of all extents of parameters and states that rest on the SSD."""
    homes = initial_copies(plan, pending=False)
    return sum(size for (_, tier), size in homes.items() if tier is Tier.SSD)


def _key(piece: Piece) -> RegionKey:
    return piece.owner, piece.role, piece.reader


def _extent_name(bundle: str, role: Role) -> str:
    return f"{bundle}.{role.value}"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


__all__ = ["Residency", "scratch_bytes", "store_bytes"]
