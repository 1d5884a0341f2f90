"""The explicit program of one optimizer step: ops, each on one lane, with what it waits for.

A `Schedule` is a list in an order in which it can be executed one op after the other; `waits` are indices of earlier ops, so
the list is its own proof that nothing waits in a circle. Lanes are in-order queues: ops of different lanes may overlap as
far as their waits allow. The simulator walks the list on paper, the executor for real.

A **piece** is what moves: one chunk of one role of a bundle, or one hidden state. A piece has a home tier, where it is
between steps, and may have copies elsewhere while the step needs them.

Rules (`scheduling.validate` holds every schedule against them):

1. An op reads only pieces that are resident on the tier it reads, in their newest version.
2. An op waits for the op that made each copy it reads, and waits only for earlier ops.
3. Fetch goes one tier up (ssd -> host -> device), Evict one tier down, each on the lane of that link.
4. At no time do the copies on a tier, homes included, exceed the tier's budget.
5. Free drops a copy that is resident and is not a home.
6. At the end every home is in its newest version and no other copy is left.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import NamedTuple

from overspill.spec.plan import Plan
from overspill.spec.tensors import Tier


class Lane(enum.StrEnum):
    """An in-order queue of ops."""

    COMPUTE = "compute"
    H2D = "h2d"
    D2H = "d2h"
    SSD_READ = "ssd_read"
    SSD_WRITE = "ssd_write"
    HOST_UPDATE = "host_update"
    NETWORK = "network"

    __hash__ = str.__hash__


MOST_UNDER_WAY = {Lane.HOST_UPDATE: 2}
"""Ops that a lane has issued and that are not complete, where the lane's thread sees to that; elsewhere buffers bound them."""


class Role(enum.StrEnum):
    """What a piece is. A buffer never changes its role."""

    PARAMETER = "parameter"
    STATE = "state"
    GRADIENT = "gradient"
    """The finished gradient of the step, in the parameter's dtype."""
    PARTIAL_GRADIENT = "partial_gradient"
    """What one unit has added up so far, in fp32 where there is more than one contribution."""
    BOUNDARY = "boundary"
    """Hidden states that enter a unit."""
    BOUNDARY_GRADIENT = "boundary_gradient"
    """The loss's gradient by these hidden states."""
    ACTIVATIONS = "activations"
    """What a unit's graph stores from its forward to its backward (`spec.retention`)."""

    __hash__ = str.__hash__


class Phase(enum.StrEnum):
    FORWARD = "forward"
    """Hidden states out (the tail: the loss); the graph is kept if activations are among what is produced, else there is none."""
    BACKWARD = "backward"
    """Gradients of parameters and boundary, by the graph whose activations are consumed, or by one that is rebuilt from the boundary (the
    tail: loss as well)."""


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Piece:
    """What moves as one."""

    role: Role
    owner: str
    """The bundle; for boundaries the unit that they enter; for activations their unit."""
    index: int
    """Chunk of the bundle, or micro-batch of the step."""
    reader: str = ""
    """Of a partial gradient: the unit that contributed it."""

    def __str__(self) -> str:
        reader = f"@{self.reader}" if self.reader else ""
        return f"{self.owner}{reader}.{self.role.value}[{self.index}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Copy a piece one tier up. The target buffer belongs to the op until it is done."""

    piece: Piece
    source: Tier
    target: Tier
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict:
    """Copy a piece one tier down (the source stays until it is freed)."""

    piece: Piece
    source: Tier
    target: Tier
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Free:
    """Drop a copy of a piece."""

    piece: Piece
    tier: Tier
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Run one unit on one micro-batch."""

    unit: str
    micro_batch: int
    phase: Phase
    produced: tuple[tuple[Piece, int], ...]
    """Pieces that it leaves on the device, with their bytes."""
    flops: float
    """Matrix-product work, recomputation included."""
    consumed: tuple[Piece, ...] = ()
    """Pieces that it reads on the device and that are gone afterwards: the activations of a unit whose graph was kept."""

    @property
    def is_retained(self) -> bool:
        """Whether the unit's graph lives from forward to backward."""
        return bool(self.consumed) or any(piece.role is Role.ACTIVATIONS for piece, _ in self.produced)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress:
    """Turn a bundle's partial gradients into the gradient that leaves the device (here: add, cast once, pack), and take its norm."""

    bundle: str
    partials: tuple[tuple[Piece, int], ...]
    """Consumed, in the order in which they are added."""
    produced: tuple[tuple[Piece, int], ...]

    @property
    def is_in_place(self) -> bool:
        """One contributor whose sum already has the gradient's size: its buffer becomes the gradient."""
        return [size for _, size in self.partials] == [size for _, size in self.produced]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer update of one chunk, in place on the copies at `tier`; the gradient's copy there is consumed."""

    bundle: str
    chunk: int
    tier: Tier
    num_elements: int
    num_bytes: int
    """Of the gradient copy that is consumed."""


