"""Training data: lines of JSON in, padded micro-batches out.

Each line of a file is one sample, in one of three formats, the same through the whole file:

* `{"text": …}`: every token is a target;
* `{"prompt": …, "completion": …}`: the completion and the end-of-sequence token are targets;
* `{"messages": [{"role": …, "content": …}, …]}`: the tokenizer's chat template renders them, assistant turns are targets.

Other fields are carried by many files and are passed over. A **target** is a position whose label is not `IGNORE`; labels
stand at the position of the token itself, and the model shifts by one, so a first token is never a target.

Rule 1. What is wrong is found before training, with its line number: nothing is skipped, cut or guessed silently.
Rule 2. Padding is known by position. Many tokenizers pad with the end-of-sequence token, so a mask by token id would
        remove every real end of sequence from the loss.
Rule 3. Order depends on (seed, epoch) alone, and the held-out split on seed alone.

Cost: 8 bytes a token, all samples in memory. Limits: no packing of short samples into one row; chats need a fast tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overspill import rng
from overspill.errors import DataError
from overspill.units import align_up

IGNORE = -100
"""Label of a position that is no target: the `ignore_index` of torch's cross entropy."""

_FORMATS: dict[str, tuple[str, ...]] = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}

HELD_OUT_EPOCH = -1
"""In place of an epoch where the held-out split is drawn: no epoch of training has this number."""

MicroBatch = dict[str, torch.Tensor]
"""`input_ids`, `attention_mask`, `labels`: int64 of shape (micro-batch, positions), on the CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One tokenized sample."""

    input_ids: np.ndarray
    """int32 (positions,)."""
    labels: np.ndarray
    """int32 (positions,): the token itself where it is a target, else `IGNORE`."""
    line: int
    """Of the file it came from, from 1."""

    @property
    def num_targets(self) -> int:
        """Positions that contribute to the loss."""
        return int((self.labels[1:] != IGNORE).sum())


def read_samples(path: str | Path, tokenizer: Any, *, seq_len: int, truncate: bool = False) -> list[Sample]:
    """Read and tokenize a JSONL file.

    Args:
        tokenizer: of transformers; it needs an end-of-sequence token, and for `messages` a chat template.
        seq_len: most tokens of a sample.
        truncate: cut longer samples at the end; otherwise they are refused.

    Raises:
        DataError: the file is missing, empty, or has a line that cannot be used; the message names the line.
    """
    path = Path(path)
    samples: list[Sample] = []
    form = None
    for line, row in _read_rows(path):
        where = f"{path}:{line}"
        found = _format_of(row, where)
        form = form or found
        if found != form:
            raise DataError(f"{where} is a {found!r} sample, the lines before it are {form!r} samples; use one format in a file")
        ids, is_target = _tokenize(row, found, tokenizer, where)
        labels = np.where(is_target, ids, IGNORE).astype(np.int32)
        samples.append(Sample(input_ids=np.asarray(ids, dtype=np.int32), labels=labels, line=line))
    if not samples:
        raise DataError(f"{path} holds no sample; write one JSON object a line, such as " + '{"prompt": "…", "completion": "…"}')
    samples = _fit(samples, path, seq_len, truncate)
    for sample in samples:
        if sample.num_targets == 0:
            cut = f" within --seq-len {seq_len}" if truncate else ""
            raise DataError(f"{path}:{sample.line} has no token to learn from{cut}; fill its completion, or remove the line")
    return samples


