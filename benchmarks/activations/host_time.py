"""Where the host's time goes in a forward with hooks: by kind of saved tensor, and by call of the link.

    python benchmarks/activations/host_time.py --shape llama-1.10B-2048 --modes keep counted host mix-97 --out host-time.jsonl

One line a mode: `launched_s` of a forward that finds the device idle, without anything measured inside of it; then, in as many rounds more,
what each hook and each call took of the host: how many a forward, the middle one in microseconds, all of them in milliseconds. Calls are
slower there, by a third of a microsecond for each one inside. On a GPU two more lines say what the calls that a copy consists of take
(`device_calls`): alone, and while fifty copies are under way; with events that a thread may wait for without spinning, and with others.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from modes import MODES, EachStep, Places, context  # noqa: E402
from net_shapes import SHAPES, TINY  # noqa: E402
from nets import build_inputs, build_net  # noqa: E402

from overspill.activations.arena import HostArena  # noqa: E402
from overspill.activations.cache import TensorCache  # noqa: E402
from overspill.activations.links import CudaLink, ThreadLink  # noqa: E402
from overspill.activations.mover import Mover  # noqa: E402
from overspill.activations.repeating import SavedKept  # noqa: E402
from overspill.activations.rounds import Rounds  # noqa: E402
from overspill.activations.saved import SavedAlone, SavedView  # noqa: E402
from overspill.activations.timeline import FIRST_WATCHED  # noqa: E402
from overspill.units import GIB, MIB  # noqa: E402

CALLS: tuple[tuple[type, str], ...] = (
    (HostArena, "take"), (Mover, "drop_left"), (Mover, "keep"), (Mover, "leave"), (TensorCache, "_find"), (TensorCache, "_reason_to_leave"),
    (TensorCache, "_make"), (TensorCache, "_keep_again"), (TensorCache, "begin_call"), (Rounds, "decide_in_forward"),
)  # fmt: skip
"""Of the hooks; of the link all of its own."""
LINK_CALLS = ("start_out", "mark", "hold")
NUM_BUSY, COPY_BYTES = 50, 64 * MIB
"""Of the lines about calls of the device. Chosen."""

NUM_WARM = 3
"""Rounds of what holds still."""

Taken = dict[str, list[int]]
"""Nanoseconds, by what took them."""


def kind_of(cache: TensorCache, saved: object, before: tuple[int, int]) -> str:
    """Of what pack returned.

    Args:
        before: places and live records, before it was packed.
    """
    if isinstance(saved, SavedKept):
        return f"{'new' if cache.num_packed != before[0] else 'found'}, kept again"
    if isinstance(saved, SavedAlone):
        return "left alone"
    if isinstance(saved, SavedView):
        return f"{'new' if cache.num_live != before[1] else 'found'}, {saved.record.target}"
    return f"{'new' if cache.num_packed != before[0] else 'found'}, rebuilt"


@contextlib.contextmanager
def timed_calls(taken: Taken) -> Iterator[None]:
    """Note what calls take, in all caches."""
    undo: list[Callable[[], None]] = []

    def wrap(owner: type, name: str, plain: Callable[..., Any]) -> None:
        key = f"{owner.__name__}.{name.removeprefix('_')}"

        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter_ns()
            result = plain(*args, **kwargs)
            taken[key].append(time.perf_counter_ns() - begun)
            return result

        undo.append(lambda: setattr(owner, name, plain))
        setattr(owner, name, call)

    plain_pack = TensorCache.pack

    def pack(cache: TensorCache, tensor: torch.Tensor) -> Any:
        before, begun = (cache.num_packed, cache.num_live), time.perf_counter_ns()
        saved = plain_pack(cache, tensor)
        ended = time.perf_counter_ns()
        taken[f"pack: {kind_of(cache, saved, before)}"].append(ended - begun)
        return saved

    undo.append(lambda: setattr(TensorCache, "pack", plain_pack))
    TensorCache.pack = pack  # type: ignore[method-assign]
    link = CudaLink if torch.cuda.is_available() else ThreadLink
    for owner, name in (*CALLS, *((link, name) for name in LINK_CALLS)):
        wrap(owner, name, getattr(owner, name))
    try:
        yield
    finally:
        while undo:
            undo.pop()()


def summarized(taken: Taken, num_rounds: int) -> dict[str, dict[str, float]]:
    return {
        key: {
            "a_forward": len(values) / num_rounds,
            "median_us": statistics.median(values) / 1e3,
            "all_ms": sum(values) / num_rounds / 1e6,
        }
        for key, values in sorted(taken.items(), key=lambda item: -sum(item[1]))
    }  # fmt: skip


class HostTime:
    """One net on its device."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, places: Places, num_rounds: int) -> None:
        net_shape = {**SHAPES, **TINY}[shape]
        self._shape, self._device, self._places, self._num_rounds = shape, device, places, num_rounds
        self._net = build_net(net_shape, device, dtype)
        self._inputs = build_inputs(net_shape, net_shape.rows, device, dtype)

    def measure(self, name: str) -> dict[str, Any]:
        """A mode's line."""
        taken = collections.defaultdict[str, list[int]](list)
        line: dict[str, Any] = {"shape": self._shape, "mode": name, "device": self._device_name(), "torch": torch.__version__}
        launched, _ = self._run(name)
        line |= {"launched_s": statistics.median(launched), "launched_s_spread": [min(launched), max(launched)]}
        if MODES[name].tier is None:
            return line
        with timed_calls(taken):  # around entering, for the hooks are taken then
            _, report = self._run(name, before_timed=taken.clear)
        last = report.rounds[-1]
        line |= {"host_bytes": last.host_bytes, "num_records": last.num_records, "num_run_again": last.num_run_again}
        return {**line, "calls": summarized(taken, self._num_rounds)}

    def _run(self, name: str, before_timed: Callable[[], None] = lambda: None) -> tuple[list[float], Any]:
        """A mode's forwards once amounts have settled, and its report."""
        mode = MODES[name]
        is_adaptive = mode.tier is not None and mode.amount in ("adaptive", "ssdtrain")
        with context(mode, self._net, self._places, None) as active:
            around = active.hooks if isinstance(active, EachStep) else contextlib.nullcontext()
            for _ in range(max(FIRST_WATCHED) + 2 if is_adaptive else NUM_WARM):
                self._launched_s(around)
            before_timed()
            launched = [self._launched_s(around) for _ in range(self._num_rounds)]
            return launched, active.report() if mode.tier is not None else None

    def _launched_s(self, around: contextlib.AbstractContextManager[Any]) -> float:
        """A step from an idle device; what the host took to launch its forward."""
        self._synchronize()
        with around:
            begun_s = time.perf_counter()
            loss = self._net(self._inputs)
            launched_s = time.perf_counter() - begun_s
            loss.backward()
        self._net.zero_grad(set_to_none=True)
        self._synchronize()
        return launched_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"


