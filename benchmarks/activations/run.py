"""Throughput against activation peak: saved tensors kept, recomputed, moved to host memory or SSD, mixed, and moved by others' tools.

    python benchmarks/activations/run.py --out results.jsonl --ssd-dir DIRECTORY [--shm-dir /dev/shm/overspill] [--deadline-s 530]
    python benchmarks/activations/run.py --out more.jsonl --done results.jsonl --ssd-dir ...     (goes on where the first call ended)
    python benchmarks/activations/run.py --list
    python benchmarks/activations/run.py --tiny --out tiny.jsonl --ssd-dir DIRECTORY             (a CPU, a minute)

`nets.py` has the shapes, `modes.py` the modes, `bounds.py` what the links allow, `tables.py` the tables, `plot.py` the plots. Protocol:

1. A job is a shape and some modes in one process (`one_shape.py`): `core` (kept, recomputed, host, mix), `ssd`, `peers` (others' tools, and
   SSDTrain's rule), `fit` (the largest micro-batch in a share of the device). Twelve processes load side by side, before anything is
   measured; then one works at a time, on an empty device. `steps.py` says why modes may share a process, and checks it.
2. A step is forward, backward, SGD. After warm-up, and once amounts have settled, at least `--steps` steps are timed, one by one: median
   and range. Every job measures `keep` first; a row's throughput is compared with the keep of its own process.
3. A line a mode, as soon as it has ended. What does not fit is a line with its error, what is not installed one that says so.
4. Order: `core` of all shapes, widest first; then `ssd` and `peers` of each, and `fit`. No mode is begun that would not end before the
   deadline, by the longest of its process so far; what is missing is done by the next call. Failures other than lack of memory are tried
   again then.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host_memory"), str(HERE.parent / "prediction")]

from attempt import Outcome  # noqa: E402
from measure import append_result, provenance  # noqa: E402
from tables import newest, read_lines, summarize  # noqa: E402
from workers import Crew, on_termination  # noqa: E402

GIB = 1 << 30
MODES_OF = {
    "core": ("keep", "counted", "checkpoint", "cheap", "host", "mix", "mix-90", "host-wide", "mix-97", "keep-again"),
    "ssd": ("ssd", "ssd-7", "ssd-14"),
    "peers": ("save_on_cpu-pinned", "host-ssdtrain", "trl", "torchtune", "save_on_cpu"),
    "fit": ("keep", "checkpoint", "cheap", "host", "mix", "save_on_cpu-pinned"),
}
FIT_SHAPES = ("llama-1.10B-2048", "gpt-8192x4")
"""Whose largest micro-batch is looked for; with 12288 x 3, weights and gradients alone take 22 GiB."""
ESTIMATED_S = {"core": 38.0, "ssd": 20.0, "peers": 28.0, "fit": 75.0}
"""Of a job before one of its kind was seen. On paper, for an H100; the longest seen counts afterwards."""
LOADING_S = 20.0
"""Of a batch of processes, before one was seen."""
LEAST_SHARE = 0.4
"""Of its estimate that must be left for a job to begin: it ends itself between modes."""
CLOSING_S, LEAST_JOB_S = 8.0, 4.0
MOST_ATTEMPTS = 2
"""Of a job in one call: a second process where the first one ended early."""


def jobs(shapes: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """(job, shape) in the order of rule 4."""
    ordered = [("core", shape) for shape in shapes]
    fits = [shape for shape in FIT_SHAPES if shape in shapes] or shapes[:1]
    for index, shape in enumerate(shapes):
        ordered += [("ssd", shape), ("peers", shape)]
        if index % 4 == 1 and fits:
            ordered.append(("fit", fits.pop(0)))
    ordered += [("fit", shape) for shape in fits]
    return [(job, shape) for job, shape in ordered if job in kinds]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path, help="a line a mode is added here")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="results of earlier calls: what has a line there is not run again")
    parser.add_argument("--ssd-dir", help="a directory on the drive; without it `ssd` says that it is missing")
    parser.add_argument("--shm-dir", help="a directory in RAM, for the paced modes")
    parser.add_argument("--shapes", nargs="+", help="without: all")
    parser.add_argument("--jobs", nargs="+", choices=MODES_OF, default=list(MODES_OF))
    parser.add_argument("--modes", nargs="+", help="of the jobs; any of modes.py with exactly one job; without: the job's own")
    parser.add_argument("--rows", type=int, help="sequences of a micro-batch, of every shape; without: the shape's own")
    parser.add_argument("--steps", type=int, default=5, help="least that are timed")
    parser.add_argument("--steps-s", type=float, default=1.0, help="more are, up to four times as many, while they take less")
    parser.add_argument("--dtype")
    parser.add_argument("--host-gib", type=float, default=48.0, help="most host memory for saved tensors")
    parser.add_argument("--fit-gib", type=float, default=24.0, help="of the device, for the largest micro-batch")
    parser.add_argument("--fit-host-gib", type=float, default=24.0, help="most host memory for it; pinning takes 0.1 s a quarter GiB")
    parser.add_argument("--deadline-s", type=float, default=530.0, help="of the whole call")
    parser.add_argument("--waiting", type=int, help="processes that load side by side; without: two cores stay free, 12 at most")
    parser.add_argument("--tiny", action="store_true", help="shapes and budgets for a CPU")
    options = parser.parse_args(arguments)
    if not options.list and options.out is None:
        parser.error("give --out; --list shows what would run")
    if options.modes and len(options.jobs) != 1:
        parser.error("--modes goes with exactly one of --jobs")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from nets import SHAPES, TINY  # torch loads with it

    known = TINY if options.tiny else SHAPES
    unknown = sorted(set(options.shapes or ()) - set(known))
    if unknown:
        print(f"{', '.join(unknown)}: no such shape; there are {', '.join(known)}", file=sys.stderr)
        return 2
    shapes = {name: shape for name, shape in known.items() if options.shapes is None or name in options.shapes}
    if options.rows:
        shapes = {name: dataclasses.replace(shape, rows=options.rows) for name, shape in shapes.items()}
    wanted = jobs(list(shapes), options.jobs)
    if options.list:
        for job, name in wanted:
            print(f"{name:20} {job:6} {ESTIMATED_S[job]:4.0f} s  {' '.join(options.modes or MODES_OF[job])}")
        print(f"about {sum(ESTIMATED_S[job] for job, _ in wanted):.0f} s, loading not counted")
        return 0
    Call(options, shapes).run(wanted)
    return 0


class Call:
    """One call: jobs one after the other until the deadline."""

    def __init__(self, options: argparse.Namespace, shapes: dict[str, Any]) -> None:
        self._options, self._shapes = options, shapes
        self._started_s = time.monotonic()
        self._longest_s: dict[str, float] = {}
        self._loading_s = 5.0 if options.tiny else LOADING_S
        self._provenance = provenance()

    def run(self, wanted: list[tuple[str, str]]) -> None:
        options, attempts = self._options, collections.Counter[tuple[str, str]]()
        queue = collections.deque(wanted)
        with Crew(HERE / "one_shape.py", num_waiting=options.waiting) as crew:
            on_termination(crew.close)
            while queue:
                job, name = queue.popleft()
                modes = self._pending(job, name)
                estimate_s = max(ESTIMATED_S[job] if not options.tiny else 1.0, self._longest_s.get(job, 0.0))
                if not modes:
                    continue
                needed_s = LEAST_SHARE * estimate_s * len(modes) / len(MODES_OF[job])
                needed_s += 0.0 if crew.num_ready else self._loading_s
                if self._left_s() < needed_s:
                    print(f"{name} {job}: not started, about {estimate_s:.0f} s, and {max(0, self._left_s()):.0f} s are left", flush=True)
                    continue
                self._run_job(job, name, modes, crew, len(queue) + 1)
                attempts[job, name] += 1
                if self._pending(job, name) and attempts[job, name] < MOST_ATTEMPTS and self._left_s() > 10:
                    queue.appendleft((job, name))
            print(f"{time.monotonic() - self._started_s:.0f} s, of which {crew.loading_s:.0f} s were loading", flush=True)
        print(summarize(self._lines()))

    def _left_s(self) -> float:
        return float(self._options.deadline_s) - (time.monotonic() - self._started_s) - CLOSING_S

    def _lines(self) -> list[dict[str, Any]]:
        return [line for path in (*self._options.done, self._options.out) for line in read_lines(path)]

    def _pending(self, job: str, name: str) -> list[str]:
        """Modes without a result (rule 4)."""
        had = {
            line["mode"]
            for line in self._lines()
            if (line["shape"], line["job"]) == (name, job) and ("step_s" in line or "missing" in line or line.get("is_oom"))
        }
        return [mode for mode in self._options.modes or MODES_OF[job] if mode not in had]

    def _run_job(self, job: str, name: str, modes: list[str], crew: Crew, num_wanted: int) -> None:
        """The job in a process of its own; a mode at which that was ended has a line too."""
        limit_s = self._left_s()
        with tempfile.TemporaryDirectory() as folder:
            running = Path(folder) / "running"
            try:
                was_loading_s = crew.loading_s
                worker = crew.take(num_wanted)
                self._loading_s = max(self._loading_s, crew.loading_s - was_loading_s)
                begun_s, limit_s = time.monotonic(), self._left_s()
                if limit_s < LEAST_JOB_S:
                    worker.close()
                    print(f"{name} {job}: loading has taken the time that was left", flush=True)
                    return
                outcome = worker.run(self._order(job, name, modes, running, limit_s), limit_s=limit_s)
                self._longest_s[job] = max(self._longest_s.get(job, 0.0), time.monotonic() - begun_s)
            except RuntimeError as error:
                outcome = Outcome(return_code=1, wall_s=0.0, output_tail=str(error))
            stopped_at = running.read_text() if running.exists() else "loading"
        print(outcome.output_tail.strip()[-3000:], flush=True)
        if outcome.return_code != 0:
            error = outcome.describe_failure(limit_s)
            line = {"shape": name, "job": job, "mode": stopped_at or "the end", "error": error, "is_oom": False, **self._provenance}
            append_result(self._options.out, line)
            print(f"{name} {job} {stopped_at}: {error}", flush=True)

    def _order(self, job: str, name: str, modes: list[str], running: Path, limit_s: float) -> dict[str, Any]:
        options, tiny = self._options, self._options.tiny
        host_bytes = 16 << 20 if tiny else int((options.fit_host_gib if job == "fit" else options.host_gib) * GIB)
        earlier = {line["mode"]: line for line in newest(self._lines()) if line["shape"] == name and line["job"] == "core"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        return {
            "job": job, "shape_name": name, "shape": dataclasses.asdict(self._shapes[name]), "modes": modes, "known": earlier,
            "places": {
                "ssd_dir": options.ssd_dir, "shm_dir": options.shm_dir, "min_bytes": 1024 if tiny else 1 << 20,
                "window_bytes": 16384 if tiny else None, "most_host_bytes": host_bytes,
                "least_host_bytes": 1 << 20 if tiny else GIB,
            },
            "dtype": options.dtype or ("float32" if tiny else "bfloat16"), "steps": options.steps, "steps_s": options.steps_s,
            "limit_s": limit_s, "fit_bytes": int(options.fit_gib * GIB), "out": str(options.out), "running": str(running),
            "provenance": self._provenance,
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
