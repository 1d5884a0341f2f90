"""What is not stored at all, where time may be lost: a share of what is cheap to rebuild, a share of the modules that may be run again.

Somebody says how much of plain PyTorch's throughput has to be left. What leaves by itself costs nothing (`Adaptive`), so all of that time
is for recomputation. Pure functions, from a measured round.

Rules:

1. What may be lost is (1 / throughput - 1) of the round, without what it waited and recomputed. `THRIFT` of it is planned, and what copies
   cost the kernels beside them (`CROWDING`) is taken from that.
2. Places of one size and one recipe are a **kind**, and cost their mean. Kinds go by bytes a second, the best first; as many of each as
   there is time for, spread evenly, so that the link has as much to do in every part of forward. So do modules that are run again; or the
   latest of them, for what is made late cannot leave.
3. Both share the time: for every number of modules the rest goes to rebuilding, and those are taken with which the fewest bytes stay, what
   leaves by itself being counted.
4. Nothing is recomputed for nothing: where as few bytes stay for less of the time, less is taken (`SHARES`).
5. The last module of a kind is run again only if all are: backward begins with it, while memory is fullest.
6. What a module saves is seen only while it is not run again. So which are is chosen once, from a round in which none was.

Limits: bytes that stay are counted, not what a rebuilt tensor takes while backward uses it. Seconds are those of single ops.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator

from overspill.activations.flight import Call, Profile

THRIFT = 0.95
"""Chosen: what is lost beside the plan (hooks, the ends of waits) was not measured yet."""
CROWDING = 0.015
"""Of the seconds in which a direction of the link is busy: what they cost compute. Measured: products took 1.02 of their time beside copies
in both directions, on an H100; steps in which 2 to 3 GB went each way without a wait 1 to 2 % of the time that the copies took."""
SHARES = (0.0, 0.25, 0.5, 0.75)
"""Of the time, that are tried for rule 4. Chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """What is recomputed in rounds like the one that was measured."""

    rebuilt: tuple[bool, ...]
    """For each place."""
    again: tuple[bool, ...]
    """For each call."""


def rebuild_all(profile: Profile) -> Mix:
    """Everything that can be rebuilt is, whatever it takes; modules as in the measured round."""
    again = tuple(call.is_again for call in profile.calls)
    return Mix(rebuilt=_flags(len(profile.device_bytes), _cheap_places(profile, again)), again=again)


def choose_mix(
    profile: Profile,
    throughput: float,
    staying_bytes: Callable[[Profile], int],
    copies_s: Callable[[Profile], float] = lambda profile: 0.0,
) -> Mix:
    """What is recomputed so that the fewest bytes stay, at this share of plain PyTorch's throughput or more.

    Args:
        throughput: in (0, 1].
        staying_bytes: of a round, what stays on the device although it may leave.
        copies_s: of a round, how long the link is busy, both directions together.
    """
    profile = _averaged(profile)
    allowed_s = max(0.0, THRIFT * (1 / throughput - 1) * profile.step_s - CROWDING * copies_s(profile))

    def fill(again: tuple[bool, ...], time_s: float) -> Mix:
        left_s = time_s - sum(call.again_s for call in itertools.compress(profile.calls, again))
        return Mix(rebuilt=_flags(len(profile.device_bytes), _share_of_cheap(profile, again, left_s)), again=again)

    def stays(mix: Mix) -> int:
        return staying_bytes(what_is_left(profile, mix))

    best = min((fill(again, allowed_s) for again in _growing_calls(profile, allowed_s)), key=stays)
    less = (fill(best.again, share * allowed_s) for share in SHARES)
    return next((mix for mix in less if stays(mix) <= stays(best)), best)


