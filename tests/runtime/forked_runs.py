"""Host memory of runs, each in a process of its own: forked from one that has loaded everything, which takes longer than a small run."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence

from loaded_python import run_loaded

_FORKING = textwrap.dedent(
    """
    import json, os, sys, traceback

    for arguments in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert reset_host_peak()
                run(*arguments)
                print(host_peak_bytes(), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
    """
)


def host_peaks(code: str, *arguments: Sequence[str]) -> list[int]:
    """The most that was resident in each `run(*arguments)`, one after the other.

    Args:
        code: defines `run`, and imports all that it needs.
    """
    code = "from overspill.report.memory import host_peak_bytes, reset_host_peak\n" + textwrap.dedent(code) + _FORKING
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = run_loaded("-c", code, json.dumps(arguments), env=environment)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]
