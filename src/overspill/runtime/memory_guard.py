"""Host memory watched while a step runs, so that a run ends by its own decision and not by the kernel's.

The kernel ends a process without a word when a control group's limit or the machine's memory is used up. The guard looks at
what is left (`probe.capacities.host_available_bytes`: MemAvailable, and the limits of all control groups of versions 1 and 2) between
the ops of a step, at most every `INTERVAL_S`:

1. Less than the margin: the step is finished; whoever drives the session then makes a checkpoint and stops.
2. Less than a quarter of the margin: the step is given up at once. The last checkpoint is whole (`tiers/records.py`, rule 1).

Both name what grew most since the session was opened.

Costs: 0.03 ms a look, and 0.15 ms once a second. Limit: an allocation larger than the margin between two looks is not seen in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from overspill.errors import HostMemoryError
from overspill.probe.capacities import AvailableBytes, host_available_bytes
from overspill.report.memory import host_resident_bytes
from overspill.runtime.residency import Residency
from overspill.units import MIB, format_bytes

MARGIN_BYTES = 512 * MIB
"""Most that is kept free. Chosen, not tuned: some of the largest single allocations of a step (a chunk of logits is 256 MiB)."""
MARGIN_SHARE = 0.05
"""Of what was free at the start, if that is less. Chosen, not tuned."""
INTERVAL_S = 0.02


class HostMemoryGuard:
    """Watches one session.

    Args:
        available_bytes: what is left for this process; None: the kernel's answer. Tests give their own.
        margin_bytes: None: the smaller of the two constants above.
    """

    def __init__(self, residency: Residency, *, available_bytes: Callable[[], int] | None = None, margin_bytes: int | None = None) -> None:
        self._residency = residency
        self._all_available_bytes = available_bytes or host_available_bytes
        self._at_start = self._pools()
        self._last_look_s = 0.0
        left = self._all_available_bytes()
        self.margin_bytes = min(MARGIN_BYTES, int(left * MARGIN_SHARE)) if margin_bytes is None else margin_bytes
        self._available_bytes = available_bytes or AvailableBytes(enough_bytes=self.margin_bytes)
        self.warning: str | None = None
        """Why the run should stop after this step; None while there is room."""

    def look(self) -> None:
        """Between two ops.

        Raises:
            HostMemoryError: there is so little left that the step cannot be finished.
        """
        now_s = time.monotonic()
        if now_s - self._last_look_s < INTERVAL_S:
            return
        self._last_look_s = now_s
        left = self._available_bytes()
        if left >= self.margin_bytes:
            return
        if self.warning is None:
            self.warning = self._describe(left)
        if left < self.margin_bytes // 4:
            raise HostMemoryError(f"{self._describe(left)}; the step was given up, the last checkpoint is whole")

    def _pools(self) -> dict[str, int]:
        """Bytes by who holds them, and what the rest of the machine has taken."""
        host, device = self._residency.host, self._residency.device
        on_cpu = device.device.type == "cpu"
        own = host.allocated_bytes + (device.allocated_bytes if on_cpu else 0)
        resident = host_resident_bytes()
        pools = {
            "buffers and homes in host memory": host.allocated_bytes,
            "activations, Python and libraries of this process": max(0, resident - own),
        }
        if on_cpu:
            pools["the tier of the cpu device"] = device.allocated_bytes
        pools["other processes, and files kept in memory"] = -(self._all_available_bytes() + resident)
        return pools

    def _describe(self, left: int) -> str:
        growth = {name: size - self._at_start.get(name, 0) for name, size in self._pools().items()}
        name = max(growth, key=growth.__getitem__)
        return (
            f"host memory is used up: {format_bytes(left)} are left to this process, {format_bytes(self.margin_bytes)} are kept free; what "
            f"grew most since the start is {name}, by {format_bytes(growth[name])}; lower --host-budget, --micro-batch or --seq-len, "
            "or give the process more memory"
        )