Op = Fetch | Evict | Free | Compute | Compress | Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledOp:
    op: Op
    lane: Lane
    waits: tuple[int, ...]
    """Indices of earlier ops that must be done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """One step's program."""

    name: str
    """`train`, `evaluate` or `flush`."""
    ops: tuple[ScheduledOp, ...]
    num_micro_batches: int
    groups: tuple[tuple[int, ...], ...]
    """Micro-batches that go through the units together."""
    starts_pending: bool
    """Whether gradients of the step before wait at their homes when it starts."""
    ends_pending: bool
    """Whether gradients of this step wait at their homes when it ends."""


BUNDLE_ROLES = (Role.PARAMETER, Role.STATE, Role.GRADIENT, Role.PARTIAL_GRADIENT)
"""Roles whose pieces are chunks of a bundle."""
RegionKey = tuple[str, Role, str]
"""Bundle, role, and the reader of a partial gradient: the chunks of one lie one after the other on the device."""


def region_key(piece: Piece) -> RegionKey:
    """The region that a chunk of a bundle belongs to."""
    return piece.owner, piece.role, piece.reader


_LINK_LANES = {
    (Tier.SSD, Tier.HOST): Lane.SSD_READ,
    (Tier.HOST, Tier.SSD): Lane.SSD_WRITE,
    (Tier.HOST, Tier.DEVICE): Lane.H2D,
    (Tier.DEVICE, Tier.HOST): Lane.D2H,
}


def link_lane(source: Tier, target: Tier) -> Lane:
    """The lane of the link between two adjacent tiers."""
    return _LINK_LANES[source, target]


class Effects(NamedTuple):
    """What an op does to the copies of pieces, the same for builder, validator, simulator and executor."""

    reads: tuple[tuple[Piece, Tier], ...] = ()
    """Copies that must be resident and newest."""
    changes: tuple[tuple[Piece, Tier], ...] = ()
    """Copies changed in place: they become the newest version, all others of the piece are stale."""
    creates: tuple[tuple[Piece, Tier, int], ...] = ()
    """Copies that exist afterwards, with their bytes; as new as what was read, or the newest if the op made the content."""
    drops: tuple[tuple[Piece, Tier], ...] = ()
    """Copies that are gone afterwards."""
    in_place: bool = False
    """Whether what is created takes the memory of what is dropped (otherwise both exist for a moment)."""

    @property
    def written(self) -> tuple[tuple[Piece, Tier], ...]:
        """Copies whose bytes the op writes: those that it changes and those that it creates."""
        return (*self.changes, *((piece, tier) for piece, tier, _ in self.creates))


def parameter_pieces(plan: Plan, bundle: str) -> tuple[tuple[Piece, int], ...]:
    """The parameter pieces of a bundle with their bytes, in element order."""
    return bundle_pieces(plan, bundle, Role.PARAMETER, plan.bundles[bundle].element_bytes)


def state_pieces(plan: Plan, bundle: str) -> tuple[tuple[Piece, int], ...]:
    """The state records of a bundle with their bytes, in element order; none where there is no state."""
    if not plan.has_state(bundle):
        return ()
    return tuple(
        (Piece(role=Role.STATE, owner=bundle, index=chunk.index), plan.state_record_bytes(bundle, chunk.index))
        for chunk in plan.bundles[bundle].chunks
    )


def bundle_pieces(plan: Plan, bundle: str, role: Role, bytes_per_element: int, reader: str = "") -> tuple[tuple[Piece, int], ...]:
    """One piece a chunk for `role` of `bundle`, with their bytes, in element order."""
    found = plan.bundles[bundle]
    return _chunk_pieces(bundle, found.num_elements, found.chunk_elements, role, bytes_per_element, reader)


