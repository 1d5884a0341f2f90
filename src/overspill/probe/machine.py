"""One probe of this machine: capacities, then every rate, each within its time, into a `MachineFile`.

Rules:

1. It ends. The whole has `ProbeSettings.most_s`, each measurement a share of it; what time does not suffice for is noted. The drive comes
   last, since it is what may be slow, and gets what is left.
2. It disturbs little: at any time it holds at most `ROOM_FRACTION` of the memory that is free (or of `--host-budget`), and at most
   that of the device; it writes at most `ProbeSettings.most_written_bytes` to the drive, and only where there is room for it.
3. Nothing is left: memory goes back to the system, the drive's file has no name. An interruption leaves as little.
4. It never fails for want of something to measure: no GPU, no directory, no room are notes. Only wrong input raises.
5. What a process takes beside its tensors is measured first, before other measurements load code.

Costs: 10 to 15 s with a GPU and a drive, most of it the drive's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch

from overspill.cores import update_threads
from overspill.errors import BudgetError, OverspillError, StorageError
from overspill.probe.capacities import ROOT, last_level_cache_bytes, look_again, place_room_bytes, read_capacities
from overspill.probe.compute import BLOCK_ON_CPU, BLOCK_ON_GPU, MatrixShape, measure_compute
from overspill.probe.drive import TRIAL_S, TRIALS_BYTES, OpenStore, Passes, choose_depth, measure_drive, measure_trial
from overspill.probe.footprint import measure_footprint
from overspill.probe.host_memory import (
    LEAST_SET_BYTES,
    ChunkUpdates,
    adamw_updates,
    choose_set_bytes,
    measure_copy,
    measure_in_place,
    open_working_set,
)
from overspill.probe.identity import read_identity
from overspill.probe.kernels import KernelRates, measure_kernels
from overspill.probe.launching import measure_launches
from overspill.probe.link import Link, measure_link, open_link
from overspill.probe.sampling import Sampling, rate_of
from overspill.spec.machine_file import (
    ComputeFigures,
    DriveFigures,
    LinkFigures,
    MachineCapacities,
    MachineFile,
    MachineRates,
    MeasuredRate,
    ProcessFootprint,
)
from overspill.spec.state_formats import STATE_FORMATS
from overspill.spec.tensors import CHUNK_BYTES, HOST_CHUNK_BYTES
from overspill.tiers import SsdStore
from overspill.tiers.block_device import is_block_device
from overspill.tiers.mapped import node_of_device
from overspill.tiers.wear import COUNTER_NAME, WriteCounter
from overspill.units import MIB, format_bytes

ROOM_FRACTION = 0.125
"""Of free memory. Chosen, not tuned."""
ROOM_ON_DRIVE = 4
"""Times the file's size that a file system must have free. Chosen: a probe must not fill a drive that others write to."""

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Sizes and times of a probe; tests make them small."""

    most_s: float = 22.0
    """Of all measurements. Chosen: starting Python and torch comes on top, and all of it shall stay below 30 s."""
    share_s: float = 2.5
    """Of one measurement other than the drive's."""
    sampling: Sampling = Sampling(least_s=0.05, num_samples=5)
    link_units: tuple[int, ...] = (HOST_CHUNK_BYTES, CHUNK_BYTES)
    """The sizes in which a session's chunks move (`spec.tensors`)."""
    host_set_bytes: int | None = None
    """Over which host memory and updates are measured; None: by what the caches hold (`host_memory.choose_set_bytes`)."""
    host_unit_bytes: int = HOST_CHUNK_BYTES
    """Of one portion of it: a chunk of states that rest in host memory."""
    block_on_gpu: MatrixShape = BLOCK_ON_GPU
    block_on_cpu: MatrixShape = BLOCK_ON_CPU
    drive_units: tuple[int, ...] = (CHUNK_BYTES, 4 * MIB)
    """A chunk of states, and about what its parameters are."""
    drive_bytes: int = 256 * MIB
    """Of the file, unless the drive needs longer than a second for it."""
    passes: Passes = Passes(most_bytes=192 * MIB, most_units=24, num_passes=3, mixed_factor=2)

    @property
    def most_written_bytes(self) -> int:
        """On a drive that is quick enough for every pass."""
        passes = self.passes
        pass_bytes = [min(passes.most_bytes, passes.most_units * unit) for unit in self.drive_units]
        each = passes.num_passes * (1 + passes.mixed_factor)
        return sum(self.drive_bytes + each * size for size in pass_bytes) + 2 * sum(TRIALS_BYTES)


SETTINGS = ProbeSettings()


