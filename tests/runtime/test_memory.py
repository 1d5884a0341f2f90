"""Host memory does not grow with depth when parameters, states and boundaries rest on the SSD."""

from __future__ import annotations

from pathlib import Path

import torch
from forked_runs import host_peaks
from transformers import LlamaConfig

from overspill.huggingface import build_meta_model, write_model_folder

HIDDEN = 512
TRAIN = """
import torch, overspill

torch.set_num_threads(1)
overspill.Session

def run(folder, ssd):
    plan = overspill.PlanRequest(
        parameters="ssd", states="ssd", boundaries="ssd", dtype="float32", seq_len=64, micro_batch=1, accumulate=2, clip=1.0,
        ssd_dir=ssd, device="cpu",
    )
    with overspill.Session(folder, plan=plan, optimizer=overspill.AdamW(lr=1e-4)) as session:
        ids = torch.arange(64).unsqueeze(0)
        for _ in range(2):
            session.step([{"input_ids": ids, "labels": ids}] * 2)
        session.flush()
"""


def write_random_folder(folder: Path, blocks: int) -> None:
    """A Llama of `blocks` blocks, written tensor by tensor."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=blocks, num_attention_heads=8, num_key_value_heads=4
    )  # fmt: skip
    model = build_meta_model(config, dtype=torch.float32)
    tensors = [(n, tuple(p.shape), torch.float32, lambda p=p: torch.randn(p.shape) * 0.02) for n, p in model.named_parameters()]
    write_model_folder(folder, config=model.config, tensors=tensors)


def test_host_peak_of_32_blocks_is_within_5_percent_of_8_blocks(tmp_path: Path) -> None:
    """Also below: what is resident is less than the model it trains (fp32, 12 bytes a parameter)."""
    runs = [(str(tmp_path / f"model-{blocks}"), str(tmp_path / f"ssd-{blocks}")) for blocks in (8, 32)]
    for blocks, (folder, _) in zip((8, 32), runs, strict=True):
        write_random_folder(Path(folder), blocks)
    shallow, deep = host_peaks(TRAIN, *runs)
    assert abs(deep - shallow) <= 0.05 * shallow, (shallow, deep)