def what_is_left(profile: Profile, mix: Mix) -> Profile:
    """The round with that mix: no bytes at places that are recomputed, and backward later by what recomputing takes."""
    device, stored, needed = list(profile.device_bytes), list(profile.stored_bytes), list(profile.needed_s)
    lost: list[tuple[float, float]] = []  # when, and how much
    for call, is_again in zip(profile.calls, mix.again, strict=True):
        if not is_again:
            continue
        wanted_s = min(profile.needed_s[call.first : call.stop], default=math.inf)
        lost.append((wanted_s, call.again_s))
        if not call.is_again:
            for place in range(call.first, call.stop):
                device[place] = stored[place] = _input_bytes(call, place)
                needed[place] = wanted_s
    for place in itertools.compress(range(len(device)), mix.rebuilt):
        device[place] = stored[place] = profile.rest_at(place)
        if profile.rebuild_s[place] < math.inf:
            lost.append((profile.needed_s[place], profile.rebuild_s[place]))
    lost.sort()
    later_s, num_passed = 0.0, 0
    for place in sorted(range(len(needed)), key=needed.__getitem__):
        while num_passed < len(lost) and lost[num_passed][0] < needed[place]:
            later_s, num_passed = later_s + lost[num_passed][1], num_passed + 1
        needed[place] += later_s
    return dataclasses.replace(profile, device_bytes=tuple(device), stored_bytes=tuple(stored), needed_s=tuple(needed))


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` numbers, evenly; the last one only with all of them (rule 5)."""
    among = total if count == total else total - 1
    return [int((index + 0.5) * among / count) for index in range(count)]


def latest(count: int, total: int) -> list[int]:
    """The last `count` of `total` numbers but the very last one, which comes with all of them (rule 5)."""
    return list(range(total)) if count == total else list(range(total - 1 - count, total - 1))


# -- modules that are run again --------------------------------------------------------------------------------------


def _growing_calls(profile: Profile, allowed_s: float) -> Iterator[tuple[bool, ...]]:
    """Rule 3: none, one more, and so on, as long as there is time; or those that were chosen before (rule 6)."""
    calls = profile.calls
    if any(call.is_again for call in calls):
        yield tuple(call.is_again for call in calls)
        return
    yield (False,) * len(calls)
    kinds = _kinds(
        range(len(calls)), lambda number: (profile.device_bytes[calls[number].first : calls[number].stop], calls[number].input_bytes)
    )
    worths = {kind[0]: _worth(profile, [calls[number] for number in kind]) for kind in kinds}
    kinds = sorted((kind for kind in kinds if worths[kind[0]] > 0), key=lambda kind: -worths[kind[0]])
    for pick in (spread, latest):
        taken: list[int] = []
        for kind, count in ((one, count) for one in kinds for count in range(1, len(one) + 1)):
            chosen = [*taken, *(kind[index] for index in pick(count, len(kind)))]
            if sum(calls[number].again_s for number in chosen) > allowed_s:
                break
            yield _flags(len(calls), chosen)
            taken = chosen if count == len(kind) else taken


def _worth(profile: Profile, calls: list[Call]) -> float:
    """Bytes a second that running these again saves, beside what would be rebuilt in them."""
    saved_bytes, lost_s = 0, 0.0
    for call in calls:
        cheap = [place for place in range(call.first, call.stop) if _can_rebuild(profile, place)]
        saved_bytes += sum(profile.device_bytes[call.first : call.stop]) - sum(_saved_bytes(profile, place) for place in cheap)
        saved_bytes -= sum(call.input_bytes)
        lost_s += call.again_s - sum(profile.rebuild_s[place] for place in cheap if profile.rebuild_s[place] < math.inf)
    return saved_bytes / lost_s if lost_s > 0 else math.inf


def _input_bytes(call: Call, place: int) -> int:
    """What a place of a call is if that is run again."""
    number = place - call.first
    return call.input_bytes[number] if number < len(call.input_bytes) else 0


# -- what is cheap to rebuild ----------------------------------------------------------------------------------------


def _share_of_cheap(profile: Profile, again: tuple[bool, ...], left_s: float) -> list[int]:
    """Rule 2: the places that so much time is best spent on."""
    places = [place for place in _cheap_places(profile, again) if profile.rebuild_s[place] < math.inf]
    found: list[int] = []
    left_s = max(0.0, left_s)
    for kind in sorted(_kinds(places, lambda place: _recipe(profile, place)), key=lambda kind: _seconds_a_byte(profile, kind[0])):
        each_s = profile.rebuild_s[kind[0]]
        count = len(kind) if each_s * len(kind) <= left_s else int(left_s / each_s)
        found += (kind[index] for index in spread(count, len(kind)))
        left_s -= count * each_s
    return found


def _cheap_places(profile: Profile, again: tuple[bool, ...]) -> list[int]:
    """What can be rebuilt; of modules that are run again only what goes in."""
    dropped = {
        place
        for call in itertools.compress(profile.calls, again)
        for place in range(call.first, call.stop)
        if not call.is_again and _input_bytes(call, place) != profile.device_bytes[place]
    }
    return [place for place in range(len(profile.device_bytes)) if _can_rebuild(profile, place) and place not in dropped]


def _can_rebuild(profile: Profile, place: int) -> bool:
    return bool(profile.moved_bytes) and profile.moved_bytes[place] > 0


def _recipe(profile: Profile, place: int) -> tuple[int, int, int]:
    return profile.device_bytes[place], profile.moved_bytes[place], profile.rest_at(place)


def _saved_bytes(profile: Profile, place: int) -> int:
    """By rebuilding it."""
    return profile.device_bytes[place] - profile.rest_at(place)


def _seconds_a_byte(profile: Profile, place: int) -> float:
    return profile.rebuild_s[place] / max(1, _saved_bytes(profile, place))


def _averaged(profile: Profile) -> Profile:
    """With the mean of a kind for what each of it takes; infinite if none was rebuilt yet."""
    seconds = list(profile.rebuild_s)
    for kind in _kinds(_cheap_places(profile, ()), lambda place: _recipe(profile, place)):
        known = [profile.rebuild_s[place] for place in kind if profile.rebuild_s[place] < math.inf]
        for place in kind:
            seconds[place] = sum(known) / len(known) if known else math.inf
    return dataclasses.replace(profile, rebuild_s=tuple(seconds))


def _kinds(numbers: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Groups of equal key, each in order."""
    found: dict[Hashable, list[int]] = {}
    for number in numbers:
        found.setdefault(key(number), []).append(number)
    return list(found.values())


def _flags(total: int, chosen: Collection[int]) -> tuple[bool, ...]:
    taken = set(chosen)
    return tuple(number in taken for number in range(total))
