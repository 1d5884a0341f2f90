"""Rows of the throughput comparison: their names, which of them a part runs, and what each is expected to take.

A row's name says everything that is varied:

    SHAPE[@CAP]:LAYOUT:SYSTEM[:clip]        1.10B:1x8x2048:zero3:clip        8B@8GiB:2x8x2048:overspill-host

* SHAPE: of benchmarks/shapes.py. CAP: device memory that the process may take, context included.
* LAYOUT: micro-batches x samples x tokens of one optimizer step.
* SYSTEM: of `SYSTEMS`. `clip`: the global gradient norm is clipped at 1.0.

Standard library only: the supervisor imports this.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 1 << 30
CLIP = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """What is expected of a system; for estimates and limits of time, never for results."""

    tokens_per_s: float
    """Expected at 1.10B parameters and 8 samples a micro-batch on an H100; other sizes in proportion."""
    is_bound_by_device: bool
    """Whether one sample a micro-batch slows it in proportion to launches."""
    open_s: float
    """Expected to open 1.10B, beyond `START_S`."""
    meaning: str


SYSTEMS = {
    "resident": System(
        tokens_per_s=44e3, is_bound_by_device=True, open_s=3, meaning="plain transformers on the device, chunked loss, no autocast"
    ),
    "resident-keep": System(
        tokens_per_s=52e3, is_bound_by_device=True, open_s=3, meaning="the same with nothing recomputed: the fastest way if it fits"
    ),
    "resident-overspill": System(tokens_per_s=42e3, is_bound_by_device=True, open_s=5, meaning="overspill with everything on the device"),
    "overspill-host": System(
        tokens_per_s=36e3,
        is_bound_by_device=True,
        open_s=8,
        meaning="overspill, parameters and fp32 states in host memory, at most 10 % of the states on the device",
    ),
    "overspill-host-graphs": System(
        tokens_per_s=36e3,
        is_bound_by_device=True,
        open_s=10,
        meaning="overspill-host with every block replayed as a CUDA graph, whether launches bound it or not",
    ),
    "overspill-host-prompt": System(
        tokens_per_s=36e3, is_bound_by_device=True, open_s=8, meaning="overspill-host with every update as its gradient arrives"
    ),
    "overspill-host-states6": System(
        tokens_per_s=36e3, is_bound_by_device=True, open_s=8, meaning="the same, up to 6 GiB of the states on the device"
    ),
    "overspill-host-keep": System(
        tokens_per_s=40e3, is_bound_by_device=True, open_s=9, meaning="overspill-host with the activations of all blocks kept on the device"
    ),
    "overspill-host-auto": System(
        tokens_per_s=40e3, is_bound_by_device=True, open_s=10, meaning="overspill-host with the planner's choice for the activations"
    ),
    "overspill-host-auto-prompt": System(
        tokens_per_s=40e3, is_bound_by_device=True, open_s=10, meaning="overspill-host-auto with every update as its gradient arrives"
    ),
    "overspill-host-states6-auto": System(
        tokens_per_s=42e3, is_bound_by_device=True, open_s=10, meaning="the same, up to 6 GiB of the states on the device"
    ),
    "overspill-host-bf16": System(
        tokens_per_s=38e3, is_bound_by_device=True, open_s=6, meaning="overspill, parameters and bf16 states in host memory"
    ),
    "overspill-host-bf16-auto": System(
        tokens_per_s=46e3, is_bound_by_device=True, open_s=9, meaning="the same with the planner's choice for the activations"
    ),
    "overspill-ssd": System(
        tokens_per_s=1.1e3, is_bound_by_device=False, open_s=12, meaning="overspill, parameters and fp32 states on the SSD"
    ),
    "overspill-ssd-states": System(
        tokens_per_s=1.3e3, is_bound_by_device=False, open_s=12, meaning="overspill, parameters in host memory, fp32 states on the SSD"
    ),
    "zero2": System(tokens_per_s=16e3, is_bound_by_device=True, open_s=15, meaning="DeepSpeed ZeRO-2, states in host memory"),
    "zero3": System(
        tokens_per_s=11e3, is_bound_by_device=True, open_s=18, meaning="DeepSpeed ZeRO-3, parameters and states in host memory"
    ),
    "superoffload": System(
        tokens_per_s=16e3,
        is_bound_by_device=True,
        open_s=25,
        meaning="DeepSpeed SuperOffload: a process of its own updates under the backward",
    ),
    "fsdp2": System(tokens_per_s=10e3, is_bound_by_device=True, open_s=12, meaning="FSDP2, CPUOffloadPolicy, fp32 masters in host memory"),
    "torchao": System(
        tokens_per_s=12e3, is_bound_by_device=True, open_s=8, meaning="torchao CPUOffloadOptimizer, fp32 parameters, autocast"
    ),
    "torchao-bf16": System(
        tokens_per_s=20e3,
        is_bound_by_device=True,
        open_s=8,
        meaning="torchao CPUOffloadOptimizer as documented: bf16 parameters and states",
    ),
}
START_S = 14.0
"""Python, torch, transformers, CUDA; and the end of the process. Assumed."""
SMALL_BATCH_S = 0.13
"""A micro-batch of one sample of 2,048 tokens, 16 blocks: bound by launches (14.7k tokens/s, docs/log.md). Per block in proportion."""
PARAMETERS_B = {"tiny": 0.0005, "63M": 0.063, "1.10B": 1.10, "3.02B": 3.02, "8B": 8.03, "14B": 14.77}
"""Billions; shapes.py has the exact ones and needs torch."""
SLACK_S = 45.0
"""What a row may take beyond twice its estimate, before it is ended."""

_NAME = re.compile(r"(?P<shape>[^:@]+)(@(?P<cap>[\d.]+)GiB)?:(?P<layout>\d+x\d+x\d+):(?P<system>[^:]+)(?P<clip>:clip)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One process of the comparison."""

    shape: str
    micro_batches: int
    samples: int
    seq_len: int
    system: str
    clip: float | None = None
    cap_gib: float | None = None
    """Device memory that the process may take, context included; None: all there is."""

    @property
    def layout(self) -> str:
        return f"{self.micro_batches}x{self.samples}x{self.seq_len}"

    @property
    def workload(self) -> str:
        """What rows must share to be compared, but for clipping."""
        cap = f"@{self.cap_gib:g}GiB" if self.cap_gib is not None else ""
        return f"{self.shape}{cap}:{self.layout}"

    @property
    def name(self) -> str:
        return f"{self.workload}:{self.system}" + (":clip" if self.clip is not None else "")

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.samples * self.seq_len

    def estimate_s(self, *, warmup: int, steps: int) -> float:
        """Wall time of the whole process. Assumed rates: good enough to pack parts and to bound a row."""
        system, size = SYSTEMS[self.system], PARAMETERS_B[self.shape] / PARAMETERS_B["1.10B"]
        step_s = self.tokens_per_step / system.tokens_per_s * size
        if not system.is_bound_by_device:  # the bytes of a step do not depend on its tokens
            step_s = 16384 / system.tokens_per_s * size
        elif self.samples == 1:
            step_s = max(step_s, self.micro_batches * SMALL_BATCH_S * max(0.2, size**0.5))
        return START_S + system.open_s * size + (warmup + steps) * step_s

    def limit_s(self, *, warmup: int, steps: int) -> float:
        """The row is ended when it takes longer."""
        return 2 * self.estimate_s(warmup=warmup, steps=steps) + SLACK_S


