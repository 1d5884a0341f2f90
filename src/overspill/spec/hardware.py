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
    h2d_duplex_bytes_per_s: float = 0.0
    """While the other direction is under way. 0: as alone, and so for the three that follow."""
    d2h_duplex_bytes_per_s: float = 0.0
    ssd_read_mixed_bytes_per_s: float = 0.0
    """While writes are under way."""
    ssd_write_mixed_bytes_per_s: float = 0.0
    host_memory_bytes_per_s: float = 0.0
    """Read and written, by all lanes that touch host memory together. 0: never what they wait for."""
    matrix_flops: float = 0.0
    """Operations a second of a large matrix product. 0: only `device_flops` is known."""
    device_memory_bytes_per_s: float = 0.0
    """Read and written by elementwise work on the device. 0: not known."""
    product_flops: float = 0.0
    """Operations a second of a large matrix product beside moving its bytes (`KernelFigures.net_per_s`). 0: not known, and so for the four
    that follow; the first is then `matrix_flops`, and each of the others what is known of the kind that comes before it."""
    attention_flops: float = 0.0
    grouped_flops: float = 0.0
    """Of routed experts' products."""
    elementwise_bytes_per_s: float = 0.0
    """Of a block's norms, gates and sums."""
    scattered_bytes_per_s: float = 0.0
    """Of rows that are added into rows that an index names."""
    compute_beside_copies: float = 1.0
    """Share of its rate that compute keeps while both directions of the link are busy."""
    copies_beside_compute: float = 1.0
    """Share of its rate that a copy keeps while the device computes."""
    launch_s: float = 0.0
    """Host seconds to launch one operation of a model on the device, Python and autograd included. 0: not measured, and
    `spec.launches.LAUNCH_S` is assumed."""
    device_capacity_bytes: int = 0
    """0: unknown."""
    host_capacity_bytes: int = 0
    """What this process may use: the smaller of MemAvailable and the cgroup's limit. 0: unknown."""
    ssd_capacity_bytes: int = 0
    """Free bytes of the SSD directory's file system. 0: unknown or no directory."""
    process_bytes: int = 0
    """Host memory that the process holds before overspill allocates anything; it counts against the host budget."""
    device_context_held_bytes: int = 0
    """Of what this process takes of the device beside its tensors: what is there already, and so is out of the capacity."""
    footprint_context_bytes: int = 0
    """What a training process takes beside its tensors on this machine's GPU, by `overspill probe`. 0: not measured, and so for the two
    that follow; predictions then take constants."""
    footprint_library_bytes: int = 0
    footprint_host_growth_bytes: int = 0
    footprint_expert_host_growth_bytes: int = 0
    """What the kernels of routed experts add to the last. 0: not measured; predictions then leave it out."""

    @property
    def is_measured(self) -> bool:
        """Whether its rates were measured, all or in part."""
        return self.source != ASSUMED
