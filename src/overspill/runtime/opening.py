"""Opening a session: from a model and a request to a plan, memory, files, and weights in their homes.

The order is that of cost and of what can be undone: look at the model, plan, refuse; then allocate; then load.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from overspill.activations.retaining import book_without_values
from overspill.checkpoint import discard_manifests, open_records
from overspill.errors import BudgetError
from overspill.huggingface import Checkpoint, StreamedModel, build_meta_model, copy_without_weights, expected_tensors, open_checkpoint
from overspill.huggingface.workload import UNDESCRIBABLE, describe_workload
from overspill.planning import build_layout, build_plan
from overspill.planning.space import rounding_bytes, scratch_bytes, store_bytes, uses_ssd
from overspill.runtime.checkpointing import Checkpointer, restore_homes
from overspill.runtime.homes import Homes
from overspill.runtime.machine import find_hardware
from overspill.runtime.residency import Residency
from overspill.spec.checkpoint import CheckpointPolicy, Manifest
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import AUTO, Plan, PlanRequest
from overspill.spec.retention import ActivationMode
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.tensors import CHUNK_BYTES, DTYPE_BYTES, HOST_CHUNK_BYTES, Tier
from overspill.spec.update_rule import Optimizer
from overspill.spec.workload import ModelLayout, WorkloadSpec
from overspill.tiers import DeviceMemory, HostMemory, RecordStore, SsdStore, Store
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy
from overspill.tiers.closing import close_after
from overspill.tiers.mapped import node_of_device

StoreFactory = Callable[[str, int, bool], Store]
"""(directory, capacity in bytes, is scratch) -> a store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """How a session reaches the SSD."""

    calls: FileCalls = OS_CALLS
    space: SpacePolicy = dataclasses.field(default_factory=SpacePolicy)
    num_threads: int = 4
    """For each directory or device."""
    overwrite: Sequence[str] = ()
    """Block devices whose content may be lost."""
    open_store: StoreFactory | None = None
    """None: files in the directory."""

    def open(self, places: tuple[str, ...], capacity_bytes: int, is_scratch: bool) -> RecordStore:
        if self.open_store is not None:
            return RecordStore(self.open_store(places[0], capacity_bytes, is_scratch))
        store = SsdStore(
            places,
            capacity_bytes=capacity_bytes,
            unlink=is_scratch,
            overwrite=self.overwrite,
            calls=self.calls,
            space=self.space,
            num_threads=self.num_threads * len(places),
        )
        return RecordStore(store)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a model is, without weights, and where its weights come from."""

    built: PreTrainedModel
    """On the meta device."""
    expected: dict[str, torch.Tensor]
    """Canonical name -> shape and dtype of all parameters and persistent buffers."""
    generation_config: GenerationConfig | None
    origin: Checkpoint | PreTrainedModel

    def has_more_than(self, names: Iterable[str]) -> bool:
        """Whether `tensors` is needed although a checkpoint of ours has `names`; a model object is taken over in any case."""
        return not isinstance(self.origin, Checkpoint) or not self.expected.keys() <= set(names)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their canonical names; a model object is emptied on the way."""
        return self.origin.read(self.expected) if isinstance(self.origin, Checkpoint) else take_weights(self.origin)


def look_at(model: str | Path | PreTrainedModel, dtype: str) -> ModelSource:
    """The model without its weights, which nothing touches yet.

    Args:
        model: a folder, a hub name, or a transformers causal LM.
        dtype: what it computes in.

    Raises:
        ModelFolderError: the folder is missing or broken.
        UnsupportedModelError: the model object cannot be copied without its weights.
    """
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model)
        built = build_meta_model(checkpoint.config, dtype=getattr(torch, dtype))
        return ModelSource(built=built, expected=expected_tensors(built), generation_config=checkpoint.generation_config, origin=checkpoint)
    built = copy_without_weights(model, dtype=getattr(torch, dtype))
    generation_config = getattr(built, "generation_config", None)
    return ModelSource(built=built, expected=expected_tensors(built), generation_config=generation_config, origin=model)


