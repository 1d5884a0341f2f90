"""Throughput against activation peak: saved tensors kept, recomputed, moved to host memory or SSD, mixed, and moved by others' tools.

    python benchmarks/activations/run.py --out results.jsonl --ssd-dir DIRECTORY [--shm-dir /dev/shm/overspill] [--deadline-s 530]
    python benchmarks/activations/run.py --out more.jsonl --done results.jsonl --ssd-dir ...     (goes on where the first call ended)
    python benchmarks/activations/run.py --list
    python benchmarks/activations/run.py --tiny --out tiny.jsonl --ssd-dir DIRECTORY             (a CPU, minutes)

`net_shapes.py` has the shapes, `modes.py` the modes, `bounds.py` what the links allow, `tables.py` the tables, `plot.py` the plots. Until a
job runs nothing here loads torch.

Protocol:

1. A job is a shape and some modes in one process (`one_shape.py`): `core` (kept, recomputed, host, mix), `ssd`, `peers` (others' tools, and
   ours where as much leaves), `fit` (the largest micro-batch in a share of the device), `more` (what the claims do not need). Twelve
   processes load side by side, before anything is measured; then one works at a time, on an empty device. `steps.py` says why modes may
   share a process, and checks it.
2. A step is forward, backward, SGD. After warm-up, and once amounts have settled, steps of the mode and of `keep` take turns in the
   same process: `--turns` of each at least, and more until the ratio is known to `--within`, or `--turns-s` are over (`turns.py`).
   `of_keep` is that ratio; all steps are in the line. The host is up to a step ahead, as it is in a training loop (`steps.py`). In every
   mode Python's collector of cycles runs between steps, not in them. Every job measures `keep` alone first, at least `--steps` steps, for
   the absolute figures; so are modes measured where keep does not fit.
3. A line a mode, as soon as it has ended. What does not fit is a line with its error, what is not installed one that says so.
4. Order: everything of the first shape and `core` of all others but `LONG_SHAPES`, so each claim has its line early; one `fit`; `ssd` and
   `peers` of `EARLY_SHAPES` between the long ones' `core`; the rest. No mode is begun that would not end before the deadline, by the
   longest of its process so far; what is missing is done by the next call, given the results of this one.
5. A mode in which its process ended, or that ran past its limit and was ended, has a line that says so. The job goes on without it in
   another process; no other shape tries a mode that ended `MOST_BROKEN` processes of this call. The next call tries again, last.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host_memory"), str(HERE.parent / "prediction")]

from estimates import JUDGED_S, NUM_TURNS, estimate_s  # noqa: E402
from measure import append_result, provenance  # noqa: E402
from net_shapes import SHAPES, TINY, NetShape  # noqa: E402
from tables import newest, read_lines, summarize  # noqa: E402
from workers import Crew, on_termination  # noqa: E402

GIB = 1 << 30
WORKER = "one_shape.py"
MODES_OF = {
    "core": ("keep", "counted", "checkpoint", "cheap", "host", "mix", "mix-97", "mix-90", "keep-again", "least"),
    "ssd": ("ssd", "ssd-7", "ssd-14"),
    "peers": ("mix-everything", "trl", "host-everything", "save_on_cpu-pinned", "torchtune"),
    "fit": ("keep", "host", "mix", "checkpoint", "cheap", "trl", "save_on_cpu-pinned"),
    "more": ("host-wide", "host-ssdtrain", "save_on_cpu"),
}
FIT_SHAPES = ("llama-1.10B-2048", "gpt-8192x4")
"""Whose largest micro-batch is looked for; with 12288 x 3, weights and gradients alone take 22 GiB."""
EARLY_SHAPES = ("gpt-8192x4", "llama-1.10B-2048")
"""After the first: another width, and another kind of block."""
LONG_SHAPES = ("llama-1.10B-16384", "llama-3.02B-16384")
"""Whose `core` takes one and two minutes."""
LOADING_S = 20.0
"""Of a batch of processes, before one was seen."""
LEAST_SHARE = 0.4
"""Of its estimate that must be left for a job to begin: it ends itself between modes."""
CLOSING_S, LEAST_JOB_S, LEAST_RETRY_S = 8.0, 4.0, 10.0
MODE_LIMIT_S = {"core": 70.0, "ssd": 70.0, "peers": 100.0, "fit": 100.0, "more": 100.0}
"""Of one mode: at least twice what the longest is expected to take."""
MOST_ATTEMPTS = 4
"""Of a job in one call: another process where one ended early."""
MOST_BROKEN = 2
MOST_LOADING_FAILURES = 2
WANTS_ANOTHER_PROCESS = 4
"""See `one_shape.py`."""
STEP_LISTS = ("warm_steps", "timed_steps")
NOT_BEGUN = "the order"
"""Where a process ended that was killed while it waited."""
HANG_WORDS = "Timeout ("
"""That faulthandler begins with."""
SHOWN_BYTES = {True: 3000, False: 12000}
"""Of a process's output, that ended well or not: room for the stacks of all threads."""


