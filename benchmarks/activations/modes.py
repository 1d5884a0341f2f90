"""The modes: what is done with saved tensors, ours and others', each as a context manager around steps.

* `keep`: plain PyTorch, no hook. `keep-again`: the same at the end of a process, for drift. `counted`: our hooks, but nothing leaves, which
  tells A.
* `checkpoint`: every block is recomputed by `torch.utils.checkpoint`. `cheap`: only what is cheap to rebuild, nothing leaves.
* `host`: adaptive amounts to host memory. `mix`: that and all that is cheap. `mix-97`, `mix-90`: that, and `throughput` of 0.97 and 0.90:
  which share of the cheap is rebuilt, and which attentions and MLPs (`nets.parts`) are run again, is the library's choice.
* `ssd`: adaptive amounts to the drive alone; `ssd-7`, `ssd-14`: to files in RAM whose transfers are paced to 7 and 14 GB/s each way: a
  stand-in for one and two good drives, no measurement of them; what it reached is in the row. There are `RAM_STRIPES` files, because a file
  in RAM takes one writer at a time (5 GB/s; four were written at 12 to 18).
* `host-wide`: as `host`, with windows of `WIDE_RECORDS` of the largest tensors each way, asked for; `host` chooses its own, and they are in
  its row (`window_bytes`, `back_window_bytes`). On paper `host` gets as much away with a lower peak.
* `*-everything`, `*-ssdtrain`: the two other rules of `activations/amounts.py`. What others' tools do is `everything`.
* `least`: no mode, but the activation peak of a step in which every saved tensor is gone and comes back just in time (`just_in_time.py`).
* `save_on_cpu`, `save_on_cpu-pinned`: torch's. `trl`, `torchtune`: their `OffloadActivations`, pinned and with streams, entered for each
  step as their trainers do (leaving them is part of the step); where the package is not installed the row says so.

Budgets are so large that they never bind in the end, and no larger, for pinning takes time: of host memory half as much again as the link
can take in a forward, of an SSD more than twice what the drive can. In the first rounds, when nothing has been measured, they do bind.

A peer that would take more than `MOST_PEER_FRACTION` of the free host memory is left out: the machine would end the process, or others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from nets import parts
from torch import nn

from overspill.activations.context import OffloadActivations
from overspill.activations.settings import build_settings, refuse_what_cannot_work
from overspill.tiers.ssd import SsdStore

ASSUMED_DRIVE_BYTES_PER_S = 2.5e9
"""For the budget of `ssd`; more than the drives of rented machines write."""
HOST_SLACK, SSD_SLACK = 1.5, 2.5
LEAST_STAGING_BYTES, MOST_STAGING_BYTES = 256 * 1024, 1 << 30
MOST_PEER_FRACTION = 0.7
WIDE_RECORDS = 3
RAM_STRIPES = 8
"""Also threads of that store. Chosen."""
ROUNDING = {True: 1.75, False: 1.4}
"""What a peer takes at most, pinned or not, of what is saved and weights: it packs what several ops save several times, and torch's pinned
memory comes in powers of two. Counted for the benchmark's shapes: 1.28 to 1.64, and 1.02 to 1.34."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """How saved tensors are treated."""

    tier: str | None = None
    """`host` or `ssd`; None: our hooks are not there."""
    amount: str = "adaptive"
    recompute: str = "none"
    throughput: float | None = None
    """Least share of keep's, for which some is recomputed; None: all that `recompute` says."""
    is_checkpointed: bool = False
    """Whether every block is recomputed by torch."""
    paced_bytes_per_s: float | None = None
    is_wide: bool = False
    peer: str | None = None
    """Whose hooks."""