def probe_machine(
    device: torch.device,
    ssd_places: Sequence[str] = (),
    *,
    host_budget_bytes: int | None = None,
    settings: ProbeSettings | None = None,
    open_store: OpenStore | None = None,
    progress: Callable[[str], None] = lambda what: None,
    root: Path = ROOT,
) -> MachineFile:
    """Measure this machine.

    Args:
        device: what computes.
        ssd_places: directories of the SSD tier; none: no figures of a drive.
        host_budget_bytes: what the user allows; it wins over what is found.
        settings: None: `SETTINGS`.
        open_store: capacity in bytes -> a store, in place of a file in the directories; tests give a `FakeStore`.
        progress: is told what is measured next.
        root: of `/proc` and `/sys`; tests give their own.

    Raises:
        ValueError: a directory cannot be meant: neither it nor its parent exists, or it is a file.
    """
    places = existing_places(ssd_places)
    probe = _Probe(device, places, host_budget_bytes, settings or SETTINGS, progress, root)
    footprint = probe.footprint()
    rates = probe.rates(open_store)
    capacities = look_again(probe.capacities, root)
    if not capacities.is_memory_steady:
        probe.notes.append(
            f"the machine's memory went from {format_bytes(capacities.memory_total_bytes)} to "
            f"{format_bytes(capacities.memory_total_after_bytes)} while it was probed: host capacity is unknown"
            + (", --host-budget holds" if host_budget_bytes is not None else "; say with --host-budget what may be used")
        )
    if len(capacities.gpus) > 1:
        probe.notes.append(f"collectives between {len(capacities.gpus)} GPUs are not measured yet")
    return MachineFile(
        identity=read_identity(device, ssd_places, root=root),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        took_s=time.perf_counter() - probe.begin_s,
        capacities=capacities,
        rates=rates,
        footprint=footprint,
        ssd_written_bytes=probe.written[0],
        notes=tuple(probe.notes),
    )