def jobs(shapes: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """(job, shape) in the order of rule 4."""
    first, others = shapes[:1], shapes[1:]
    fits = [shape for shape in FIT_SHAPES if shape in shapes] or first
    early = [shape for shape in EARLY_SHAPES if shape in others]
    long = [shape for shape in LONG_SHAPES if shape in others]
    ordered = [(job, shape) for shape in first for job in ("core", "ssd", "peers")]
    ordered += [("core", shape) for shape in (*early, *others) if shape not in long]
    ordered += [("fit", shape) for shape in fits[:1]]
    ordered += [("core", shape) for shape in long[:1]]
    ordered += [(job, shape) for job in ("ssd", "peers") for shape in early]
    ordered += [("core", shape) for shape in long[1:]]
    ordered += [(job, shape) for shape in others for job in ("ssd", "peers")]
    ordered += [("fit", shape) for shape in fits[1:]]
    ordered += [("more", shape) for shape in shapes]
    ordered = list(dict.fromkeys(ordered))
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
    parser.add_argument("--steps", type=int, default=5, help="least that are timed where no keep comes in between")
    parser.add_argument("--steps-s", type=float, default=1.0, help="more are, up to four times as many, while they take less")
    parser.add_argument("--turns", type=int, default=NUM_TURNS, help="least steps of a mode between steps of keep; 0: no keep in between")
    parser.add_argument("--turns-s", type=float, help="most for more turns, of a mode that claims are about; without: 5, tiny 0")
    parser.add_argument("--within", type=float, default=0.005, help="two standard errors of the ratio at which there are enough turns")
    parser.add_argument("--dtype")
    parser.add_argument("--host-gib", type=float, default=48.0, help="most host memory for saved tensors")
    parser.add_argument("--fit-gib", type=float, default=24.0, help="of the device, for the largest micro-batch")
    parser.add_argument("--fit-host-gib", type=float, default=40.0, help="most host memory for it; pinning takes 0.2 s a GiB")
    parser.add_argument("--deadline-s", type=float, default=530.0, help="of the whole call")
    parser.add_argument("--mode-limit-s", type=float, help="of one mode, before its process is ended; without: 70 to 100, by job")
    parser.add_argument("--waiting", type=int, help="processes that load side by side; without: two cores stay free, 12 at most")
    parser.add_argument("--tiny", action="store_true", help="shapes and budgets for a CPU")
    options = parser.parse_args(arguments)
    if not options.list and options.out is None:
        parser.error("give --out; --list shows what would run")
    if options.modes and len(options.jobs) != 1:
        parser.error("--modes goes with exactly one of --jobs")
    return options


def main(arguments: list[str] | None = None) -> int:
    started_s = time.monotonic()
    options = parse_arguments(arguments)
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
        ends_s = itertools.accumulate(estimate_s(job, shapes[name]) for job, name in wanted)
        for (job, name), end_s in zip(wanted, ends_s, strict=True):
            took = f"{estimate_s(job, shapes[name]):4.0f} s, ends at {end_s:5.0f} s"
            print(f"{name:20} {job:6} {took}  {' '.join(options.modes or MODES_OF[job])}")
        print("on an H100, on paper; building, and loading of each twelve processes, are not counted")
        return 0
    return Call(options, shapes, started_s).run(wanted)


class Call:
    """One call: jobs one after the other until the deadline."""

    def __init__(self, options: argparse.Namespace, shapes: dict[str, NetShape], started_s: float) -> None:
        self._options, self._shapes, self._started_s = options, shapes, started_s
        self._slowness: dict[str, float] = {}
        """Seconds over estimate, the most of each kind of job so far."""
        self._loading_s = 5.0 if options.tiny else LOADING_S
        self._num_loading_failures = 0
        self._broken: collections.Counter[str] = collections.Counter()
        """Processes of this call that ended in each mode."""
        self._broken_here: set[tuple[str, str, str]] = set()
        self._provenance = provenance()
        self._sizes: list[int] = []
        self._read: list[dict[str, Any]] = []

    def run(self, wanted: list[tuple[str, str]]) -> int:
        """Until all is measured, or the deadline; 1 if no process comes to load."""
        options, attempts = self._options, collections.Counter[tuple[str, str]]()
        queue = collections.deque(wanted)
        with Crew(HERE / WORKER, num_waiting=options.waiting) as crew:
            on_termination(crew.close)
            while queue and self._num_loading_failures < MOST_LOADING_FAILURES:
                job, name = queue.popleft()
                modes = self._pending(job, name)
                if not modes:
                    continue
                needed_s = LEAST_SHARE * self._estimate_s(job, name, modes)
                needed_s += 0.0 if crew.num_ready else self._loading_s
                if self._left_s() < needed_s:
                    print(f"{name} {job}: not started, {max(0, self._left_s()):.0f} s are left", flush=True)
                    continue
                num_wanted = 1 + sum(bool(self._pending(*other)) for other in queue)
                has_ended_early = self._run_job(job, name, modes, crew, num_wanted)
                attempts[job, name] += 1
                if has_ended_early and attempts[job, name] < MOST_ATTEMPTS and self._left_s() > LEAST_RETRY_S:
                    queue.appendleft((job, name))
            print(f"{time.monotonic() - self._started_s:.0f} s, of which {crew.loading_s:.0f} s were loading", flush=True)
        print(summarize(self._lines()))
        return 1 if self._num_loading_failures >= MOST_LOADING_FAILURES else 0

    def _estimate_s(self, job: str, name: str, modes: list[str]) -> float:
        if self._options.tiny:
            return 1.0
        share = len(modes) / len(self._options.modes or MODES_OF[job])
        return estimate_s(job, self._shapes[name]) * share * self._slowness.get(job, 1.0)

    def _left_s(self) -> float:
        return float(self._options.deadline_s) - (time.monotonic() - self._started_s) - CLOSING_S

    def _lines(self) -> list[dict[str, Any]]:
        """All results so far, without the figures of single steps; read again when there are more."""
        paths = (*self._options.done, self._options.out)
        sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
        if sizes != self._sizes:
            found = [line for path in paths for line in read_lines(path)]
            self._read = [{name: value for name, value in line.items() if name not in STEP_LISTS} for line in found]
            self._sizes = sizes
        return self._read

    def _pending(self, job: str, name: str) -> list[str]:
        """Modes without a result (rules 4 and 5), those that ended a process in an earlier call last."""
        own = [line for line in self._lines() if (line["shape"], line["job"]) == (name, job)]
        had = {line["mode"] for line in own if "step_s" in line or "missing" in line or "least_peak_bytes" in line or line.get("is_oom")}
        failed = {line["mode"] for line in own} - had
        left = [mode for mode in self._options.modes or MODES_OF[job] if mode not in had and (job, name, mode) not in self._broken_here]
        left = [mode for mode in left if self._broken[mode] < MOST_BROKEN]
        return sorted(left, key=lambda mode: mode in failed)

    def _run_job(self, job: str, name: str, modes: list[str], crew: Crew, num_wanted: int) -> bool:
        """The job in a process of its own; whether that ended before its modes and its time. A mode that ended it has a line too."""
        with tempfile.TemporaryDirectory() as folder:
            running = Path(folder) / "running"
            was_loading_s = crew.loading_s
            try:
                worker = crew.take(num_wanted)
            except RuntimeError as error:
                self._num_loading_failures += 1
                self._note_failure(job, name, "loading", str(error).splitlines()[-1][:600])
                print(error, flush=True)
                return True
            self._num_loading_failures = 0
            self._loading_s = max(self._loading_s, crew.loading_s - was_loading_s)
            begun_s, limit_s = time.monotonic(), self._left_s()
            try:
                if limit_s < LEAST_JOB_S:
                    print(f"{name} {job}: loading has taken the time that was left", flush=True)
                    return False
                outcome = worker.run(self._order(job, name, modes, running, limit_s), limit_s=limit_s)
            finally:
                worker.close()
            stopped_at = (running.read_text() or "the end") if running.exists() else NOT_BEGUN
        tail_bytes = SHOWN_BYTES[outcome.return_code == 0]
        print(outcome.output_tail.strip()[-tail_bytes:], flush=True)
        if outcome.return_code in (0, None):
            slowness = (time.monotonic() - begun_s) / self._estimate_s(job, name, modes)
            self._slowness[job] = max(self._slowness.get(job, 1.0), slowness * self._slowness.get(job, 1.0))
        if outcome.return_code in (0, WANTS_ANOTHER_PROCESS):
            return outcome.return_code != 0
        self._broken[stopped_at] += outcome.return_code is not None
        self._broken_here.add((job, name, stopped_at))
        is_hang = outcome.return_code == 1 and HANG_WORDS in outcome.output_tail
        error = f"ran past {self._mode_limit_s(job):.0f} s" if is_hang else outcome.describe_failure(limit_s)
        self._note_failure(job, name, stopped_at, error)
        return stopped_at in (*modes, NOT_BEGUN) and stopped_at != "keep"  # what every process does first would end the next one too

    def _mode_limit_s(self, job: str) -> float:
        return float(self._options.mode_limit_s or MODE_LIMIT_S[job])

    def _note_failure(self, job: str, name: str, mode: str, error: str) -> None:
        append_result(self._options.out, {"shape": name, "job": job, "mode": mode, "error": error, "is_oom": False, **self._provenance})
        print(f"{name} {job} {mode}: {error}", flush=True)

    def _order(self, job: str, name: str, modes: list[str], running: Path, limit_s: float) -> dict[str, Any]:
        options, tiny = self._options, self._options.tiny
        turns_s = options.turns_s if options.turns_s is not None else 0.0 if tiny else JUDGED_S
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
            "turns": options.turns, "turns_s": turns_s, "within": options.within,
            "limit_s": limit_s, "mode_limit_s": self._mode_limit_s(job),
            "fit_bytes": int(options.fit_gib * GIB), "out": str(options.out), "running": str(running),
            "provenance": self._provenance,
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
