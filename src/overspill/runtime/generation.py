"""Greedy generation over a streamed model: for a look at what was learnt, not for serving.

The whole model streams by once a token, there is no cache. Texts of different length are padded on the right: causal models
give the logits of a position from what is before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Batch = Mapping[str, torch.Tensor]
Logits = Callable[[list[Batch], list[torch.Tensor]], torch.Tensor]
"""(micro-batches, the position asked for in each sample) -> logits [samples, vocabulary]."""


def validate_generation(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Look at what was asked for, before anything is done.

    Raises:
        ValueError: no prompt, or an empty one, or no token asked for.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate needs at least one prompt and at least one token in each")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"generate makes at least 1 token, got max_new_tokens={max_new_tokens!r}; give a whole number from 1 on")


def generate_greedily(
    prompts: Sequence[Sequence[int]], logits_at: Logits, *, micro_batch: int, max_new_tokens: int, eos_token_id: int | None
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the prompt, up to and without the end token."""
    texts = [list(prompt) for prompt in prompts]
    open_texts = list(range(len(texts)))
    for _ in range(max_new_tokens):
        if not open_texts:
            break
        logits = logits_at(*_padded([texts[index] for index in open_texts], micro_batch))
        tokens = dict(zip(open_texts, logits.argmax(dim=-1).tolist(), strict=True))
        open_texts = [index for index in open_texts if tokens[index] != eos_token_id]
        for index in open_texts:
            texts[index].append(tokens[index])
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _padded(texts: list[list[int]], micro_batch: int) -> tuple[list[Batch], list[torch.Tensor]]:
    """Micro-batches of the texts, and the last position of each text."""
    batches: list[Batch] = []
    ends = []
    for start in range(0, len(texts), micro_batch):
        part = texts[start : start + micro_batch]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(part):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        batches.append({"input_ids": ids, "labels": torch.full_like(ids, -100), "attention_mask": mask})
        ends.append(torch.tensor([len(text) - 1 for text in part]))
    return batches, ends