MODES = {
    "keep": Mode(),
    "counted": Mode(tier="host", amount="nothing"),
    "checkpoint": Mode(is_checkpointed=True),
    "cheap": Mode(tier="host", amount="nothing", recompute="cheap"),
    "host": Mode(tier="host"),
    "mix": Mode(tier="host", recompute="cheap"),
    "mix-97": Mode(tier="host", recompute="cheap", throughput=0.97),
    "mix-90": Mode(tier="host", recompute="cheap", throughput=0.90),
    "host-wide": Mode(tier="host", is_wide=True),
    "keep-again": Mode(),
    "least": Mode(),
    "ssd": Mode(tier="ssd"),
    "ssd-7": Mode(tier="ssd", paced_bytes_per_s=7e9),
    "ssd-14": Mode(tier="ssd", paced_bytes_per_s=14e9),
    "host-everything": Mode(tier="host", amount="everything"),
    "mix-everything": Mode(tier="host", amount="everything", recompute="cheap"),
    "host-ssdtrain": Mode(tier="host", amount="ssdtrain"),
    "ssd-everything": Mode(tier="ssd", amount="everything"),
    "ssd-ssdtrain": Mode(tier="ssd", amount="ssdtrain"),
    "save_on_cpu": Mode(peer="save_on_cpu"),
    "save_on_cpu-pinned": Mode(peer="save_on_cpu-pinned"),
    "trl": Mode(peer="trl.models.activation_offloading"),
    "torchtune": Mode(peer="torchtune.training"),
}


class Missing(Exception):
    """A peer is not installed, or a mode has nothing to do here; its row says so and is no failure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where to, and how much."""

    ssd_dir: str | None
    shm_dir: str | None
    min_bytes: int
    window_bytes: int | None
    most_host_bytes: int
    least_host_bytes: int
    """1 GiB or so; less for tiny models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What earlier modes of the process found out."""

    all_bytes: int
    largest_bytes: int
    """Of one record, about: the inner width of an MLP."""
    forward_s: float
    d2h_bytes_per_s: float
    fits: bool = True
    """Whether the device has room for all; if not, the first rounds need host memory for all."""


class PacedTransfer:
    """A transfer that ends no earlier than it is due. Meets the protocol `CheckedTransfer`."""

    def __init__(self, inner: Any, due_s: float) -> None:
        self._inner, self._due_s = inner, due_s

    @property
    def is_done(self) -> bool:
        return bool(self._inner.is_done) and time.perf_counter() >= self._due_s

    @property
    def checksums(self) -> tuple[int, ...]:
        return tuple(self._inner.checksums)

    def wait(self) -> None:
        self._inner.wait()
        left_s = self._due_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)


class PacedStore:
    """A store with reads and writes of at most so many bytes per second each; all else is the inner store's."""

    def __init__(self, inner: Any, bytes_per_s: float) -> None:
        self._inner, self._bytes_per_s = inner, bytes_per_s
        self._free_s = {"read": 0.0, "write": 0.0}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_read(self, name: str, offset: int, target: torch.Tensor, **more: Any) -> PacedTransfer:
        return PacedTransfer(self._inner.start_read(name, offset, target, **more), self._due_s("read", target.numel()))

    def start_write(self, name: str, offset: int, source: torch.Tensor, **more: Any) -> PacedTransfer:
        return PacedTransfer(self._inner.start_write(name, offset, source, **more), self._due_s("write", source.numel()))

    def _due_s(self, way: str, num_bytes: int) -> float:
        with self._lock:
            self._free_s[way] = max(self._free_s[way], time.perf_counter()) + num_bytes / self._bytes_per_s
            return self._free_s[way]


