"""What the links of a machine allow, from figures that were measured without moving anything: pure functions.

Words: A are all bytes that autograd saves, T_f and T_b the seconds of forward and backward when all are kept, D and H the link's bytes per
second out and back.

* **The bound** of a tier: a byte must have left when forward ends, so min(1, D · T_f / A) can leave without slowing compute down.
* **The optimum of the mix**, at a given share r of keep's throughput, is a linear program in five numbers:

      f    share of the blocks that are recomputed whole: each keeps its input alone (I bytes if all are), and costs C_f seconds if all are
      c    share of the blocks of which what is cheap is rebuilt: saves R bytes and costs C_c seconds if all are
      y    bytes that leave
      s, b seconds that forward and backward wait for the link

      least     A - (A - I) f - R c - y  >= 0                  what stays
      where     f + c <= 1,   y <= D (T_f + s),   y <= H (T_b + C_f f + C_c c + b),   C_f f + C_c c + s + b <= (1 / r - 1) (T_f + T_b)

  C_f and C_c are measured: full recomputation's, and cheap recomputation's step less keep's. Backward's time includes the update, which
  is small here.

* **The window** is what the two above do not have: whole tensors, of which what is under way is on the device still. In a block of hidden
  size h and t tokens 4 h t elements are made twice at once (the MLP's inner state and its activation), and smaller ones before. If at most
  W bytes may be under way, what does not fit beside them stays, in every block; and W is on the device while memory is fullest, unless what
  has left by then is let go. `simulate_host` walks a measured round that way, with the code that decides in `overspill.activations`: what
  leaves without a wait and the peak of it, for windows W out and V back. Its peak is at most what stays and W while forward runs, and what
  stays and V (or what has not left yet, if that is more) when backward begins.

Limits: shares of blocks and bytes are real numbers in the program, tensors and blocks are whole. Neither the bound nor the program counts
memory in flight, nor that the last block's tensors are made too late to leave; so where the link takes most, nothing reaches these figures
quite. The program knows one price for all that is cheap, and whole blocks alone: who chooses among ops and modules may be beyond it.
`simulate_host` counts what is in flight, and no compute that runs slower because a copy runs beside it. How low a peak can be at all,
whatever moves, is in `least_peak.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from overspill.activations.amounts import Adaptive, Room, Target
from overspill.activations.flight import Profile, simulate_flight
from overspill.activations.mix import what_is_left
from overspill.activations.windows import decide, default_window_bytes
from overspill.spec.activations import ActivationRates

NUM_UNKNOWNS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """The letters of this file."""

    all_bytes: int
    """A."""
    inputs_bytes: int
    """I."""
    cheap_bytes: int
    """R."""
    forward_s: float
    step_s: float
    """T_f + T_b."""
    full_s: float
    """C_f."""
    cheap_s: float
    """C_c."""
    d2h_bytes_per_s: float
    h2d_bytes_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """An optimum."""

    gone_fraction: float
    """Of A."""
    moved_bytes: float
    full_fraction: float
    """f: of the blocks."""
    cheap_fraction: float
    """c."""


def best_mix(terms: Terms, *, throughput_fraction: float) -> Mix:
    """The linear program of this file, by trying all its corners.

    Raises:
        ValueError: a time, a rate or A is not above zero, or the throughput is no share.
    """
    if min(terms.all_bytes, terms.forward_s, terms.step_s, terms.d2h_bytes_per_s, terms.h2d_bytes_per_s) <= 0:
        raise ValueError(f"times, rates and bytes are above zero, got {terms}")
    if not 0 < throughput_fraction <= 1:
        raise ValueError(f"throughput_fraction is in (0, 1], got {throughput_fraction}")
    unit, allowed_s = float(terms.all_bytes), (1 / throughput_fraction - 1) * terms.step_s
    full, cheap = 1 - terms.inputs_bytes / unit, terms.cheap_bytes / unit
    out, back = terms.d2h_bytes_per_s / unit, terms.h2d_bytes_per_s / unit
    full_s, cheap_s = max(0.0, terms.full_s), max(0.0, terms.cheap_s)
    # Rows of a · x <= limit, x = (f, c, y / A, s, b).
    rows: list[tuple[tuple[float, ...], float]] = [
        ((1, 1, 0, 0, 0), 1.0),
        ((0, 0, 1, -out, 0), out * terms.forward_s),
        ((-back * full_s, -back * cheap_s, 1, 0, -back), back * (terms.step_s - terms.forward_s)),
        ((full_s, cheap_s, 0, 1, 1), allowed_s),
        ((full, cheap, 1, 0, 0), 1.0),
        *((tuple(-1.0 if column == index else 0.0 for column in range(NUM_UNKNOWNS)), 0.0) for index in range(NUM_UNKNOWNS)),
    ]
    best: tuple[float, ...] | None = None
    best_gone = -1.0
    for chosen in itertools.combinations(rows, NUM_UNKNOWNS):
        point = _solve([list(row) for row, _ in chosen], [limit for _, limit in chosen])
        if point is None or any(sum(a * x for a, x in zip(row, point, strict=True)) > limit + 1e-9 for row, limit in rows):
            continue
        gone = full * point[0] + cheap * point[1] + point[2]
        if gone > best_gone + 1e-12:
            best, best_gone = point, gone
    assert best is not None, "keeping everything is a corner"
    return Mix(gone_fraction=best_gone, moved_bytes=best[2] * unit, full_fraction=best[0], cheap_fraction=best[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostRound:
    """A round of the host tier on paper."""

    window_bytes: int
    """W."""
    back_window_bytes: int
    """V."""
    gone_fraction: float
    """Of A."""
    peak_fraction: float
    """Most bytes on the device at one time, of A."""


def simulate_host(
    profile: Profile,
    *,
    d2h_bytes_per_s: float,
    h2d_bytes_per_s: float,
    windows: tuple[int, int] | None = None,
    throughput: float | None = None,
) -> HostRound:
    """What leaves without a wait in a round like this one, with windows W and V; None: those that are chosen by default.

    What is recomputed is gone as well: at this share of keep's throughput, or (None) whatever can be rebuilt.
    """
    largest = max(profile.stored_bytes)
    usual = default_window_bytes(largest)
    room = Room(
        host_bytes=sum(profile.stored_bytes), ssd_bytes=0, staging_bytes=0, keep_bytes=None,
        window_bytes=windows[0] if windows else usual, back_window_bytes=windows[1] if windows else None,
    )  # fmt: skip
    rates = ActivationRates(d2h_bytes_per_s=d2h_bytes_per_s, h2d_bytes_per_s=h2d_bytes_per_s)
    found = decide(Adaptive(), profile, rates, room, may_choose=windows is None, throughput=throughput)
    rest = what_is_left(profile, found.mix)
    leaves = [target is not Target.KEEP for target in found.targets]
    flight = simulate_flight(rest, leaves, d2h_bytes_per_s, found.windows.out_bytes, found.windows.back_bytes)
    everything = sum(profile.device_bytes)
    kept = sum(size for size, is_moved in zip(rest.device_bytes, leaves, strict=True) if not is_moved)
    return HostRound(
        window_bytes=found.windows.out_bytes, back_window_bytes=found.windows.back_bytes, gone_fraction=1 - kept / everything,
        peak_fraction=flight.peak_bytes / everything,
    )  # fmt: skip


def _solve(matrix: list[list[float]], limits: Sequence[float]) -> tuple[float, ...] | None:
    """The point where all rows hold with equality; None: there is none, or more than one. By elimination."""
    size = len(matrix)
    rows = [[*row, limit] for row, limit in zip(matrix, limits, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        if abs(rows[pivot][column]) < 1e-12:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for index in range(size):
            if index != column:
                factor = rows[index][column] / rows[column][column]
                rows[index] = [value - factor * lead for value, lead in zip(rows[index], rows[column], strict=True)]
    return tuple(rows[index][size] / rows[index][index] for index in range(size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationPeak:
    """The fullest moment of a step."""

    num_bytes: int
    event: int
    """After which event of the history it was."""
    blocks: tuple[int, ...]
    """Bytes of each block that was there then, the largest first."""


def activation_peak(events: Sequence[dict[str, object]], gradient_addresses: set[int]) -> ActivationPeak:
    """When the most bytes were allocated at one time after the first event, the gradients left out.

    Args:
        events: torch's allocation history of one forward and backward, in order (`action`, `addr`, `size`).
        gradient_addresses: of what is a gradient when it has ended; what was allocated there last is that gradient, from then on.
    """
    last: dict[object, int] = {}
    for index, event in enumerate(events):
        if event["action"] == "alloc" and event["addr"] in gradient_addresses:
            last[event["addr"]] = index
    live: dict[object, int] = {}
    now, peak = 0, ActivationPeak(num_bytes=0, event=0, blocks=())
    for index, event in enumerate(events):
        address = event.get("addr")
        if event["action"] == "alloc" and last.get(address) != index:
            size = event["size"]
            assert isinstance(size, int)
            live[address] = size
            now += size
            if now > peak.num_bytes:
                peak = ActivationPeak(num_bytes=now, event=index, blocks=tuple(live.values()))
        elif event["action"] == "free_completed":
            now -= live.pop(address, 0)
    return dataclasses.replace(peak, blocks=tuple(sorted(peak.blocks, reverse=True)))


def largest_rows(*, fits: dict[int, bool], predicted: int, most: int) -> int | None:
    """Which number of rows to try next, for the largest that fits; None: it is known.

    Args:
        fits: what was tried.
        predicted: from a line through the peaks of two small ones; tried first.
        most: not more than that.
    """
    good = max((rows for rows, fit in fits.items() if fit), default=0)
    bad = min((rows for rows, fit in fits.items() if not fit), default=most + 1)
    if bad - good <= 1:
        return None
    guess = min(max(predicted, 1), most)
    if good < guess < bad:
        return guess
    if bad > most:  # nothing has failed: a little more
        return min(most, good + max(1, good // 16))
    if good == 0:  # nothing has fit: clearly less, for tries are few
        return bad - max(1, bad // 6)
    return (good + bad) // 2
