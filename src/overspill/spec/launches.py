"""When launching a block's kernels takes longer than running them: the one rule, for all who ask.

A block that launches bound is recorded as a CUDA graph and replayed (`runtime/graphs.py`). The executor asks after a step
(`runtime/graphs.py`), timed templates answer before the first one (`spec/workload.UnitTimes`), and without either it is judged on paper
(`planning/graphs.py`).
"""

from __future__ import annotations

LAUNCH_BOUND = 0.8
"""Share of the device's time that launching must take to be what bounds it. Chosen."""
LAUNCH_BESIDE_LANES = 1.4
"""What launching takes in a session, whose lanes want the interpreter and the cores as well, over what it takes alone. Chosen within what
runs on an H100 machine allow, 1.1 to 1.6: blocks that took 7.0 to 7.8 ms to launch alone were judged to be bound in sessions where the
device took 10.9 ms, and not where it took 14.5."""
LAUNCH_S = 26e-6
"""Of one operation, autograd and transformers' own code included, where nobody has measured it (`HardwareSpec.launch_s`). Measured on an
H100 machine: a forward of some 60 kernels took 1.56 ms to launch."""


def do_launches_bind(*, launch_s: float, device_s: float) -> bool:
    """Whether launching is what bounds some work.

    Args:
        launch_s: of the host in a session, from before the first call to after the last; measured alone, it is to be multiplied by
            `LAUNCH_BESIDE_LANES`.
        device_s: from the first kernel's begin to the last one's end, waits for launches included.
    """
    return launch_s > LAUNCH_BOUND * device_s
