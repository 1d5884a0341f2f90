"""How much leaves the device: pure functions from a round's measured times, the links' rates and the room there is.

The bound. A byte that leaves during forward must cross the link before forward ends, or it is still there when memory is fullest. So at
no slowdown at most B_d2h · T_forward of A bytes can leave: a share of min(1, B_d2h · T_forward / A).

Three rules to choose from; each is a type:

* `Everything`: whatever has room. Compute waits for the link where it must. Also what happens in a first round, before anything is known.
* `Adaptive`: walk the records in the order in which forward made them, with the link's time beside it. A record leaves if (1) with it,
  whole records that are not gone yet stay within the window, so compute never waits for room, (2) its copy ends with forward,
  (3) it can be back when backward wants it. Rule 1 spreads what leaves evenly over forward instead of taking all of the first layers: the
  link is busy as long, and the memory in flight is a window instead of a backlog. How wide it is `windows.py` says, what "gone" means
  `flight.py`.
* `SsdTrain`: the published baseline (SSDTrain, and its artifact): go through the records in order; at record n compare the volume of
  everything before it plus twice its own with the time from forward's start until backward wants it, taking backward for twice forward.
  The first n that asks for more than the write rate, and all after it, stay.

Where what leaves goes to: to host memory, and what host memory cannot hold to the SSD. The earliest records go to the SSD, for they are
wanted last.

`keep_bytes` is stronger than all three: what must leave does, earliest first, whatever compute then waits for.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

from overspill.activations.flight import Profile, those_back_in_time, those_out_in_time
from overspill.spec.activations import ActivationRates


class Target(enum.StrEnum):
    """Where a record goes."""

    KEEP = "keep"
    """It stays in the device memory in which the model made it."""
    HOST = "host"
    """A range of host memory, pinned where there is a GPU; the device's memory is free once the copy has ended."""
    REBUILD = "rebuild"
    """Nowhere: backward rebuilds it (`rebuild.py`)."""
    SSD = "ssd"
    """A range of the SSD's file; through a range of host memory that is free again once it is written, or with GPUDirect Storage none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What there is to go to."""

    host_bytes: int
    ssd_bytes: int
    """0: there is no SSD."""
    staging_bytes: int
    """Host memory on the way to and from the SSD; with GPUDirect Storage device memory."""
    window_bytes: int
    """Device memory that may be on its way out."""
    keep_bytes: int | None
    """Most bytes that may stay on the device; None: all of them."""
    back_window_bytes: int | None = None
    """Device memory that may have come back early; None: as much as may be on its way out."""
    peak_bytes: int | None = None
    """Most bytes of records that the device has room for at one time, as far as that is known; None: no limit. It decides how wide
    windows may be chosen (`windows.py`)."""
    least_bytes: int = 0
    """Smaller records stay, unless they must leave or the link has nothing else to do."""

    @property
    def back_bytes(self) -> int:
        return self.window_bytes if self.back_window_bytes is None else self.back_window_bytes


class Amount(Protocol):
    """A rule that says which records leave."""

    needs_profile: ClassVar[bool]
    """Whether rounds have to be measured for it."""
    leaves_unmeasured: ClassVar[bool]
    """Whether records leave while nothing is measured."""

    def leaves(self, profile: Profile, rates: ActivationRates, room: Room) -> list[bool]:
        """For each record whether it leaves the device."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything:
    """All records leave, as far as host memory and SSD have room."""

    needs_profile: ClassVar[bool] = False
    leaves_unmeasured: ClassVar[bool] = True

    def leaves(self, profile: Profile, rates: ActivationRates, room: Room) -> list[bool]:
        return [True] * len(profile.device_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing:
    """All records stay: what plain PyTorch does, for comparison."""

    needs_profile: ClassVar[bool] = False
    leaves_unmeasured: ClassVar[bool] = False

    def leaves(self, profile: Profile, rates: ActivationRates, room: Room) -> list[bool]:
        return [False] * len(profile.device_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SsdTrain:
    """SSDTrain's rule, with single records for its modules."""

    needs_profile: ClassVar[bool] = True
    leaves_unmeasured: ClassVar[bool] = True

    def leaves(self, profile: Profile, rates: ActivationRates, room: Room) -> list[bool]:
        rate = (rates.ssd_write_bytes_per_s if room.ssd_bytes else None) or rates.d2h_bytes_per_s
        if rate is None:
            return [True] * len(profile.device_bytes)
        volume = 0
        for index, size in enumerate(profile.stored_bytes):
            window_s = 3 * profile.forward_s - 2 * profile.packed_s[index]
            if window_s <= 0 or (volume + 2 * size) / window_s > rate:
                return [other < index for other in range(len(profile.stored_bytes))]
            volume += size
        return [True] * len(profile.stored_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
    """As much as costs no time, by measured times and rates (rules 1 to 3 of this file)."""

    needs_profile: ClassVar[bool] = True
    leaves_unmeasured: ClassVar[bool] = True

    def leaves(self, profile: Profile, rates: ActivationRates, room: Room) -> list[bool]:
        out, back = rates.d2h_bytes_per_s, rates.h2d_bytes_per_s or rates.d2h_bytes_per_s
        if out is None or back is None:
            return [True] * len(profile.device_bytes)
        chosen = those_out_in_time(profile, out, room.window_bytes, room.least_bytes)
        return those_back_in_time(profile, chosen, back, room.back_bytes)


def decide_targets(amount: Amount, profile: Profile, rates: ActivationRates, room: Room) -> tuple[Target, ...]:
    """Where each record of a round like `profile` goes."""
    leaves = amount.leaves(profile, rates, room)
    if room.keep_bytes is not None:
        kept_bytes = sum(size for size, is_moved in zip(profile.device_bytes, leaves, strict=True) if not is_moved)
        for index, size in enumerate(profile.device_bytes):
            if kept_bytes <= room.keep_bytes:
                break
            if not leaves[index]:
                leaves[index] = True
                kept_bytes -= size
    return _place(profile, leaves, rates, room)


def _place(profile: Profile, leaves: Sequence[bool], rates: ActivationRates, room: Room) -> tuple[Target, ...]:
    """Host memory or SSD for those that leave; the earliest to the SSD, as many as host memory has no room for."""
    too_much = sum(size for size, is_moved in zip(profile.stored_bytes, leaves, strict=True) if is_moved) - room.host_bytes
    ssd_free_bytes = min(too_much, room.ssd_bytes) if too_much > 0 else 0
    must = room.keep_bytes is not None
    lane_s, host_bytes, targets = 0.0, 0, []
    for size, packed_s, is_moved in zip(profile.stored_bytes, profile.packed_s, leaves, strict=True):
        if not is_moved:
            targets.append(Target.KEEP)
            continue
        begin_s = max(lane_s, packed_s)
        rate = rates.ssd_write_bytes_per_s or math.inf
        is_in_time = (begin_s - packed_s) * rate + size <= room.staging_bytes if rate < math.inf else True
        if ssd_free_bytes > 0 and size <= room.staging_bytes and (is_in_time or must):
            targets.append(Target.SSD)
            ssd_free_bytes -= size
            lane_s = begin_s + size / rate
        elif host_bytes + size <= room.host_bytes:
            targets.append(Target.HOST)
            host_bytes += size
        else:
            targets.append(Target.KEEP)
    return tuple(targets)


def most_without_slowdown(*, device_bytes: int, forward_s: float, d2h_bytes_per_s: float) -> float:
    """The bound of this file: the share of a forward's activations that can leave while it runs."""
    return min(1.0, d2h_bytes_per_s * forward_s / device_bytes) if device_bytes else 1.0
