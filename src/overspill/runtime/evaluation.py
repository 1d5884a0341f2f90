"""Looking at what was learnt: the loss over held-out targets, and what comes next in a text.

Programs of evaluation keep nothing and change no weight. They read the homes: whoever asks has flushed pending updates. The model is in
evaluation mode (no dropout) meanwhile, and in training mode again after, however it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from overspill.runtime.batches import count_targets, sum_losses, token_counts
from overspill.runtime.compute import MicroBatch, StepContext
from overspill.runtime.generation import generate_greedily
from overspill.runtime.program_runner import ProgramRunner
from overspill.spec.report import EvaluationReport

Batches = Sequence[Mapping[str, torch.Tensor]]


class Evaluation:
    """Evaluates one session's model.

    Args:
        prepare: checks micro-batches and moves them to the device.
    """

    def __init__(self, runner: ProgramRunner, prepare: Callable[[Batches], list[MicroBatch]]) -> None:
        self._runner, self._prepare = runner, prepare
        self._plan, self._model = runner.executor.plan, runner.executor.model

    def evaluate(self, micro_batches: Batches, *, step: int, seed: int) -> EvaluationReport:
        """Mean loss over all targets.

        Raises:
            ValueError: batches that do not fit the plan, or without a target.
        """
        prepared = self._prepare(micro_batches)
        num_targets = sum(count_targets(batch) for batch in micro_batches)
        if num_targets == 0:
            raise ValueError("nothing to evaluate: all labels are -100 after the shift by one")
        with self._evaluation_mode():
            self._run(micro_batches, prepared, StepContext(step=step, seed=seed, num_targets=num_targets, trains=False))
        return EvaluationReport(loss=sum_losses(prepared), num_targets=num_targets)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, step: int, seed: int, max_new_tokens: int, eos_token_id: int | None
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt (`generate_greedily`).

        Raises:
            ValueError: prompt and continuation are longer than the plan's batch holds.
        """
        context = StepContext(step=step, seed=seed, num_targets=1, trains=False)

        def logits_at(batches: list[Mapping[str, torch.Tensor]], ends: list[torch.Tensor]) -> torch.Tensor:
            prepared = self._prepare(batches)
            for item, positions in zip(prepared, ends, strict=True):
                item.positions = positions.to(self._model.device)
            self._run(batches, prepared, context)
            return torch.cat([item.logits for item in prepared if item.logits is not None])

        with self._evaluation_mode():
            return generate_greedily(
                prompts, logits_at, micro_batch=self._plan.micro_batch, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id
            )

    def _run(self, micro_batches: Batches, prepared: list[MicroBatch], context: StepContext) -> None:
        self._runner.run(self._runner.programs.evaluate(token_counts(micro_batches)), prepared, context)

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        self._model.train(False)
        try:
            yield
        finally:
            self._model.train(True)
