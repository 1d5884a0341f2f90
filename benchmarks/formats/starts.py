"""Where master weights start: model folders that differ in the low bits of their fp32 weights alone.

A bf16 model with fp32 masters computes with each master's nearest bf16. How far a master is from the border of its cell says how soon
an update shows. Three kinds of start, all with the same nearest bf16, so that the model computes the same at step 0 and a narrow
format, which keeps the bf16 alone, does the same throughout:

* `file`: as the file has them. (A dequantized 4-bit file has a quarter of its weights on the grid, the rest between.)
* `grid`: in the middle of their cells: what a bf16 file gives.
* `off-grid`: anywhere in their cells, by a seeded uniform offset of at most half a bf16 step; one that would round elsewhere (below a
  power of two, where cells are half as wide) is left out.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

STARTS = ("file", "grid", "off-grid")


def bf16_step(values: torch.Tensor) -> torch.Tensor:
    """Distance of neighbouring bf16 numbers, away from zero."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 8)


def move_to_start(name: str, master: torch.Tensor, start: str, *, seed: int) -> torch.Tensor:
    """The fp32 weights `master` [any shape] of the tensor `name`, moved to where `start` wants them."""
    if start not in STARTS:
        raise ValueError(f"a start is one of {', '.join(STARTS)}, got {start!r}")
    nearest = master.bfloat16().float()
    if start == "file":
        return master
    if start == "grid":
        return nearest
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # torch takes 32 bits of a seed
    moved = nearest + (torch.rand(master.shape, generator=generator) - 0.5) * bf16_step(nearest)
    return torch.where(moved.bfloat16().float() == nearest, moved, nearest)


def write_start(model: Path, folder: Path, start: str, *, seed: int = 0) -> Path:
    """A copy of the model folder whose weights start as `start` says; made once. For `file` the model itself."""
    if start == "file":
        return model
    done = folder / "config.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in model.iterdir() if path.is_file())
    for path in files:
        if path.suffix != ".safetensors" and path.name != done.name:
            shutil.copy(path, folder / path.name)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as source:
                names = source.keys()
                tensors = {name: source.get_tensor(name) for name in names}
                metadata = source.metadata()
            moved = {
                name: move_to_start(name, tensor.float(), start, seed=seed) if tensor.is_floating_point() else tensor
                for name, tensor in tensors.items()
            }
            save_file(moved, folder / path.name, metadata=metadata)
    shutil.copy(model / done.name, done)  # last: it says that the folder is whole
    return folder
