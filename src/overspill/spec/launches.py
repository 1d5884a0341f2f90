"""When launching a block's kernels takes as long as running them, or nearly: the one place that says so, for all who ask.

Such a block is recorded as a CUDA graph and replayed (`runtime/graphs.py`). The executor asks after a step (`runtime/graphs.py`), timed
templates answer before the first one (`spec/workload.UnitTimes`), and without either it is judged on paper (`planning/graphs.py`).
"""

from __future__ import annotations

LAUNCH_BOUND = 0.8
"""Share of the device's time that launching must take to be what bounds it. Chosen."""
REPLAYED_FROM = 0.5
"""Share from which a block is replayed. Chosen below the one before, because the host does more than launch, a busy one takes twice as
long, and a replay costs nothing but memory, where that is left: 1.10B with launches at 0.78 took 60 ms of 513 longer than its blocks
(H100)."""
WAITED_FROM = 0.15
"""Share of the device's time from which a session that judges its own steps replays: of launches that the device waited for, which are few
where the host is ahead for most of a step. By simulation launches at 0.9 of the device's time are waited for at 0.15 of it, at 0.78 at 0.05
and at 0.97 at 0.5; a host that is put aside now and then makes it more. Chosen."""
LAUNCH_BESIDE_LANES = 1.4
"""What launching takes in a session, whose lanes want the interpreter and the cores as well, over what it takes alone. Chosen within what
runs on an H100 machine allow, 1.1 to 1.6: blocks that took 7.0 to 7.8 ms to launch alone were judged to be bound in sessions where the
device took 10.9 ms, and not where it took 14.5."""
MODEL_LAUNCH = 1.5
"""What launching an operation of a model takes over one of the probe's bare blocks: transformers' own code, and a trace that counts
kernels and not calls. Templates of three models on an H100 machine: 1.4 to 1.6; on two CPU cores, where a launch is cheaper, 2.0."""
LAUNCH_S = 26e-6
"""Of one operation, autograd and transformers' own code included, where nobody has measured it (`HardwareSpec.launch_s`). Measured on an
H100 machine: a forward of some 60 kernels took 1.56 ms to launch."""


def is_worth_replaying(*, launch_s: float, device_s: float) -> bool:
    """Whether launching some work takes so much of its time that it is better replayed; as `do_launches_bind`."""
    return launch_s > REPLAYED_FROM * device_s


def do_waits_bind(*, waited_s: float, device_s: float) -> bool:
    """Whether a device waited so much for launches in a step that its blocks are better replayed.

    Args:
        waited_s: of the host, to launch what the device was ready for before that had ended.
        device_s: of all blocks, from the first kernel's begin to the last one's end.
    """
    return waited_s > WAITED_FROM * device_s


def do_launches_bind(*, launch_s: float, device_s: float) -> bool:
    """Whether launching is what bounds some work.

    Args:
        launch_s: of the host in a session, from before the first call to after the last; measured alone, it is to be multiplied by
            `LAUNCH_BESIDE_LANES`.
        device_s: from the first kernel's begin to the last one's end, waits for launches included.
    """
    return launch_s > LAUNCH_BOUND * device_s
