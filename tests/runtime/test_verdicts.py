"""A verdict names what is not finite and changes nothing else: claims about `runtime.verdicts`."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from overspill.errors import NonFiniteError
from overspill.runtime.verdicts import VerdictMemory, Verdicts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def plan_of(**tensors: list[str]) -> SimpleNamespace:
    bundles = {
        name: SimpleNamespace(slots=[SimpleNamespace(tensor=SimpleNamespace(name=t)) for t in names]) for name, names in tensors.items()
    }
    return SimpleNamespace(bundles=bundles)


PLAN = plan_of(tail=["norm", "head"], block=["up", "gate", "down"])


def sums(*values: float, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_is_used_again_in_the_next_step_and_each_step_has_its_own_verdicts(device: str) -> None:
    memory = VerdictMemory(PLAN)  # type: ignore[arg-type]
    losses = [torch.tensor(1.5, device=device), torch.tensor(2.5, device=device)]
    for step, bad in ((1, math.nan), (2, 1.0), (3, math.inf)):
        verdicts = Verdicts(PLAN, SimpleNamespace(step=step), memory)  # type: ignore[arg-type]
        verdicts.start("tail", sums(0.0, 1e300, device=device), losses)
        verdicts.start("block", sums(1.0, bad, math.nan if step == 3 else 3.0, device=device), losses)
        verdicts.check("tail", [])
        if math.isfinite(bad):
            verdicts.check("block", ["tail"])
            continue
        with pytest.raises(NonFiniteError, match=f"gradient of gate is not finite in step {step}; already updated in this step: tail. Set"):
            verdicts.check("block", ["tail", "tail"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_becomes_known_later_decides_on_the_bundles_from_then_on(device: str) -> None:
    verdicts = Verdicts(PLAN, SimpleNamespace(step=4), VerdictMemory(PLAN))  # type: ignore[arg-type]
    losses: list[torch.Tensor | None] = [None, torch.tensor([2.0], device=device), None]
    verdicts.start("tail", sums(1.0, 1.0, device=device), losses)
    losses[0], losses[2] = torch.tensor(3.0, device=device), torch.tensor(math.inf, device=device)
    verdicts.start("block", sums(1.0, 1.0, 1.0, device=device), losses)
    verdicts.check("tail", [])
    with pytest.raises(NonFiniteError, match="loss of step 4, micro-batch 2 is inf; no weight was changed"):
        verdicts.check("block", [])
    verdicts.check("unknown", [])


@pytest.mark.parametrize("device", DEVICES)
def test_gates_are_the_losses_and_the_sums_where_they_were_computed(device: str) -> None:
    verdicts = Verdicts(PLAN, SimpleNamespace(step=4), VerdictMemory(PLAN))  # type: ignore[arg-type]
    losses: list[torch.Tensor | None] = [torch.tensor(3.0, device=device), None]
    assert verdicts.gates("tail") is None
    verdicts.start("tail", sums(1.0, math.inf, device=device), losses)
    losses[1] = torch.tensor([7.0], device=device)
    verdicts.start("block", sums(4.0, 5.0, 6.0, device=device), losses)
    tail, block = verdicts.gates("tail"), verdicts.gates("block")
    assert tail is not None and block is not None and tail.device.type == block.device.type == device
    assert block.tolist() == [4.0, 5.0, 6.0, 3.0, 7.0] and math.isinf(tail.sum().item())
    assert verdicts.find_refusal("block", []) is None and verdicts.find_refusal("tail", []) is not None
