"""A training session: a model in its tiers, stepped, evaluated, saved.

Rules:

1. All bytes are placed when the session opens; a step allocates nothing that the plan did not count.
2. Weights are never stale: `evaluate`, `generate`, `save_pretrained` and `save_checkpoint` flush pending updates first.
   Leaving the `with` block saves nothing.
3. After a failure that may have changed part of the weights, and nobody knows which, the session refuses to go on
   (`runtime/program_runner`, which runs all programs).
   Without clip a step returns before its last updates are home (`runtime/landing`). Everything here but the next step's forward waits for
   them first; should one of them fail, the next call says so, as of that step, and there is no going on.
4. A model object given to a session is taken over once the plan stands: its weights move into the tiers, tensor by tensor, and
   the object keeps none. Until then it is not touched. Sessions train in training mode, whatever mode the object was in.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from overspill.huggingface import write_model_folder
from overspill.optim import global_norm
from overspill.report.perfetto import write_trace
from overspill.runtime.batches import count_targets, prepare_batches, sum_losses, token_count, token_counts
from overspill.runtime.checkpointing import Checkpointer, SessionState, config_facts, describe_room, validate_same_run
from overspill.runtime.compute import MicroBatch, StepContext
from overspill.runtime.evaluation import Evaluation
from overspill.runtime.executor import Executor
from overspill.runtime.generation import validate_generation
from overspill.runtime.gradients import Gradients
from overspill.runtime.homes import Homes
from overspill.runtime.machine import prepare_process, resolve_device
from overspill.runtime.opening import Files, StoreFactory, allocate, fill_homes, look_at, plan_for_optimizer, plan_session
from overspill.runtime.predictions import Predictions, brings_mask
from overspill.runtime.program_runner import ProgramRunner
from overspill.runtime.programs import Programs
from overspill.runtime.rates import look_again, measure_rates, spare_host_bytes
from overspill.runtime.step_memory import MemoryWatch
from overspill.runtime.template_timing import LIMIT_S
from overspill.runtime.timing import StepTiming
from overspill.runtime.updating import UpdateContext
from overspill.runtime.verdicts import judge_norm
from overspill.runtime.wear import SsdWear, watch_wear
from overspill.spec.checkpoint import CheckpointPolicy, Manifest
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest, UpdateTiming
from overspill.spec.rates import LaneRates
from overspill.spec.report import EvaluationReport, PoolReport, Prediction, StepFigures, StepReport
from overspill.spec.schedule import Schedule
from overspill.spec.update_rule import LearningRate, LossScale, Optimizer
from overspill.spec.workload import TemplateTimes
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy
from overspill.tiers.closing import Closing, close_after


class Session(Closing):
    """Train one model under one plan.

    Args:
        model: a folder, a hub name, or a transformers causal LM (rule 4).
        plan: what the user wants (`PlanRequest`), or a plan made before for the same model.
        optimizer: `AdamW`, `SGD` or `Lion` with its hyperparameters.
        learning_rate: schedule over optimizer steps; None: constant at the optimizer's `lr`.
        seed: of dropout, with the step, the micro-batch and the unit.
        open_store: makes the stores that rest on the SSD, (directory, capacity in bytes, is scratch) -> store; None: files
            in the directory. Tests and users give a `FakeStore` here.
        chunk_bytes: bound on the bytes of one chunk; None: `CHUNK_BYTES` if anything rests on the SSD, `HOST_CHUNK_BYTES` if nothing does.
        checkpoints: reserve room for checkpoints, which `save_checkpoint` makes; None: none can be made.
        resume_from: used by `overspill.resume`.
        serial: one op after the other, nothing overlaps; the same bits, slower. For measurements and for finding faults.
        compile: let `torch.compile` fuse the blocks' elementwise work, once a kind of block (tens of seconds at the first step). Other
            roundings than the model's own code, and forward and recomputation are compiled apart.
        cuda_graphs: let blocks whose launches take longer than their work be launched as one; the same bits. No effect on the CPU.
        calls, space, num_threads: of the files on the SSD; threads for each place; tests give a `FaultInjector` (no effect with
            `open_store`).
        ssd_overwrite: block devices among the plan's places whose content may be lost.
        machine: a machine file of `overspill probe` whose rates `predict` takes, also another machine's; None: this machine's in the cache,
            if there is one that holds, else assumed rates.

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
        optimizer: Optimizer,
        learning_rate: LearningRate | None = None,
        seed: int = 0,
        open_store: StoreFactory | None = None,
        chunk_bytes: int | None = None,
        checkpoints: CheckpointPolicy | None = None,
        resume_from: tuple[Manifest, Path] | None = None,
        calls: FileCalls = OS_CALLS,
        space: SpacePolicy | None = None,
        num_threads: int = 4,
        serial: bool = False,
        compile: bool = False,
        cuda_graphs: bool = True,
        ssd_overwrite: Sequence[str] = (),
        machine: str | Path | None = None,
    ) -> None:
        self.optimizer, self.seed, self._is_compiled = optimizer, seed, compile
        plan = plan_for_optimizer(plan, optimizer)
        files = Files(calls=calls, space=space or SpacePolicy(), num_threads=num_threads, overwrite=ssd_overwrite, open_store=open_store)
        self._checkpointer: Checkpointer | None = None
        self._wear: SsdWear | None = None
        self.learning_rate = learning_rate or LearningRate(kind="constant", base=optimizer.lr, total_steps=1)
        self.device = resolve_device(plan.device)
        prepare_process(self.device)
        source = look_at(model, plan.dtype)
        self._generation_config = source.generation_config
        self.model, self.hardware, self.plan, workload = plan_session(
            plan, source, self.device, is_compiled=compile, machine=machine, chunk_bytes=chunk_bytes, replays_graphs=cuda_graphs
        )
        if checkpoints is not None:
            self.plan = dataclasses.replace(self.plan, notes=(*self.plan.notes, describe_room(checkpoints, self.plan)))
        if resume_from is not None:
            validate_same_run(resume_from[0], self.plan, self.model.config)
        self.residency, self._checkpointer = allocate(self.plan, files, checkpoints, resume_from)
        try:
            if open_store is None:
                stores = [store for store in (self.residency.store, self.residency.scratch) if store is not None]
                self._wear = watch_wear(self.plan, stores, beside=checkpoints.directory if checkpoints is not None else None)
            self.homes = Homes(self.plan, self.residency)
            self._unread = fill_homes(self.homes, source, self.model, own=self._checkpointer, resumed=resume_from, calls=calls)
            self.model.to(self.device)
            self.model.train()
        except BaseException as error:
            close_after(error, self.close)
            raise
        self.executor = Executor(self.plan, self.model, self.residency, serial=serial, cuda_graphs=cuda_graphs)
        start = resume_from[0] if resume_from is not None else None
        self.step_number = start.step if start is not None else 0
        """Optimizer steps done, pending ones included."""
        self.loss_scale = start.loss_scale if start is not None else LossScale() if self.plan.dtype == "float16" else None
        self.data_position: Any = start.data_position if start is not None else None
        """What the last checkpoint said about where the caller's data goes on."""
        self._vocab_size = self.model.config.get_text_config().vocab_size
        self._programs = Programs(self.plan)
        self._runner = ProgramRunner(self.executor, self._programs)
        self._evaluation = Evaluation(self._runner, self._prepare)
        self._memory = MemoryWatch(self.residency, self.device)
        self._timing = StepTiming(lambda: self._measure_rates(files))
        self.executor.while_waiting = self._timing.read_previous
        self.executor.lanes.while_blocked = self._timing.advance_previous
        self._predictions = Predictions(
            self.plan,
            self.model.config,
            self._programs,
            self.hardware,
            rates=lambda: self._timing.rates if self._timing.has_rates else None,
            replays_graphs=cuda_graphs,
            decided=lambda: self.executor.graphs.replayed,
            serial=serial,
            own_resident_bytes=self.residency.host.resident_bytes,
            workload=workload,
        )

    # -- training ----------------------------------------------------------------------------------------------------

    def step(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> StepReport:
        """One optimizer step. Without clip its last updates may be under way when it returns (rule 3).

        Args:
            micro_batches: CPU tensors: `input_ids` [B, T], `labels` [B, T] (-100 where nothing is learnt; the model shifts),
                optional `attention_mask` [B, T] and `position_ids` [B, T]; B and T may differ between micro-batches, within
                the plan's.

        Raises:
            ValueError: batches that do not fit the plan, or without a target.
            NonFiniteError: a loss or gradient is not finite; the message says what was changed.
            StorageError: a transfer failed, of this step or, as the message then says, of the last updates of the one before.
        """
        self._runner.check_usable()
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
        figures, gradients = self._run(prepared, context, lr)
        with self._runner.counting(number):
            norm = global_norm(gradients.land_sums()) / scale
            skipped = self.plan.timing is UpdateTiming.PENDING and not self._let_wait(number, lr, norm)
            if not skipped:
                self.step_number = number
        memory = self._memory.after_step(self.step_number)
        assert self.executor.lazy_trace is not None
        return StepReport(
            **vars(figures),
            **vars(memory),
            step=number,
            loss=sum_losses(prepared),
            grad_norm=norm,
            lr=lr,
            num_tokens=sum(token_count(batch) for batch in micro_batches),
            num_targets=num_targets,
            skipped=skipped,
            loss_scale=scale,
            num_replays=self.executor.num_replays,
            ssd_life_written_bytes=self._wear.after_step(figures.step_s, land=self.executor.finish) if self._wear is not None else 0,
            read_times=self._timing.after_step(number, self.executor.lazy_trace),
        )

    def _run(self, prepared: Sequence[MicroBatch], context: StepContext, lr: float) -> tuple[StepFigures, Gradients]:
        """The program of a step, with the updates that it makes: of its own gradients, or those that wait for it."""
        tokens = token_counts([item.batch for item in prepared])
        if self._pending is not None and not self._runner.train_program(tokens).starts_pending:
            self.flush()
        schedule = self._runner.train_program(tokens)
        updates = self._pending
        if self.plan.timing is UpdateTiming.IMMEDIATE:
            updates = UpdateContext(self.optimizer, seed=self.seed, step=context.step, lr=lr, gradient_scale=1.0)
        self._memory.begin_step()
        return self._runner.run(schedule, prepared, context, updates, number=context.step)

    def _let_wait(self, number: int, lr: float, norm: float) -> bool:
        """Let a step's gradients wait for the next one; False: they are dropped.

        Raises:
            NonFiniteError: they are dropped, and it is no use to go on.
        """
        verdict = judge_norm(norm, number, clip=self.plan.clip, loss_scale=self.loss_scale)
        self.loss_scale = verdict.loss_scale
        if verdict.factor is None:
            self.residency.drop_all_but_homes()
            if verdict.refusal is not None:
                raise verdict.refusal
            return False
        self._runner.pending = UpdateContext(self.optimizer, seed=self.seed, step=number, lr=lr, gradient_scale=verdict.factor)
        return True

    @property
    def _pending(self) -> UpdateContext | None:
        """The updates that wait for the next step."""
        return self._runner.pending

    def _prepare(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> list[MicroBatch]:
        return prepare_batches(micro_batches, self.plan, vocab_size=self._vocab_size, device=self.device)

    def flush(self) -> None:
        """Run the updates that wait for the next step, or wait for those under way, so that the homes hold the newest weights."""
        self._runner.flush()

    def schedule(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> Schedule:
        """The program of the next step over `micro_batches`."""
        return self._runner.train_program(token_counts(micro_batches))

    @property
    def memory_warning(self) -> str | None:
        """Why the run should make a checkpoint and stop now: host memory is nearly used up. None while there is room."""
        return self.executor.guard.warning

    # -- looking at what was learnt ----------------------------------------------------------------------------------

    def evaluate(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> EvaluationReport:
        """Mean loss over all targets of `micro_batches` (as in `step`), in evaluation mode, weights flushed."""
        self.flush()
        return self._evaluation.evaluate(micro_batches, step=self.step_number, seed=self.seed)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int | None = None) -> list[list[int]]:
        """The likeliest continuation of each prompt, token by token; without the prompt, up to and without the end token.

        The whole model streams by once a token (there is no cache): meant for a look at what was learnt.

        Args:
            prompts: token ids; all are continued side by side.

        Raises:
            ValueError: no prompt, or an empty one, or no token asked for, or prompt and continuation longer than the plan's batch holds.
        """
        validate_generation(prompts, max_new_tokens)
        self.flush()
        return self._evaluation.generate(
            prompts, step=self.step_number, seed=self.seed, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id
        )

    # -- saving ------------------------------------------------------------------------------------------------------

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
            chunk_bytes=self.plan.chunk_bytes,
            config=config_facts(self.model.config),
            data_position=data_position,
        )
        try:
            manifest = self._checkpointer.save(self.residency, state)
        except BaseException as error:
            self._runner.failure = f"the checkpoint of step {self.step_number} failed: {error}"
            raise
        if self._wear is not None:
            self._wear.save()
        self.data_position = data_position
        return manifest

    def save_pretrained(self, directory: str | Path, *, tokenizer: object | None = None) -> Path:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; streamed, read back, compared.

        Args:
            tokenizer: a tokenizer to save along, or a folder to copy it from.
        """
        self.flush()
        others = dict(self._unread)
        for name, (module, attribute) in self.model.persistent_buffers.items():
            others[name] = getattr(module, attribute).detach()
        kept = [(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.to("cpu")) for name, tensor in others.items()]
        return write_model_folder(
            directory,
            config=self.model.saved_config,
            generation_config=self._generation_config,
            tokenizer_source=tokenizer,
            tensors=[*self.homes.outgoing(), *kept],
        )

    # -- measuring ---------------------------------------------------------------------------------------------------

    @property
    def rates(self) -> LaneRates:
        """How fast this session's lanes are: measured when it is first asked for, in about a second, never within a step, and once more by
        `time_templates`. The reports of all later steps have their `floor`."""
        if not self._timing.has_rates:
            self._runner.check_usable()
            self.executor.finish()
        return self._timing.rates

    def _measure_rates(self, files: Files) -> LaneRates:
        rates, written = measure_rates(self.plan, self.optimizer, files, **self._room_for_rates())
        if self._wear is not None:
            self._wear.add(written)
        return rates

    def _room_for_rates(self) -> dict[str, int]:
        host = self.residency.host
        room = spare_host_bytes(self.plan, host.allocated_bytes)
        return {"room_bytes": room, "untouched_bytes": host.allocated_bytes - host.resident_bytes()}

    @property
    def wear(self) -> SsdWear | None:
        """Watches the life of the SSD, whose last step has landed; None if it has no store in places of the plan."""
        if self._wear is not None and hasattr(self, "executor"):
            self.executor.finish()
        return self._wear

    def pool_reports(self) -> tuple[PoolReport, PoolReport]:
        """What the pools of device and host slots hold and have held since the session was opened."""
        return self.residency.pool_reports()

    def export_trace(self, path: str | Path) -> Path:
        """Write what ran when in the last step, for ui.perfetto.dev or chrome://tracing.

        Raises:
            ValueError: there was no step yet.
            StorageError: the file cannot be written.
        """
        if self._timing.trace is None:
            raise ValueError("there is no step yet that could be traced; make one first")
        return write_trace(path, self._timing.trace, self.plan, step=self._timing.step)

    # -- predicting --------------------------------------------------------------------------------------------------

    def predict(self, micro_batches: Sequence[Mapping[str, torch.Tensor]], *, hardware: HardwareSpec | None = None) -> Prediction:
        """What the next step over `micro_batches` will move, hold and take; kept for the next batch of these shapes."""
        return self._predictions.predict(self.schedule(micro_batches), is_masked=brings_mask(micro_batches), hardware=hardware)

    def predict_plan(self) -> Prediction:
        """Of a step of the plan's batch at its longest, as it is in a row of such steps."""
        return self._predictions.predict_whole_step()

    def predict_if_cheap(self, micro_batches: Sequence[Mapping[str, torch.Tensor]], *, trained_s: float) -> Prediction | None:
        """The same; None for shapes not seen before while predicting has taken more than a thousandth of `trained_s`."""
        schedule, is_masked = self.schedule(micro_batches), brings_mask(micro_batches)
        return self._predictions.if_cheap(schedule, is_masked=is_masked, trained_s=trained_s)

    def time_templates(self, *, limit_s: float = LIMIT_S) -> TemplateTimes | None:
        """Time one block of every class and the tail on the device, for all predictions from now on, within about `limit_s`.

        This also decides which blocks are replayed as CUDA graphs, unless steps that were made before have shown that launches bound all
        of them, or a class could not be timed (`UnitTimes.note`): then steps decide. Predictions are of what the session does, either way.
        Rates that somebody has asked for are looked at again, in about half a second.

        Between steps; takes memory of the device that the plan knows nothing of. None: the model cannot be described without weights.
        """
        self._runner.check_usable()
        self.executor.finish()  # what a step has left under way would be timed along
        times = self._predictions.time_templates(self.device, limit_s=limit_s)
        is_timed = times is not None and all(item.backward is not None for item in times.blocks)
        if is_timed and not self._is_compiled:  # compiled blocks launch less than was timed: the run judges
            self.executor.graphs.choose(self._predictions.choose_blocks())
        self._timing.look_again(lambda rates: look_again(rates, self.plan, self.optimizer, **self._room_for_rates()))
        return times

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give all memory and files back; weights that were not saved, and are in no checkpoint, are gone.

        Raises:
            StorageError: the last step failed while it landed, or a transfer that nobody waited for did; all is given back.
        """
        runner = getattr(self, "_runner", None)  # None: opening has failed before
        if runner is not None:
            runner.is_closed = True  # at once, whatever interrupts the rest
        with contextlib.ExitStack() as stack:  # all of it, also when one raises
            stack.callback(self.residency.close)
            if self._wear is not None:
                stack.callback(self._wear.save)
            if self._checkpointer is not None:
                stack.callback(self._checkpointer.close)
            if runner is not None:
                stack.callback(runner.close)
