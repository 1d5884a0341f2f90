"""A small causal LM whose forward can be told to do what streaming supports or must refuse, one behaviour at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class FakeConfig(PreTrainedConfig):
    model_type = "overspill_fake"

    def __init__(self, behaviour: str = "plain", hidden_size: int = 16, num_hidden_layers: int = 3, vocab_size: int = 32, **kwargs: object):
        super().__init__(**kwargs)
        self.behaviour = behaviour
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size


class FakeBlock(nn.Module):
    def __init__(self, config: FakeConfig, layer_idx: int) -> None:
        super().__init__()
        self.behaviour = config.behaviour
        self.layer_idx = layer_idx
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, hidden_states: Tensor, extra: object = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.behaviour == "block writes to a buffer":
            self.count.add_(1)
        if self.behaviour == "block writes to its input":
            hidden_states.mul_(2)
        if self.behaviour == "block writes to an argument":
            extra.add_(1)
        side = extra if self.behaviour == "side input" else 0
        hidden_states = hidden_states + torch.tanh(self.linear(hidden_states)) * (1 + side)
        if self.behaviour == "block changes the shape":
            return hidden_states[:, :-1]
        return (hidden_states, hidden_states.mean()) if "second output" in self.behaviour else hidden_states


class FakePreTrainedModel(PreTrainedModel):
    config_class = FakeConfig
    config: FakeConfig
    base_model_prefix = "model"
    _no_split_modules = ["FakeBlock"]


class FakeModel(FakePreTrainedModel):
    def __init__(self, config: FakeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.side = nn.Embedding(config.vocab_size, config.num_hidden_layers)
        self.mix = nn.Parameter(torch.full((config.hidden_size,), 0.5))
        self.layers = nn.ModuleList([FakeBlock(config, index) for index in range(config.num_hidden_layers)])
        if config.behaviour == "shared parameter":
            self.layers[2].linear.weight = self.layers[0].linear.weight
        if config.behaviour == "shared block":
            self.layers[2] = self.layers[0]
        if config.behaviour == "two lists":
            self.encoder_layers = nn.ModuleList([FakeBlock(config, index) for index in range(2)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layerdrop = 0.1 if config.behaviour == "layerdrop" else 0.0
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> BaseModelOutputWithPast:
        behaviour = self.config.behaviour
        hidden = first = self.embed_tokens(input_ids)
        sides = self.side(input_ids) if behaviour in ("side input", "side input of the tail") else None
        shared = {"list": [], "dictionary": {}, "cache": DynamicCache(), "object": object()}.get(behaviour)
        kept = []
        for index, layer in enumerate(self.layers):
            extra = shared
            if behaviour == "side input":
                extra = sides[..., index : index + 1]
            if behaviour == "block writes to an argument":
                extra = torch.zeros(1)
            if behaviour == "hidden states twice":
                extra = hidden
            if behaviour == "skips a block" and index == 1:
                continue
            if behaviour == "sets an attribute":
                layer.seen = index
            output = layer(hidden, extra)
            if behaviour == "reads the second output":
                kept.append(output[1] + 1)
            hidden = output[0] if isinstance(output, tuple) else output
            kept.append(hidden)
            if behaviour == "computes between" and index == 0:
                hidden = hidden * 1.5
            if behaviour == "computes in place between" and index == 0:
                hidden.mul_(1.5)
            if behaviour == "reads a parameter between":
                self.mix * 2
        if behaviour == "reads an inner block":
            hidden = hidden + kept[0]
        if behaviour == "adds the embedding":
            hidden = hidden + first
        if behaviour == "side input of the tail":
            hidden = hidden + sides.mean()
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class FakeForCausalLM(FakePreTrainedModel):
    def __init__(self, config: FakeConfig) -> None:
        super().__init__(config)
        self.model = FakeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> CausalLMOutputWithPast:
        output = self.model(input_ids, attention_mask=attention_mask, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state))


def fake_model(behaviour: str = "plain") -> FakeForCausalLM:
    """The model with `behaviour`; "plain" has none."""
    torch.manual_seed(0)
    return FakeForCausalLM(FakeConfig(behaviour))
