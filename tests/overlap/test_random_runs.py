"""Whatever is placed, frozen, delayed, looked at between steps and stopped: a session's numbers are those of its serial twin, bit for bit.

A run is a seed: model, dtype, what is frozen, optimizer, state format, placement, budgets of states, groups, clip. Its twin does the steps
one op after the other and nothing else. The run itself has late lanes, evaluations, flushes, texts and homes read between its steps, and
steps that are stopped in a compute op or in a lane's job, and made again if the session says that it can go on.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import assert_equal, content
from tiny_models import tiny_model
from training_loop import make_batches

import overspill
from overspill.runtime.compute import UnitRunner
from overspill.runtime.lanes import Lanes
from overspill.tiers import FakeStore

STEPS = 4
TIERS = ("device", "host", "ssd")
MODELS = ("llama", "llama_tied", "gpt2", "qwen3_moe", "gemma2", "gemma3", "gpt_neox", "smollm3", "mixtral", "opt", "phi", "cohere2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run and its twin have in common."""

    model: str
    dtype: str
    frozen: str
    optimizer: Any
    plan: dict[str, Any]
    chunk_bytes: int
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Run:
        choose = random.Random(seed)
        dtype = choose.choice(["float32", "bfloat16", "bfloat16", "float16"])
        optimizers = [overspill.AdamW(lr=3e-3), overspill.SGD(lr=0.01, momentum=0.9), overspill.Lion(lr=1e-3)]
        return cls(
            model=choose.choice(MODELS), dtype=dtype, frozen=choose.choice(["nothing", "nothing", ".0.", "embed", "norm"]),
            optimizer=choose.choice(optimizers), seed=seed, chunk_bytes=choose.choice([8, 32, 1024]) * 1024,
            plan={
                "parameters": choose.choice(TIERS), "states": choose.choice(TIERS), "boundaries": choose.choice(TIERS),
                "group_size": choose.choice([None, 1, 2, 3]), "accumulate": choose.choice([1, 2, 3]), "clip": choose.choice([None, 0.5]),
                "device_states_bytes": choose.choice([None, 0, 20_000, 100_000]),
                "state_format": "fp32" if dtype == "float16" else choose.choice(["fp32", "bf16", "int8"]),
            } | choose.choice([{}, {}, {}, {"parameters": "host", "states": "host", "device_states_bytes": 0, "deferred_updates": 1}]),
        )  # fmt: skip

    def open(self, *, serial: bool, delay_s: float = 0.0) -> overspill.Session:
        model = tiny_model(self.model, seed=self.seed, dtype=getattr(torch, self.dtype))
        model.config.dtype = getattr(torch, self.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.frozen not in name)
        plan = overspill.PlanRequest(dtype=self.dtype, seq_len=12, micro_batch=2, device="cpu", ssd_dir="fake", **self.plan)
        return overspill.Session(
            model, plan=plan, optimizer=self.optimizer, seed=self.seed, serial=serial, chunk_bytes=self.chunk_bytes,
            open_store=lambda directory, capacity_bytes, is_scratch: FakeStore(capacity_bytes, delay_s=delay_s),
        )  # fmt: skip

    def batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        choose = random.Random(self.seed * 1000 + step)
        count, tokens = choose.randint(1, self.plan["accumulate"]), 12 - choose.choice([0, 0, 3])
        return make_batches(count, vocab_size=96, tokens=tokens, seed=self.seed + step)


class Trouble:
    """Delays on every lane and in compute, and now and then an exception in a job."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._choose, self._lock = random.Random(seed), threading.Lock()
        self.left = -1
        """Jobs until one raises; below 0: none will."""
        execute, run, trouble = Lanes._run, UnitRunner.run, self

        def late(self: Lanes, completion: Any, job: Callable[[], Any], waits: Any, stream: Any) -> None:
            def slow_job() -> Any:
                trouble.pause(raises=True)
                result = job()
                trouble.pause()
                return result

            execute(self, completion, slow_job, waits, stream)

        def slow(self: UnitRunner, *arguments: Any) -> None:
            trouble.pause(raises=True)
            run(self, *arguments)

        monkeypatch.setattr(Lanes, "_run", late)
        monkeypatch.setattr(UnitRunner, "run", slow)

    def pause(self, *, raises: bool = False) -> None:
        with self._lock:
            delay_s = self._choose.random() * 0.002 * (self._choose.random() < 0.3)
            self.left -= raises
            hits = raises and self.left == 0
        time.sleep(delay_s)
        if hits:
            raise RuntimeError("stopped by the test")


def train(session: overspill.Session, run: Run, step: int) -> tuple[float, float]:
    """One step that counts: with fp16 some are skipped."""
    while session.step_number == step:
        report = session.step(run.batches(step))
    return report.loss, report.grad_norm


def run_with_trouble(seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Hold a run against its twin; whether it came to its end (else it was stopped where it cannot go on, and said so)."""
    run, choose = Run.draw(seed), random.Random(seed + 1)
    with run.open(serial=True) as twin:
        expected = [train(twin, run, step) for step in range(STEPS)]
        final = content(twin)
        evaluated = twin.evaluate(run.batches(99)).loss
    with monkeypatch.context() as patch:
        trouble = Trouble(seed, patch)
        session = run.open(serial=False, delay_s=choose.choice([0, 0.0005]))
        try:
            while (step := session.step_number) < STEPS:
                match choose.choice(["step", "step", "step", "stop", "stop", "evaluate", "flush", "generate", "read"]):
                    case "stop":
                        trouble.left = choose.randint(1, choose.choice([5, 40, 400]))
                        try:
                            train(session, run, step)
                        except RuntimeError as error:
                            assert "stopped by the test" in str(error), run
                        trouble.left = -1
                        try:
                            session.flush()
                        except RuntimeError as error:
                            assert "stopped by the test" in str(error), run
                            return False
                    case "evaluate":
                        session.evaluate(run.batches(50 + step))
                    case "flush":
                        session.flush()
                    case "generate":
                        session.generate([[5, 6, 7], [8]], max_new_tokens=2)
                    case "read":
                        session.homes.read(choose.choice(session.homes.names))
                    case _:
                        assert train(session, run, step) == expected[step], run
            assert_equal(content(session), final)
            assert session.evaluate(run.batches(99)).loss == evaluated, run
            assert session.residency.host_pool.used_bytes == 0, run
        finally:
            trouble.left = -1
            try:
                session.close()
            except RuntimeError as error:
                assert "stopped by the test" in str(error), run
    return True


@pytest.mark.parametrize("seed", range(6))
def test_a_random_run_is_its_serial_twin(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with_trouble(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_300_random_runs_are_their_serial_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [run_with_trouble(seed, monkeypatch) for seed in range(100, 400)]
    assert sum(ended) > 200
