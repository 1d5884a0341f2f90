"""Counts what became of records; one round at a time, and all rounds together."""

from __future__ import annotations

import collections

from overspill.activations.amounts import Target
from overspill.activations.mover import Mover
from overspill.activations.records import Record
from overspill.spec.activations import MOST_LOOKS, MOST_ROUNDS, Look, RoundAmounts


class Tally:
    """The books of one cache, and of those that go on after it; the cache locks."""

    def __init__(self) -> None:
        self.mover: Mover | None = None
        """Whose counts are read; given by the cache."""
        self.left_alone: collections.Counter[str] = collections.Counter()
        self.rounds: collections.deque[RoundAmounts] = collections.deque(maxlen=MOST_ROUNDS)
        self.looks: collections.deque[Look] = collections.deque(maxlen=MOST_LOOKS)
        self.num_ended = 0
        self._before_round: collections.Counter[str] = collections.Counter()
        """Bytes of the rounds before this one."""
        self._round: collections.Counter[str] = collections.Counter()
        self._is_planned = False
        self._before = (0, 0.0, 0, 0)
        """The mover's counts when the round began."""
        self.device_peak_bytes = 0
        self.num_waits, self.wait_s = 0, 0.0

    def begin(self, *, is_planned: bool) -> int:
        """A round begins; its number."""
        self._before_round.update(self._round)
        self._round.clear()
        self._is_planned = is_planned
        mover = self._open_mover()
        self._before = mover.num_waits, mover.wait_s, mover.forwarded_bytes, mover.cancelled_bytes
        mover.device_peak_bytes = mover.device_bytes
        return self.num_ended + 1

    def note_packed(self, record: Record) -> None:
        there_bytes = record.num_bytes
        if record.is_narrowed:
            there_bytes = record.stored_bytes
            self._round["rebuilt"] += record.num_bytes - there_bytes
        self._note(record.target, there_bytes)
        if record.target is not Target.KEEP:
            self._round["stored"] += record.stored_bytes

    def note_kept(self, num_bytes: int) -> None:
        """What stays, and has no record."""
        self._note(Target.KEEP, num_bytes)

    def _note(self, target: Target, num_bytes: int) -> None:
        found = self._round
        found["packed"] += num_bytes
        found[target] += num_bytes
        found["records"] += 1

    @property
    def totals(self) -> collections.Counter[str]:
        """Bytes of the rounds that have ended, and of this one."""
        return self._before_round + self._round

    def note_rebuilt(self, num_bytes: int) -> None:
        """A tensor will be rebuilt; by the time of its round's first record it may be of the round before."""
        self._round["rebuilt"] += num_bytes

    def note_run_again(self) -> None:
        """Backward will run a module again that may be."""
        self._round["run again"] += 1

    def end(self) -> None:
        """The round has ended."""
        self.num_ended += 1
        mover = self._open_mover()
        num_waits, wait_s, forwarded_bytes, cancelled_bytes = self._before
        self.num_waits += mover.num_waits - num_waits
        self.wait_s += mover.wait_s - wait_s
        self._round["forwarded"] = mover.forwarded_bytes - forwarded_bytes
        self._round["cancelled"] = mover.cancelled_bytes - cancelled_bytes
        self.device_peak_bytes = max(self.device_peak_bytes, mover.device_peak_bytes)
        self.rounds.append(
            RoundAmounts(
                round=self.num_ended,
                is_planned=self._is_planned,
                num_records=self._round["records"],
                num_run_again=self._round["run again"],
                window_bytes=mover.window_bytes,
                back_window_bytes=mover.back_window_bytes,
                packed_bytes=self._round["packed"],
                kept_bytes=self._round[Target.KEEP],
                host_bytes=self._round[Target.HOST],
                ssd_bytes=self._round[Target.SSD],
                stored_bytes=self._round["stored"],
                rebuilt_bytes=self._round["rebuilt"],
                forwarded_bytes=self._round["forwarded"],
                cancelled_bytes=self._round["cancelled"],
                wait_s=mover.wait_s - wait_s,
                device_peak_bytes=mover.device_peak_bytes,
            )
        )

    def _open_mover(self) -> Mover:
        assert self.mover is not None
        return self.mover
