"""Host memory that runs out ends the run cleanly, with a checkpoint, and says what grew."""

from __future__ import annotations

import json
import os
import resource
import sys
import textwrap
from pathlib import Path

import pytest
from loaded_python import run_loaded
from small_runs import assert_equal, batches, content, open_run, train, uninterrupted
from tiny_models import tiny_model

import overspill
from overspill.checkpoint import find_manifests
from overspill.errors import HostMemoryError
from overspill.runtime.memory_guard import HostMemoryGuard
from overspill.units import MIB


def test_little_memory_lets_the_step_end_and_warns_and_too_little_stops_it(tmp_path: Path) -> None:
    left = [1000 * MIB]
    with open_run(tmp_path / "run", parameters="ssd", states="ssd") as session:
        guard = session.executor.guard = HostMemoryGuard(session.residency, available_bytes=lambda: left[0], margin_bytes=100 * MIB)
        train(session, 1)
        assert session.memory_warning is None
        left[0] = 60 * MIB
        guard._last_look_s = 0.0
        train(session, 2)
        assert session.memory_warning is not None
        assert "60.00 MiB are left to this process, 100.00 MiB are kept free; what grew most" in session.memory_warning
        left[0] = 20 * MIB
        guard._last_look_s = 0.0
        with pytest.raises(HostMemoryError, match="20.00 MiB are left.* the last checkpoint is whole"):
            session.step(batches(2))
    with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied")) as session:
        assert session.step_number == 2
        train(session, 3)
        assert_equal(content(session), uninterrupted(3))


HUNGRY = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import overspill
    from overspill.errors import HostMemoryError
    from overspill.report.memory import host_resident_bytes
    from overspill.runtime.memory_guard import HostMemoryGuard
    from small_runs import open_run, train
    import mmap, resource

    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    hoard = []
    with open_run(directory, parameters="host", states="ssd") as session:
        train(session, 1)
        limit = host_resident_bytes() + 64 * 2**20
        available = lambda: limit - host_resident_bytes()
        # The stand-in for a control group: the guard sees a limit of 64 MiB above what is resident, and the kernel ends the process
        # soon above it (RLIMIT_DATA refuses memory there, which nothing here would survive).
        resource.setrlimit(resource.RLIMIT_DATA, (limit + 512 * 2**20, limit + 512 * 2**20))
        session.executor.guard = HostMemoryGuard(session.residency, available_bytes=available, margin_bytes=24 * 2**20)
        try:
            for step in range(2, 400):
                hoard.append(b"x" * (2**20 * (1 + (seed + step) % 4)))
                train(session, step)
                if session.memory_warning:
                    raise HostMemoryError(session.memory_warning)
        except HostMemoryError as error:
            print(error)
            sys.exit(7)
    """
)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_runs_whose_memory_grows_stop_cleanly_with_a_usable_checkpoint(count: int, tmp_path: Path) -> None:
    """A leak in a process with a limit that stands in for a small control group, since tests may not make one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for seed in range(count):
        directory = tmp_path / f"run-{seed}"
        done = run_loaded("-c", HUNGRY, directory, seed, env=environment, timeout=100)
        assert done.returncode == 7, done.stderr
        assert "activations, Python and libraries of this process" in done.stdout
        (path,) = find_manifests(directory).values()
        step = json.loads(path.read_text())["manifest"]["step"]
        with overspill.resume(directory, model=tiny_model("llama_tied")) as session:
            assert session.step_number == step > 1
            assert_equal(content(session), uninterrupted(step))
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
