"""Where every piece is right now: the buffers behind the copies that a schedule talks about.

A copy of a piece is one of four things:

| tier | home (between steps) | borrowed (within a step) |
|---|---|---|
| device | a part of its bundle's *region*, one contiguous allocation | the same, from the device pool; a boundary is a torch tensor |
| host | a part of its bundle's region in (pinned) host memory | a slot of the host pool, one a chunk |
| ssd | a record of the store (`tiers/records.py`), one a chunk | a record of scratch, whose file has no name on disk |

Activations are as boundaries are, but that on the device several tensors of a graph (`runtime/retained`) are one piece.

Rules:

1. Parameters, gradients and partial gradients of a bundle are contiguous on the device, so that tensors are views; the
   region is borrowed when its first chunk is created and given back when its last chunk is dropped.
2. `create` makes a copy with undefined content; whoever executes the op fills it before anybody reads it.
3. Bytes are counted per piece and in the order of the program, as the schedule's rules count them, so predicted and measured
   peaks are equal, whatever overlaps.
4. Records of scratch are made once, at the plan's largest sizes, and used again by every step.
5. What comes from the SSD is verified before it is used, scratch as well.
6. Only the dispatching thread asks or changes anything here. `drop` is given the work that still uses the copy's buffer, and
   `create` returns the work that must have ended before the new copy's buffer is touched: the in-flight hazards of all buffers
   are these two lists. (Hazards between copies of one piece are the schedule's waits.)
7. Ctrl-C may come between any two lines here. So a buffer is given back only after nothing here refers to it, and after a step that
   ended early `drop_all_but_homes` counts everything anew from the homes: what they do not hold goes back to its pool, whoever had it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import torch

from overspill.planning.arena import waiting_offsets
from overspill.runtime.lanes import Completion
from overspill.runtime.scratch_records import ScratchRecords, Work, unfinished
from overspill.spec.plan import Plan
from overspill.spec.report import PoolReport
from overspill.spec.schedule import BUNDLE_ROLES, Piece, RegionKey, Role, home_tier, initial_copies, region_key
from overspill.spec.tensors import Tier
from overspill.tiers import Arena, DeviceMemory, HostMemory, RecordStore, Slot

Release = Callable[[Work], None]
"""Gives a buffer back, with the work that still uses it."""


@dataclasses.dataclass
class _Region:
    """One contiguous allocation for all chunks of a role of a bundle."""

    tensor: torch.Tensor
    """uint8 [bytes of the whole role]."""
    slot: Slot | None
    """None: a home."""
    pieces: set[Piece]
    after: Work = ()
    """What must have ended before its memory is touched."""
    left: list[Completion] = dataclasses.field(default_factory=list)
    """Work on the pieces that have left it."""


@dataclasses.dataclass
class _Copy:
    num_bytes: int
    tensor: torch.Tensor | None = None
    """uint8 view of the bytes; None on the SSD."""
    value: torch.Tensor | None = None
    """A boundary on the device, in its own shape and dtype."""
    slot: Slot | None = None
    """Of a pool, for this copy alone."""
    release: Release | None = None
    """Gives a record of scratch back."""
    record: tuple[RecordStore, str] | None = None
    """Where it is on the SSD."""
    after: Work = ()
    """What must have ended before its memory, or its record, is touched."""


class Residency:
    """All copies of all pieces of one session.

    Args:
        store: keeps parameters and states that rest on the SSD; None if nothing does. A record that is there already (of a
            checkpoint that is resumed from) is taken as it is.
        scratch: keeps gradients and boundaries that rest on the SSD; None if nothing does.
    """

    def __init__(
        self, plan: Plan, *, device: DeviceMemory, host: HostMemory, store: RecordStore | None, scratch: RecordStore | None
    ) -> None:
        self.plan = plan
        self.device, self.host, self.store, self.scratch = device, host, store, scratch
        self.device_work: Callable[[], Work] = tuple
        """The work that the device's own lane has now; set by the executor. A new allocation is zeroed there, and may be memory that
        it still uses."""
        self.before_home_access: Callable[[], None] = lambda: None
        """Called before a home is looked at outside of a step; set by the executor, whose last step may not have landed."""
        self.device_pool = Arena(device, "device", fresh_work=lambda: self.device_work())
        self.host_pool = Arena(host, "host")
        self.pools: Mapping[Tier, Arena] = {Tier.DEVICE: self.device_pool, Tier.HOST: self.host_pool}
        self._waiting = {tier: waiting_offsets(plan, tier) for tier in Tier}
        """Where gradients that wait for the next step's update lie in the pools' arenas."""
        self._copies: dict[tuple[Piece, Tier], _Copy] = {}
        self._regions: dict[tuple[RegionKey, Tier], _Region] = {}
        self._scratch_records = ScratchRecords(plan, scratch)
        self._scratch_work: dict[str, Work] = {}
        """Record of scratch -> the work that still uses what it held last."""
        self.resident_bytes = dict.fromkeys(Tier, 0)
        self.peak_bytes = dict.fromkeys(Tier, 0)
        for (piece, tier), size in initial_copies(plan, pending=False).items():
            self._create_home(piece, tier, size)
        self.reset_peaks()

    # -- copies ------------------------------------------------------------------------------------------------------

    def has(self, piece: Piece, tier: Tier) -> bool:
        return (piece, tier) in self._copies

    def create(self, piece: Piece, tier: Tier, num_bytes: int) -> Work:
        """Make room for a copy; a home that exists is kept and will be overwritten (rule 2).

        Returns:
            What must have ended before the copy is filled (rule 6).
        """
        if (piece, tier) in self._copies:
            return ()
        if piece.role not in BUNDLE_ROLES:
            copy = self._create_unbundled(piece, tier, num_bytes)
        elif tier is Tier.DEVICE:
            copy = self._create_in_region(piece, num_bytes)
        elif tier is Tier.HOST:
            copy = _borrow(self.host_pool, num_bytes)
        else:
            copy = self._scratch_copy(piece, num_bytes)
        self._add(piece, tier, copy)
        return copy.after

    def put_boundary(self, piece: Piece, value: torch.Tensor) -> None:
        """Take a hidden state that the device has computed."""
        value = value.contiguous()
        self._add(piece, Tier.DEVICE, _Copy(num_bytes=value.nbytes, tensor=_bytes_of(value), value=value))

    def put_activations(self, piece: Piece, num_bytes: int) -> None:
        """Count what a graph that is kept has stored on the device; its memory is the graph's."""
        self._add(piece, Tier.DEVICE, _Copy(num_bytes=num_bytes, tensor=torch.empty(0, dtype=torch.uint8)))

    def is_of_allocator(self, piece: Piece) -> bool:
        """Whether a copy on the device is memory that torch's allocator gave to compute, and hands on in the order of compute."""
        return piece.role not in BUNDLE_ROLES and self._copies[piece, Tier.DEVICE].slot is None

    def drop(self, piece: Piece, tier: Tier, work: Work = ()) -> None:
        """Give a copy's buffer back; `work` still uses it (rule 6). For the allocator's memory compute has been told to wait."""
        copy = self._copies.pop((piece, tier))
        self.resident_bytes[tier] -= copy.num_bytes
        if copy.slot is not None:
            copy.slot.release(work)
        elif copy.release is not None:
            copy.release(work)
        elif tier is Tier.DEVICE and piece.role in BUNDLE_ROLES:
            self._leave_region(piece, work)

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

    def record_of(self, piece: Piece) -> tuple[RecordStore, str]:
        """Where the copy on the SSD is: store and record."""
        record = self._copies[piece, Tier.SSD].record
        assert record is not None
        return record

    def turn_into_gradient(self, bundle: str, reader: str, pieces: list[tuple[Piece, Piece]]) -> None:
        """A partial gradient that is already the gradient: its region changes hands, nothing is copied."""
        region = self._regions.pop(((bundle, Role.PARTIAL_GRADIENT, reader), Tier.DEVICE))
        for partial, gradient in pieces:
            self._copies[gradient, Tier.DEVICE] = self._copies.pop((partial, Tier.DEVICE))
        region.pieces = {gradient for _, gradient in pieces}
        self._regions[(bundle, Role.GRADIENT, ""), Tier.DEVICE] = region

    def drop_all_but_homes(self, *, pending: bool = False, applied: Collection[tuple[str, int]] = ()) -> bool:
        """After a step that ended early, at whatever place (rule 7): keep the homes and nothing else; whether all homes are there.

        Nothing of the step may be under way. Done again, it does no harm.

        Args:
            pending: whether the gradients that wait for their update count as homes.
            applied: (bundle, chunk) of those among them that have had it: room for a gradient is made anew, its content is nobody's. A
                gradient that was on its way from the SSD is still there: its record is written by the next step's alone.

        Raises:
            BudgetError: there is no such room.
        """
        homes = initial_copies(self.plan, pending=pending)
        self._copies = {key: copy for key, copy in self._copies.items() if key in homes and self._is_whole(*key)}
        for region in self._regions.values():
            region.pieces, region.left, region.after = set(), [], ()
        for (piece, tier), copy in self._copies.items():
            if copy.slot is None and copy.record is None:
                self._regions[region_key(piece), tier].pieces.add(piece)
        self._regions = {key: region for key, region in self._regions.items() if region.slot is None or region.pieces}
        for tier, pool in self.pools.items():
            kept = [copy.slot for (_, at), copy in self._copies.items() if at is tier]
            kept += [region.slot for (_, at), region in self._regions.items() if at is tier]
            pool.recover(slot for slot in kept if slot is not None)
        if self.scratch is not None:
            self._scratch_work.clear()
            self._scratch_records.recover()
        self.resident_bytes = {tier: sum(copy.num_bytes for (_, at), copy in self._copies.items() if at is tier) for tier in Tier}
        for (piece, tier), size in homes.items():
            if piece.role is Role.GRADIENT and (tier is Tier.SSD or (piece.owner, piece.index) in applied):
                self._create_waiting(piece, tier, size)
        return homes.keys() <= self._copies.keys()

    def _create_waiting(self, piece: Piece, tier: Tier, num_bytes: int) -> None:
        """Room for a gradient that waits, where the programs look for it if they follow an arena."""
        place = self._waiting[tier].get((piece.owner, piece.index if tier is Tier.HOST else None))
        if place is not None and self.pools[tier].block_bytes >= sum(place):
            self.pools[tier].follow([place], num_bytes=sum(place))
        self.create(piece, tier, num_bytes)
        if tier is not Tier.SSD:
            self.pools[tier].leave()

    def _is_whole(self, piece: Piece, tier: Tier) -> bool:
        """Whether a copy's memory, or its record, is still the copy's."""
        copy = self._copies[piece, tier]
        return copy.slot is not None or copy.record is not None or (region_key(piece), tier) in self._regions

    # -- outside of steps --------------------------------------------------------------------------------------------

    def write_home(self, bundle: str, role: Role, offset: int, source: torch.Tensor) -> None:
        """Copy uint8 CPU bytes into a home at byte `offset` of the role."""
        self.before_home_access()
        tier = home_tier(self.plan, bundle, role)
        if tier is not Tier.SSD:
            self._regions[(bundle, role, ""), tier].tensor[offset : offset + source.numel()].copy_(source)
            return
        assert self.store is not None
        for name, start, first, size in self._parts(bundle, role, offset, source.numel()):
            self.store.write_part(name, start, source[first : first + size])

    def read_home(self, bundle: str, role: Role, offset: int, num_bytes: int) -> torch.Tensor:
        """Bytes of a home as a new uint8 CPU tensor."""
        self.before_home_access()
        tier = home_tier(self.plan, bundle, role)
        if tier is not Tier.SSD:
            return self._regions[(bundle, role, ""), tier].tensor[offset : offset + num_bytes].to("cpu", copy=True)
        assert self.store is not None
        target = torch.empty(num_bytes, dtype=torch.uint8)
        for name, start, first, size in self._parts(bundle, role, offset, num_bytes):
            target[first : first + size] = self.store.read_part(name, start, size)
        return target

    def _parts(self, bundle: str, role: Role, offset: int, num_bytes: int) -> Iterator[tuple[str, int, int, int]]:
        """(record, first byte in it, first byte of the range, bytes) of each record that a byte range of a home touches."""
        layout = self.plan.bundles[bundle]
        for chunk in layout.chunks:
            if role is Role.STATE:
                first = self.plan.state_record_start(bundle, chunk.index)
                size = self.plan.state_record_bytes(bundle, chunk.index)
            else:
                first, size = chunk.start * layout.element_bytes, chunk.num_elements * layout.element_bytes
            start, end = max(offset, first), min(offset + num_bytes, first + size)
            if start < end:
                piece = Piece(role=role, owner=bundle, index=chunk.index)
                yield str(piece), start - first, start - offset, end - start

    def reset_peaks(self) -> None:
        self.peak_bytes = dict(self.resident_bytes)

    def pool_reports(self) -> tuple[PoolReport, PoolReport]:
        """Of the device's pool and the host's, since the session was opened."""
        return self.device_pool.report(), self.host_pool.report()

    def trim(self) -> int:
        """Free idle slots of both pools; their bytes."""
        return self.device_pool.trim() + self.host_pool.trim()

    def interrupt(self) -> None:
        """A step is given up: transfers that wait for a person fail instead."""
        for store in (self.store, self.scratch):
            if store is not None:
                store.interrupt()

    def proceed(self) -> None:
        """Nothing of the step that was given up is under way any more."""
        for store in (self.store, self.scratch):
            if store is not None:
                store.proceed()

    def close(self) -> None:
        """Give all memory and files back."""
        self._copies.clear()
        self._regions.clear()
        with contextlib.ExitStack() as stack:  # all are closed, also when one raises
            for store in (self.store, self.scratch):
                if store is not None:
                    stack.callback(store.close)
            stack.callback(self.host.close)
            stack.callback(self.device.close)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _add(self, piece: Piece, tier: Tier, copy: _Copy) -> None:
        assert (piece, tier) not in self._copies, f"{piece} is already on {tier}"
        self._copies[piece, tier] = copy
        self.resident_bytes[tier] += copy.num_bytes
        self.peak_bytes[tier] = max(self.peak_bytes[tier], self.resident_bytes[tier])

    def _place_in_region(self, piece: Piece, num_bytes: int) -> tuple[int, int]:
        """First byte of a piece where all chunks of its role lie one after the other, and the bytes of them all."""
        if piece.role is Role.STATE:
            return self.plan.state_record_start(piece.owner, piece.index), self.plan.state_bytes(piece.owner)
        bundle = self.plan.bundles[piece.owner]
        chunk = bundle.chunks[piece.index]
        per_element = num_bytes // chunk.num_elements
        return chunk.start * per_element, bundle.num_elements * per_element

    def _create_home(self, piece: Piece, tier: Tier, num_bytes: int) -> None:
        offset, region_bytes = self._place_in_region(piece, num_bytes)
        if tier is Tier.SSD:
            assert self.store is not None, f"{piece} rests on the SSD but there is no store"
            if not self.store.has(str(piece)):
                self.store.create(str(piece), num_bytes)
            self._add(piece, tier, _Copy(num_bytes=num_bytes, record=(self.store, str(piece))))
            return
        name = f"{piece.owner}.{piece.role.value}"
        memory = self.device if tier is Tier.DEVICE else self.host
        key = (region_key(piece), tier)
        if key not in self._regions:
            tensor = memory.allocate(name, region_bytes, pinned=piece.role is not Role.STATE)
            self._regions[key] = _Region(tensor=tensor, slot=None, pieces=set())
        region = self._regions[key]
        region.pieces.add(piece)
        self._add(piece, tier, _Copy(num_bytes=num_bytes, tensor=region.tensor[offset : offset + num_bytes]))

    def _create_in_region(self, piece: Piece, num_bytes: int) -> _Copy:
        offset, region_bytes = self._place_in_region(piece, num_bytes)
        key = (region_key(piece), Tier.DEVICE)
        if key not in self._regions:
            slot = self.device_pool.acquire(region_bytes)
            self._regions[key] = _Region(tensor=slot.tensor, slot=slot, pieces=set(), after=slot.after)  # type: ignore[arg-type]
        region = self._regions[key]
        region.pieces.add(piece)
        return _Copy(num_bytes=num_bytes, tensor=region.tensor[offset : offset + num_bytes], after=[*region.after, *region.left])

    def _leave_region(self, piece: Piece, work: Work) -> None:
        key = (region_key(piece), Tier.DEVICE)
        region = self._regions[key]
        region.pieces.discard(piece)
        region.left.extend(completion for completion in work if completion not in region.left)
        if not region.pieces and region.slot is not None:
            del self._regions[key]
            region.slot.release(region.left)

    def _create_unbundled(self, piece: Piece, tier: Tier, num_bytes: int) -> _Copy:
        if tier is Tier.SSD:
            store, name, after, release = self._scratch_records.borrow(piece.role)
            return _Copy(num_bytes=num_bytes, record=(store, name), release=release, after=after)
        return _borrow(self.device_pool if tier is Tier.DEVICE else self.host_pool, num_bytes)

    def _scratch_copy(self, piece: Piece, num_bytes: int) -> _Copy:
        """A gradient's record, made once and kept."""
        assert self.scratch is not None, f"{piece} rests on the SSD but there is no scratch store"
        name = str(piece)
        if not self.scratch.has(name):
            self.scratch.create(name, num_bytes)

        def release(work: Work) -> None:
            self._scratch_work[name] = work

        return _Copy(num_bytes=num_bytes, record=(self.scratch, name), release=release, after=unfinished(self._scratch_work.pop(name, ())))


def _borrow(pool: Arena, num_bytes: int) -> _Copy:
    slot = pool.acquire(num_bytes)
    return _Copy(num_bytes=num_bytes, tensor=slot.tensor, slot=slot, after=slot.after)  # type: ignore[arg-type]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
