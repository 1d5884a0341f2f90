"""DeepSpeed's ways of training with states, and parameters, in host memory (0.19.8 is what was compared).

| system | stage | parameters | states | update |
|---|---|---|---|---|
| zero2 | 2 | device | host | DeepSpeedCPUAdam after the backward |
| zero3 | 3 | host | host | the same |
| superoffload | 3 | device | 80 % host, 20 % device | DeepSpeedCPUAdam in a process of its own, under the backward; with clip after it |

SuperOffload is a ZeRO-3 option (`offload_optimizer.super_offload`); its settings are those of DeepSpeed's own example for one GPU, with the
sub-group scaled to the model (the example's 4e8 elements are a twentieth of its 8B), and DeepSpeed's default of 80 % of the cores for the
update: of 16 cores the 90 % that the example gives on a Superchip leave one to the training process.

The loss is the model's own, from full logits, as its users have it: ZeRO-3 gathers the head's weights in the head's own forward only.
Weights are drawn by transformers, so losses differ from the other systems' in the second digit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from chunked_loss import recompute_blocks
from one_rank import pretend_one_rank
from plain_systems import Batch
from rows import Row
from run_deepspeed import base_config
from shapes import SHAPES
from torch import Tensor
from transformers import AutoModelForCausalLM

SUPEROFFLOAD_SUB_GROUPS = 20
SUPEROFFLOAD_MOST_ELEMENTS = 400_000_000


def build_config(row: Row, *, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of `row`."""
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "offload_optimizer": host}
    if row.system == "zero2":
        zero["stage"] = 2
    elif row.system == "zero3":
        zero |= {"stage": 3, "offload_param": dict(host)}
    else:
        elements = min(SUPEROFFLOAD_MOST_ELEMENTS, max(1, num_parameters // SUPEROFFLOAD_SUB_GROUPS))
        superoffload = {"super_offload": True, "ratio": 0.8, "cpuadam_cores_perc": 0.8}
        zero |= {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": elements,
            "sub_group_size": elements,
            "offload_optimizer": host | superoffload,
        }
    return base_config(samples=row.samples, accumulate=row.micro_batches, clip=row.clip) | {"zero_optimization": zero}


class DeepSpeed:
    """One engine."""

    precision = "bf16 parameters, fp32 master weights and moments"

    def __init__(self, row: Row, *, dtype: torch.dtype, device: torch.device, ssd_dir: str | None) -> None:
        _remove_stale_locks()
        pretend_one_rank()
        import deepspeed

        self.row, self.device, self.version = row, device, deepspeed.__version__
        shape = SHAPES[row.shape]
        self.config = build_config(row, num_parameters=shape.num_parameters)
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        model_config = shape.config(max_positions=max(4096, row.seq_len))
        torch.manual_seed(0)
        if row.system == "zero2":
            with device:
                model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
        else:
            with deepspeed.zero.Init(config_dict_or_path=self.config, dtype=torch.bfloat16):
                model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
        recompute_blocks(model)
        self.engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=self.config)[0]

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; the loss, on the device."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            ids = batch["input_ids"].to(self.device, non_blocking=True)
            loss = self.engine(input_ids=ids, labels=ids, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return total / len(batches)

    def between_steps(self) -> None:
        pass

    def figures(self, *, counted: int) -> dict[str, Any]:
        return {"deepspeed": self.version, "config": self.config}

    def close(self) -> None:
        """End SuperOffload's process; the rest ends with this one."""
        worker = getattr(self.engine.optimizer, "superoffload_cpu_optimizer", None)
        if worker is not None:
            worker.close()


def _remove_stale_locks() -> None:
    """torch's loader of extensions waits for ever for the lock of a build that was killed; rows run one after the other, so none is held.

    Only in a folder that the environment names: the user's own cache is nobody else's to clear.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    for lock in Path(folder).glob("**/lock") if folder else ():
        with contextlib.suppress(OSError):
            lock.unlink()
