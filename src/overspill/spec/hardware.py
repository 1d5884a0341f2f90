"""What the machine can hold and how fast its lanes are.

Until `overspill probe` has measured them (`machine_file`), rates are assumed, and `source` says so: byte counts and peaks do not depend
on them.
"""

from __future__ import annotations

import dataclasses

ASSUMED = "assumed"
"""The `source` of rates that nobody measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """Rates of one machine's lanes and capacities of its tiers."""

    source: str = ASSUMED
    """`assumed`, or `measured` with the file, its date and what is assumed all the same; printed beside every time predicted from it."""
    h2d_bytes_per_s: float = 20e9
    """Host to device. Assumed: PCIe 4.0 x16 with pinned memory."""
    d2h_bytes_per_s: float = 20e9
    ssd_read_bytes_per_s: float = 2e9
    """Assumed: a slow NVMe drive."""
    ssd_write_bytes_per_s: float = 1.5e9
    host_update_parameters_per_s: float = 1e9
    """Parameters that the host updates in one second."""
    device_flops: float = 5e12
    """Floating-point operations per second that a unit's matrix products reach."""
    device_capacity_bytes: int = 0
    """0: unknown."""
    host_capacity_bytes: int = 0
    """What this process may use: the smaller of MemAvailable and the cgroup's limit. 0: unknown."""
    ssd_capacity_bytes: int = 0
    """Free bytes of the SSD directory's file system. 0: unknown or no directory."""
    process_bytes: int = 0
    """Host memory that the process holds before overspill allocates anything; it counts against the host budget."""
    device_context_bytes: int = 0
    """Device memory that the driver's context takes; it counts against the device budget."""
