"""Timing something that can be repeated: how often, how many samples, and until when.

Rules:

1. One run that is not counted comes first: it touches pages, loads code, wakes threads.
2. A sample is so many repetitions that it takes `least_s`, or `most_repeats`; starting and waiting then does not count.
3. At `until_s` no further sample begins. One that is under way is finished, so whoever sets a limit keeps single repetitions short.
4. Where samples disagree (`DISAGREEMENT`), more are made, up to `most_samples`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from overspill.spec.machine_file import MeasuredRate

DISAGREEMENT = 0.1
"""Of the median: the quartiles' distance from which on samples disagree. Chosen: five of the update's lay within 6 % on an H100 machine."""

Run = Callable[[int], object]
"""Does its work so many times and returns when all of it has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How long and how often."""

    least_s: float
    """Of one sample."""
    num_samples: int = 1
    most_repeats: int = 64
    """In one sample: what takes no time is not repeated for ever."""
    most_samples: int = 0
    """Where samples disagree (rule 4); 0: no more than `num_samples`."""


def sample_seconds(run: Run, sampling: Sampling, *, until_s: float = math.inf) -> list[float]:
    """Seconds of one repetition, one number a sample, at least one.

    Args:
        until_s: of `time.perf_counter`.
    """
    run(1)
    times = 1
    while True:
        took_s = _timed(run, times)
        if took_s >= sampling.least_s or times >= sampling.most_repeats or time.perf_counter() >= until_s:
            break
        wanted = math.ceil(1.1 * times * sampling.least_s / max(took_s, 1e-9))
        times = min(sampling.most_repeats, max(times + 1, min(8 * times, wanted)))
    seconds = [took_s / times]
    while time.perf_counter() < until_s:
        if len(seconds) >= sampling.num_samples and (len(seconds) >= sampling.most_samples or not do_disagree(seconds)):
            break
        seconds.append(_timed(run, times) / times)
    return seconds


def do_disagree(samples: Sequence[float]) -> bool:
    """Rule 4."""
    if len(samples) < 2:
        return False
    lower, middle, upper = statistics.quantiles(samples, method="inclusive")
    return upper - lower > DISAGREEMENT * middle


def sample_beside(run: Run, background: Run, sampling: Sampling, *, until_s: float = math.inf) -> list[float]:
    """The same while `background` runs on another thread without a pause."""
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            background(2)

    with ThreadPoolExecutor(1, thread_name_prefix="overspill-probe") as pool:
        future = pool.submit(go_on)
        try:
            seconds = sample_seconds(run, sampling, until_s=until_s)
        finally:
            stop.set()
        future.result()
    return seconds


def measured_rate(seconds: Sequence[float], size: int) -> MeasuredRate:
    """The rate of something of `size` from what single repetitions of it took."""
    return rate_of([size / max(took_s, 1e-9) for took_s in seconds], size)


def rate_of(per_s: Sequence[float], size: int) -> MeasuredRate:
    """The same from rates."""
    return MeasuredRate(
        median_per_s=statistics.median(per_s), min_per_s=min(per_s), max_per_s=max(per_s), num_samples=len(per_s), size=size
    )


def _timed(run: Run, times: int) -> float:
    begin_s = time.perf_counter()
    run(times)
    return time.perf_counter() - begin_s
