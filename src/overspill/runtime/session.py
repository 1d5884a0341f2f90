"""A training session: a model in its tiers, stepped, evaluated, saved.

Rules:

1. All bytes are placed when the session opens; a step allocates nothing that the plan did not count.
2. Weights are never stale: `evaluate`, `generate`, `save_pretrained` and `save_checkpoint` flush pending updates first.
   Leaving the `with` block saves nothing.
3. After a failure that may have changed part of the weights the session refuses to go on.
4. A model object given to a session is taken over once the plan stands: its weights move into the tiers, tensor by tensor, and
   the object keeps none. Until then it is not touched. Sessions train in training mode, whatever mode the object was in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from overspill.checkpoint import discard_manifests, open_records
from overspill.errors import NonFiniteError, StorageError
from overspill.huggingface import (
    StreamedModel,
    build_meta_model,
    copy_without_weights,
    expected_tensors,
    open_checkpoint,
    write_model_folder,
)
from overspill.optim import global_norm
from overspill.planning import build_layout, build_plan, simulate
from overspill.planning.space import scratch_bytes, store_bytes
from overspill.report.memory import host_peak_bytes
from overspill.runtime.batches import count_targets, prepare_batch, token_count
from overspill.runtime.checkpointing import (
    Checkpointer,
    SessionState,
    config_facts,
    describe_room,
    kept_bytes,
    restore_homes,
    validate_same_run,
)
from overspill.runtime.compute import MicroBatch, StepContext
from overspill.runtime.executor import Executor, UpdateContext
from overspill.runtime.gradients import Gradients
from overspill.runtime.homes import Homes
from overspill.runtime.machine import read_hardware, resolve_device, return_freed_memory
from overspill.runtime.residency import Residency
from overspill.scheduling import build_evaluation, build_flush, build_train_step, validate
from overspill.spec.checkpoint import CheckpointPolicy, Manifest
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest, UpdateTiming
from overspill.spec.report import EvaluationReport, Prediction, StepFigures, StepReport
from overspill.spec.schedule import Schedule, Update
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.tensors import CHUNK_BYTES, DTYPE_BYTES
from overspill.spec.update_rule import AdamW, LearningRate, LossScale, clip_coefficient, gradient_scale
from overspill.spec.workload import ModelLayout
from overspill.tiers import DeviceMemory, HostMemory, RecordStore, SsdStore, Store
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy

MOST_SCHEDULES_KEPT = 3
"""Programs kept for batches of the same shapes (a step, its pending twin, an evaluation); each can take megabytes."""
StoreFactory = Callable[[str, int, bool], Store]


class Session:
    """Train one model under one plan.

    Args:
        model: a folder, a hub name, or a transformers causal LM (rule 4).
        plan: what the user wants (`PlanRequest`), or a plan made before for the same model.
        optimizer: hyperparameters of AdamW.
        learning_rate: schedule over optimizer steps; None: constant at the optimizer's `lr`.
        seed: of dropout, with the step, the micro-batch and the unit.
        open_store: makes the stores that rest on the SSD, (directory, capacity in bytes, is scratch) -> store; None: files
            in the directory. Tests and users give a `FakeStore` here.
        chunk_bytes: bound on the bytes of one chunk; tests lower it.
        checkpoints: reserve room for checkpoints, which `save_checkpoint` makes; None: none can be made.
        resume_from: used by `overspill.resume`.
        calls, space, num_threads: of the files on the SSD; tests give a `FaultInjector` (no effect with `open_store`).

    Raises:
        BudgetError: the plan does not fit; nothing was allocated.
        StorageError: the SSD directory cannot be used, is in use, or has checkpoints that would be lost.
        UnsupportedModelError: the model cannot be streamed exactly; with the reason.
        ModelFolderError: the folder is missing or broken.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        plan: PlanRequest | Plan,
        optimizer: AdamW,
        learning_rate: LearningRate | None = None,
        seed: int = 0,
        open_store: StoreFactory | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        checkpoints: CheckpointPolicy | None = None,
        resume_from: tuple[Manifest, Path] | None = None,
        calls: FileCalls = OS_CALLS,
        space: SpacePolicy | None = None,
        num_threads: int = 4,
    ) -> None:
        self.optimizer, self.seed, self._chunk_bytes = optimizer, seed, chunk_bytes
        self._files = {"calls": calls, "space": space or SpacePolicy(), "num_threads": num_threads}
        self._open_store = open_store or self._open_ssd_store
        self._checkpointer: Checkpointer | None = None
        self.learning_rate = learning_rate or LearningRate(kind="constant", base=optimizer.lr, total_steps=1)
        self.device = resolve_device(plan.device)
        return_freed_memory()
        checkpoint = None if isinstance(model, PreTrainedModel) else open_checkpoint(model)
        dtype = getattr(torch, plan.dtype)
        if checkpoint is not None:
            built = build_meta_model(checkpoint.config, dtype=dtype)
        else:
            assert isinstance(model, PreTrainedModel)
            built = copy_without_weights(model, dtype=dtype)
        expected = expected_tensors(built)
        self._generation_config = getattr(built, "generation_config", None) if checkpoint is None else checkpoint.generation_config
        self.model = StreamedModel(built)
        self.hardware = read_hardware(self.device, plan.ssd_dir)
        if plan.ssd_dir is not None:  # a data file that is there is used again, or discarded
            free = self.hardware.ssd_capacity_bytes + kept_bytes(plan.ssd_dir)
            self.hardware = dataclasses.replace(self.hardware, ssd_capacity_bytes=free)
        self.plan = self._make_plan(plan, chunk_bytes)
        if checkpoints is not None:
            self.plan = dataclasses.replace(self.plan, notes=(*self.plan.notes, describe_room(checkpoints, self.plan)))
        if resume_from is not None:
            validate_same_run(resume_from[0], self.plan, self.model.config)
        self.residency = self._allocate(checkpoints, resume_from)
        try:
            self.homes = Homes(self.plan, self.residency)
            self._unread: dict[str, torch.Tensor] = {}
            if checkpoint is not None:
                if resume_from is None or not expected.keys() <= set(self.homes.names):
                    self._load(checkpoint.read(expected), with_homes=resume_from is None)
            else:
                assert isinstance(model, PreTrainedModel)
                self._load(_taken_from(model), with_homes=resume_from is None)
            if resume_from is not None:
                self._restore(*resume_from)
            self.model.to(self.device)
            self.model.train()
        except BaseException:
            self.close()
            raise
        self.executor = Executor(self.plan, self.model, self.residency)
        self.step_number = resume_from[0].step if resume_from is not None else 0
        """Optimizer steps done, pending ones included."""
        self.loss_scale = LossScale() if self.plan.dtype == "float16" else None
        if resume_from is not None:
            self.loss_scale = resume_from[0].loss_scale
        self.data_position: Any = resume_from[0].data_position if resume_from is not None else None
        """What the last checkpoint said about where the caller's data goes on."""
        self._pending: UpdateContext | None = None
        self._failure: str | None = None
        self._is_closed = False
        self._vocab_size = self.model.config.get_text_config().vocab_size
        self._schedules: dict[tuple[str, tuple[int, ...], bool], Schedule] = {}

    # -- opening -----------------------------------------------------------------------------------------------------

    def _make_plan(self, plan: PlanRequest | Plan, chunk_bytes: int) -> Plan:
        state_format = plan.state_format

        def bytes_per_element(dtype: str, trainable: bool) -> int:
            if not trainable:
                return DTYPE_BYTES[dtype]
            return 2 * DTYPE_BYTES[dtype] + resolve_state_format(state_format, dtype).bytes_per_element

        config = self.model.config.get_text_config()
        units, bundles = build_layout(
            self.model.unit_parameters, self.model.parameters, bytes_per_element, dtype=plan.dtype, chunk_bytes=chunk_bytes
        )
        layout = ModelLayout(
            model=type(self.model.model).__name__,
            units=units,
            bundles=bundles,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            hidden_dtypes={
                unit: str(dtype).removeprefix("torch.")
                for unit, dtype in self.model.hidden_dtypes.items()
                if dtype is not getattr(torch, plan.dtype)
            },
            buffer_bytes=self.model.buffer_bytes,
        )
        if isinstance(plan, PlanRequest):
            return build_plan(plan, layout, self.hardware, device=str(self.device))
        if (plan.model, plan.units, dict(plan.bundles)) != (layout.model, units, bundles):
            raise ValueError(f"the plan was made for a {plan.model} of {plan.num_parameters} parameters, this model differs; plan it anew")
        return plan

    def _allocate(self, checkpoints: CheckpointPolicy | None, resume_from: tuple[Manifest, Path] | None) -> Residency:
        plan = self.plan
        if resume_from is None and store_bytes(plan) and plan.ssd_dir is not None and checkpoints is None:
            discard_manifests(Path(plan.ssd_dir), allowed=False)
        stores: list[RecordStore | None] = []
        needs = (store_bytes(plan) if checkpoints is None else 0, scratch_bytes(plan))
        # Slots are rounded up to pages, which the schedule does not count.
        rounding = 2 * len(plan.units) * plan.group_size * 4096
        host_budget = None if plan.host_budget_bytes is None else plan.host_budget_bytes + rounding
        host = HostMemory(pin=self.device.type == "cuda", budget_bytes=host_budget)
        device = DeviceMemory(self.device, budget_bytes=plan.device_budget_bytes)
        try:
            for num_bytes, is_scratch in zip(needs, (False, True), strict=True):
                if num_bytes == 0:
                    stores.append(None)
                    continue
                assert plan.ssd_dir is not None
                stores.append(RecordStore(self._open_store(plan.ssd_dir, num_bytes, is_scratch)))
            if checkpoints is not None:
                self._checkpointer = Checkpointer(checkpoints, plan, source=resume_from, **self._files)  # type: ignore[arg-type]
                stores[0] = self._checkpointer.records
            return Residency(plan, device=device, host=host, store=stores[0], scratch=stores[1])
        except BaseException:
            for store in (*stores[1:], stores[0] if stores else None):
                if store is not None:
                    store.close()
            device.close()
            host.close()
            raise

    def _restore(self, manifest: Manifest, directory: Path) -> None:
        """Parameters and states from a checkpoint, one record at a time."""
        own = self._checkpointer
        if own is not None and own.directory.resolve() == directory.resolve():
            restore_homes(self.residency, own.records)
            return
        records, _ = open_records(directory, manifest, calls=self._files["calls"])  # type: ignore[arg-type]
        try:
            restore_homes(self.residency, records)
        finally:
            records.close()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, with_homes: bool = True) -> None:
        """Parameters into their homes, buffers into the model; what no unit reads is kept for `save_pretrained`."""
        homes = set(self.homes.names)
        for name, tensor in tensors:
            if name in homes:
                if with_homes:
                    self.homes.write(name, tensor)
            elif name in self.model.persistent_buffers:
                self.model.load_buffers({name: tensor})
            else:
                self._unread[name] = tensor.detach().to("cpu", getattr(torch, self.model.parameters[name].dtype))
            del tensor

    # -- work --------------------------------------------------------------------------------------------------------

    def step(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> StepReport:
        """One optimizer step.

        Args:
            micro_batches: CPU tensors: `input_ids` [B, T], `labels` [B, T] (-100 where nothing is learnt; the model shifts),
                optional `attention_mask` [B, T] and `position_ids` [B, T]; B and T may differ between micro-batches, within
                the plan's.

        Raises:
            ValueError: batches that do not fit the plan, or without a target.
            NonFiniteError: a loss or gradient is not finite; the message says what was changed.
        """
        self._check_usable()
        if len(micro_batches) > self.plan.accumulate:
            raise ValueError(
                f"a step of {len(micro_batches)} micro-batches, but the plan was made for {self.plan.accumulate}; "
                "plan with a larger --accumulate"
            )
        prepared = self._prepare(micro_batches)
        num_targets = sum(count_targets(batch) for batch in micro_batches)
        if num_targets == 0:
            raise ValueError(f"step {self.step_number + 1} has no target: all labels are -100 after the shift by one")
        number = self.step_number + 1
        lr = self.learning_rate.at(number)
        scale = self.loss_scale.value if self.loss_scale is not None else 1.0
        context = StepContext(step=number, seed=self.seed, num_targets=num_targets, loss_scale=scale)
        waits = self.plan.timing is UpdateTiming.PENDING
        updates = self._pending if waits else UpdateContext(self.optimizer, step=number, lr=lr, gradient_scale=1.0)
        schedule = self._schedule("train", tuple(token_count(batch) for batch in micro_batches), pending=self._pending is not None)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        figures, gradients = self._run(schedule, prepared, context, updates)
        norm = global_norm(gradients.sums_of_squares.values()) / scale
        skipped = self._finish_step(number, lr, norm, scale) if waits else False
        if not skipped:
            self.step_number = number
        return StepReport(
            **_fields(figures),
            step=number,
            loss=math.fsum(float(batch.loss) for batch in prepared if batch.loss is not None),
            grad_norm=norm,
            lr=lr,
            num_tokens=sum(token_count(batch) for batch in micro_batches),
            num_targets=num_targets,
            skipped=skipped,
            loss_scale=scale,
            device_peak_bytes=self._device_peak_bytes(),
            host_peak_bytes=host_peak_bytes(),
            pinned_bytes=self.residency.host.pinned_bytes,
        )

    def _finish_step(self, number: int, lr: float, norm: float, scale: float) -> bool:
        """Pending timing: decide with which scale the waiting gradients are applied, or drop them; whether they were dropped."""
        finite = math.isfinite(norm)
        if self.loss_scale is not None:
            self.loss_scale = self.loss_scale.after_step(not finite)
            if not finite:
                self.residency.drop_all_but_homes()
                if scale <= self.loss_scale.minimum:
                    raise NonFiniteError(
                        f"gradients of step {number} are not finite even at the smallest loss scale, {scale}; no weight was changed by this "
                        "step; lower --lr, or compute in --dtype bfloat16 or float32"
                    )
                return True
        if not finite:
            self.residency.drop_all_but_homes()
            raise NonFiniteError(
                f"the gradient norm of step {number} is {norm}; no weight was changed by this step; lower --lr or add --warmup-steps"
            )
        coefficient = clip_coefficient(norm, self.plan.clip) if self.plan.clip is not None else 1.0
        self._pending = UpdateContext(self.optimizer, step=number, lr=lr, gradient_scale=gradient_scale(loss_scale=scale, clip=coefficient))
        return False

    def flush(self) -> None:
        """Run the updates that wait for the next step, so that the homes hold the newest weights."""
        self._check_usable()
        if self._pending is not None:
            context = StepContext(step=self.step_number, seed=self.seed, num_targets=1)
            self._run(self._schedule("flush", (), pending=True), [], context, self._pending)

    @property
    def memory_warning(self) -> str | None:
        """Why the run should make a checkpoint and stop now: host memory is nearly used up. None while there is room."""
        return self.executor.guard.warning

    def save_checkpoint(self, data_position: Any = None) -> Manifest:
        """Make a checkpoint of the state after the last step, and drop the oldest one beyond what is kept.

        Args:
            data_position: JSON that `overspill.resume` gives back as `session.data_position`.

        Raises:
            ValueError: the session was opened without `checkpoints`.
            StorageError: a file failed; the last checkpoint is whole, and the session cannot go on.
        """
        if self._checkpointer is None:
            raise ValueError("this session reserved no room for checkpoints; open it with checkpoints=CheckpointPolicy(...)")
        self.flush()
        state = SessionState(
            step=self.step_number,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            loss_scale=self.loss_scale,
            seed=self.seed,
            chunk_bytes=self._chunk_bytes,
            config=config_facts(self.model.config),
            data_position=data_position,
        )
        try:
            manifest = self._checkpointer.save(self.residency, state)
        except BaseException as error:
            self._failure = f"the checkpoint of step {self.step_number} failed: {error}"
            raise
        self.data_position = data_position
        return manifest

    def evaluate(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> EvaluationReport:
        """Mean loss over all targets of `micro_batches` (as in `step`), in evaluation mode, weights flushed."""
        self.flush()
        prepared = self._prepare(micro_batches)
        num_targets = sum(count_targets(batch) for batch in micro_batches)
        if num_targets == 0:
            raise ValueError("nothing to evaluate: all labels are -100 after the shift by one")
        context = StepContext(step=self.step_number, seed=self.seed, num_targets=num_targets)
        with self._evaluation_mode():
            schedule = self._schedule("evaluate", tuple(token_count(batch) for batch in micro_batches), pending=False)
            self._run(schedule, prepared, context, None)
        loss = math.fsum(float(batch.loss) for batch in prepared if batch.loss is not None)
        return EvaluationReport(loss=loss, num_targets=num_targets)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int | None = None) -> list[list[int]]:
        """The likeliest continuation of each prompt, token by token; without the prompt, up to and without the end token.

        The whole model streams by once a token (there is no cache): meant for a look at what was learnt.

        Args:
            prompts: token ids; all are continued side by side.

        Raises:
            ValueError: no prompt, or an empty one, or prompt and continuation longer than the plan's batch holds.
        """
        self.flush()
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("generate needs at least one prompt and at least one token in each")
        texts = [list(prompt) for prompt in prompts]
        open_texts = set(range(len(texts)))
        context = StepContext(step=self.step_number, seed=self.seed, num_targets=1)
        with self._evaluation_mode():
            for _ in range(max_new_tokens):
                if not open_texts:
                    break
                logits = self._next_logits([texts[index] for index in sorted(open_texts)], context)
                for row, index in enumerate(sorted(open_texts)):
                    token = int(logits[row].argmax())
                    if token == eos_token_id:
                        open_texts.discard(index)
                    else:
                        texts[index].append(token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _next_logits(self, texts: list[list[int]], context: StepContext) -> torch.Tensor:
        """Logits after the last token of each text, [texts, vocabulary], in micro-batches of the plan's size."""
        size = self.plan.micro_batch
        batches, ends = [], []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            longest = max(map(len, part))
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros(len(part), longest, dtype=torch.long)
            for row, text in enumerate(part):
                ids[row, : len(text)] = torch.tensor(text)
                mask[row, : len(text)] = 1
            batches.append({"input_ids": ids, "labels": torch.full_like(ids, -100), "attention_mask": mask})
            ends.append(torch.tensor([len(text) - 1 for text in part]))
        prepared = self._prepare(batches)
        for micro_batch, positions in zip(prepared, ends, strict=True):
            micro_batch.positions = positions.to(self.device)
        self._run(self._schedule("evaluate", tuple(token_count(batch) for batch in batches), pending=False), prepared, context, None)
        return torch.cat([micro_batch.logits for micro_batch in prepared if micro_batch.logits is not None])

    def save_pretrained(self, directory: str | Path, *, tokenizer: object | None = None) -> Path:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; streamed, read back, compared.

        Args:
            tokenizer: a tokenizer to save along, or a folder to copy it from.
        """
        self.flush()
        model = self.model.model
        others = dict(self._unread)
        for name, (module, attribute) in self.model.persistent_buffers.items():
            others[name] = getattr(module, attribute).detach()
        kept = [(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.to("cpu")) for name, tensor in others.items()]
        return write_model_folder(
            directory,
            config=model.config,
            generation_config=self._generation_config,
            tokenizer_source=tokenizer,
            tensors=[*self.homes.outgoing(), *kept],
        )

    def predict(self, micro_batches: Sequence[Mapping[str, torch.Tensor]], *, hardware: HardwareSpec | None = None) -> Prediction:
        """What the next step over `micro_batches` will move, hold and take."""
        tokens = tuple(token_count(batch) for batch in micro_batches)
        schedule = self._schedule("train", tokens, pending=self._pending is not None)
        return simulate(schedule, self.plan, hardware or self.hardware)

    def schedule(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> Schedule:
        """The program of the next step over `micro_batches`."""
        return self._schedule("train", tuple(token_count(batch) for batch in micro_batches), pending=self._pending is not None)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _run(
        self, schedule: Schedule, prepared: Sequence[MicroBatch], context: StepContext, updates: UpdateContext | None
    ) -> tuple[StepFigures, Gradients]:
        try:
            result = self.executor.run(schedule, prepared, context, updates=updates)
        except BaseException as error:
            self._recover(schedule, error)
            raise
        if schedule.starts_pending:
            self._pending = None
        return result

    def _recover(self, schedule: Schedule, error: BaseException) -> None:
        """After a schedule that stopped: go on if weights are all from before its updates, or all from after them; else rule 3."""
        num_updates = sum(isinstance(item.op, Update) for item in schedule.ops)
        untouched = not self.executor.updated
        if not untouched and schedule.starts_pending and len(self.executor.updated) == num_updates:
            # The step before is applied in full; only this one's gradients are lost.
            self._pending = None
            self.residency.drop_all_but_homes()
        elif not (untouched and self.residency.drop_all_but_homes(pending=schedule.starts_pending)):
            self._failure = f"{type(error).__name__}: {error}"

    def _schedule(self, name: str, tokens: tuple[int, ...], *, pending: bool) -> Schedule:
        key = (name, tokens, pending)
        if key not in self._schedules:
            if name == "flush":
                schedule = build_flush(self.plan)
            elif name == "evaluate":
                schedule = build_evaluation(self.plan, tokens)
            else:
                schedule = build_train_step(self.plan, tokens, starts_pending=pending)
            validate(schedule, self.plan)
            if len(self._schedules) >= MOST_SCHEDULES_KEPT:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = schedule
        return self._schedules[key]

    def _prepare(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> list[MicroBatch]:
        if not micro_batches:
            raise ValueError("at least one micro-batch is needed, got none")
        return [
            MicroBatch(
                batch=prepare_batch(batch, self.plan, index, vocab_size=self._vocab_size, device=self.device),
                shape=torch.Size([*batch["input_ids"].shape, self.plan.hidden_size]),
            )
            for index, batch in enumerate(micro_batches)
        ]

    def _evaluation_mode(self) -> _EvaluationMode:
        return _EvaluationMode(self.model)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise RuntimeError("this session is closed; its memory and files were given back")
        if self._failure is not None:
            raise RuntimeError(f"this session stopped half-way through an update and cannot go on: {self._failure}")

    def _device_peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return self.residency.device.peak_bytes

    def close(self) -> None:
        """Give all memory and files back; weights that were not saved, and are in no checkpoint, are gone."""
        self._is_closed = True
        if self._checkpointer is not None:
            self._checkpointer.close()
        self.residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except StorageError as unseen:
            if error is None:
                raise
            error.add_note(str(unseen))

    def _open_ssd_store(self, directory: str, capacity_bytes: int, is_scratch: bool) -> Store:
        return SsdStore(directory, capacity_bytes=capacity_bytes, unlink=is_scratch, **self._files)  # type: ignore[arg-type]


def _taken_from(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
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


class _EvaluationMode:
    """No dropout inside, training mode again after."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._model.train(False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._model.train(True)


def _fields(figures: StepFigures) -> dict[str, Any]:
    return {field.name: getattr(figures, field.name) for field in dataclasses.fields(figures)}