def parse_row(name: str) -> Row:
    """The row of a name.

    Raises:
        ValueError: it is not one; the message says what is.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not a row; one is SHAPE[@CAPGiB]:MICRO_BATCHESxSAMPLESxTOKENS:SYSTEM[:clip], as 1.10B:1x8x2048:zero3:clip"
        )
    if match["shape"] not in PARAMETERS_B:
        raise ValueError(f"{match['shape']!r} in {name!r} is not a shape; choose one of {', '.join(PARAMETERS_B)}")
    if match["system"] not in SYSTEMS:
        raise ValueError(f"{match['system']!r} in {name!r} is not a system; choose one of {', '.join(SYSTEMS)}")
    micro_batches, samples, seq_len = (int(number) for number in match["layout"].split("x"))
    if not (micro_batches and samples and seq_len > 1):
        raise ValueError(f"layout {match['layout']} in {name!r} has no target; a sample needs at least 2 tokens")
    return Row(
        shape=match["shape"],
        micro_batches=micro_batches,
        samples=samples,
        seq_len=seq_len,
        system=match["system"],
        clip=CLIP if match["clip"] else None,
        cap_gib=float(match["cap"]) if match["cap"] else None,
    )


def _rows(workload: str, systems: str, clipped: str = "") -> list[str]:
    return [f"{workload}:{system}" for system in systems.split()] + [f"{workload}:{system}:clip" for system in clipped.split()]


_OWN = "resident resident-overspill overspill-host"
_OWN_CLIPPED = "resident resident-overspill overspill-host overspill-host-states6"
_PEERS = "zero2 zero3 superoffload fsdp2 torchao"
_PEERS_CLIPPED = "zero2 superoffload"

PARTS = {
    "16k": _rows("1.10B:1x8x2048", f"{_OWN} {_PEERS}", f"{_OWN_CLIPPED} {_PEERS_CLIPPED}"),
    "16k-small": _rows("1.10B:8x1x2048", f"{_OWN} {_PEERS}", f"{_OWN_CLIPPED} {_PEERS_CLIPPED}"),
    "32k": _rows("1.10B:2x8x2048", f"{_OWN} {_PEERS}", f"{_OWN_CLIPPED} zero2"),
    "32k-small": _rows("1.10B:16x1x2048", f"{_OWN} zero2 fsdp2", _OWN_CLIPPED),
    "own": [
        name
        for layout in ("1x8x2048", "2x8x2048", "8x1x2048", "16x1x2048")
        for name in _rows(f"1.10B:{layout}", "resident overspill-host", "overspill-host overspill-host-states6")
    ],
    "3.02B": _rows("3.02B:1x8x2048", f"{_OWN} zero2", "resident overspill-host overspill-host-states6") + _rows("3.02B:2x8x2048", _OWN),
    "budgets": _rows("1.10B:1x8x2048", "resident zero2")
    + _rows("1.10B@8GiB:1x8x2048", "overspill-host")
    + _rows("8B@8GiB:16x1x2048", "overspill-host")
    + _rows("14B@24GiB:2x8x2048", "overspill-host-bf16")
    + _rows("1.10B@14.8GiB:1x8x2048", "overspill-host-auto")
    + _rows("1.10B@5.9GiB:1x8x2048", "overspill-host"),
    "3.02B-32k": _rows("3.02B:2x8x2048", "resident", "overspill-host-states6")
    + _rows("3.02B@12GiB:2x8x2048", "overspill-host", "overspill-host")
    + _rows("3.02B:1x8x2048", "resident")
    + _rows("3.02B@12GiB:1x8x2048", "overspill-host"),
    "own-8GiB": [
        row
        for layout in ("1x8x2048", "2x8x2048", "8x1x2048", "16x1x2048")
        for row in (f"1.10B:{layout}:resident", f"1.10B@8GiB:{layout}:overspill-host")
    ],
    "ssd": _rows("1.10B:1x8x2048", "resident overspill-ssd overspill-ssd-states", "overspill-ssd"),
    "8B": _rows("8B@8GiB:2x8x2048", "overspill-host") + _rows("8B@8GiB:16x1x2048", "overspill-host"),
    "activations": _rows("1.10B@24GiB:1x8x2048", "overspill-host overspill-host-auto overspill-host-keep")
    + _rows("1.10B@24GiB:1x8x2048", "overspill-host-states6 overspill-host-states6-auto overspill-host-bf16 overspill-host-bf16-auto")
    + _rows("1.10B:1x8x2048", "resident-keep resident overspill-host overspill-host-auto"),
    "deferred": _rows("1.10B:1x8x2048", "resident zero2")
    + _rows("1.10B@24GiB:1x8x2048", "overspill-host-auto overspill-host-auto-prompt overspill-host")
    + _rows("1.10B@8GiB:1x8x2048", "overspill-host overspill-host-prompt")
    + _rows("1.10B@14.8GiB:1x8x2048", "overspill-host-auto"),
    "tiny": _rows("tiny:2x1x16", " ".join(SYSTEMS), f"{_OWN_CLIPPED} {_PEERS}"),
    "14B": _rows("14B@24GiB:2x8x2048", "overspill-host-bf16") + _rows("14B@24GiB:16x1x2048", "overspill-host-bf16"),
}
"""Each is one call: it fits into `run.py`'s deadline (tests add the estimates up), and brings the resident rows that it is compared with.
Rows that matter most come first. DeepSpeed's clipped ZeRO-3, FSDP2 and the bf16 torchao row are run by name.
`tiny` tries every system out, on any machine."""
