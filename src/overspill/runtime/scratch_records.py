"""Records of scratch that pieces of one step borrow, one after the other: hidden states and activations on the SSD.

A record of a kind has the kind's largest size, is made when it is first needed, and is used again by every step. It is given back with
the work that still uses it, and lent to the next one together with that (`runtime/residency`, rules 4 and 6).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from overspill.planning.space import activation_slot_bytes, boundary_slot_bytes
from overspill.runtime.lanes import Completion
from overspill.spec.plan import Plan
from overspill.spec.schedule import Role
from overspill.tiers import RecordStore

Work = Sequence[Completion]


class ScratchRecords:
    """The records of one session.

    Args:
        store: None: nothing of these rests on the SSD.
    """

    def __init__(self, plan: Plan, store: RecordStore | None) -> None:
        self._plan, self._store = plan, store
        self._idle: dict[str, collections.deque[tuple[str, Work]]] = {}
        self._num_made: collections.Counter[str] = collections.Counter()

    def borrow(self, role: Role) -> tuple[RecordStore, str, Work, Callable[[Work], None]]:
        """A record that nobody else has now: store, name, what must have ended before it is written, and how it is given back."""
        assert self._store is not None, f"{role} rest on the SSD but there is no scratch store"
        kind = _kind(role)
        idle = self._idle.setdefault(kind, collections.deque())
        after: Work = ()
        if idle:
            name, after = idle.popleft()
        else:
            self._num_made[kind] += 1
            name = f"{kind}-{self._num_made[kind]}"
            self._store.create(name, (boundary_slot_bytes if kind == "boundary" else activation_slot_bytes)(self._plan))

        def release(work: Work) -> None:
            idle.append((name, work))

        return self._store, name, unfinished(after), release

    def recover(self) -> None:
        """After a step that ended early, with nothing under way: nobody has any."""
        if self._store is not None:
            for kind, number in self._num_made.items():
                names = (f"{kind}-{index}" for index in range(1, number + 1))
                self._idle[kind] = collections.deque((name, ()) for name in names if self._store.has(name))


def unfinished(work: Work) -> Work:
    """What still has to be waited for; work that failed has ended too, and its failure is told by the step that it belonged to."""
    return [completion for completion in work if not completion.is_done]


def _kind(role: Role) -> str:
    return "activations" if role is Role.ACTIVATIONS else "boundary"
