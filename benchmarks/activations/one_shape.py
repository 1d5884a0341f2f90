"""One job of `run.py` in a process of its own: one net, and one mode after the other; a line each as soon as it has ended.

    python benchmarks/activations/one_shape.py READY_FD      (started by `prediction/workers.py`)

It loads everything, says so on `READY_FD`, and waits for an order on its input, as `prediction/one_run.py` does; nothing has touched the
device before. `steps.py` says why modes that share a process have a fresh one's figures.

Rules:

1. `keep` is measured first in every job, whatever is asked for, so that each row has the keep of its own process beside it. What earlier
   jobs found out about the shape (`known`) is in the order, for a job that goes on where another call ended.
2. A line is written in one piece when its mode has ended, and the bounds as soon as what they need is there: whatever ends the process
   later takes nothing of it along.
3. A mode that takes longer than `mode_limit_s` ends the process, with the stacks of all threads: a hang costs one mode's time.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in (".", "host_memory", "prediction", "throughput"))]

from workers import take_order, write_stacks_when_asked  # noqa: E402

CLOSING_S = 3.0
"""Left before the limit for ending."""
MOST_LEAST_S = 10.0
"""For the least number of turns of a mode; where steps take seconds, there are fewer."""
WANTS_ANOTHER_PROCESS = 4
"""Exit status: the modes that are left were not begun, because of what one left on the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is told to do."""

    job: str
    """`core`, `ssd`, `peers` or `fit`."""
    shape_name: str
    shape: dict[str, Any]
    modes: list[str]
    known: dict[str, Any]
    """Lines of this shape's modes that earlier jobs measured, by mode."""
    places: dict[str, Any]
    dtype: str
    steps: int
    steps_s: float
    turns: int
    turns_s: float
    within: float
    limit_s: float
    mode_limit_s: float
    """Of one mode, or of building the net (rule 3)."""
    fit_bytes: int
    """Of the device, for `fit`."""
    out: str
    running: str
    """File that has the name of the mode that runs, and is empty after the last."""
    provenance: dict[str, Any]


def main(ready_fd: int) -> int:
    write_stacks_when_asked()
    load_all()
    told = take_order(ready_fd)
    if told is None:
        return 0
    try:
        return Job(Order(**told)).run()
    except BaseException:
        traceback.print_exc()
        return 1


def load_all() -> None:
    """Import what a job will import; nothing is called."""
    import chunked_loss  # noqa: F401
    import fit  # noqa: F401
    import shapes  # noqa: F401
    import steps  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401


