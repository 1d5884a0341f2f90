"""Rows into samples: which tokens a model reads, and which of them it learns from.

A row has one of three formats, the same through the whole data set:

* `{"text": …}`: every token is a target;
* `{"prompt": …, "completion": …}`: the completion and the end-of-sequence token are targets;
* `{"messages": [{"role": …, "content": …}, …]}`: the tokenizer's chat template renders them, assistant turns are targets.

Other fields are carried by many files and are passed over. A **target** is a position whose label is not `IGNORE`; labels
stand at the position of the token itself, and the model shifts by one, so a first token is never a target.

Running text, and `text` rows if asked for, are cut into **blocks** of at most `seq_len` tokens. A block starts with the last token of the
one before, so every token but a document's first is a target exactly once; blocks of two documents never mix.

Rule 1. What is wrong is found with its line number: nothing is skipped, cut or guessed silently.

Limits: chats need a fast tokenizer. Running text is tokenized in pieces cut at line ends, so a merge across such an end (two line
feeds that are one token) is lost once in about 260,000 characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from overspill.errors import DataError
from overspill.huggingface.rows import DataSource, RawRow

IGNORE = -100
"""Label of a position that is no target: the `ignore_index` of torch's cross entropy."""

_FORMATS: dict[str, tuple[str, ...]] = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One tokenized sample."""

    input_ids: np.ndarray
    """int32 (positions,)."""
    labels: np.ndarray
    """int32 (positions,): the token itself where it is a target, else `IGNORE`."""
    line: int
    """Of the file it came from, from 1; of a block of running text its number."""
    source: str = ""
    """The file it came from."""

    @property
    def num_targets(self) -> int:
        """Positions that contribute to the loss."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def tokenize_rows(rows: Iterable[RawRow], tokenizer: Any) -> Iterator[Sample]:
    """One sample a row, of any length.

    Args:
        tokenizer: of transformers; it needs an end-of-sequence token, and for `messages` a chat template.

    Raises:
        DataError: a row that cannot be used.
    """
    form = None
    for row in rows:
        found = _format_of(row.fields, row.where)
        form = form or found
        if found != form:
            raise DataError(f"{row.where} is a {found!r} sample, the lines before it are {form!r} samples; use one format in a data set")
        ids, is_target = _tokenize(row.fields, found, tokenizer, row.where)
        labels = np.where(is_target, ids, IGNORE).astype(np.int32)
        yield Sample(input_ids=np.asarray(ids, dtype=np.int32), labels=labels, line=row.line, source=row.source)


def fit_sample(sample: Sample, *, seq_len: int, truncate: bool) -> Sample:
    """Cut a sample to `seq_len` tokens, or refuse it.

    Raises:
        DataError: it is too long and may not be cut, or has no target.
    """
    if len(sample.input_ids) > seq_len:
        if not truncate:
            raise DataError(
                f"{sample.where} has {len(sample.input_ids)} tokens, more than {seq_len}; raise --seq-len, or cut it with --truncate"
            )
        sample = dataclasses.replace(sample, input_ids=sample.input_ids[:seq_len], labels=sample.labels[:seq_len])
    if sample.num_targets == 0:
        cut = f" within --seq-len {seq_len}" if truncate else ""
        raise DataError(f"{sample.where} has no token to learn from{cut}; fill its completion, or remove the line")
    return sample


def cut_blocks(source: DataSource, tokenizer: Any, *, seq_len: int) -> Iterator[Sample]:
    """The blocks of running text, or of `text` rows, each row a document.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or a row is not of the format `text`.
    """
    documents = _text_documents(source, tokenizer) if source.is_running_text else _row_documents(source, tokenizer)
    for name, line, pieces in documents:
        ids = np.empty(0, dtype=np.int32)
        number = 0
        for piece in pieces:
            ids = np.concatenate([ids, piece])
            while len(ids) > seq_len:  # one more than fits: there is a next block, and it is not empty
                number += 1
                yield _block(ids[:seq_len], name, line or number)
                ids = ids[seq_len - 1 :]
        if len(ids) > 1:
            yield _block(ids, name, line or number + 1)


def _block(ids: np.ndarray, source: str, line: int) -> Sample:
    ids = ids.copy()
    return Sample(input_ids=ids, labels=ids, line=line, source=source)


def _text_documents(source: DataSource, tokenizer: Any) -> Iterator[tuple[str, int, Iterator[np.ndarray]]]:
    end = _end_token(tokenizer)
    for path in source.files:
        one = dataclasses.replace(source, files=(path,))

        def token_pieces(one: DataSource = one) -> Iterator[np.ndarray]:
            is_first = True
            for _, text in one.pieces():
                # Only the document's start gets the token that opens a text; its end is written below.
                ids = list(tokenizer(text, add_special_tokens=is_first, verbose=False)["input_ids"])
                yield np.asarray(ids[:-1] if is_first and ids and ids[-1] == end else ids, dtype=np.int32)
                is_first = False
            yield np.asarray([end], dtype=np.int32)

        yield str(path), 0, token_pieces()


def _row_documents(source: DataSource, tokenizer: Any) -> Iterator[tuple[str, int, Iterator[np.ndarray]]]:
    for row in source.rows():
        if _format_of(row.fields, row.where) != "text":
            raise DataError(f"{row.where} has no 'text'; --blocks cuts running text only, leave it out")
        yield row.source, row.line, iter([_tokenize(row.fields, "text", tokenizer, row.where)[0].astype(np.int32)])


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(f"{type(tokenizer).__name__} has no end-of-sequence token; set eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


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
    end = _end_token(tokenizer)
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
