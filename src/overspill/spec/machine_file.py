"""What `overspill probe` found on one machine: a frozen document. `measured_hardware` makes of it what predictions take.

Words:

* **rate**: so much a second: the median of several samples, and the smallest and largest of them.
* **unit**: the bytes of one transfer; a rate is measured at the sizes in which a session moves (`spec.tensors`).
* **machine**: CPU, cores of this process, memory class, and the device that computes. **Software**: driver, torch, overspill.

Rules:

1. What could not be measured is None, or missing from its list, and `notes` says why. Nothing in a machine file is assumed.
2. A file holds for the machine that its `identity` names. Another machine's, or one of other software, is not used unless the user names
   it; a drive's figures hold for that drive only (`identity.ssd`).
3. The file has a version. A reader refuses any version but its own, because a figure that changed its meaning is worse than none.

Limits: the compute rate is that of one matrix product; how much of it a block reaches depends on the model. Collectives between GPUs have
a place here (`collectives`) and are not measured yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from overspill.spec.documents import from_plain, to_json
from overspill.spec.rates import LinkRates
from overspill.units import format_bytes

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRate:
    """One rate with its spread. What is counted (bytes, parameters, floating-point operations) is said where it stands."""

    median_per_s: float
    min_per_s: float
    max_per_s: float
    num_samples: int
    size: int
    """Of one repetition, in what the rate counts."""

    def __post_init__(self) -> None:
        if not 0 < self.min_per_s <= self.median_per_s <= self.max_per_s < math.inf:
            raise ValueError(f"a rate of {self.median_per_s} between {self.min_per_s} and {self.max_per_s} cannot have been measured")

    @property
    def spread_fraction(self) -> float:
        """Largest minus smallest, over the median."""
        return (self.max_per_s - self.min_per_s) / self.median_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineIdentity:
    """What must be the same for figures to hold."""

    cpu_model: str
    num_cpus: int
    """That this process may use."""
    memory_class_bytes: int
    """Physical memory, rounded to a power of two; not compared where it grows."""
    device: str
    """`cpu`, or the GPU's name."""
    device_uuid: str = ""
    """Of a GPU."""
    driver: str = ""
    """Of a GPU."""
    torch: str
    overspill: str
    ssd: tuple[str, ...] = ()
    """File systems of the SSD directories, type and id; empty: none was given."""

    @property
    def key(self) -> str:
        """Names the file in the cache: the same for all software, drives and memory sizes of one machine and device."""
        text = json.dumps([self.cpu_model, self.num_cpus, self.device, self.device_uuid])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_MACHINE_FIELDS = {
    "cpu_model": "the CPU",
    "num_cpus": "the number of cores",
    "memory_class_bytes": "the memory class",
    "device": "the device",
    "device_uuid": "the GPU's id",
}
_SOFTWARE_FIELDS = {"driver": "the driver", "torch": "torch", "overspill": "overspill"}
"""Field -> how messages call it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineCapacities:
    """What the machine's tiers could hold when it was probed. A run asks again what is free when it starts."""

    memory_total_bytes: int
    memory_total_after_bytes: int
    """The same at the end of the probe; memory that comes and goes (a virtual machine's balloon) shows here."""
    host_available_bytes: int
    """MemAvailable, or what the control groups leave if that is less."""
    host_budget_bytes: int | None = None
    """What the user gave; it wins over everything that was found."""
    cgroup_limit_bytes: int | None = None
    """The smallest limit of this process's memory control groups, versions 1 and 2; None: no limit."""
    memlock_bytes: int | None = None
    """Most bytes that this process may lock (`ulimit -l`); None: no limit."""
    ssd_free_bytes: int | None = None
    """Of the SSD directories' file systems, the fullest times their number; None: no directory was given."""
    device_total_bytes: int | None = None
    """None: the device is the CPU, whose memory is the host's."""
    device_free_bytes: int | None = None
    gpus: tuple[str, ...] = ()
    """Names of all GPUs that this process sees."""

    @property
    def is_memory_steady(self) -> bool:
        return self.memory_total_bytes == self.memory_total_after_bytes

    @property
    def host_usable_bytes(self) -> int | None:
        """The user's budget; else what is available; None: unknown, for the machine's memory changes while one looks."""
        if self.host_budget_bytes is not None:
            return self.host_budget_bytes
        return self.host_available_bytes if self.is_memory_steady else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """Copies between host and device in units of `unit_bytes`, in bytes a second."""

    unit_bytes: int
    is_pinned: bool
    """False on a CPU, and where pinning was refused."""
    h2d: MeasuredRate
    d2h: MeasuredRate
    duplex: MeasuredRate
    """Each direction, while both move the same."""

    @property
    def duplex_factor(self) -> float:
        """Both directions together over the sum of what they reach alone: 1 if they do not disturb each other, 0.5 if they take turns."""
        return 2 * self.duplex.median_per_s / (self.h2d.median_per_s + self.d2h.median_per_s)

    @property
    def rates(self) -> LinkRates:
        both = self.duplex.median_per_s
        return LinkRates(
            up_bytes_per_s=self.h2d.median_per_s,
            down_bytes_per_s=self.d2h.median_per_s,
            up_duplex_bytes_per_s=both,
            down_duplex_bytes_per_s=both,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriveFigures:
    """Transfers of the SSD tier in units of `unit_bytes`, checksums included, in bytes a second of all directories together."""

    unit_bytes: int
    in_flight: int
    """Transfers of a direction under way at a time."""
    is_direct: bool
    """False: through the page cache, because the file system refuses direct I/O."""
    read: MeasuredRate
    write: MeasuredRate
    mixed_read: MeasuredRate
    """While writes are under way."""
    mixed_write: MeasuredRate

    @property
    def rates(self) -> LinkRates:
        return LinkRates(
            up_bytes_per_s=self.read.median_per_s,
            down_bytes_per_s=self.write.median_per_s,
            up_duplex_bytes_per_s=self.mixed_read.median_per_s,
            down_duplex_bytes_per_s=self.mixed_write.median_per_s,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFigures:
    """A kind of product, by the device."""

    rate: MeasuredRate
    """Floating-point operations a second."""
    moved_bytes: int
    """Read and written by one repetition, each tensor once."""

    def net_per_s(self, memory_bytes_per_s: float) -> float:
        """The rate beside moving the bytes, if the device moves them at that rate and computes at another time: what is left is what the
        arithmetic takes. At least the rate itself, at most twice."""
        took_s = self.rate.size / self.rate.median_per_s
        return self.rate.size / max(took_s / 2, took_s - self.moved_bytes / memory_bytes_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeFigures:
    """A matrix product of a block's size on the device, alone and beside copies over the link in both directions."""

    what: str
    """Its shapes and dtype."""
    alone: MeasuredRate
    """Floating-point operations a second."""
    beside_copies: MeasuredRate | None
    """The same while both directions of the link are busy; None: not measured."""
    copies_unit_bytes: int = 0
    copies_alone: MeasuredRate | None = None
    """Bytes a second of each direction, both busy, nothing computed."""
    copies_beside: MeasuredRate | None = None
    """The same while the product runs."""
    device_memory: MeasuredRate | None = None
    """Bytes read and written a second of x = x + 1 on the device; None: not measured (a machine file of before)."""
    moved_bytes: int = 0
    """Read and written by the product; 0: a machine file of before."""
    attention: KernelFigures | None = None
    """Causal attention, forward and backward. None: not measured (no GPU, or a machine file of before), and so for those that follow."""
    grouped: KernelFigures | None = None
    """Products of routed experts, forward and backward."""
    elementwise: MeasuredRate | None = None
    """Bytes read and written a second of what a block does beside products: norms, gates, residual sums."""
    scattered: MeasuredRate | None = None
    """The same where rows are added into rows that an index names."""

    @property
    def product(self) -> KernelFigures | None:
        """The matrix product; None: a machine file of before, which does not say what it moved."""
        return KernelFigures(rate=self.alone, moved_bytes=self.moved_bytes) if self.moved_bytes else None

    @property
    def compute_slowdown(self) -> float | None:
        """How many times longer the product takes beside copies."""
        return None if self.beside_copies is None else self.alone.median_per_s / self.beside_copies.median_per_s

    @property
    def copies_slowdown(self) -> float | None:
        if self.copies_alone is None or self.copies_beside is None:
            return None
        return self.copies_alone.median_per_s / self.copies_beside.median_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineRates:
    """How fast the lanes are."""

    link: tuple[LinkFigures, ...] = ()
    """A row for each unit size."""
    host_copy: MeasuredRate | None = None
    """Bytes read and written a second of a copy from host memory to host memory, all cores."""
    host_in_place: MeasuredRate | None = None
    """Bytes read and written a second of x = a * x + b in host memory: what bounds any update in place."""
    update: Mapping[str, MeasuredRate] = dataclasses.field(default_factory=dict)
    """State format -> parameters a second of AdamW's update in host memory."""
    update_parameter_dtype: str = "bfloat16"
    """Of the parameters and gradients in `update`."""
    update_beside_copies: MeasuredRate | None = None
    """The same in format `fp32` while both directions of the link are busy; None: not measured (no GPU, or a machine file of before)."""
    copies_beside_update: MeasuredRate | None = None
    """Bytes a second of each direction while the host updates."""
    host_set_bytes: int = 0
    """Of the working set over which host memory and updates were measured; 0: a machine file of before, whose figures may be a cache's."""
    launches: MeasuredRate | None = None
    """Small kernels a second that the host issues from Python, forward and backward; None: not measured."""
    compute: ComputeFigures | None = None
    ssd: tuple[DriveFigures, ...] = ()
    """A row for each unit size."""
    collectives: Mapping[str, MeasuredRate] = dataclasses.field(default_factory=dict)
    """Name (`all_gather`, `reduce_scatter`, `all_reduce`) -> bytes a second between all GPUs. Empty: not measured yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFootprint:
    """What a process that trains on the GPU takes beside its tensors, once the kernels of a step are loaded."""

    context_bytes: int
    """What the driver counts as used beside the allocator's; what other programs had on the device while it was probed included."""
    library_bytes: int
    """Workspaces that matrix libraries keep, from the allocator."""
    host_growth_bytes: int
    """Resident host memory that kernels and libraries took, from a context with none of them on."""
    expert_host_growth_bytes: int = 0
    """What the kernels of routed experts take of host memory on top. 0: not measured (a torch without grouped products on this GPU, a
    machine file of before). The context is the same with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineFile:
    """One probe of one machine."""

    format_version: int = FORMAT_VERSION
    identity: MachineIdentity
    measured_at: str
    """UTC, ISO 8601."""
    took_s: float
    capacities: MachineCapacities
    rates: MachineRates
    footprint: ProcessFootprint | None = None
    """None: no GPU, or not measured (a machine file of before)."""
    ssd_written_bytes: int = 0
    """What the probe wrote to the drive and removed."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""

    def to_json(self) -> str:
        return to_json(self)


def parse_machine_file(text: str, where: str | Path) -> MachineFile:
    """A machine file from its JSON.

    Args:
        where: its path, for messages.

    Raises:
        ValueError: it is no machine file, or of another format version.
    """
    cure = "measure again with `overspill probe --renew`"
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no machine file: it is not JSON ({error}); {cure}") from error
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if version is None:
        raise ValueError(f"{where} is no machine file: it has no format_version; {cure}")
    if version != FORMAT_VERSION:
        raise ValueError(f"{where} is a machine file of format version {version!r}, this overspill reads version {FORMAT_VERSION}; {cure}")
    try:
        return from_plain(MachineFile, plain)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is a damaged machine file: {error}; {cure}") from error


def machine_differences(file: MachineFile, here: MachineIdentity) -> tuple[str, ...]:
    """In what `here` is another machine than the file's, in words; empty: the same."""
    is_comparable = file.capacities.is_memory_steady
    fields = {name: text for name, text in _MACHINE_FIELDS.items() if name != "memory_class_bytes" or is_comparable}
    return _differences(file.identity, here, fields)


def software_differences(file: MachineFile, here: MachineIdentity) -> tuple[str, ...]:
    """In what the software of `here` is not the file's, in words."""
    return _differences(file.identity, here, _SOFTWARE_FIELDS)


def _differences(then: MachineIdentity, now: MachineIdentity, fields: Mapping[str, str]) -> tuple[str, ...]:
    def shown(name: str, value: object) -> object:
        return format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else value or "none"

    pairs = [(name, getattr(then, name), getattr(now, name)) for name in fields]
    return tuple(f"{fields[name]} was {shown(name, old)}, is {shown(name, new)}" for name, old, new in pairs if old != new)
