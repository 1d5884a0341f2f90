"""Rounds: when one begins and ends, which are watched, and what was decided from them.

A round begins with the first record that is packed when none is alive, and ends with the death of the last one. A watched round is read
once the device has passed its last mark; then it is decided where the records of the rounds from there on go, what is rebuilt and which
modules are run again, by their place in the micro-batch. A round with other lengths than the watched one follows the same decisions: bytes
and times grow together. What is beyond the places that were seen stays.

To read and to decide takes the host up to 0.1 s for a Llama, as long as it takes the device to run its forward, and in forward the device
waits for the host. So that is done at the end of a backward, which has been launched by then and takes the device far longer. Only the
first decision, one for which there is less room than was thought, and what no backward came for, are made where a forward begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from overspill.activations.amounts import Amount, Room, Target
from overspill.activations.flight import Profile
from overspill.activations.mover import Mover
from overspill.activations.records import Record
from overspill.activations.steadying import BelievedRates, QuickestRounds
from overspill.activations.tally import Tally
from overspill.activations.timeline import Timeline, is_watched
from overspill.activations.windows import Decision, decide, next_caution, slowed
from overspill.spec.activations import ActivationRates, Look


class Space(Protocol):
    """Knows how much room there is."""

    def look(self, kept_bytes: int, peak_bytes: int) -> Room:
        """The room now; the last round kept so much on the device, and at its fullest moment had so much of records there."""
        ...

    def has_shrunk(self) -> bool:
        """Whether there is less than at the last look."""
        ...


class Rounds:
    """The rounds of one cache; its cache locks.

    Args:
        throughput: least share of plain PyTorch's that recomputation leaves; None: what can be recomputed is.
        before: of an earlier cache of the same model, whose counts and decisions are gone on with.
    """

    def __init__(self, mover: Mover, amount: Amount, space: Space, throughput: float | None, before: Rounds | None) -> None:
        self._mover, self._amount, self._space, self._throughput = mover, amount, space, throughput
        self.tally: Tally = before.tally if before is not None else Tally()
        self.tally.mover = mover
        self.rates: ActivationRates = before.rates if before is not None else ActivationRates()
        self._believed: BelievedRates = before._believed if before is not None else BelievedRates()
        self.profile: Profile | None = before.profile if before is not None else None
        self._targets: tuple[Target, ...] | None = before._targets if before is not None else None
        self._keep_bytes: int | None = before._keep_bytes if before is not None else None
        self._decision: Decision | None = before._decision if before is not None else None
        self._quickest: QuickestRounds = before._quickest if before is not None else QuickestRounds()
        self._caution: float = before._caution if before is not None else 1.0
        """Of the rates, what is decided with."""
        if self._decision is not None:
            mover.set_windows(self._decision.windows)
        self.timeline: Timeline | None = None
        """Of the round that runs, if it is watched."""
        self._unread: Timeline | None = before._unread if before is not None else None

    def begin(self) -> None:
        """The first record of a round is being made."""
        self.decide_in_forward()
        number = self.tally.begin(is_planned=self._targets is not None)
        # While a look is unread there is no other: it would take the place of it, and a host that is ahead would never read one.
        if self._amount.needs_profile and self._unread is None and (is_watched(number) or self._believed.is_in_doubt):
            is_free = self._decision is not None and self._decision.is_free
            self.timeline = Timeline(self._mover.link, number=number, is_free=is_free)
            self._mover.holds = self.timeline.holds
            if self._mover.ssd is not None:
                self._mover.ssd.clear_spans()

    def end(self) -> None:
        """The last record has died."""
        self.tally.end()
        if self.timeline is not None:
            self.timeline.finish(self._mover)
            self._unread, self.timeline, self._mover.holds = self.timeline, None, None

    @property
    def is_decided(self) -> bool:
        """Whether a measured round has said what is done."""
        return self._decision is not None

    @property
    def choices(self) -> object:
        """What is done in this round, equal to that of another round in which the same is done; None: that depends on more, or what is
        fetched depends on the records that backward wants, and not on a measured pace."""
        decision = self._decision
        if decision is not None:
            has_pace = decision.pace is not None and decision.pace.way_back is not None
            leaves = any(target is not Target.KEEP and target is not Target.REBUILD for target in decision.targets)
            return (decision.targets, decision.mix) if has_pace or not leaves else None
        return () if not self._amount.needs_profile and not self._amount.leaves_unmeasured else None

    def target(self, place: int) -> Target:
        """Where a micro-batch's record at this place goes."""
        if self._targets is not None:
            target = self._targets[place] if place < len(self._targets) else Target.KEEP
            return target if target is not Target.REBUILD else Target.KEEP
        return Target.HOST if self._amount.leaves_unmeasured else Target.KEEP

    def rebuilds(self, place: int) -> bool:
        """Whether what has a recipe at this place is rebuilt; while nothing is measured all is."""
        if self._targets is None or self._throughput is None:
            return True
        mix = self._decision.mix if self._decision is not None else None
        return mix is not None and place < len(mix.rebuilt) and mix.rebuilt[place]

    def stop_of_again(self, call: int) -> int | None:
        """Whether a call of a module is run again: the first place behind it; None: it is not, as while nothing is measured."""
        if self._decision is None or self.profile is None or call >= len(self._decision.mix.again):
            return None
        return self.profile.calls[call].stop if self._decision.mix.again[call] else None

    def may_wait(self, record: Record) -> bool:
        """Whether forward may wait for room on a record's way out, instead of keeping it."""
        if self._targets is None or not self._amount.needs_profile:
            return True
        return self._keep_bytes is not None and self._mover.device_bytes + record.num_bytes > self._keep_bytes

    def gone_when_packed(self, micro_batch: int, num_packed: int) -> Callable[[Record], bool] | None:
        """Says of which records the copy should have ended, now that so many of this micro-batch are packed; None: of none."""
        pace = self._decision.pace if self._decision is not None else None
        if pace is None:
            return None
        here = pace.num_gone[min(num_packed, len(pace.num_gone)) - 1] if num_packed else 0
        return lambda record: record.index < (here if record.micro_batch == micro_batch else pace.num_gone_at_turn)

    def way_back(self, place: int) -> tuple[Sequence[int], int] | None:
        """Places of a micro-batch in the order in which they come back, and how many of them are on their way once this place is wanted;
        None: what was packed last comes first, as much as the window takes."""
        way = self._decision.pace.way_back if self._decision is not None and self._decision.pace is not None else None
        if way is None or place >= len(way.until):
            return None
        return way.order, way.until[place]

    def gone_in_backward(self) -> Callable[[Record], bool] | None:
        """The same, whenever backward wants one."""
        pace = self._decision.pace if self._decision is not None else None
        return (lambda record: record.index < pace.num_gone_at_turn) if pace is not None else None

    @property
    def awaits_backward(self) -> bool:
        """Whether there is, or will be, something to decide at the end of a backward."""
        return self.timeline is not None or self._unread is not None

    def decide_in_forward(self) -> None:
        """No record is alive, and forward begins: what cannot wait for the end of its backward is decided now."""
        is_overdue = self._unread is not None and self.tally.num_ended > self._unread.number
        if (self._decision is None or is_overdue) and self._read():
            self._decide()
        elif self.profile is not None and self._space.has_shrunk():
            self._read()
            self._decide()

    def decide_in_backward(self) -> None:
        """No record is alive, and backward has been launched: the device is behind, and has no need of the host for a while."""
        if self._read():
            self._decide()

    def _read(self) -> bool:
        """Read the last watched round, if the device has passed it; whether there is a profile now."""
        watched = self._unread
        if watched is None or not watched.is_readable():
            return False
        self._unread = None
        found = watched.rates(self._mover)
        self.rates = self._believed.see(found)
        if watched.is_free and not self._believed.is_in_doubt:
            self._caution = next_caution(self._caution, watched.waited_fraction())
        profile = watched.profile(self.profile)
        if profile is not None:
            self.tally.looks.append(self._look(watched, profile, found))
            self.profile = self._quickest.steady(profile)
        return self.profile is not None

    def _decide(self) -> None:
        """What the rounds from here on do."""
        assert self.profile is not None
        last = self.tally.rounds[-1] if self.tally.rounds else None
        room = self._space.look(*((last.kept_bytes, last.device_peak_bytes) if last is not None else (0, 0)))
        self._keep_bytes = room.keep_bytes
        rates = slowed(self.rates, self._caution)
        self._decision = decide(
            self._amount, self.profile, rates, room, may_choose=self._mover.has_own_windows, throughput=self._throughput
        )
        self._targets = self._decision.targets
        self._mover.set_windows(self._decision.windows)

    def _look(self, watched: Timeline, profile: Profile, found: ActivationRates) -> Look:
        paused_s = watched.paused_s()
        return Look(
            round=watched.number,
            forward_s=profile.forward_s,
            backward_s=profile.step_s - profile.forward_s,
            waited_s=paused_s["held"],
            rebuilt_s=paused_s["rebuilt"],
            again_s=paused_s["again"],
            rates=found,
            caution=self._caution,
            is_believed=not self._believed.is_in_doubt,
        )
