"""The fused loss is the cross entropy, and its gradient, as near to float64 as plain torch's.

Runs on a GPU (marker gpu) and in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/architectures/test_fused_loss.py
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """`cpu`: the interpreter."""
    if importlib.util.find_spec("triton") is None or (request.param == "cpu") != INTERPRETS:
        pytest.skip("needs Triton, and TRITON_INTERPRET=1 or a GPU")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return str(request.param)


def plain(logits: torch.Tensor, tokens: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf if leaf.dtype == torch.float64 else leaf.float(), tokens, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum() * factor, leaf)[0]


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 96), (5, 4097), (2, 32000)])
def test_loss_and_gradient_are_as_near_to_float64_as_plain_torch(
    rows: int, vocab: int, dtype: torch.dtype, scale: float, device: str
) -> None:
    from overspill.huggingface.fused_loss import cross_entropy_fused

    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype).to(device)
    tokens = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    factor = 0.37 / rows
    losses, gradient = cross_entropy_fused(logits, tokens, factor=factor, with_gradient=True)
    assert gradient is not None and gradient.dtype == dtype and losses.dtype == torch.float32
    exact_losses, exact_gradient = plain(logits.double(), tokens, factor)
    plain_losses, plain_gradient = plain(logits, tokens, factor)
    slack = 4e-6 * (1 + exact_losses.abs().max())
    assert (losses.double() - exact_losses).abs().max() <= (plain_losses.double() - exact_losses).abs().max() + slack
    unit = factor * {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-20}[dtype]
    assert (gradient.double() - exact_gradient).abs().max() <= (plain_gradient.double() - exact_gradient).abs().max() + unit
    again, same = cross_entropy_fused(logits, tokens, factor=factor, with_gradient=True)
    assert torch.equal(again, losses) and same is not None and torch.equal(same, gradient)
    without, none = cross_entropy_fused(logits, tokens, factor=factor, with_gradient=False)
    assert torch.equal(without, losses) and none is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_makes_the_loss_not_finite(bad: float, device: str) -> None:
    from overspill.huggingface.fused_loss import cross_entropy_fused

    logits = torch.zeros(2, 5000, device=device)
    logits[1, 4500] = bad
    losses, _ = cross_entropy_fused(logits, torch.tensor([0, 1], device=device), factor=1.0, with_gradient=True)
    assert torch.isfinite(losses).tolist() == [True, False]


def test_masked_vocabulary_entries_have_no_probability(device: str) -> None:
    from overspill.huggingface.fused_loss import cross_entropy_fused

    logits = torch.zeros(1, 6000, device=device)
    logits[:, :5000] = float("-inf")
    losses, gradient = cross_entropy_fused(logits, torch.tensor([5999], device=device), factor=1.0, with_gradient=True)
    assert losses.item() == pytest.approx(torch.log(torch.tensor(1000.0)).item(), rel=1e-6)
    assert gradient is not None and bool((gradient[:, :5000] == 0).all()) and bool(torch.isfinite(gradient).all())