class _Probe:
    """What the measurements of one probe share: the clock, the rooms, the notes."""

    def __init__(
        self,
        device: torch.device,
        places: Sequence[Path],
        host_budget_bytes: int | None,
        settings: ProbeSettings,
        progress: Callable[[str], None],
        root: Path,
    ) -> None:
        self.begin_s = time.perf_counter()
        self.device, self.places, self.settings, self._progress, self.root = device, places, settings, progress, root
        self.capacities: MachineCapacities = read_capacities(
            device, [str(place) for place in places], host_budget_bytes=host_budget_bytes, root=root
        )
        usable = min(self.capacities.host_available_bytes, host_budget_bytes or self.capacities.host_available_bytes)
        self.host_room_bytes = int(usable * ROOM_FRACTION)
        free = self.capacities.device_free_bytes
        self.device_room_bytes = self.host_room_bytes if free is None else int(free * ROOM_FRACTION)
        self.notes: list[str] = []
        self.written = [0]

    def footprint(self) -> ProcessFootprint | None:
        """Of a training process; first of all, while no kernel is loaded. None without a GPU."""
        if self.device.type != "cuda":
            return None
        return self._attempt("what a process takes of the device", lambda end: measure_footprint(self.device, self.device_room_bytes))

    def rates(self, open_store: OpenStore | None) -> MachineRates:
        """All of them, the drive last (rule 1)."""
        rates = MachineRates(link=self._each("the link to the device", self.settings.link_units, self._link))
        rates = self._host(rates)
        if self.device.type == "cuda":
            rates = dataclasses.replace(
                rates, launches=self._attempt("launches", lambda end: measure_launches(self.device, self.settings.sampling, until_s=end))
            )
        compute = self._attempt("compute", self._compute)
        if compute is not None and self.device.type == "cuda":
            kernels = self._attempt("the kinds of kernels", self._kernels)
            compute = dataclasses.replace(compute, **vars(kernels)) if kernels is not None else compute
        return dataclasses.replace(rates, compute=compute, ssd=self._drive(open_store))

    def _host(self, rates: MachineRates) -> MachineRates:
        """Host memory and updates, all over one working set, which is there as long as they take."""
        settings, sampling = self.settings, self.settings.sampling
        is_beside_gpu = self.device.type == "cuda"
        rates = dataclasses.replace(rates, update_parameter_dtype="bfloat16" if is_beside_gpu else "float32")  # what a session computes in
        with contextlib.ExitStack() as opened:
            block = self._attempt("host memory", lambda end: opened.enter_context(self._working_set(end)))
            if block is None:
                return rates
            unit = settings.host_unit_bytes
            copy = self._attempt("a copy in host memory", lambda end: measure_copy(block, unit, sampling, until_s=end))
            place = self._attempt("an update in place of host memory", lambda end: measure_in_place(block, unit, sampling, until_s=end))
            found: dict[str, MeasuredRate] = {}
            beside = None
            for name in STATE_FORMATS:
                updates = adamw_updates(
                    block,
                    name,
                    parameter_dtype=rates.update_parameter_dtype,
                    chunk_bytes=unit,
                    num_threads=update_threads(is_beside_gpu=is_beside_gpu),
                )
                rate = self._attempt(f"the host's update in format {name}", functools.partial(_update_alone, updates, sampling))
                found |= {name: rate} if rate is not None else {}
                if name == "fp32" and is_beside_gpu:
                    beside = self._attempt("the host's update beside copies", functools.partial(self._beside, updates))
            return dataclasses.replace(
                rates,
                host_copy=copy,
                host_in_place=place,
                update=found,
                host_set_bytes=block.numel(),
                update_beside_copies=beside[0] if beside is not None else None,
                copies_beside_update=beside[1] if beside is not None else None,
            )

    # -- one measurement each ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _open_link(self, unit_bytes: int, device_room_bytes: int, host_room_bytes: int | None = None) -> Iterator[Link]:
        """As many buffers as the largest unit takes, or as there is room for."""
        needed = 2 * unit_bytes
        if needed > device_room_bytes:
            raise BudgetError(
                f"two copies of {format_bytes(unit_bytes)} are needed on the device, {format_bytes(device_room_bytes)} may be taken"
            )
        host_room = self.host_room_bytes if host_room_bytes is None else host_room_bytes
        slots = min(max(self.settings.link_units) // unit_bytes, host_room // needed, device_room_bytes // needed)
        with open_link(self.device, unit_bytes, room_bytes=host_room, num_slots=max(1, slots)) as link:
            yield link

    def _link(self, unit_bytes: int, end_s: float) -> LinkFigures:
        with self._open_link(unit_bytes, self.device_room_bytes) as link:
            return measure_link(link, self.settings.sampling, until_s=end_s)

    @contextlib.contextmanager
    def _working_set(self, end_s: float) -> Iterator[torch.Tensor]:
        """As large as caches demand, room and time allow; a note where that is too little to be sure of them."""
        settings, caches = self.settings, last_level_cache_bytes(self.root)
        room = self.host_room_bytes // 2 if self.device.type == "cuda" else self.host_room_bytes  # the rest: buffers of the link
        size = min(settings.host_set_bytes or choose_set_bytes(caches, room), room // 4096 * 4096)
        with open_working_set(size, room_bytes=room, numa_node=node_of_device(self.device), until_s=end_s) as block:
            if settings.host_set_bytes is None and block.numel() < 2 * (caches or LEAST_SET_BYTES // 4):
                self.notes.append(
                    f"host memory and updates were measured over {format_bytes(block.numel())}, caches hold "
                    f"{format_bytes(caches) if caches else 'nobody knows how much'}: their rates may be a cache's, higher than a step's"
                )
            yield block

    def _beside(self, updates: ChunkUpdates, end_s: float) -> tuple[MeasuredRate, MeasuredRate]:
        with self._open_link(min(self.settings.link_units), self.device_room_bytes, self.host_room_bytes // 2) as link:
            return updates.beside(link, self.settings.sampling, until_s=end_s)

    def _compute(self, end_s: float) -> ComputeFigures:
        """Half of the device's room for the matrices, half for the copies."""
        settings, room = self.settings, self.device_room_bytes // 2
        shape = settings.block_on_gpu if self.device.type == "cuda" else settings.block_on_cpu
        with self._open_link(min(settings.link_units), room) as link:
            return measure_compute(self.device, shape, link, settings.sampling, room_bytes=room, until_s=end_s)

    def _kernels(self, end_s: float) -> KernelRates:
        return measure_kernels(self.device, self.settings.sampling, room_bytes=self.device_room_bytes, until_s=end_s)

    def _drive(self, open_store: OpenStore | None) -> tuple[DriveFigures, ...]:
        """Each unit size, as far as the time that is left suffices."""
        if not self.places and open_store is None:
            self.notes.append("no --ssd-dir was given, so no drive was measured")
            return ()
        settings = self.settings
        is_direct = [False]

        def open_in_places(capacity_bytes: int) -> SsdStore:
            self._require_room(capacity_bytes)
            store = SsdStore(
                [str(place) for place in self.places], capacity_bytes=capacity_bytes, unlink=True, num_threads=4 * len(self.places)
            )
            is_direct[0] = store.is_direct
            return store

        open_any = open_store or open_in_places
        found = []
        try:
            trial = self._attempt("the SSD", lambda end: measure_trial(open_any, written=self.written))
            for index, unit in enumerate(settings.drive_units if trial is not None else ()):
                assert trial is not None
                left = len(settings.drive_units) - index

                def measure(end: float, unit: int = unit, left: int = left) -> DriveFigures:
                    now_s = time.perf_counter()
                    left_s = (self.begin_s + settings.most_s - now_s) / left
                    room = self.host_room_bytes
                    depth = choose_depth(unit, trial, settings.passes, left_s=left_s, room_bytes=room)
                    num_units = min(settings.drive_bytes, int(trial * TRIAL_S)) // unit
                    samples = measure_drive(
                        open_any,
                        unit,
                        max(2 * depth, num_units),  # each direction has its half while both are under way
                        settings.passes,
                        written=self.written,
                        room_bytes=room,
                        in_flight=depth,
                        until_s=now_s + left_s / 2,
                    )
                    lists = {name: rate_of(getattr(samples, name), unit) for name in ("read", "write", "mixed_read", "mixed_write")}
                    return DriveFigures(unit_bytes=unit, in_flight=depth, is_direct=is_direct[0], **lists)

                figures = self._attempt(f"the SSD in units of {format_bytes(unit)}", measure)
                found += [figures] if figures is not None else []
        finally:
            self._count_wear()
        return tuple(found)

    def _require_room(self, num_bytes: int) -> None:
        for place in self.places:
            if is_block_device(place):
                raise ValueError(f"{place} is a block device: what is on it would be lost, so it is not written to")
            free, needed = place_room_bytes(place), ROOM_ON_DRIVE * num_bytes // len(self.places)
            if free < needed:
                raise BudgetError(
                    f"{place} has {format_bytes(free)} free, and {format_bytes(needed)} must be for a file of "
                    f"{format_bytes(num_bytes // len(self.places))} to be no trouble; make room or give another --ssd-dir"
                )

    def _count_wear(self) -> None:
        """Where overspill counts what it writes, this counts too; a directory without a count gets none."""
        folder = self.places[0] if self.places else None
        if folder is not None and self.written[0] and (folder / COUNTER_NAME).is_file():
            counter = WriteCounter(folder)
            counter.note(self.written[0])
            counter.save()

    # -- all measurements --------------------------------------------------------------------------------------------

    def _each(self, what: str, units: Sequence[int], measure: Callable[[int, float], _Result]) -> tuple[_Result, ...]:
        rows = [
            self._attempt(f"{what} in units of {format_bytes(unit)}", lambda end, unit=unit: measure(unit, end))  # type: ignore[misc]
            for unit in units
        ]
        return tuple(row for row in rows if row is not None)

    def _attempt(self, what: str, measure: Callable[[float], _Result]) -> _Result | None:
        """`measure` until the end it is given; None and a note if there is no time left or it fails. Warnings become notes."""
        now_s = time.perf_counter()
        end_s = min(now_s + self.settings.share_s, self.begin_s + self.settings.most_s)
        if now_s >= end_s:
            self.notes.append(f"{what} was not measured: the probe's {self.settings.most_s:g} s are over")
            return None
        self._progress(what)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                return measure(end_s)
            except (OverspillError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch's, out of device memory as well
                self.notes.append(f"{what} was not measured: {error}")
                return None
            finally:
                for warning in heard:
                    if issubclass(warning.category, RuntimeWarning):
                        self._note_once(str(warning.message))

    def _note_once(self, text: str) -> None:
        """The same about files of several sizes is said once."""
        known = {_without_sizes(note) for note in self.notes}
        if _without_sizes(text) not in known:
            self.notes.append(text)


def _update_alone(updates: ChunkUpdates, sampling: Sampling, end_s: float) -> MeasuredRate:
    return updates.alone(sampling, until_s=end_s)


def _without_sizes(text: str) -> str:
    return re.sub(r"[0-9.]+ ([KMGT]i)?B", "", text)


def existing_places(ssd_places: Sequence[str]) -> list[Path]:
    """What there is of the directories of an SSD tier.

    Raises:
        ValueError, StorageError: a directory cannot be meant, or may not be looked at.
    """
    return [_existing(Path(place)) for place in ssd_places]


def _existing(place: Path) -> Path:
    """The directory, or its parent where it does not exist yet: a probe makes none.

    Raises:
        ValueError: there is neither, or the name is a file's.
        StorageError: one may not look.
    """
    try:
        if place.is_dir() or is_block_device(place):
            return place
        if place.exists():
            raise ValueError(f"{place} is a file and not a directory; give another --ssd-dir")
        if not place.absolute().parent.is_dir():
            raise ValueError(
                f"the SSD directory {place} does not exist, nor does {place.absolute().parent}; create it or give another --ssd-dir"
            )
    except OSError as error:
        raise StorageError(f"the SSD directory {place} cannot be used ({error.strerror}); give another --ssd-dir") from error
    return place.absolute().parent