def plan_session(
    plan: PlanRequest | Plan,
    source: ModelSource,
    device: torch.device,
    *,
    is_compiled: bool,
    machine: str | Path | None,
    chunk_bytes: int | None,
    replays_graphs: bool,
) -> tuple[StreamedModel, HardwareSpec, Plan, WorkloadSpec | None]:
    """The model taken apart, what the machine has, where everything goes, and what the batch costs if that was asked (`describe_batch`).

    Args:
        source: its model belongs to the streamed one from here on.
        machine, chunk_bytes: as `Session` has them.
        replays_graphs: whether blocks whose launches bound them are replayed as CUDA graphs.

    Raises:
        BudgetError: it does not fit.
        UnsupportedModelError: the model cannot be streamed exactly; with the reason.
        ValueError: as `make_plan`, `describe_batch` and `refuse_compiled`.
    """
    plan = refuse_compiled(plan) if is_compiled else plan
    workload = describe_batch(plan, source.built, device)
    model = StreamedModel(source.built)
    if is_compiled:
        model.compile()
    hardware = find_hardware(plan, device, machine)
    found = make_plan(plan, model, hardware, device=str(device), chunk_bytes=chunk_bytes, workload=workload, replays_graphs=replays_graphs)
    return model, hardware, found, workload


def describe_batch(request: PlanRequest | Plan, model: PreTrainedModel | PreTrainedConfig, device: torch.device) -> WorkloadSpec | None:
    """What the request's batch costs, on a GPU or if activations may be kept, and then also what each block's graph stores; None: nobody
    asks, or (`auto`, `recompute`) it cannot be described.

    Args:
        model: a model without weights, which is not touched; of a configuration, all parameters are taken to be trainable.

    Raises:
        ValueError: it cannot be described, and not all blocks are to be recomputed.
    """
    retains = request.activations != ActivationMode.RECOMPUTE if isinstance(request, PlanRequest) else False
    if not isinstance(request, PlanRequest) or (device.type == "cpu" and not retains):
        return None
    try:
        return describe_workload(
            StreamedModel(copy.deepcopy(model)) if isinstance(model, PreTrainedModel) else model,
            seq_len=request.seq_len,
            micro_batch=request.micro_batch,
            dtype=request.dtype,
            device="cpu" if device.type == "cpu" else "cuda",
            is_masked=request.is_masked,
            open_book=book_without_values if retains else None,
        )
    except UNDESCRIBABLE as error:
        if not retains or request.activations == AUTO:
            return None  # the plan says so
        raise ValueError(
            f"--activations {request.activations} needs to know what each block stores, and the model cannot be described without weights: "
            f"{type(error).__name__}: {error}; choose --activations recompute, or auto"
        ) from error


def make_plan(
    request: PlanRequest | Plan,
    model: StreamedModel,
    hardware: HardwareSpec,
    *,
    device: str,
    chunk_bytes: int | None,
    workload: WorkloadSpec | None = None,
    replays_graphs: bool = True,
) -> Plan:
    """The plan for `model`, or the one given if it was made for the same model.

    Args:
        workload, replays_graphs: as `build_plan` wants them.
        chunk_bytes: None: `HOST_CHUNK_BYTES` if nothing then moves to an SSD, else `CHUNK_BYTES`; of a plan that is given, its own.

    Raises:
        BudgetError: it does not fit.
        ValueError: a plan for another model, or samples longer than the model's table of positions.
    """
    if model.max_positions is not None and request.seq_len > model.max_positions:
        raise ValueError(
            f"samples may have {request.seq_len} tokens, but {type(model.model).__name__} has learned positions for "
            f"{model.max_positions}; lower --seq-len to {model.max_positions} (with --truncate for longer samples)"
        )
    if isinstance(request, PlanRequest):
        sizes = _chunk_sizes(model, request) if chunk_bytes is None else (chunk_bytes,)
        build = functools.partial(build_plan, request, hardware=hardware, device=device, workload=workload, replays_graphs=replays_graphs)
        return _build_plan(build, [_read_layout(model, request, size) for size in sizes])
    layout = _read_layout(model, request, request.chunk_bytes if chunk_bytes is None else chunk_bytes)
    if (request.model, request.units, dict(request.bundles)) != (layout.model, layout.units, layout.bundles):
        raise ValueError(
            f"the plan was made for a {request.model} of {request.num_parameters} parameters, this model differs; plan it anew"
        )
    return dataclasses.replace(request, chunk_bytes=layout.chunk_bytes)