@functools.lru_cache(maxsize=16384)
def _chunk_pieces(
    bundle: str, num_elements: int, chunk_elements: int, role: Role, bytes_per_element: int, reader: str
) -> tuple[tuple[Piece, int], ...]:
    """The same pieces each time: a planner asks for them a million times, and looks them up by what is the same object quickest."""
    return tuple(
        (Piece(role=role, owner=bundle, index=index, reader=reader), min(chunk_elements, num_elements - start) * bytes_per_element)
        for index, start in enumerate(range(0, num_elements, chunk_elements))
    )


def effects(op: Op, plan: Plan) -> Effects:
    """What `op` reads, changes, creates and drops under `plan`."""
    match op:
        case Fetch() | Evict():
            return Effects(reads=((op.piece, op.source),), creates=((op.piece, op.target, op.num_bytes),))
        case Free():
            return Effects(drops=((op.piece, op.tier),))
        case Compute():
            return _compute_effects(op, plan)
        case Compress():
            partials = tuple((piece, Tier.DEVICE) for piece, _ in op.partials)
            created = tuple((piece, Tier.DEVICE, size) for piece, size in op.produced)
            return Effects(reads=partials, creates=created, drops=partials, in_place=op.is_in_place)
        case Update():
            gradient = Piece(role=Role.GRADIENT, owner=op.bundle, index=op.chunk)
            touched = [(Piece(role=Role.PARAMETER, owner=op.bundle, index=op.chunk), op.tier)]
            if plan.has_state(op.bundle):
                touched.append((Piece(role=Role.STATE, owner=op.bundle, index=op.chunk), op.tier))
            return Effects(reads=((gradient, op.tier), *touched), changes=tuple(touched), drops=((gradient, op.tier),))


def _compute_effects(op: Compute, plan: Plan) -> Effects:
    names = [unit.name for unit in plan.units]
    position = names.index(op.unit)
    reads = [(piece, Tier.DEVICE) for bundle in plan.units[position].bundles for piece, _ in parameter_pieces(plan, bundle)]
    changes: list[tuple[Piece, Tier]] = []
    consumed = tuple((piece, Tier.DEVICE) for piece in op.consumed)
    if position > 0:
        reads.append((Piece(role=Role.BOUNDARY, owner=op.unit, index=op.micro_batch), Tier.DEVICE))
    if op.phase is Phase.BACKWARD:
        if position < len(names) - 1:
            reads.append((Piece(role=Role.BOUNDARY_GRADIENT, owner=names[position + 1], index=op.micro_batch), Tier.DEVICE))
        made = {piece for piece, _ in op.produced}
        for bundle in plan.units[position].bundles:
            if plan.bundles[bundle].trainable:
                partials = [piece for piece, _ in bundle_pieces(plan, bundle, Role.PARTIAL_GRADIENT, 0, reader=op.unit)]
                changes.extend((piece, Tier.DEVICE) for piece in partials if piece not in made)
    return Effects(
        reads=tuple(reads + changes) + consumed,
        changes=tuple(changes),
        creates=tuple((piece, Tier.DEVICE, size) for piece, size in op.produced),
        drops=consumed,
    )


def home_tier(plan: Plan, bundle: str, role: Role) -> Tier:
    """Where a bundle's parameters or states (`role`) rest."""
    placement = plan.placements[bundle]
    return placement.parameters if role is Role.PARAMETER else placement.states


def initial_copies(plan: Plan, *, pending: bool) -> dict[tuple[Piece, Tier], int]:
    """The homes: copies that exist between steps, with their bytes."""
    homes: dict[tuple[Piece, Tier], int] = {}
    for name, bundle in plan.bundles.items():
        placement = plan.placements[name]
        homes.update({(piece, placement.parameters): size for piece, size in parameter_pieces(plan, name)})
        homes.update({(piece, placement.states): size for piece, size in state_pieces(plan, name)})
        if bundle.trainable and pending:
            gradients = bundle_pieces(plan, name, Role.GRADIENT, bundle.element_bytes)
            homes.update({(piece, placement.gradients): size for piece, size in gradients})
    return homes
