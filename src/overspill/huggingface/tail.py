"""The tail: the model's own code from the last block's hidden states to the loss, without the full logits.

1. The model's forward is entered again. Its stand-ins hand through, the last one returns the hidden states to work on, and what
   follows is the model's: final norm, output projection, whatever else. The embedding's own weights are not needed for that and are
   bound to zeros that take no memory; what the prefix computes from them is thrown away.
2. The module that owns the blocks has then returned `last_hidden_state`. The causal LM around it is entered once per chunk of
   rows with those rows in place of the whole: head, logit scale and softcap are the model's own. Only positions with a target are rows.
3. Each chunk's loss is fp32, a sum, and goes backward at once, so at most `chunk_rows` x vocabulary logits exist.
4. The loss of a micro-batch is (sum over its targets) / (targets of the whole optimizer step); summed over
   micro-batches and ranks that is the mean over all targets.
5. The router loss is the model's own code over leaves of all blocks' router logits. A micro-batch weighs its share of the targets, so
   with one micro-batch the sum is the model's own loss.

Shapes: B sequences of T tokens, R rows with a target, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from overspill.huggingface.stand_ins import ReturnShape, StandInStack
from overspill.tiers.cuda import cuda_index, to_device

IGNORED_LABEL = -100
"""transformers' mark for a position without a target."""

Accumulate = Callable[[str, Tensor], None]
"""Takes one contribution to the gradient of the parameter named."""
LossOfChunk = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""(logits [r, V], targets [r], factor, with gradient) -> sum of the cross entropies, gradient of factor x it by the logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TailOutput:
    """What a micro-batch's tail produced."""

    loss: Tensor
    """fp32, 0-d, not scaled: its share of the step's loss."""
    num_targets: int
    """Targets of this micro-batch."""
    hidden_gradient: Tensor | None
    """Of the scaled loss by the last block's hidden states; None in evaluation."""
    side_output_gradients: Mapping[str, tuple[Tensor, ...]]
    """Unit -> gradients of its side outputs; empty in evaluation."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """Rows of the flattened [B * T] hidden states that have a target, and the target of each."""

    rows: Tensor
    tokens: Tensor

    @property
    def num_targets(self) -> int:
        return self.rows.numel()


def find_targets(labels_BT: Tensor) -> Targets:
    """Targets of unshifted labels: the hidden states at t predict the label at t + 1. On the CPU (keep labels there: no wait)."""
    next_BT = F.pad(labels_BT.detach().cpu()[:, 1:], (0, 1), value=IGNORED_LABEL)
    rows_R = (next_BT != IGNORED_LABEL).flatten().nonzero().squeeze(1)
    return Targets(rows=rows_R, tokens=next_BT.flatten()[rows_R])


def cross_entropy_chunks(
    head: Callable[[Tensor], Tensor],
    last_hidden_BTH: Tensor,
    targets: Targets,
    *,
    chunk_rows: int,
    factor: float,
    parameters: Mapping[str, Tensor],
    accumulate: Accumulate | None,
    loss_of_chunk: LossOfChunk | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross entropies of all targets (fp32, 0-d), and with `accumulate` its gradient by the hidden states.

    Args:
        head: rows [1, r, H] -> logits [1, r, V].
        factor: gradients are of factor x sum.
        parameters: leaves that the head reads; chunk by chunk each one's gradient goes to `accumulate`. None: no gradients at all.
        loss_of_chunk: in place of the loss itself, for a trace.
    """
    loss_of = loss_of_chunk or cross_entropy_of_chunk
    device = last_hidden_BTH.device
    rows_R, tokens_R = (to_device(tensor, device) for tensor in (targets.rows, targets.tokens))
    flat_NH = last_hidden_BTH.detach().flatten(0, -2)
    total = torch.zeros((), dtype=torch.float32, device=device)
    gradient_NH = torch.zeros_like(flat_NH) if accumulate is not None else None
    trainable = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    for start in range(0, targets.num_targets, chunk_rows):
        rows = rows_R[start : start + chunk_rows]
        hidden_1rH = flat_NH[rows].unsqueeze(0).requires_grad_(accumulate is not None)
        with torch.set_grad_enabled(accumulate is not None):
            logits_rV = head(hidden_1rH).squeeze(0)
        loss, logits_gradient_rV = loss_of(logits_rV, tokens_R[start : start + chunk_rows], factor, accumulate is not None)
        total += loss
        if accumulate is not None and gradient_NH is not None:
            hidden_gradient, *gradients = torch.autograd.grad(
                [logits_rV], [hidden_1rH, *trainable.values()], [logits_gradient_rV], allow_unused=True
            )
            del logits_rV, logits_gradient_rV
            gradient_NH[rows] = hidden_gradient.squeeze(0)
            _pass_on(accumulate, trainable, gradients)
    return total, None if gradient_NH is None else gradient_NH.view_as(last_hidden_BTH)