def _chunk_sizes(model: StreamedModel, request: PlanRequest) -> tuple[int, ...]:
    """Chunk sizes to plan with, the larger first, which is of use only where a plan may leave the SSD alone (`uses_ssd`)."""
    kinds = [str(parameter.dtype) for parameter in model.parameters.values() if parameter.trainable]
    has_states = any(resolve_state_format(request.state_format, kind, request.optimizer or "adamw").fields for kind in kinds)
    asked = request.parameters == Tier.SSD or (request.states == Tier.SSD and has_states)
    if request.boundaries == Tier.SSD or (asked and request.device_states_bytes is None):  # which lifts what was asked for
        return (CHUNK_BYTES,)
    return HOST_CHUNK_BYTES, CHUNK_BYTES


def _build_plan(build: Callable[[ModelLayout], Plan], layouts: Sequence[ModelLayout]) -> Plan:
    """By the first layout whose plan leaves the SSD alone, else by the last: large chunks cost less to dispatch, small ones less memory
    to pass through it."""
    *larger, last = layouts
    for layout in larger:
        with contextlib.suppress(BudgetError):
            plan = build(layout)
            if not uses_ssd(plan):
                return plan
    return build(last)


def refuse_compiled(plan: PlanRequest | Plan) -> PlanRequest | Plan:
    """`plan` for blocks that are compiled: what their graphs store is the compiler's choice, and nobody knows it beforehand.

    Raises:
        ValueError: it keeps graphs all the same.
    """
    asked = plan.activations if isinstance(plan, PlanRequest) else ",".join(sorted(set(plan.activations.values())))
    if isinstance(plan, PlanRequest) and asked == AUTO:
        return dataclasses.replace(plan, activations=ActivationMode.RECOMPUTE.value)
    if asked and asked != ActivationMode.RECOMPUTE:
        raise ValueError(
            f"--activations {asked} cannot be had of compiled blocks, which keep what the compiler chooses; leave --compile out"
        )
    return plan


def plan_for_optimizer(plan: PlanRequest | Plan, optimizer: Optimizer) -> PlanRequest | Plan:
    """`plan` with the optimizer's states.

    Raises:
        ValueError: it was made for another optimizer's.
    """
    if isinstance(plan, PlanRequest) and plan.optimizer is None:
        return dataclasses.replace(plan, optimizer=optimizer.kind)
    if plan.optimizer != optimizer.kind:
        raise ValueError(
            f"the plan is for the states of {plan.optimizer}, the session's optimizer is {optimizer.kind}; "
            "give that optimizer, or plan anew (a request's optimizer may be left out)"
        )
    return plan


def _read_layout(model: StreamedModel, request: PlanRequest | Plan, chunk_bytes: int) -> ModelLayout:
    dtype, state_format, optimizer = request.dtype, request.state_format, request.optimizer or "adamw"

    def bytes_per_element(kind: str, trainable: bool) -> float:
        if not trainable:
            return DTYPE_BYTES[kind]
        return 2 * DTYPE_BYTES[kind] + resolve_state_format(state_format, kind, optimizer).bytes_per_element

    config = model.config.get_text_config()
    units, bundles = build_layout(model.unit_parameters, model.parameters, bytes_per_element, dtype=dtype, chunk_bytes=chunk_bytes)
    names = {unit: str(kind).removeprefix("torch.") for unit, kind in model.hidden_dtypes.items()}
    return ModelLayout(
        model=type(model.model).__name__,
        units=units,
        bundles=bundles,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        hidden_dtypes={unit: kind for unit, kind in names.items() if kind != dtype},
        buffer_bytes=model.buffer_bytes,
        chunk_bytes=chunk_bytes,
    )