def device_calls(device: torch.device, *, is_busy: bool) -> dict[str, Any]:
    """Microseconds of the host for each call that a copy consists of, on an idle device or behind copies that are under way."""
    out, taken = torch.cuda.Stream(device), collections.defaultdict[str, list[int]](list)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    events: list[torch.cuda.Event] = []

    def note(name: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter_ns()
        result = call()
        taken[name].append(time.perf_counter_ns() - begun)
        return result

    torch.cuda.synchronize()
    for _ in range(NUM_BUSY):
        stream = note("current_stream", lambda: torch.cuda.current_stream(device))
        mark = torch.cuda.Event()
        note("record a mark", lambda mark=mark, stream=stream: mark.record(stream))
        note("wait_event", lambda mark=mark: out.wait_event(mark))
        inside = note("enter a stream", lambda: _entered(torch.cuda.stream(out)))
        note("copy_", lambda: target.copy_(source, non_blocking=True))
        for is_blocking in (True, False):
            event = torch.cuda.Event(blocking=is_blocking)
            note(f"record an end, {'blocking' if is_blocking else 'spinning'}", lambda event=event: event.record(out))
            events.append(event)
        note("leave a stream", lambda inside=inside: inside.__exit__(None, None, None))
        note("query", events[0].query)
        if not is_busy:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    note("free events", events.clear)
    medians = {name: statistics.median(values) / 1e3 for name, values in taken.items()}
    return {"device_calls": "busy" if is_busy else "idle", "device": torch.cuda.get_device_name(), "median_us": medians}


def _entered(context: Any) -> Any:
    context.__enter__()
    return context


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, *TINY], default="llama-1.10B-2048")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["keep", "counted", "cheap", "host", "mix-97", "mix-90"])
    parser.add_argument("--rounds", type=int, default=20, help="that are timed, and as many with what is inside")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--min-bytes", type=int, default=MIB)
    parser.add_argument("--host-bytes", type=int, default=8 * GIB)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    places = Places(
        ssd_dir=None, shm_dir=None, min_bytes=options.min_bytes, window_bytes=None, most_host_bytes=options.host_bytes,
        least_host_bytes=min(options.host_bytes, GIB),
    )  # fmt: skip
    bench = HostTime(options.shape, device, getattr(torch, options.dtype), places, options.rounds)
    with options.out.open("a") as out:
        for name in options.modes:
            line = bench.measure(name)
            print(json.dumps(line), file=out, flush=True)
            print(f"{line['shape']} {name}: forward launched in {1e3 * line['launched_s']:.1f} ms", flush=True)
        for is_busy in (False, True) if device.type == "cuda" else ():
            print(json.dumps(device_calls(device, is_busy=is_busy)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
