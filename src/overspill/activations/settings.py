"""What a person may ask of `offload_activations`, checked; and the models that it cannot serve, refused with the reason."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from overspill.activations.amounts import Adaptive, Amount, Everything, Nothing, SsdTrain
from overspill.activations.forms import FORMS, AsIs, Form
from overspill.activations.rebuild import RECOMPUTE, can_read_saved
from overspill.errors import BudgetError, UnsupportedModelError
from overspill.tiers import Store
from overspill.tiers.block_device import is_block_device
from overspill.tiers.extent_file import is_in_memory
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.units import GIB, MIB, format_bytes, parse_bytes

AMOUNTS: dict[str, Amount] = {"adaptive": Adaptive(), "everything": Everything(), "ssdtrain": SsdTrain(), "nothing": Nothing()}
"""By name."""

MIN_BYTES = MIB
"""A copy of less takes longer to start than to run. Chosen; SSDTrain has 2²⁰ elements."""
STAGING_FRACTION = 0.25
"""Of the host budget, between device and SSD; the rest is where records rest. Chosen."""
MOST_STAGING_BYTES = 4 * GIB
"""Two seconds of writing at 2 GB/s. Chosen."""
LEAST_STAGING_BYTES = 64 * 1024
LEAST_RANGE_BYTES = EXTENT_ALIGNMENT_BYTES
"""Less host memory than this holds nothing."""
MOST_SSD_BYTES = 256 * GIB
"""Of a budget that nobody gave: half of what is free, and at most this. Chosen."""

Size = int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes in bytes; see `offload_activations` for what they mean."""

    host_budget_bytes: int
    staging_bytes: int
    """0 without an SSD, or with `is_direct`; part of the host budget."""
    ssd_places: tuple[str, ...]
    ssd_budget_bytes: int
    """0: no SSD."""
    is_direct: bool
    """Whether the SSD is reached by GPUDirect Storage."""
    device_budget_bytes: int | None
    amount: Amount
    form: Form | None
    """None: as they are."""
    is_rebuilding: bool
    segments: tuple[str, ...]
    """Patterns of the names of modules that are run again in backward."""
    throughput: float | None
    """Least share of plain PyTorch's, for which some of what may be recomputed is; None: all of it."""
    min_bytes: int
    window_bytes: int | None
    open_store: Callable[[int], Store] | None

    @property
    def resting_bytes(self) -> int:
        """Host memory in which records rest."""
        return self.host_budget_bytes - self.staging_bytes


