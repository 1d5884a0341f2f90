"""What became of the tensors that autograd saved: per round, and since the offloading was made.

Words:

* **saved tensor**: what autograd packed for backward. **record**: the bytes of one storage that were packed, however many saved tensors
  are views of them. Bytes here are bytes of records, so what is saved five times counts once.
* **round**: from the first record after nothing was alive to the death of the last one: one forward and backward of a plain step, or all
  micro-batches that a pipeline schedule has under way together.
* **kept**: stays on the device. **moved**: copied to host memory or to the SSD. **forwarded**: moved, but wanted before the device's copy
  was gone, so that nothing had to come back. **cancelled**: forwarded so early that its write to the SSD never began.
* **rebuilt**: dropped, and recomputed in backward from records.
* **left alone**: a saved tensor that is no candidate at all, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Amounts:
    """What became of records, in one round or in all."""

    packed_bytes: int
    """kept + host + ssd."""
    kept_bytes: int
    host_bytes: int
    """On the device; the host has `stored_bytes` of it."""
    ssd_bytes: int
    stored_bytes: int
    """What host and SSD took for `host_bytes + ssd_bytes`; less with a storage form that compresses."""
    rebuilt_bytes: int
    """Stored nowhere, because backward rebuilds them from records."""
    forwarded_bytes: int
    cancelled_bytes: int
    wait_s: float
    """Time in which this process's threads waited for a copy that compute needed."""
    device_peak_bytes: int
    """Most bytes of records on the device at one time: kept, leaving, and fetched ahead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundAmounts(_Amounts):
    """The bytes of one round."""

    round: int
    """Counted from 1."""
    is_planned: bool
    """Whether measured times and rates decided; else everything that had room was moved, because nothing was known yet."""
    num_records: int
    num_run_again: int
    """Calls of modules that backward runs again because a throughput leaves time for them."""
    window_bytes: int
    """Device memory that could be on its way out, at the round's end."""
    back_window_bytes: int
    """The same of what could have come back early."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationRates:
    """Bytes per second, measured; None: not yet."""

    d2h_bytes_per_s: float | None = None
    h2d_bytes_per_s: float | None = None
    ssd_write_bytes_per_s: float | None = None
    ssd_read_bytes_per_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a watched round said, on the clock of the device; the amounts follow from it and from those before."""

    round: int
    """Counted from 1."""
    forward_s: float
    """From the first record to the end of forward; pauses are taken out of this and the next."""
    backward_s: float
    """From there to the last record that was wanted."""
    waited_s: float
    """Compute waited for copies."""
    rebuilt_s: float
    """Backward rebuilt tensors."""
    again_s: float
    """Backward ran modules again."""
    rates: ActivationRates
    """Of this round alone."""
    caution: float
    """Of the rates that are believed: what is decided with."""
    is_believed: bool
    """Whether its rates are what was believed, or came to be; if not, the next round was watched as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationReport(_Amounts):
    """All rounds so far; bytes and waits add up over rounds unless it says otherwise, `device_peak_bytes` is the largest of the rounds'."""

    num_rounds: int
    """Rounds that have ended."""
    num_waits: int
    """How often a thread waited for a copy that compute needed."""
    left_alone: Mapping[str, int]
    """Number of saved tensors that were no candidates, by reason."""
    num_live: int
    """Records that are alive now."""
    host_used_bytes: int
    """Of host memory, now."""
    ssd_used_bytes: int
    host_peak_bytes: int
    """Host memory that was held, pinned or not."""
    pinned_bytes: int
    """Of host memory, now."""
    ssd_peak_bytes: int
    rates: ActivationRates
    rounds: tuple[RoundAmounts, ...]
    """The last `MOST_ROUNDS`."""
    looks: tuple[Look, ...] = ()
    """The last `MOST_LOOKS`."""
    segments: tuple[str, ...]
    """Modules whose forward backward runs again; what is saved in them is packed nowhere and counted nowhere, what goes in is."""
    num_segment_rebuilds: int
    """How often one of them was run again."""
    gradient_error: float | None
    """‖g − g₀‖₂ / ‖g₀‖₂ over all parameters, g₀ without offloading; None: not measured."""


MOST_ROUNDS = 64
"""Rounds that a report remembers one by one: enough to see amounts settle, and it does not grow. Chosen."""
MOST_LOOKS = 16
"""Watched rounds that it remembers: those of the first 256 rounds. Chosen."""
