"""What the thread that dispatches a step takes for each op: the host's time to launch kernels, and the runtime's own.

A device that is done before the next op has been launched waits for it. So the timeline (`planning/timeline.py`) lets the thread take this
time for each op; an op on a device's stream begins to compute no sooner than its first kernel has been launched, and ends no sooner than
its last. What comes before the first is the runtime's own Python, which a device that has waited for the thread, or with it for an update,
waits for too.

Words:

* **operation**: the unit: what the host takes to launch one kernel of a block, Python, autograd and transformers' own code included
  (`spec/launches.py`). It differs by a factor of three between hosts; what the runtime's own Python takes differs with it.

Where it comes from, the first of these that is known: templates timed on this machine, over the kernels of their trace; the probe's
(`HardwareSpec.launch_s`); for ops on paper, nothing. In a session it is `LAUNCH_BESIDE_LANES` times what it is alone.

The runtime's own Python is the median of what steps of 1.10B took on an H100 machine whose operations took 2.1 times `LAUNCH_S`, where
nothing kept the thread waiting, over 2.1; what is not seen there is of two virtual cores without a GPU. Every host is taken to be in
proportion.
"""

from __future__ import annotations

from typing import NamedTuple

from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import LAUNCH_BESIDE_LANES, LAUNCH_S
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Op, Phase, Update
from overspill.spec.workload import TemplateTimes, Timing, UnitWork, WorkloadSpec

COMPUTE_S = 70e-6
"""Around a block's own: seeds, hidden states taken and put, events."""
VISIT_S = {Phase.FORWARD: 230e-6, Phase.BACKWARD: 650e-6}
"""Once a visit: views of parameters are made and swapped in; backward, sums of gradients are made too."""
BESIDE_UPDATES = 1.4
"""What a forward's `Compute` takes where the host updates meanwhile, as when a step begins with pending updates, or the one before has put
some off, over what it takes else: its threads and the lanes want the cores, too. 1.10B with clipping over the same without it, on two H100
machines: 1.35 and 1.44."""
MOVE_S = 12e-6
"""A `Fetch` or `Evict`: slots, waits, and handing it to its lane."""
HOST_UPDATE_S = 12e-6
FREE_S = 10e-6
OWN_COMPRESS_S = 200e-6
"""Beside its kernels. Assumed: on a CPU they are not apart."""
STAND_IN_OPERATIONS, EMBEDDING_OPERATIONS = 2.0, 18
"""Of the embedding's forward, beside its kernels: each block's stand-in, whose call is written down, and the model's and our own Python
around them (checks, masks, positions, reads that are noted, a graph that is kept). On two virtual cores without a GPU 2.5 and 27 of a
block's operations, by embeddings of 2, 12 and 24 blocks. Beside a GPU an operation costs more: the calibration runs' embeddings took 0.7 to
0.9 of what the same cores said of the code of their day (seven runs of 1.10B on H100 machines, 28 to 66 operations with the kernels)."""
TAIL_STAND_IN_OPERATIONS, TAIL_OPERATIONS = 0.5, 60
"""The same of a tail that was not timed, whose stand-ins only hand through: 0.4 to 0.9 and 75, at 0.8."""
RETAINED_LAUNCHES = 2.2
"""Of a forward whose graph is kept, over one without a graph: autograd, and a decision for each saved tensor."""
REPLAY_OPERATIONS = 8
"""Of a CUDA graph that nobody timed, copies in and out included. Assumed."""
COMPRESS_OPERATIONS, DEVICE_UPDATE_OPERATIONS = 10, 10
"""Of fused kernels: sums into the gradient that leaves, its sum of squares and verdict; an update. Assumed."""


class Turn(NamedTuple):
    """What the dispatching thread takes for one op."""

    seconds: float
    before_s: float = 0.0
    """Of these, until its first kernel is launched; of a `Compute`."""


class Dispatching:
    """Seconds of the dispatching thread.

    Args:
        operation_s: of one operation in a session; 0: not known, and nothing takes time.
        begins_beside_updates: those of the step before are under way when the program begins (`Plan.deferred`).
    """

    def __init__(self, operation_s: float, *, begins_beside_updates: bool = False) -> None:
        self.operation_s = operation_s
        self._slowness = operation_s / LAUNCH_S
        self._visited: tuple[str, Phase] | None = None
        self._is_beside_updates = begins_beside_updates

    def turn(self, op: Op, lane: Lane, *, launched_s: float) -> Turn:
        """For one op; asked in the order of the program.

        Args:
            launched_s: of a `Compute`, to launch its kernels.
        """
        match op:
            case Compute():
                visit, self._visited = self._visited, (op.unit, op.phase)
                self._is_beside_updates &= op.phase is Phase.FORWARD  # all that a forward reads has been updated before the first backward
                own_s = COMPUTE_S + (VISIT_S[op.phase] if visit != self._visited else 0)
                factor = BESIDE_UPDATES if self._is_beside_updates and op.phase is Phase.FORWARD else 1
                before_s = factor * self._slowness * own_s
                return Turn(before_s + factor * launched_s, before_s)
            case Compress():
                self._visited = None
                return Turn(self._slowness * OWN_COMPRESS_S + COMPRESS_OPERATIONS * self.operation_s)
            case Update() if lane is Lane.HOST_UPDATE:
                self._is_beside_updates = True
                return Turn(self._slowness * HOST_UPDATE_S)
            case Update():
                return Turn(self._slowness * HOST_UPDATE_S + DEVICE_UPDATE_OPERATIONS * self.operation_s)
            case Fetch() | Evict():
                return Turn(self._slowness * MOVE_S)
            case Free():
                return Turn(self._slowness * FREE_S)
            case _:
                return Turn(0.0)


def find_operation_s(hardware: HardwareSpec, workload: WorkloadSpec | None, times: TemplateTimes | None) -> float:
    """Of one operation in a session; 0: nobody measured it."""
    known = {item.name: item for item in workload.classes} if workload is not None else {}
    for timed in times.blocks if times is not None else ():
        number = count_operations(known[timed.name]) if timed.name in known else 0
        if timed.launch_s and timed.forward is not None and number:
            return LAUNCH_BESIDE_LANES * timed.launch_s / number
    return LAUNCH_BESIDE_LANES * hardware.launch_s


def count_operations(item: UnitWork) -> int:
    """Kernels of a template's forward, recomputation and backward."""
    return sum(part.work.num_ops for part in (item.forward, item.recompute, item.backward) if part is not None)


def issue_s(timing: Timing | None) -> float:
    """To launch what was timed, in a session. 0: not measured."""
    return LAUNCH_BESIDE_LANES * timing.issue_s if timing is not None else 0.0