def build_settings(
    *,
    host_budget: Size,
    ssd_dir: Any,
    ssd_budget: Size | None,
    gpudirect: bool,
    device_budget: Size | None,
    amount: Amount | str,
    storage: Form | str,
    recompute: str | Sequence[str],
    throughput: float | None,
    min_bytes: Size,
    window: Size | None,
    open_store: Callable[[int], Store] | None,
) -> Settings:
    """The settings that a person's words mean.

    Raises:
        ValueError: a word is not known, or a size is none.
        BudgetError: a budget is zero, or more than the machine has.
    """
    is_rebuilding, segments = _recomputed(recompute)
    chosen_amount = _named("amount", amount, AMOUNTS, needs=("leaves", "needs_profile", "leaves_unmeasured"))
    _check_throughput(throughput, recompute, amount, is_measured=chosen_amount.needs_profile)
    host_bytes = parse_bytes(host_budget)
    places = _places(ssd_dir)
    total = psutil.virtual_memory().total
    if host_bytes > total:
        raise BudgetError(f"host_budget is {format_bytes(host_bytes)} but this machine has {format_bytes(total)} of memory; lower it")
    has_ssd = bool(places) or open_store is not None
    if gpudirect and (not places or open_store is not None):
        given = "open_store, which is no file" if open_store is not None else "no ssd_dir"
        raise ValueError(
            f"gpudirect=True moves saved tensors between GPU and files, and there is {given}; give an ssd_dir, or leave it out"
        )
    if not has_ssd and ssd_budget is not None:
        raise ValueError("ssd_budget has no effect without ssd_dir; give a directory on a drive, or leave it out")
    is_staged = has_ssd and not gpudirect
    staging_bytes = min(int(host_bytes * STAGING_FRACTION), MOST_STAGING_BYTES) // 4096 * 4096 if is_staged else 0
    if (host_bytes < LEAST_RANGE_BYTES and not gpudirect) or (is_staged and staging_bytes < LEAST_STAGING_BYTES):
        why = (
            f"the SSD is reached through host memory, a quarter of the budget and at least {LEAST_STAGING_BYTES} B"
            if is_staged
            else "and there is no ssd_dir, so there is nowhere to move saved tensors to"
        )
        raise BudgetError(
            f"host_budget is {host_bytes} B: {why}; give at least {int(LEAST_STAGING_BYTES / STAGING_FRACTION)} B, better some GiB"
        )
    return Settings(
        host_budget_bytes=host_bytes,
        staging_bytes=staging_bytes,
        ssd_places=places,
        ssd_budget_bytes=_ssd_budget(places, ssd_budget, open_store),
        is_direct=gpudirect,
        device_budget_bytes=None if device_budget is None else parse_bytes(device_budget),
        amount=chosen_amount,
        form=None if isinstance(form := _named("storage", storage, FORMS, needs=("applies", "encode", "decode")), AsIs) else form,
        is_rebuilding=is_rebuilding,
        segments=segments,
        throughput=throughput,
        min_bytes=parse_bytes(min_bytes),
        window_bytes=None if window is None else parse_bytes(window),
        open_store=open_store,
    )


def _recomputed(recompute: str | Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Whether cheap ops are rebuilt, and the patterns of segments."""
    words = [recompute] if isinstance(recompute, str) else recompute
    is_list = isinstance(words, Sequence) and words and all(isinstance(word, str) for word in words)
    if not is_list or (isinstance(recompute, str) and recompute not in RECOMPUTE):
        raise ValueError(
            f"recompute={recompute!r} is not known; choose one of {', '.join(map(repr, RECOMPUTE))}, or a list of 'cheap' and patterns of "
            "modules' names, such as ['cheap', 'model.layers.*.mlp']"
        )
    if "none" in words and len(words) > 1:
        raise ValueError(f"recompute={recompute!r}: 'none' stands alone; leave it out, or the others")
    is_rebuilding = "cheap" in words
    if is_rebuilding and not can_read_saved():
        raise ValueError(f"recompute={recompute!r} needs a newer torch than {torch.__version__}: this one hides what a hook has packed")
    return is_rebuilding, tuple(word for word in words if word not in RECOMPUTE)


def _check_throughput(throughput: float | None, recompute: str | Sequence[str], amount: Amount | str, *, is_measured: bool) -> None:
    if throughput is None:
        return
    if isinstance(throughput, bool) or not isinstance(throughput, int | float) or not 0 < throughput <= 1:
        raise ValueError(f"throughput={throughput!r} is a share of plain PyTorch's, above 0 and at most 1, such as 0.97")
    if recompute == "none" or list(recompute) == ["none"]:
        raise ValueError(
            f"throughput={throughput!r} says how much may be recomputed, and recompute={recompute!r}; name what may be, or leave it out"
        )
    if not is_measured:
        raise ValueError(
            f"throughput={throughput!r} needs measured rounds, which amount={amount!r} does without; use 'adaptive' or 'ssdtrain'"
        )


def _named(what: str, value: Any, known: dict[str, Any], *, needs: Sequence[str]) -> Any:
    """What is known by that name, or the person's own that has all that is needed of one."""
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, str | type) or not all(hasattr(value, name) for name in needs):
        own = f"an object with {', '.join(needs)}"
        raise ValueError(f"{what}={value!r} is not known; choose one of {', '.join(map(repr, known))}, or {own}")
    return value


