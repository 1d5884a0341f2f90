"""Resident training, FSDP2 and torchao: PyTorch's own ways, each as fast as its user can make it with the precision of the others.

All three run transformers' own model with the chunked loss, flash attention through SDPA, every block recomputed (`chunked_loss.py`);
`resident-keep` is resident training with nothing recomputed.

| | parameters | master weights and moments | gradients of a step add up in | update |
|---|---|---|---|---|
| resident | bf16, device | fp32, device | fp32 | torch's fused AdamW on the device |
| fsdp2 | fp32, host; bf16 while a block computes | the parameters; fp32, host | fp32 | torch's fused AdamW on the CPU |
| torchao | fp32, device, autocast | fp32, host | fp32 | torch's fused AdamW on the CPU, tensor by tensor |
| torchao-bf16 | bf16, device | none; bf16 moments, host | bf16 | the same |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from chunked_loss import CausalLoss, recompute_blocks
from one_rank import pretend_one_rank
from rows import Row
from shapes import SHAPES, build_windowed_model, place_weights
from torch import Tensor, nn

LEARNING_RATE = 1e-4
Batch = dict[str, Tensor]


def build_plain_model(row: Row, *, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device) -> CausalLoss:
    """The row's shape with weights of its own memory on `device`."""
    model = build_windowed_model(SHAPES[row.shape], dtype=dtype, max_positions=max(4096, row.seq_len))
    place_weights(model, device)
    if row.system != "resident-keep":
        recompute_blocks(model)
    return CausalLoss(model, dtype=compute_dtype)


def num_targets(batches: Sequence[Batch]) -> int:
    return sum(batch["labels"].shape[0] * (batch["labels"].shape[1] - 1) for batch in batches)


class Resident:
    """Everything on the device."""

    precision = "bf16 parameters, fp32 master weights and moments"

    def __init__(self, row: Row, *, dtype: torch.dtype, device: torch.device, ssd_dir: str | None) -> None:
        self.row, self.device = row, device
        self.loss = build_plain_model(row, dtype=dtype, compute_dtype=dtype, device=device)
        self.parameters = [parameter.data for parameter in self.loss.parameters()]
        self.masters = [nn.Parameter(data.to(torch.float32, copy=True)) for data in self.parameters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; the loss, on the device."""
        count, total = num_targets(batches), torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            ids = batch["input_ids"].to(self.device, non_blocking=True)
            loss = self.loss(ids, ids, num_targets=count)
            loss.backward()
            total += loss.detach()
            self._add_gradients(is_first=index == 0)
        if self.row.clip is not None:
            nn.utils.clip_grad_norm_(self.masters, self.row.clip, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, [master.detach() for master in self.masters])
        return total

    def _add_gradients(self, *, is_first: bool) -> None:
        parameters = list(self.loss.parameters())
        gradients = [parameter.grad for parameter in parameters]
        sums = [master.grad for master in self.masters]
        if is_first:
            torch._foreach_copy_(sums, gradients)
        else:
            torch._foreach_add_(sums, gradients)
        for parameter in parameters:
            parameter.grad = None

    def between_steps(self) -> None:
        pass

    def figures(self, *, counted: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Fsdp2:
    """`fully_shard` over one process with everything offloaded.

    The optimizer gets the local tensors of the sharded parameters: of one rank they are the whole, and plain tensors are spared DTensor's
    dispatch. Several micro-batches are summed unsharded on the device and cross the link once, which takes 4 bytes a parameter there.
    """

    precision = "fp32 parameters (masters) and moments, bf16 compute"

    def __init__(self, row: Row, *, dtype: torch.dtype, device: torch.device, ssd_dir: str | None) -> None:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self.row, self.device = row, device
        pretend_one_rank()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
        self.loss = build_plain_model(row, dtype=torch.float32, compute_dtype=dtype, device=torch.device("cpu"))
        options = {
            "mesh": init_device_mesh(device.type, (1,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
        }
        for block in self.loss.model.model.layers:
            fully_shard(block, **options)
        fully_shard(self.loss, **options)
        self.locals: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; the loss, on the device."""
        count, total = num_targets(batches), torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            self.loss.set_requires_gradient_sync(is_last)
            self.loss.set_is_last_backward(is_last)
            ids = batch["input_ids"].to(self.device, non_blocking=True)
            loss = self.loss(ids, ids, num_targets=count)
            loss.backward()
            total += loss.detach()
        self._update()
        return total

    def _update(self) -> None:
        parameters = list(self.loss.parameters())
        if self.optimizer is None:  # only now: the first forward may still replace the sharded tensors, by pinned ones
            self.locals = [nn.Parameter(parameter.detach().to_local()) for parameter in parameters]
            self.optimizer = torch.optim.AdamW(self.locals, lr=LEARNING_RATE, fused=True)
        for parameter, local in zip(parameters, self.locals, strict=True):
            assert parameter.detach().to_local().data_ptr() == local.data_ptr(), "the optimizer would update a copy"
            local.grad = parameter.grad.to_local()
        if self.row.clip is not None:
            nn.utils.clip_grad_norm_(self.locals, self.row.clip)
        self.optimizer.step()
        for parameter, local in zip(parameters, self.locals, strict=True):
            parameter.grad = local.grad = None

    def between_steps(self) -> None:
        pass

    def figures(self, *, counted: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        from torch import distributed

        distributed.destroy_process_group()


class TorchAo:
    """`torchao.optim.CPUOffloadOptimizer`: gradients go to the host as they are made, the update runs after the backward."""

    def __init__(self, row: Row, *, dtype: torch.dtype, device: torch.device, ssd_dir: str | None) -> None:
        from torchao.optim import CPUOffloadOptimizer

        if row.clip is not None:
            raise ValueError("torchao's CPUOffloadOptimizer copies a gradient to the host before a norm can be known: it cannot clip")
        self.row, self.device, self.dtype = row, device, dtype
        self.is_autocast = row.system == "torchao"
        self.precision = (
            "fp32 parameters (masters) and moments, bf16 compute by autocast"
            if self.is_autocast
            else "bf16 parameters and moments, no masters"
        )
        self.loss = build_plain_model(row, dtype=torch.float32 if self.is_autocast else dtype, compute_dtype=dtype, device=device)
        self.optimizer = CPUOffloadOptimizer(self.loss.parameters(), torch.optim.AdamW, lr=LEARNING_RATE, fused=True)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; the loss, on the device."""
        count, total = num_targets(batches), torch.zeros((), device=self.device)
        for batch in batches:
            ids = batch["input_ids"].to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.is_autocast):
                loss = self.loss(ids, ids, num_targets=count)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def between_steps(self) -> None:
        pass

    def figures(self, *, counted: int) -> dict[str, Any]:
        import torchao

        return {"torchao": torchao.__version__}

    def close(self) -> None:
        pass
