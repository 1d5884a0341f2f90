"""Tiny real models of transformers, as folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped folder must not wait for a network

import tokenizers
import torch
import transformers

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)


@pytest.fixture
def build_llama() -> Callable[..., transformers.LlamaForCausalLM]:
    """Builds a random Llama; keyword arguments go into its config."""

    def build(**changes: object) -> transformers.LlamaForCausalLM:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes}))

    return build


@pytest.fixture
def llama_folder(tmp_path: Path, build_llama: Callable[..., transformers.LlamaForCausalLM]) -> Path:
    """A saved random Llama with separate embedding and head."""
    build_llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture(scope="session")
def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Word `w7` is token 8; token 0 ends a text and pads."""
    vocabulary = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(500))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