def _places(ssd_dir: Any) -> tuple[str, ...]:
    if ssd_dir is None:
        return ()
    given = [ssd_dir] if isinstance(ssd_dir, str | os.PathLike) else ssd_dir
    if isinstance(given, Sequence) and given and all(isinstance(item, str | os.PathLike) and os.fspath(item) for item in given):
        return tuple(os.fspath(item) for item in given)
    raise ValueError(f"ssd_dir is a directory, or a list of directories, got {ssd_dir!r}")


def _ssd_budget(places: Sequence[str], asked: Size | None, open_store: Callable[[int], Store] | None) -> int:
    """Bytes of the file; reserved when the block is entered."""
    if asked is not None:
        num_bytes = parse_bytes(asked)
        if num_bytes < 4096:
            raise BudgetError(f"ssd_budget is {num_bytes} B, less than one page of 4096 B; raise it, or leave ssd_dir out")
        return num_bytes
    if open_store is not None:
        raise ValueError("open_store needs ssd_budget: the bytes that it is asked to hold")
    free = []
    for place in places:
        if is_block_device(Path(place)):
            raise ValueError(f"{place} is a block device: say with ssd_budget how much of it may be used")
        folder = Path(place)
        existing = folder if folder.exists() else folder.parent
        if not existing.is_dir():
            raise ValueError(f"the SSD directory {folder} cannot be made: {existing} is no directory; create it or give another ssd_dir")
        if is_in_memory(existing):
            raise ValueError(
                f"ssd_dir {folder} is in RAM (tmpfs): what is moved there frees no host memory; raise host_budget instead, give a "
                "directory on a drive, or insist by giving ssd_budget"
            )
        free.append(shutil.disk_usage(existing).free)
    if not free:
        return 0
    num_bytes = min(MOST_SSD_BYTES, min(free) * len(free) // 2)
    if num_bytes < MIB:
        raise BudgetError(
            f"{places[0]} has {format_bytes(min(free))} free, half of which is too little for saved tensors; give another ssd_dir"
        )
    return num_bytes


def device_of(model: nn.Module) -> torch.device:
    """The one device whose saved tensors are looked after.

    Raises:
        UnsupportedModelError: there is none, or there are several.
    """
    counts: dict[torch.device, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        counts[tensor.device] = counts.get(tensor.device, 0) + tensor.numel()
    name = type(model).__name__
    accelerators = [device for device in counts if device.type != "cpu"]
    if not counts:
        raise UnsupportedModelError(f"{name} has no parameters and no buffers, so nothing says on which device its saved tensors are")
    if any(device.type == "meta" for device in accelerators):
        raise UnsupportedModelError(f"{name} has parameters on the meta device: load its weights first")
    if any(device.type != "cuda" for device in accelerators):
        raise UnsupportedModelError(f"{name} is on {', '.join(map(str, accelerators))}; saved tensors are moved from cuda and cpu only")
    if len(accelerators) > 1:
        raise UnsupportedModelError(
            f"{name} is spread over {', '.join(map(str, accelerators))}; one context looks after one device: give the part that is on one"
        )
    return accelerators[0] if accelerators else torch.device("cpu")


def refuse_what_cannot_work(model: Any) -> None:
    """Raise for models whose saved tensors cannot be moved, with the reason."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"offload_activations needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "DataParallel runs its replicas on threads of its own, in which no saved-tensor hook is active; use DistributedDataParallel"
        )
    noisy = [name for name, module in model.named_modules() if isinstance(module, nn.RReLU)]
    if noisy:
        raise UnsupportedModelError(
            f"{noisy[0] or type(model).__name__} is an RReLU: torch saves its noise before it is drawn and counts no change, so what "
            "was moved is not the noise. Use another activation, such as LeakyReLU"
        )
    is_compiled = type(model).__module__.startswith("torch._dynamo")  # by name: importing dynamo takes a second
    if is_compiled or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(
            "the model is compiled as a whole: one graph saves all its tensors when forward has ended, so none could leave while it runs. "
            "Compile its blocks instead (for block in model.model.layers: block.compile())"
        )