class EachStep:
    """Hooks that are entered for each step (`steps.Bench.step`), not around all."""

    def __init__(self, hooks: contextlib.AbstractContextManager[Any]) -> None:
        self.hooks = hooks

    def __enter__(self) -> EachStep:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def context(
    mode: Mode, net: nn.Module, places: Places, known: Known | None, *, device_budget: int | None = None
) -> contextlib.AbstractContextManager[Any]:
    """What is entered once around the steps of a mode.

    Raises:
        Missing: there is no such package, drive or folder.
    """
    if mode.tier is None:
        if mode.peer is not None and known is not None:
            _refuse_too_much(mode.peer, known, net)
        return contextlib.nullcontext() if mode.peer is None else _peer(mode.peer, net)
    host_bytes, ssd_bytes = places.most_host_bytes, 0
    if known is not None:
        host_bytes = _within(HOST_SLACK * known.d2h_bytes_per_s * known.forward_s, places.least_host_bytes, host_bytes)
        host_bytes = min(host_bytes, _within(1.05 * known.all_bytes, places.least_host_bytes, host_bytes))
    if known is not None and (mode.amount == "everything" or not known.fits):
        host_bytes = min(places.most_host_bytes, int(1.05 * known.all_bytes) + places.least_host_bytes)
    more: dict[str, Any] = {}
    if mode.tier == "ssd":
        place = places.shm_dir if mode.paced_bytes_per_s else places.ssd_dir
        if place is None:
            raise Missing("no --shm-dir was given" if mode.paced_bytes_per_s else "no --ssd-dir was given")
        rate = mode.paced_bytes_per_s or ASSUMED_DRIVE_BYTES_PER_S
        wanted = SSD_SLACK * rate * known.forward_s if known is not None else 0
        ssd_bytes = _within(wanted, places.least_host_bytes, 16 << 30) if mode.amount == "adaptive" else host_bytes
        host_bytes = _within(ssd_bytes, LEAST_STAGING_BYTES, MOST_STAGING_BYTES)
        more = {"ssd_budget": ssd_bytes, "ssd_dir": place}
        if mode.paced_bytes_per_s:
            Path(place).mkdir(parents=True, exist_ok=True)
            pace = mode.paced_bytes_per_s
            more["open_store"] = lambda size: PacedStore(_open_in_ram(Path(place), size), pace)
    refuse_what_cannot_work(net)
    window_bytes = WIDE_RECORDS * known.largest_bytes if mode.is_wide and known is not None else places.window_bytes
    settings = build_settings(
        **{
            "host_budget": max(host_bytes, 4 * LEAST_STAGING_BYTES), "ssd_dir": None, "ssd_budget": None, "gpudirect": False,
            "device_budget": device_budget, "amount": mode.amount, "storage": "as_is",
            "recompute": mode.recompute if mode.throughput is None else [mode.recompute, *parts(net)], "throughput": mode.throughput,
            "min_bytes": places.min_bytes,
            "window": window_bytes, "open_store": None, **more,
        }
    )  # fmt: skip
    if mode.tier == "ssd":  # the drive alone: host memory is the way to it, and nothing rests there
        settings = dataclasses.replace(settings, staging_bytes=settings.host_budget_bytes // 4096 * 4096)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is on the CPU")
        return OffloadActivations(net, settings)


def _open_in_ram(place: Path, size: int) -> SsdStore:
    places = [place / str(number) for number in range(RAM_STRIPES)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is in RAM")
        return SsdStore(places, capacity_bytes=size, num_threads=RAM_STRIPES, unlink=True)


def _within(wanted: float, least: int, most: int) -> int:
    return int(min(max(wanted, least), most)) // 4096 * 4096


def peer_bytes(peer: str, all_bytes: float, weights_bytes: float) -> float:
    """Host memory that a peer takes at most; weights are packed by save_on_cpu alone."""
    return ROUNDING[peer != "save_on_cpu"] * (all_bytes + (weights_bytes if peer.startswith("save_on_cpu") else 0.0))


def _refuse_too_much(peer: str, known: Known, net: nn.Module) -> None:
    weights_bytes = sum(parameter.numel() * parameter.itemsize for parameter in net.parameters())
    wanted_bytes = peer_bytes(peer, known.all_bytes, weights_bytes)
    free_bytes = psutil.virtual_memory().available
    if wanted_bytes > MOST_PEER_FRACTION * free_bytes:
        raise Missing(
            f"{peer} would take about {wanted_bytes / 1e9:.0f} GB of host memory, and {free_bytes / 1e9:.0f} GB are free; use fewer --rows"
        )


def _peer(name: str, net: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if name.startswith("save_on_cpu"):
        return torch.autograd.graph.save_on_cpu(pin_memory=name.endswith("pinned") and torch.cuda.is_available())
    try:
        offload = importlib.import_module(name).OffloadActivations
    except Exception as error:  # whatever an import may raise: their packages want others, and say so in many ways
        raise Missing(f"{name} has no OffloadActivations here: {error}"[:200]) from error
    if not torch.cuda.is_available():
        raise Missing(f"{name} moves tensors of accelerators only")
    with contextlib.suppress(ImportError):
        importlib.import_module("accelerate").PartialState()  # without it trl's logger raises where it would warn of little memory
    found = offload(use_pin_memory=True, use_streams=True)
    if hasattr(found, "update_model_params"):
        found.update_model_params(net)  # so that weights are left alone, as its trainer does
    return EachStep(found)
