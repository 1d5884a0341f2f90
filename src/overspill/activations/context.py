"""`offload_activations`: what autograd saves in a plain training loop, moved to host memory and SSD until backward wants it.

    with overspill.offload_activations(model, host_budget="32GiB", ssd_dir="/nvme/overspill") as offload:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(offload.report())

How: two hooks (`torch.autograd.graph.saved_tensors_hooks`) are active inside the block; nothing of the model is patched. `cache.py` has
what they do, `amounts.py` how much leaves, `mover.py` how it moves. Gradients are those of the loop without the block, to the bit, unless
a storage form that rounds was asked for.

Rules:

1. Enter the block once around the loop: entering pins memory and opens the file, leaving gives both back. It may be entered again.
2. A graph may outlive the block. Leaving ends packing at once; what was packed keeps its memory until its graph dies.
3. Hooks belong to a thread. Forward has to run in the thread that entered, which also has to leave; backward may run in any.
4. Only the innermost hooks of a thread see a tensor. So the block is not entered inside of other hooks (refused), and what is saved inside
   of somebody else's hooks further in (`torch.utils.checkpoint`) is theirs; what those save at their borders is seen here.
5. torch's engine keeps what a failed backward was about to run until the thread's next backward. Leaving with an exception makes it let go.
6. A copy of the model (`copy.deepcopy`, `torch.save`) that is made inside is a plain model: nothing is active in it.

Limits: Linux, CUDA and CPU. One device. torch.func's transforms refuse hooks. A model that is compiled as a whole is refused. So is one
with `nn.RReLU`, whose noise is written after it was packed, uncounted; a call of the function itself is not seen.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import CodeType, FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn

from overspill.activations.amounts import Amount
from overspill.activations.cache import TensorCache
from overspill.activations.flight import Profile
from overspill.activations.forms import Form
from overspill.activations.opened import OpenTiers
from overspill.activations.segments import EveryCall, Segments, find_segments
from overspill.activations.settings import MIN_BYTES, Settings, Size, build_settings, device_of, refuse_what_cannot_work
from overspill.spec.activations import ActivationRates, ActivationReport
from overspill.tiers import Store
from overspill.tiers.closing import close_after
from overspill.tiers.gpudirect import open_kvikio


def offload_activations(
    model: nn.Module,
    *,
    host_budget: Size,
    ssd_dir: Any = None,
    ssd_budget: Size | None = None,
    gpudirect: bool = False,
    device_budget: Size | None = None,
    amount: Amount | str = "adaptive",
    storage: Form | str = "as_is",
    recompute: str | Sequence[str] = "none",
    throughput: float | None = None,
    min_bytes: Size = MIN_BYTES,
    window: Size | None = None,
    open_store: Callable[[int], Store] | None = None,
) -> OffloadActivations:
    """A context manager in which saved tensors of `model` may leave its device. Sizes are bytes, or text such as `8GiB`.

    Args:
        model: on one device. Its parameters and buffers are left alone; tensors saved outside of it, as by a loss function, are not.
        host_budget: host memory for saved tensors, pinned where there is a GPU. With an SSD a quarter of it is for what is on the way.
        ssd_dir: directory on a drive, or several to stripe over; used for what host memory has no room for. None: no SSD.
        ssd_budget: of all of them together; None: half of what is free, at most 256 GiB.
        gpudirect: reach the SSD by GPUDirect Storage (kvikio), past host memory, of which 0 is then enough; refused where it is missing.
        device_budget: most bytes of saved tensors that stay on the device, whatever moving the others costs; None: on CUDA what the device
            has room for, measured; on the CPU no limit.
        amount: how much leaves: `adaptive` (as much as costs no time, from measured times and rates, from the fourth round on; until then
            everything), `everything`, `ssdtrain` (the published rule), `nothing`, or an `Amount` (`amounts.py`).
        storage: `as_is`, `bf16` (of fp32) or `int8` (in groups); the last two change gradients (`forms.py`).
        recompute: `none`, or `cheap`: products, SiLU, GELU and layer norms are not stored but rebuilt in backward, to the bit
            (`rebuild.py`). Or a list of `cheap` and patterns of modules' names, such as `["cheap", "model.layers.*.mlp"]`: of these
            modules only what goes in is stored, and backward runs their forward again (`segments.py`).
        throughput: least share of plain PyTorch's, such as 0.97, for which `recompute` names what *may* be recomputed; how much of it is
            follows from measured times (`mix.py`). Until then what is cheap is rebuilt, and no module is run again, so that the first two
            rounds need room for what moves. None: all that `recompute` names is recomputed.
        min_bytes: smaller saved tensors are left alone.
        window: device memory that may be on its way out, and as much that may have come back early; one tensor may always. None: two of
            the largest tensor, from 128 MiB to 1 GiB, until a round was measured; then what has the lowest peak (`windows.py`).
        open_store: opens something else than files in `ssd_dir`, such as a `FakeStore`, for so many bytes.

    Raises:
        ValueError: an argument cannot be meant, or `gpudirect` cannot be had here.
        BudgetError: a budget is zero, or more than the machine has.
        UnsupportedModelError: the model's saved tensors cannot be moved.
    """
    refuse_what_cannot_work(model)
    settings = build_settings(
        host_budget=host_budget, ssd_dir=ssd_dir, ssd_budget=ssd_budget, gpudirect=gpudirect, device_budget=device_budget,
        amount=amount, storage=storage, recompute=recompute, throughput=throughput, min_bytes=min_bytes, window=window,
        open_store=open_store,
    )  # fmt: skip
    find_segments(model, settings.segments)
    if gpudirect:
        open_kvikio(device_of(model), settings.ssd_places)
    return OffloadActivations(model, settings)


class OffloadActivations:
    """See `offload_activations`, which makes it, and the rules of this file."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._device = device_of(model)
        self._segments = Segments(model, settings.segments)
        self._foreign: list[tuple[torch.Tensor, Callable[[], torch.Tensor] | None]] = []
        self._tiers: OpenTiers | None = None
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._handles: list[Any] = []
        self._thread = 0
        """That the hooks belong to."""
        self._depth = 0
        """Of the model's forward, while attached."""
        self._frame: FrameType | None = None
        """Of the call that pushed the hooks, while attached."""
        self._gradient_error: float | None = None
        if self._device.type == "cpu" and not settings.ssd_budget_bytes:
            warnings.warn(
                f"{type(model).__name__} is on the CPU: moving its saved tensors to host memory frees none; give an ssd_dir",
                RuntimeWarning,
                stacklevel=3,
            )

    # -- the block ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._hooks is not None or self._handles:
            raise RuntimeError("this offload_activations is already active; leave it before it is entered again")
        _refuse_foreign_hooks()
        self._open()
        self._handles.append(self._model.register_forward_pre_hook(self._begin_forward))
        self._push()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._refuse_other_thread()
        try:
            self._pop()
        finally:
            self._remove_handles()
            if error is None:
                self._shut()
            else:
                _forget_failed_backward()
                close_after(error, self._shut)

    def attach(self) -> None:
        """Be active in every forward of the model from now on, instead of in a block; an exception in it leaves no hook behind."""
        if self._hooks is not None or self._handles:
            raise RuntimeError("this offload_activations is already active; leave it before it is attached")
        self._open()
        self._handles.append(self._model.register_forward_pre_hook(self._enter_forward, prepend=True))
        self._handles.append(self._model.register_forward_hook(self._leave_forward, always_call=True))

    def detach(self) -> None:
        """Undo `attach`; what was packed stays until its graph dies. Does nothing if it is not attached.

        Raises:
            RuntimeError: the model's forward runs in another thread.
        """
        self._refuse_other_thread()
        self._end_forward()
        self._remove_handles()
        self._shut()

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),)  # rule 6: the hooks of a copied model find nothing to do

    # -- hints -------------------------------------------------------------------------------------------------------

    def next_micro_batch(self, number: int | None = None) -> None:
        """What is saved from here on belongs to another micro-batch. The model's forward says so by itself; needed where a schedule calls
        parts of the model. `number` is for `phase`; None: the one after the present."""
        self._cache().next_micro_batch(number)

    def phase(self, phase: str, *, micro_batch: int | None = None) -> None:
        """A pipeline schedule says what comes next: `forward` begins a micro-batch, `backward` fetches the last tensors of one ahead.

        Raises:
            ValueError: the phase is neither, or the micro-batch has saved nothing.
        """
        if phase == "forward":
            self._cache().next_micro_batch(micro_batch)
        elif phase == "backward":
            self._cache().prefetch_last(micro_batch)
        else:
            raise ValueError(f"phase {phase!r} is not known; it is 'forward' or 'backward'")

    def register_parameter_storage(self, tensor: torch.Tensor, restore: Callable[[], torch.Tensor] | None = None) -> None:
        """Leave alone whatever is saved of this tensor's storage: a weight that is no parameter of the model, such as a buffer that weights
        are fetched into.

        Args:
            restore: for a buffer that holds other bytes by the time of backward: gives a tensor whose storage has the same bytes in the
                same places. Without it the storage itself must have them, and versions are checked.
        """
        self._foreign.append((tensor, restore))
        if self._tiers is not None:
            self._tiers.parameters.add(tensor, restore)

    # -- figures -----------------------------------------------------------------------------------------------------

    def report(self) -> ActivationReport:
        """What became of all saved tensors so far."""
        tiers = self._tiers
        if tiers is None:
            return ActivationReport(
                num_rounds=0, packed_bytes=0, kept_bytes=0, host_bytes=0, ssd_bytes=0, stored_bytes=0, rebuilt_bytes=0, forwarded_bytes=0,
                cancelled_bytes=0, num_waits=0, wait_s=0.0, left_alone={}, num_live=0, host_used_bytes=0, ssd_used_bytes=0,
                device_peak_bytes=0, host_peak_bytes=0, pinned_bytes=0, ssd_peak_bytes=0, rates=ActivationRates(), rounds=(),
                segments=self._segments.names, num_segment_rebuilds=self._segments.num_rebuilds, gradient_error=self._gradient_error,
            )  # fmt: skip
        tally, ssd = tiers.cache.rounds.tally, tiers.ssd
        return ActivationReport(
            num_rounds=tally.num_ended,
            packed_bytes=tally.totals["packed"],
            kept_bytes=tally.totals["keep"],
            host_bytes=tally.totals["host"],
            ssd_bytes=tally.totals["ssd"],
            stored_bytes=tally.totals["stored"],
            rebuilt_bytes=tally.totals["rebuilt"],
            forwarded_bytes=tally.totals["forwarded"],
            cancelled_bytes=tally.totals["cancelled"],
            num_waits=tally.num_waits,
            wait_s=tally.wait_s,
            left_alone=dict(tally.left_alone),
            num_live=tiers.cache.num_live,
            host_used_bytes=tiers.host.used_bytes + (tiers.staging.used_bytes if tiers.staging is not None else 0),
            ssd_used_bytes=ssd.used_bytes if ssd is not None else 0,
            device_peak_bytes=tally.device_peak_bytes,
            host_peak_bytes=tiers.memory.peak_bytes,
            pinned_bytes=tiers.memory.pinned_bytes,
            ssd_peak_bytes=ssd.peak_bytes if ssd is not None else 0,
            rates=tiers.cache.rounds.rates,
            rounds=tuple(tally.rounds),
            looks=tuple(tally.looks),
            segments=self._segments.names,
            num_segment_rebuilds=self._segments.num_rebuilds,
            gradient_error=self._gradient_error,
        )

    def profile(self) -> Profile | None:
        """Bytes and times of the last round that was measured, which the amounts were decided from; None: none was."""
        return self._tiers.cache.rounds.profile if self._tiers is not None else None

    def measure_gradient_error(self, step: Callable[[], object]) -> float:
        """‖g − g₀‖₂ / ‖g₀‖₂ of one step, g₀ without offloading; it is also in `report()` from then on.

        The parameters' gradients, the buffers and torch's random generators are as before when it returns. Not to be called inside the
        block.

        Args:
            step: forward and backward of one batch, the same each time; no update.
        """
        if self._hooks is not None or self._handles:
            raise RuntimeError("measure_gradient_error runs the step with and without offloading: call it outside of the block")
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in parameters]
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]  # such as a batch norm's statistics
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            seed = int(torch.randint(2**62, ()).item())
            try:
                plain = _gradients_of(step, parameters, seed)
                with self:
                    ours = _gradients_of(step, parameters, seed)
            finally:
                for parameter, gradient in zip(parameters, before, strict=True):
                    parameter.grad = gradient
                with torch.no_grad():
                    for buffer, values in buffers:
                        buffer.copy_(values)
        difference = sum(_square_of_norm(_wide(one) - _wide(other)) for one, other in zip(ours, plain, strict=True))
        size = sum(_square_of_norm(_wide(one)) for one in plain)
        self._gradient_error = (difference / size) ** 0.5 if size else 0.0
        return self._gradient_error

    # -- inside ------------------------------------------------------------------------------------------------------

    def _cache(self) -> TensorCache:
        if self._tiers is None or not self._tiers.is_open:
            raise RuntimeError("offload_activations is not active: enter the block first")
        return self._tiers.cache

    def _open(self) -> None:
        self._device = device_of(self._model)  # it may have been moved since
        self._tiers = OpenTiers(self._model, self._device, self._settings, self._tiers)
        for tensor, restore in self._foreign:
            self._tiers.parameters.add(tensor, restore)
        try:
            self._segments.install(self._device, EveryCall() if self._settings.throughput is None else self._tiers.cache)
        except BaseException:
            self._shut()
            raise

    def _shut(self) -> None:
        if self._tiers is not None:
            self._tiers.shut()

    def _push(self) -> None:
        cache = self._cache()
        self._thread = threading.get_ident()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(_uncompiled(cache.pack), _uncompiled(cache.unpack))
        cache.is_innermost = functools.partial(_is_innermost, self._hooks)
        self._hooks.__enter__()

    def _pop(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(*sys.exc_info())

    def _remove_handles(self) -> None:
        self._segments.remove()
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _watches(self, module: nn.Module) -> bool:
        """Not a copy of the model (rule 6)."""
        return module is vars(self).get("_model")

    def _begin_forward(self, module: nn.Module, *_: Any) -> None:
        if self._watches(module) and torch._C._current_graph_task_id() == -1 and self._tiers is not None:
            self._tiers.cache.next_micro_batch()

    def _enter_forward(self, module: nn.Module, *_: Any) -> None:
        if not self._watches(module):
            return
        caller = sys._getframe(1)
        if self._depth and self._thread == threading.get_ident() and not _is_running(self._frame, caller):
            self._end_forward()  # Ctrl-C broke the last one off, for which torch calls no hook
        self._depth += 1
        if self._depth == 1:
            self._frame = caller
        if self._depth == 1 and torch._C._current_graph_task_id() == -1:
            _refuse_foreign_hooks()
            self._begin_forward(module)
            self._push()

    def _leave_forward(self, module: nn.Module, *_: Any) -> None:
        if not self._watches(module):
            return
        if self._depth <= 1:
            self._end_forward()
        else:
            self._depth -= 1

    def _end_forward(self) -> None:
        self._depth, self._frame = 0, None
        self._pop()

    def _refuse_other_thread(self) -> None:
        """Rule 3."""
        if self._hooks is not None and self._thread != threading.get_ident():
            raise RuntimeError("offload_activations is left in another thread than entered it, whose hooks cannot be reached from here")


_callback_of_dynamo: Callable[[], object] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)
"""None: no compiled code runs around this; not in every torch."""


