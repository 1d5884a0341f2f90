"""What a review of widening casts and of fetching just in time found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paced_link import PacedLink
from small_nets import offload
from torch import nn

from overspill.activations import windows
from overspill.activations.rounds import Rounds

ROWS, WIDTH = 32, 64


@pytest.mark.parametrize("amount", ["everything", "nothing"])
def test_a_complex_view_of_a_narrowed_result_is_a_view_of_its_record(amount: str) -> None:
    """Rotary positions as complex numbers: what is narrowed must not be stored once more, nor take a place that it has not elsewhere."""
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.ones(WIDTH, requires_grad=True)
    turns = torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2).float()).requires_grad_()

    def gradients() -> list[torch.Tensor]:
        wide = (inputs * 1).float()
        scaled = wide * scale
        turned = torch.view_as_complex(wide.view(ROWS, WIDTH // 2, 2)) * turns
        return list(torch.autograd.grad(scaled.sum() + torch.view_as_real(turned).sum(), (inputs, scale, turns)))

    def run(**more: Any) -> tuple[list[torch.Tensor], Any]:
        with offload(nn.Linear(1, 1), amount=amount, min_bytes=1024, **more) as active:
            found = gradients()
        return found, active.report()

    expected = gradients()
    found, report = run(recompute="cheap")
    _, plain = run()
    assert all(map(torch.equal, found, expected))
    assert report.packed_bytes + report.rebuilt_bytes == plain.packed_bytes and report.packed_bytes < plain.packed_bytes
    assert report.rounds[-1].num_records == plain.rounds[-1].num_records