def cross_entropy_of_chunk(logits_rV: Tensor, tokens_r: Tensor, factor: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross entropies of rows of logits (fp32, 0-d), and the gradient of factor x it by the logits, in their dtype."""
    values_rV = logits_rV.detach()
    if _has_fused_loss(values_rV.device) and values_rV.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from overspill.huggingface.fused_loss import cross_entropy_fused

        losses_r, gradient_rV = cross_entropy_fused(values_rV.contiguous(), tokens_r, factor=factor, with_gradient=with_gradient)
        return losses_r.sum(), gradient_rV
    leaf_rV = values_rV.requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        loss = F.cross_entropy(leaf_rV.float(), tokens_r, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss * factor, leaf_rV)[0] if with_gradient else None


def load_loss(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load what the loss of training runs, which takes seconds the first time on a machine."""
    row = torch.zeros((1, vocab_size), dtype=dtype, device=device)
    cross_entropy_of_chunk(row, torch.zeros(1, dtype=torch.int64, device=device), 1.0, True)


@functools.cache
def _has_fused_loss(device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from overspill.huggingface.fused_loss import is_usable

    return is_usable(cuda_index(device))


class Tail:
    """Enters the model's own code behind its blocks."""

    def __init__(
        self,
        model: PreTrainedModel,
        owner: nn.Module,
        stack: StandInStack,
        returns: Mapping[str, ReturnShape],
        *,
        body_names: Sequence[str],
        head_names: Sequence[str],
        has_router_loss: bool,
    ) -> None:
        """
        Args:
            owner: the module that holds the blocks and returns `last_hidden_state`.
            body_names: parameters read between the last block and `last_hidden_state`.
            head_names: parameters read from there to the logits.
        """
        self.model = model
        self.owner = owner
        self.stack = stack
        self.returns = returns
        self.body_names = tuple(body_names)
        self.head_names = tuple(head_names)
        self.has_router_loss = has_router_loss
        self._own_forward = owner.__dict__.get("forward")
        """What `forward_replaced` puts back; nearly always None, the class's own."""

    def leave(self) -> None:
        """After an interruption of `run`: the owner has its own forward again."""
        self.owner.__dict__.pop("forward", None)
        if self._own_forward is not None:
            self.owner.__dict__["forward"] = self._own_forward

    def run(
        self,
        inputs: Mapping[str, Any],
        labels_BT: Tensor,
        hidden: Tensor,
        *,
        side_outputs: Mapping[str, tuple[Tensor, ...]],
        parameters: Mapping[str, Tensor],
        num_targets: int,
        loss_scale: float,
        chunk_rows: int,
        accumulate: Accumulate | None,
        before_tail: Callable[[], None] | None,
        reading: AbstractContextManager[None] | None,
    ) -> TailOutput:
        """See `StreamedModel.run_tail`."""
        is_training = accumulate is not None
        targets = find_targets(labels_BT)
        leaf = hidden.detach().requires_grad_(is_training)
        with torch.set_grad_enabled(is_training):
            output = self.run_body(inputs, leaf, before_tail, reading)
        last_hidden_BTH = last_hidden_state(output)
        total, gradient = cross_entropy_chunks(
            lambda rows: self.run_head(inputs, output, rows),
            last_hidden_BTH,
            targets,
            chunk_rows=chunk_rows,
            factor=loss_scale / num_targets,
            parameters={name: parameters[name] for name in self.head_names},
            accumulate=accumulate,
        )
        loss = total / num_targets
        side_gradients: dict[str, tuple[Tensor, ...]] = {}
        if self.has_router_loss:
            weight = float(self.model.config.router_aux_loss_coef) * (targets.num_targets / num_targets)
            router_loss, side_gradients = self.run_router_loss(
                inputs, output, last_hidden_BTH, side_outputs, weight * loss_scale, is_training
            )
            loss = loss + weight * router_loss
        if accumulate is None:
            return TailOutput(loss=loss, num_targets=targets.num_targets, hidden_gradient=None, side_output_gradients={})
        trainable = {name: parameters[name] for name in self.body_names if parameters[name].requires_grad}
        hidden_gradient, *gradients = torch.autograd.grad(last_hidden_BTH, [leaf, *trainable.values()], gradient, allow_unused=True)
        _pass_on(accumulate, trainable, gradients)
        return TailOutput(loss=loss, num_targets=targets.num_targets, hidden_gradient=hidden_gradient, side_output_gradients=side_gradients)

    def run_body(
        self,
        inputs: Mapping[str, Any],
        hidden: Tensor,
        before_tail: Callable[[], None] | None = None,
        reading: AbstractContextManager[None] | None = None,
    ) -> Any:
        """The owner's output for `hidden` as the last block's hidden states (rule 1)."""
        forward = self.owner.forward

        def stop_behind_owner(*args: Any, **kwargs: Any) -> Any:
            raise _OwnerReturned(forward(*args, **kwargs))

        with (
            self.stack.visited_by(_TailVisitor(self.stack, self.returns, hidden, before_tail)),
            forward_replaced(self.owner, stop_behind_owner),
            reading or nullcontext(),
        ):
            try:
                self.model(**inputs)
            except _OwnerReturned as returned:
                return returned.output
        self.stack.refuse(f"its forward does not call {type(self.owner).__name__}, which holds the blocks")

    def run_head(self, inputs: Mapping[str, Any], output: Any, rows_1rH: Tensor, **extra: Any) -> Tensor:
        """Logits of `rows_1rH` by the model's code around the owner, whose `output` it gets with these rows (rule 2)."""
        return self._enter_head(inputs, output, rows_1rH, **extra).logits

    def _enter_head(self, inputs: Mapping[str, Any], output: Any, rows_1rH: Tensor, **extra: Any) -> Any:
        with forward_replaced(self.owner, lambda *args, **kwargs: _with_last_hidden_state(output, rows_1rH)):
            return self.model(**{**inputs, **extra}, return_dict=True)

    def run_router_loss(
        self,
        inputs: Mapping[str, Any],
        output: Any,
        last_hidden_BTH: Tensor,
        side_outputs: Mapping[str, tuple[Tensor, ...]],
        factor: float,
        is_training: bool,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
        """The model's auxiliary loss (fp32, 0-d) and the gradients of factor x it by every side output (rule 5)."""
        leaves = {
            unit: tuple(tensor.detach().requires_grad_(is_training) for tensor in side_outputs.get(unit, ())) for unit in self.stack.names
        }
        flat = [leaf for unit in self.stack.names for leaf in leaves[unit]]
        output["router_logits"] = tuple(flat)
        with torch.set_grad_enabled(is_training):
            result = self._enter_head(inputs, output, last_hidden_BTH.detach()[:1, :1], output_router_logits=True)
        loss = getattr(result, "aux_loss", None)
        if not isinstance(loss, Tensor):
            self.stack.refuse("its router loss is on, but its output has no aux_loss; turn config.output_router_logits off")
        if not is_training:
            return loss.detach().float(), {}
        gradients = iter(torch.autograd.grad(loss.float() * factor, flat))
        return loss.detach().float(), {unit: tuple(next(gradients) for _ in leaves[unit]) for unit in self.stack.names if leaves[unit]}


def last_hidden_state(output: Any) -> Tensor:
    """First element of what the owner of the blocks returned."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _with_last_hidden_state(output: Any, rows: Tensor) -> Any:
    if isinstance(output, tuple):
        return (rows, *output[1:])
    changed = type(output)(**output)
    changed["last_hidden_state"] = rows
    return changed


def _pass_on(accumulate: Accumulate, parameters: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> None:
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            accumulate(name, gradient)


class _OwnerReturned(BaseException):
    """Carries the owner's output out of the model. Not an Exception: no handler in a model may catch it."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _TailVisitor:
    """Hands through; the last stand-in returns the hidden states of the tail."""

    def __init__(
        self, stack: StandInStack, returns: Mapping[str, ReturnShape], hidden: Tensor, before_tail: Callable[[], None] | None
    ) -> None:
        self.stack = stack
        self.returns = returns
        self.hidden = hidden
        self.before_tail = before_tail

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The same alias all the way: what the prefix made of its zeros is not kept, and the last alias is a view of the leaf.
        if index == len(self.stack.names) - 1 and self.before_tail is not None:
            self.before_tail()
        return self.returns[self.stack.names[index]].mirrored(self.hidden.view_as(self.hidden))


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` runs `forward` inside: an attribute of this one object, whose class stays as it is."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if module.__dict__.get("forward") is not forward:
            pass  # `Tail.leave` was there first
        elif before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