class Job:
    """One order under way."""

    def __init__(self, order: Order) -> None:
        import torch
        from modes import Places
        from net_shapes import NetShape
        from steps import Bench

        self.order, self.begun_s = order, time.monotonic()
        self.lines: dict[str, dict[str, Any]] = {}
        """Of this process, by mode."""
        self._write_running("the net")
        self.places = Places(**order.places)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bench = Bench(NetShape(**order.shape), device, getattr(torch, order.dtype))
        self.build_s = time.monotonic() - self.begun_s
        self._longest_s = 0.0
        self._bounds_of: Any = None
        """What the last line with bounds was made of."""

    def run(self) -> int:
        """The exit status."""
        from fit import fit_mode
        from steps import MOST_RESIDUE_BYTES

        asked = list(self.order.modes)
        if self.order.job == "fit":
            for mode in asked:
                if not self._has_time():
                    break
                self._write_running(mode)
                self._append(
                    mode, fit_mode(self.bench, mode, self.places, self.order.fit_bytes, steps=self.order.steps, is_late=self._is_late)
                )
        else:
            for mode in ["keep", *(mode for mode in asked if mode != "keep")]:
                if not self._has_time():
                    print(f"{mode}: not started, {self._left_s():.0f} s are left")
                    break
                self._write_running(mode)
                self._append(mode, self._measure(mode))
                self._append_bounds()
                if self.bench.residue_bytes > MOST_RESIDUE_BYTES:
                    print(f"{mode} left {self.bench.residue_bytes} B on the device: the modes after it want another process")
                    self._write_running("")
                    return WANTS_ANOTHER_PROCESS
        self._write_running("")
        return 0

    def _measure(self, mode: str) -> dict[str, Any]:
        return self.bench.measure(
            mode, self.places, self.known(), steps=self.order.steps, steps_s=self.order.steps_s, plan=self._plan(mode)
        )

    def _plan(self, mode: str) -> Any:
        """Of modes that no claim is about, no more turns than the least."""
        from modes import MODES
        from turns import Plan

        order, is_judged = self.order, MODES[mode].tier is not None and MODES[mode].amount != "nothing"
        limit_s = order.turns_s if is_judged else 0.0
        return Plan(turns=order.turns, limit_s=limit_s, most_s=MOST_LEAST_S, within=order.within) if order.turns else None

    def _line(self, *modes: str) -> dict[str, Any]:
        """The figures of the first of these modes that has any, of this process or of an earlier one."""
        for lines in (self.lines, self.order.known):
            for mode in modes:
                if "step_s" in lines.get(mode, {}):
                    return lines[mode]
        return {}

    def known(self) -> Any:
        """What `modes.context` wants to know; None: not yet."""
        from modes import Known

        counted, plain = self._line("counted", "cheap", "host", "mix"), self._line("keep", "counted", "checkpoint")
        if not counted or not plain:
            return None
        return Known(
            all_bytes=counted["packed_bytes"] + counted["rebuilt_bytes"], forward_s=plain["forward_s"],
            largest_bytes=4 * self.bench.shape.tokens() * self.bench.shape.hidden * self.bench.dtype.itemsize,
            d2h_bytes_per_s=self.bench.rates["d2h_bytes_per_s"], fits="step_s" in self._line("keep", "counted"),
        )  # fmt: skip

    def terms(self) -> Any:
        """Of the linear program; None where something was not measured. Without keep (it does not fit), its step is that of full
        recomputation less a forward."""
        from bounds import Terms

        known, keep, full, cheap = self.known(), self._line("keep"), self._line("checkpoint"), self._line("cheap")
        if known is None or not full:
            return None
        shape, bench, counted = self.bench.shape, self.bench, self._line("counted")
        inputs_bytes = bench.num_blocks * shape.tokens() * shape.hidden * bench.dtype.itemsize
        step_s = keep["step_s"] if keep else full["step_s"] - full["forward_s"]
        without_s = self._own_s(counted, step_s) if counted else step_s  # so that what hooks cost is not the recomputation's
        return Terms(
            all_bytes=known.all_bytes, inputs_bytes=min(known.all_bytes, inputs_bytes),
            cheap_bytes=cheap.get("rebuilt_bytes", 0), forward_s=known.forward_s, step_s=step_s,
            full_s=max(0.0, self._own_s(full, step_s) - step_s),
            cheap_s=max(0.0, self._own_s(cheap, step_s) - without_s) if cheap else 0.0, **bench.rates,
        )  # fmt: skip

    def _own_s(self, line: dict[str, Any], keep_s: float) -> float:
        """Of a step: by what it takes beside keep, where that was measured."""
        return float(keep_s / line["of_keep"] if "of_keep" in line else line["step_s"])

    def mix(self, share: float) -> Any:
        from bounds import best_mix

        terms = self.terms()
        return best_mix(terms, throughput_fraction=share) if terms is not None else None

    def _append_bounds(self) -> None:
        """A line with the link's bound as soon as A is known, and with the mix's optima once all that they need is there."""
        known = self.known()
        terms = self.terms() if self._line("checkpoint") and self._line("cheap") else None
        if self.order.job != "core" or known is None or (known, terms) == self._bounds_of:
            return
        self._bounds_of = known, terms
        told = {"all_bytes": known.all_bytes, "forward_s": known.forward_s, **self.bench.rates}
        line = {
            "bound_fraction": min(1.0, known.d2h_bytes_per_s * known.forward_s / known.all_bytes),
            "terms": dataclasses.asdict(terms) if terms is not None else told,
            "is_keep_measured": bool(self._line("keep")),
        }
        if terms is not None:
            line |= {f"mix_{round(share * 100)}": dataclasses.asdict(self.mix(share)) for share in (0.98, 0.97, 0.90)}
        self._append("bounds", line)

    def _append(self, mode: str, line: dict[str, Any]) -> None:
        import torch

        order, keep = self.order, self.lines.get("keep", {})
        self._longest_s = max(self._longest_s, line.get("mode_wall_s", 0.0))
        known = self.known() if order.job != "fit" else None
        beside = {
            "shape": order.shape_name, "job": order.job, "mode": mode, "net": order.shape, "dtype": order.dtype, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.bench.is_cuda else "cpu", "tokens": self.bench.shape.tokens(),
            "link": self.bench.rates, "static_bytes": self.bench.static_bytes, "build_s": round(self.build_s, 2),
            "keep_step_s": keep.get("step_s"), "keep_activation_peak_bytes": keep.get("activation_peak_bytes"),
            "all_bytes": known.all_bytes if known is not None else None,
        }  # fmt: skip
        line = {**beside, **order.provenance, **line}
        self.lines[mode] = line
        with Path(order.out).open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        step = f"{line['step_s'] * 1e3:.1f} ms" if "step_s" in line else line.get("error") or line.get("missing") or ""
        if "of_keep" in line:
            low, high = line["of_keep_interval"]
            step += f", {line['of_keep']:.3f} of keep ({low:.3f} to {high:.3f}, {line['num_turns']} turns)"
        step += f", {line['device_allocs']} allocations" if line.get("device_allocs") else ""
        print(f"{order.shape_name} {order.job} {mode}: {step[:160]} ({line.get('mode_wall_s', 0):.1f} s)", flush=True)

    def _left_s(self) -> float:
        return self.order.limit_s - (time.monotonic() - self.begun_s) - CLOSING_S

    def _has_time(self) -> bool:
        """For a mode like the longest so far; the first may always try."""
        return self._left_s() > 1.2 * self._longest_s

    def _is_late(self) -> bool:
        return self._left_s() <= 0

    def _write_running(self, mode: str) -> None:
        """What runs from here on, and the end of its time (rule 3)."""
        Path(self.order.running).write_text(mode)
        if mode:
            faulthandler.dump_traceback_later(self.order.mode_limit_s, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written and closed: taking down the interpreter and torch takes a second of the call