def split_held_out(samples: Sequence[Sample], held_out: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Set samples aside for evaluation: (training, held out).

    Args:
        held_out: a count (an integer, 0 for none), or a share between 0 and 1, of which at least one sample is taken.

    Raises:
        DataError: it is negative or leaves nothing to train on.
    """
    count = math.ceil(held_out * len(samples)) if 0 < held_out < 1 else int(held_out)
    if held_out < 0 or (held_out >= 1 and held_out != count) or count >= len(samples):
        raise DataError(
            f"--held-out {held_out:g} of {len(samples)} samples leaves none to train on, or is no count; give at most {len(samples) - 1}"
        )
    order = np.random.default_rng(rng.shuffle_seed(seed, HELD_OUT_EPOCH)).permutation(len(samples))
    chosen = set(order[:count].tolist())
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


def build_micro_batches(
    samples: Sequence[Sample], *, micro_batch: int, pad_token_id: int, seed: int | None, epoch: int = 0, pad_to_multiple: int = 1
) -> Iterator[MicroBatch]:
    """Yield one epoch of micro-batches; the last may be smaller.

    Args:
        seed: of the order (rule 3); None keeps the order of `samples`, as evaluation does.
        pad_to_multiple: positions are padded to the longest sample of the micro-batch, rounded up to this.
    """
    order: Sequence[int] = range(len(samples))
    if seed is not None:
        order = np.random.default_rng(rng.shuffle_seed(seed, epoch)).permutation(len(samples)).tolist()
    for start in range(0, len(samples), micro_batch):
        chosen = [samples[i] for i in order[start : start + micro_batch]]
        yield pad_samples(chosen, pad_token_id=pad_token_id, pad_to_multiple=pad_to_multiple)


def iterate_steps(
    samples: Sequence[Sample], *, micro_batch: int, accumulate: int, pad_token_id: int, seed: int, pad_to_multiple: int = 1
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of one optimizer step after the other, epoch after epoch, without end.

    A step never crosses an epoch, so an epoch is `steps_per_epoch` steps and its last step may be smaller.
    """
    epoch = 0
    while True:
        group: list[MicroBatch] = []
        for batch in build_micro_batches(
            samples, micro_batch=micro_batch, pad_token_id=pad_token_id, seed=seed, epoch=epoch, pad_to_multiple=pad_to_multiple
        ):
            group.append(batch)
            if len(group) == accumulate:
                yield group
                group = []
        if group:
            yield group
        epoch += 1


def steps_per_epoch(num_samples: int, *, micro_batch: int, accumulate: int) -> int:
    """Optimizer steps in which `iterate_steps` shows every sample once."""
    return math.ceil(math.ceil(num_samples / micro_batch) / accumulate)


def pad_samples(samples: Sequence[Sample], *, pad_token_id: int, pad_to_multiple: int = 1) -> MicroBatch:
    """One micro-batch, padded on the right by position (rule 2)."""
    length = align_up(max(len(sample.input_ids) for sample in samples), pad_to_multiple)
    batch = {
        "input_ids": torch.full((len(samples), length), pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros((len(samples), length), dtype=torch.int64),
        "labels": torch.full((len(samples), length), IGNORE, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        batch["input_ids"][row, :end] = torch.from_numpy(sample.input_ids)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, :end] = torch.from_numpy(sample.labels)
    return batch


def _read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, JSON object) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw)
                except ValueError as error:  # covers bytes that are no UTF-8
                    raise DataError(f"{path}:{line} is no JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{line} is a JSON {type(row).__name__}, expected an object")
                yield line, row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a JSONL file") from error


def _format_of(row: Mapping[str, Any], where: str) -> str:
    """Which of the three formats a row has; its fields are of the right type."""
    found = [form for form, fields in _FORMATS.items() if any(field in row for field in fields)]
    if len(found) != 1:
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"{where} has the fields {fields}; expected exactly one of: text; prompt and completion; messages")
    for field in _FORMATS[found[0]]:
        wanted = list if field == "messages" else str
        if not isinstance(row.get(field), wanted):
            got = type(row[field]).__name__ if field in row else "nothing"
            raise DataError(f"{where} needs a {'list' if wanted is list else 'string'} in {field!r}, got {got}")
    return found[0]


def _tokenize(row: Mapping[str, Any], form: str, tokenizer: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, whether each is a target)."""
    if form == "messages":
        return _tokenize_chat(row["messages"], tokenizer, where)
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"{type(tokenizer).__name__} has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if form == "text":
        ids = list(tokenizer(row["text"])["input_ids"])
        ids += [] if ids and ids[-1] == end else [end]
        return np.asarray(ids), np.ones(len(ids), dtype=bool)
    # Prompt and completion are tokenized apart: generation also starts from the prompt's own tokens.
    prompt = list(tokenizer(row["prompt"])["input_ids"])
    if prompt and prompt[-1] == end:  # some tokenizers close every text
        prompt.pop()
    completion = list(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])
    if not completion:
        raise DataError(f"{where} has an empty completion; fill it, or remove the line")
    ids = [*prompt, *completion, end]
    return np.asarray(ids), np.arange(len(ids)) >= len(prompt)


def _tokenize_chat(messages: list[Any], tokenizer: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Render a chat with the tokenizer's template; assistant turns are targets.

    A template with `{% generation %}` markers says itself where they are. Without, a turn is what rendering it adds to the
    text that ends in the generation prompt, and a token is a target if its first character lies in a turn.
    """
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where} has a message without role and content: {str(message)[:80]}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant, so nothing to learn from; add one, or remove the line")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where} has messages but the tokenizer has no chat template; use an instruct model, or prompt and completion")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{where} has messages, which need a fast tokenizer, not {type(tokenizer).__name__}; use prompt and completion")
    try:
        if "{% generation" in tokenizer.get_chat_template().replace("{%-", "{%").replace("{%  ", "{% "):
            marked = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return np.asarray(marked["input_ids"]), np.asarray(marked["assistant_masks"], dtype=bool)
        text, spans = _assistant_spans(messages, tokenizer, where)
    except (TypeError, KeyError) as error:
        raise DataError(f"{where} does not fit the chat template: {error}") from error
    except Exception as error:  # jinja2 is transformers' dependency, not ours: its TemplateError is known by name only
        if type(error).__module__.split(".")[0] != "jinja2":
            raise
        raise DataError(f"{where} is refused by the chat template: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    is_target = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        is_target |= (starts >= begin) & (starts < end)
    return np.asarray(encoded["input_ids"]), is_target


def _assistant_spans(messages: list[dict], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and the characters [begin, end) of each assistant turn in it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (through.startswith(before) and text.startswith(through)):
            raise DataError(
                f"{where}: the chat template renders turn {index} differently once more turns follow, so its tokens cannot be told apart; "
                "end the sample at that turn, or use a template with {% generation %} markers"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _fit(samples: list[Sample], path: Path, seq_len: int, truncate: bool) -> list[Sample]:
    """Cut or refuse samples of more than `seq_len` tokens."""
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    if len(longest.input_ids) <= seq_len:
        return samples
    if not truncate:
        count = sum(len(sample.input_ids) > seq_len for sample in samples)
        raise DataError(
            f"{count} of {len(samples)} samples of {path} have more than {seq_len} tokens, the longest {len(longest.input_ids)} "
            f"(line {longest.line}); raise --seq-len, or cut them with --truncate"
        )
    return [dataclasses.replace(s, input_ids=s.input_ids[:seq_len], labels=s.labels[:seq_len]) for s in samples]
