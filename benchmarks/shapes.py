"""The model shapes that benchmarks train, and how they get weights.

Weights are random: for bytes, memory and time the architecture is what counts. Two ways to have them:

* `build_model` draws them, on the device where that is quick, and leaves them in host memory: 2 bytes a parameter there.
* `build_windowed_model` makes every matrix a window on one short random vector: element [i, j] is vector[i + j]. All rows
  differ and the matrix has full rank, but it takes memory only when somebody copies it, so it does not blur a measurement
  of host memory, and 8B parameters are there in a second.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config

WEIGHT_STD = 0.02
"""transformers' `initializer_range` of Llama."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama, or of a Qwen2, which differs by the biases of its q, k and v; embedding and head are not tied."""

    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int = 32000
    is_qwen2: bool = False

    @property
    def num_block_parameters(self) -> int:
        kv_size = self.hidden_size * self.num_kv_heads // self.num_heads
        matrices = 2 * self.hidden_size * (self.hidden_size + kv_size) + 3 * self.hidden_size * self.ffn_size
        biases = self.hidden_size + 2 * kv_size if self.is_qwen2 else 0
        return matrices + biases + 2 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        return 2 * self.vocab_size * self.hidden_size + self.num_blocks * self.num_block_parameters + self.hidden_size

    @property
    def largest_tensor_elements(self) -> int:
        return self.hidden_size * max(self.vocab_size, self.ffn_size)

    def with_blocks(self, num_blocks: int | None) -> LlamaShape:
        """The same shape with another depth; None: as it is."""
        return self if num_blocks is None else dataclasses.replace(self, num_blocks=num_blocks)

    def config(self, *, max_positions: int = 4096) -> PreTrainedConfig:
        config = (Qwen2Config if self.is_qwen2 else LlamaConfig)(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_blocks,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.ffn_size,
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
        )
        config.use_cache = False
        return config


SHAPES = {
    "tiny": LlamaShape(hidden_size=64, num_blocks=4, num_heads=4, num_kv_heads=2, ffn_size=128),
    "63M": LlamaShape(hidden_size=512, num_blocks=8, num_heads=8, num_kv_heads=2, ffn_size=2048),
    "1.10B": LlamaShape(hidden_size=2048, num_blocks=16, num_heads=32, num_kv_heads=8, ffn_size=8192),
    "3.02B": LlamaShape(hidden_size=3072, num_blocks=28, num_heads=24, num_kv_heads=8, ffn_size=8192),
    "8B": LlamaShape(hidden_size=4096, num_blocks=32, num_heads=32, num_kv_heads=8, ffn_size=14336, vocab_size=128256),
    "14B": LlamaShape(hidden_size=5120, num_blocks=48, num_heads=40, num_kv_heads=8, ffn_size=13824, vocab_size=152064, is_qwen2=True),
}
"""`8B` is Llama-3.1-8B, `14B` is Qwen2.5-14B. `tiny` is for tests, `63M` for trying things on a CPU: its matrices are just
large enough for DeepSpeed to swap."""


def build_model(shape: LlamaShape, device: torch.device) -> LlamaForCausalLM:
    """The shape with drawn bf16 weights, in host memory."""
    config = shape.config()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    config.dtype = torch.bfloat16
    return model.to("cpu")


def build_windowed_model(shape: LlamaShape, *, dtype: torch.dtype, max_positions: int) -> PreTrainedModel:
    """The shape with weights that are windows on random vectors (see above): no memory of its own to speak of."""
    from overspill.huggingface import build_meta_model

    model = build_meta_model(shape.config(max_positions=max_positions), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_window(parameter.shape, dtype, generator))
                if name == "bias":
                    nn.init.zeros_(module._parameters[name])
    return model


def place_weights(model: nn.Module, device: torch.device) -> None:
    """Give every parameter memory of its own on `device`, contiguous, and move the buffers there: windows cannot be trained in place."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                own = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                parameter.data = own.copy_(parameter.detach())
    model.to(device)


def _window(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # a norm's weight
        return torch.ones(shape, dtype=dtype)
    rows, columns = shape
    vector = (torch.randn(rows + columns, generator=generator) * WEIGHT_STD).to(dtype)
    return vector.as_strided((rows, columns), (1, 1))


def random_batch(shape: LlamaShape, *, samples: int, seq_len: int, seed: int) -> dict[str, torch.Tensor]:
    """One micro-batch of random tokens, on the CPU; every token is a target."""
    ids = torch.randint(0, shape.vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}