def allocate(
    plan: Plan, files: Files, checkpoints: CheckpointPolicy | None, source: tuple[Manifest, Path] | None
) -> tuple[Residency, Checkpointer | None]:
    """All memory and files of a plan.

    Args:
        checkpoints: reserve their room; the store of parameters and states is then the one that checkpoints pin.
        source: the checkpoint that is resumed.
    """
    if source is None and store_bytes(plan) and checkpoints is None:
        for place in plan.ssd_places:
            discard_manifests(Path(place), allowed=False)
    host_budget, device_budget = (
        None if budget is None else budget + rounding_bytes(plan) for budget in (plan.host_budget_bytes, plan.device_budget_bytes)
    )
    is_cuda = torch.device(plan.device).type == "cuda"
    host = HostMemory(
        pin=is_cuda,
        budget_bytes=host_budget,
        pinned_budget_bytes=plan.pinned_budget_bytes,
        numa_node=node_of_device(torch.device(plan.device)),
    )
    opened: list[HostMemory | DeviceMemory | RecordStore] = [host]
    try:
        device = DeviceMemory(torch.device(plan.device), budget_bytes=device_budget)
        opened.append(device)
        store, scratch, checkpointer = None, None, None
        if checkpoints is None and store_bytes(plan):
            store = files.open(plan.ssd_places, store_bytes(plan), False)
            opened.append(store)
        if scratch_bytes(plan):
            scratch = files.open(plan.ssd_places, scratch_bytes(plan), True)
            opened.append(scratch)
        if checkpoints is not None:
            checkpointer = Checkpointer(
                checkpoints,
                plan,
                source=source,
                calls=files.calls,
                space=files.space,
                num_threads=files.num_threads,
                overwrite=files.overwrite,
            )
            store = checkpointer.records
            opened.append(store)
        return Residency(plan, device=device, host=host, store=store, scratch=scratch), checkpointer
    except BaseException as error:
        for item in reversed(opened):
            close_after(error, item.close)
        raise


def fill_homes(
    homes: Homes,
    source: ModelSource,
    model: StreamedModel,
    *,
    own: Checkpointer | None,
    resumed: tuple[Manifest, Path] | None,
    calls: FileCalls,
) -> dict[str, torch.Tensor]:
    """Weights, and of a checkpoint states, into their homes, and buffers into the model; what no unit reads is returned, for
    `save_pretrained`.

    Args:
        own: the session's own checkpoints.
        resumed: the checkpoint that has the weights; None: `source` has them.
    """
    unread: dict[str, torch.Tensor] = {}
    if resumed is None or source.has_more_than(homes.names):
        unread = load(source.tensors(), model, homes, with_homes=resumed is None)
    if resumed is not None:
        restore(homes.residency, own, *resumed, calls)
    return unread


def restore(residency: Residency, own: Checkpointer | None, manifest: Manifest, directory: Path, calls: FileCalls) -> None:
    """Parameters and states from a checkpoint, one record at a time."""
    if own is not None and own.directory.resolve() == directory.resolve():
        restore_homes(residency, own.records)
        return
    records, _ = open_records(directory, manifest, calls=calls)
    with records:
        restore_homes(residency, records)


def load(tensors: Iterable[tuple[str, torch.Tensor]], model: StreamedModel, homes: Homes, *, with_homes: bool) -> dict[str, torch.Tensor]:
    """Parameters into their homes, buffers into the model; what no unit reads is returned, for `save_pretrained`.

    Args:
        with_homes: False where a checkpoint fills the homes.
    """
    names = set(homes.names)
    unread: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in names:
            if with_homes:
                homes.write(name, tensor)
        elif name in model.persistent_buffers:
            model.load_buffers({name: tensor})
        else:
            unread[name] = tensor.detach().to("cpu", getattr(torch, model.parameters[name].dtype))
        del tensor
    return unread


def take_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model object, each freed there as soon as the next one is asked for; the object ends on the meta device."""
    shapes: dict[int, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        shapes[id(parameter)] = torch.empty_like(parameter, device="meta")
        yield name, parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = torch.nn.Parameter(shapes[id(held)], requires_grad=held.requires_grad)
