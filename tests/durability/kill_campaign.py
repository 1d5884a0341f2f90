"""Kill a training run at random moments, resume it, and look whether it still ends with the same bits.

    python tests/durability/kill_campaign.py NUM_KILLS SEED DIRECTORY

One warm process forks a child for each life of a run. A child opens the run (fresh, or from its last checkpoint), makes a
checkpoint after every step, and compares weights and moments with the uninterrupted run's when it reaches the end. Half of
the kills come at a random time, half inside a random system call, which has then moved half of its bytes (`FaultKind.KILLED`):
so data writes, flushes, manifest writes, the rename and the removal of old checkpoints are all hit. Placements take turns.

Prints one JSON object; `num_different` and `num_refused` must be 0.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
for folder in ("runtime", "architectures", "durability", "."):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch  # noqa: E402
from small_runs import Weights, content, open_run, train, uninterrupted  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

import overspill  # noqa: E402
from overspill.checkpoint import find_manifests  # noqa: E402
from overspill.tiers import Fault, FaultInjector, FaultKind  # noqa: E402

NUM_STEPS = 5
PLACEMENTS: dict[str, dict[str, object]] = {
    "all on the SSD": {"parameters": "ssd", "states": "ssd", "boundaries": "ssd"},
    "all on the SSD, pending updates": {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": 1.0},
    "all in host memory": {"parameters": "host", "states": "host"},
    "states on the SSD, two kept": {"parameters": "host", "states": "ssd"},
}
SAME, DIFFERENT, REFUSED = 0, 3, 4


def live(directory: Path, name: str, expected: Weights, calls: FaultInjector) -> int:
    """One life of a run, up to its end."""
    fields = PLACEMENTS[name]
    keep = 2 if "two kept" in name else 1
    settings: dict[str, object] = {"calls": calls}
    if find_manifests(directory):
        policy = overspill.CheckpointPolicy(directory=str(directory), keep=keep)
        session = overspill.resume(directory, model=tiny_model("llama_tied"), checkpoints=policy, **settings)  # type: ignore[arg-type]
    else:
        session = open_run(directory, keep=keep, settings=settings, **fields)
    with session:
        train(session, NUM_STEPS)
        found = content(session)
    return SAME if all(torch.equal(found[key], expected[key]) for key in expected) else DIFFERENT


def fork(directory: Path, name: str, expected: Weights, calls: FaultInjector) -> int:
    child = os.fork()
    if child == 0:
        code = REFUSED
        try:
            sys.stderr = open(directory.with_suffix(".err"), "w")  # noqa: SIM115  kept open: the process ends here
            code = live(directory, name, expected, calls)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return child


def main(num_kills: int, seed: int, directory: Path) -> dict[str, object]:
    torch.set_num_threads(1)
    generator = random.Random(seed)
    expected = {name: uninterrupted(NUM_STEPS, **fields) for name, fields in PLACEMENTS.items()}
    typical: dict[str, tuple[float, int]] = {}
    for name, fields in PLACEMENTS.items():
        counter, started_s = FaultInjector(), time.monotonic()
        with open_run(directory / "typical", settings={"calls": counter}, **fields) as session:
            train(session, NUM_STEPS)
        typical[name] = (time.monotonic() - started_s, len(counter.log))
        shutil.rmtree(directory / "typical")
    counts = {"num_killed_by_time": 0, "num_killed_in_a_call": 0, "num_finished": 0, "num_different": 0, "num_refused": 0}
    gc.collect()
    gc.freeze()  # what is loaded is no garbage: a child would copy its pages only to find that out
    first_checkpoint_missing = 0
    problems: list[str] = []
    started_s = time.monotonic()
    number = 0
    while counts["num_killed_by_time"] + counts["num_killed_in_a_call"] < num_kills:
        name = list(PLACEMENTS)[number % len(PLACEMENTS)]
        run = directory / f"run-{number}"
        number += 1
        duration_s, num_calls = typical[name]
        for _ in range(1000):
            first_checkpoint_missing += not find_manifests(run)
            in_a_call = generator.random() < 0.5
            faults = [Fault(kind=FaultKind.KILLED, call_index=generator.randrange(num_calls))] if in_a_call else []
            child = fork(run, name, expected[name], FaultInjector(*faults))
            process = os.pidfd_open(child)
            has_ended, _, _ = select.select([process], [], [], 20.0 if in_a_call else generator.random() * duration_s)
            os.close(process)
            if not has_ended:
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                counts["num_killed_in_a_call" if in_a_call else "num_killed_by_time"] += 1
                continue
            code = os.WEXITSTATUS(status)
            counts["num_finished"] += 1
            counts["num_different"] += code == DIFFERENT
            if code == REFUSED:
                counts["num_refused"] += 1
                problems.append(f"{name}, {run}: {run.with_suffix('.err').read_text()}")
            break
        shutil.rmtree(run, ignore_errors=True)
    return {
        **counts,
        "num_lives_that_began_without_a_checkpoint": first_checkpoint_missing,
        "num_steps_of_a_run": NUM_STEPS,
        "placements": list(PLACEMENTS),
        "problems": problems,
        "seed": seed,
        "elapsed_s": round(time.monotonic() - started_s, 1),
        "command": f"python tests/durability/kill_campaign.py {num_kills} {seed} DIRECTORY",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])), indent=1))
