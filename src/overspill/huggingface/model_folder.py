"""Find a model folder and its weight files: what is there, what may be read, what to say when it cannot be used.

A folder has a `config.json` and either `model.safetensors` or `model.safetensors.index.json` with the shards it lists.
Anything else (pickles, adapters, GGUF files, one vendor's own layout) is refused with the way to convert it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from overspill.errors import ModelFolderError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that make up a tokenizer, whatever its kind; `chat_templates/` may lie beside them."""

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""What is downloaded of a hub repository: never a pickle, never code."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_model_folder(path_or_hub_name: str | Path, *, allow_remote: bool = True, only_config: bool = False) -> Path:
    """The local folder of a path or hub name, downloaded when it is a name and may be.

    Args:
        only_config: of a hub name, no more than `config.json` is needed.

    Raises:
        ModelFolderError: there is no such folder, or the hub does not give it.
    """
    folder = Path(path_or_hub_name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelFolderError(f"{folder} is a file; name the folder that holds it together with config.json")
    name = str(path_or_hub_name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ModelFolderError(f"no such model folder: {name}")
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    try:
        patterns = [CONFIG_FILE] if only_config else _HUB_PATTERNS
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not allow_remote))
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError, OSError) as error:
        where = "on the model hub" if allow_remote else "in the hub's local cache"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFolderError(f"no model folder {name} here, and none of that name {where}: {first_line}") from error


def require_config(folder: Path) -> None:
    """
    Raises:
        ModelFolderError: a folder has no config, or one of an adapter alone.
    """
    if not (folder / CONFIG_FILE).is_file():
        adapter = " (an adapter: name its base model instead)" if (folder / "adapter_config.json").is_file() else ""
        raise ModelFolderError(f"{folder} has no {CONFIG_FILE}{adapter}; name a folder written by save_pretrained")


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        ModelFolderError: no config, no safetensors, an index whose shards are missing; the message has the cure.
    """
    require_config(folder)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelFolderError(
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when opened and is not read; "
            "convert it once on a machine you trust: from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" (found {', '.join(others[:3])})" if others else ""
    raise ModelFolderError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}{found}; save the model with save_pretrained")


def _indexed_shards(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFolderError(f"{index} is no index of shards ({error}); copy it again") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelFolderError(f"{index} names files outside its folder; only plain file names are read")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelFolderError(
            f"{folder} lacks {len(missing)} of {len(names)} shards ({', '.join(missing[:3])}); finish the download or copy them"
        )
    return [folder / name for name in names]
