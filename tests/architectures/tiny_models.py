"""Tiny random causal LMs, one factory for many architectures.

Each has at least two blocks of every kind of layer its architecture mixes, fp32 parameters, no dropout, eager or sdpa attention as
transformers chooses, and sliding windows of 4 tokens, so that a sequence of 12 passes them. Weights are drawn
wide (`spread`), so that a wrong layer shows in a gradient; norms and biases are not left at ones and zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
WINDOW = 4
SEQUENCE = 12

_GPT2_SIZES = dict(n_embd=32, n_layer=3, n_head=4, n_positions=32, vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    **_IDS,
)
_FALCON_SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_hidden_size=48, **_IDS)
_ALTERNATING = dict(num_hidden_layers=4, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
_PARTLY_ROTARY = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})
_MOE = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.02)

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "llama_tied": ("LlamaConfig", _SIZES | dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", _SIZES | _ALTERNATING | dict(use_sliding_window=True)),
    "qwen3": ("Qwen3Config", _SIZES),
    "mistral": ("MistralConfig", _SIZES | dict(sliding_window=WINDOW)),
    "gemma": ("GemmaConfig", _SIZES),
    "gemma2": ("Gemma2Config", _SIZES | _ALTERNATING | dict(query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3TextConfig", _SIZES | _ALTERNATING | dict(query_pre_attn_scalar=8, final_logit_softcapping=20.0)),
    "phi": ("PhiConfig", _SIZES | _PARTLY_ROTARY),
    "phi3": ("Phi3Config", _SIZES | dict(sliding_window=WINDOW)),
    "olmo2": ("Olmo2Config", _SIZES),
    "gpt2": ("GPT2Config", _GPT2_SIZES | _IDS),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "opt": ("OPTConfig", _SIZES | dict(ffn_dim=48, word_embed_proj_dim=16, dropout=0.0)),
    "bloom": ("BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, **_IDS)),
    "falcon": ("FalconConfig", _FALCON_SIZES | dict(parallel_attn=True, multi_query=True, alibi=False)),
    "falcon_alibi": ("FalconConfig", _FALCON_SIZES | dict(parallel_attn=False, multi_query=False, alibi=True, bias=True)),
    "stablelm": ("StableLmConfig", _SIZES | _PARTLY_ROTARY),
    "cohere": ("CohereConfig", _SIZES | dict(logit_scale=0.25)),
    "cohere2": ("Cohere2Config", _SIZES | _ALTERNATING | dict(logit_scale=0.25)),
    "granite": ("GraniteConfig", _SIZES | dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5)),
    "starcoder2": ("Starcoder2Config", _SIZES | dict(sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0)),
    "glm4": ("Glm4Config", _SIZES),
    "smollm3": ("SmolLM3Config", _SIZES | dict(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])),
    "mixtral": ("MixtralConfig", _SIZES | _MOE | dict(num_local_experts=4, sliding_window=WINDOW)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _SIZES | _MOE | dict(num_hidden_layers=4, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[0, 2], norm_topk_prob=True),
    ),
    "gpt_oss": ("GptOssConfig", _SIZES | _ALTERNATING | _MOE | dict(num_local_experts=4)),
    "mamba2": (
        "Mamba2Config",
        dict(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=2,
            chunk_size=4, **_IDS,
        ),
    ),
}  # fmt: skip
"""Name -> class of its configuration, and what is set in it."""

NAMES = tuple(CONFIGURATIONS)


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of `name` with `changes` to it."""
    class_name, settings = CONFIGURATIONS[name]
    config = getattr(transformers, class_name)(**{**settings, **changes})
    config.use_cache = False
    return config


def tiny_model(name: str, *, seed: int = 0, spread: float = 0.3, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of `name` with random weights of `dtype` and buffers as transformers keeps them.

    Matrices are normal with deviation 4 `spread` / sqrt(fan in), vectors near their initial values.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread * 4 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_batch(
    seed: int, *, num_sequences: int = 2, num_tokens: int = SEQUENCE, padding: int = 0, ignored: int = 0
) -> dict[str, torch.Tensor]:
    """A random micro-batch.

    Args:
        padding: tokens of padding at the end of the first sequence; 0: no attention mask at all.
        ignored: labels at the start of every sequence that are no targets.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (num_sequences, num_tokens), generator=generator)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    batch["labels"][:, :ignored] = -100
    if padding:
        batch["attention_mask"] = torch.ones_like(input_ids)
        batch["attention_mask"][0, -padding:] = 0
        input_ids[0, -padding:] = 0
        batch["labels"][0, -padding:] = -100
    return batch