def _uncompiled(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The hook, for compiled blocks too: they call hooks as well, and dynamo would compile what these do, for each shape.

    Hooks are called a thousand times a step: where nothing compiled runs they are called as they are.
    """
    disabled = torch.compiler.disable(hook)

    def run(saved: Any) -> Any:
        return hook(saved) if _callback_of_dynamo() is None else disabled(saved)

    skip: Callable[[CodeType], object] | None = getattr(torch._dynamo.eval_frame, "skip_code", None)  # not in every torch
    if skip is None:
        return torch.compiler.disable(run, recursive=False)  # itself alone; what it calls goes one of the two ways
    skip(run.__code__)  # the same, without a function around it
    return run


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _square_of_norm(tensor: torch.Tensor) -> float:
    return float(tensor.abs().square().sum())


def _is_running(frame: FrameType | None, caller: FrameType | None) -> bool:
    """Whether a call is among those that led to `caller`."""
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _forget_failed_backward() -> None:
    """Rule 5."""
    if torch._C._current_graph_task_id() == -1:
        with torch.inference_mode(False), torch.enable_grad():
            torch.ones(1, device="cpu", requires_grad=True).sum().backward()


def _gradients_of(step: Callable[[], object], parameters: Sequence[nn.Parameter], seed: int) -> list[torch.Tensor]:
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(seed)
    step()
    return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone() for parameter in parameters]


def _top_hooks() -> tuple[Any, Any] | None:
    """The innermost hooks of this thread; None where there are none, or torch does not say."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in every torch
    hooks: tuple[Any, Any] | None = top(True) if top is not None else None
    return hooks


def _is_innermost(ours: torch.autograd.graph.saved_tensors_hooks) -> bool:
    hooks = _top_hooks()
    return hooks is not None and hooks[0] is ours.pack_hook


def _refuse_foreign_hooks() -> None:
    """Rule 4."""
    hooks = _top_hooks()
    if hooks is not None:
        owner = getattr(hooks[0], "__qualname__", repr(hooks[0]))
        raise RuntimeError(
            f"other saved-tensor hooks are active here ({owner}), such as those of save_on_cpu, torch.utils.checkpoint or another "
            "offload_activations: the innermost alone would see what is saved. Leave theirs, or enter this block outside of them"
        )
