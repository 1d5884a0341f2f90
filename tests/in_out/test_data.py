"""Claims about `huggingface.data`: what is learned from, what is padding, in which order, and which lines are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from overspill.errors import DataError
from overspill.huggingface.data import (
    IGNORE,
    Sample,
    build_micro_batches,
    iterate_steps,
    pad_samples,
    read_samples,
    split_held_out,
    steps_per_epoch,
)

WORDS = ["<end>", "<start>", "What", "is", "a", "cat", "dog", "animal", "?", "user", "assistant", "system", ":", "yes", "no", "\n"]
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <end>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + ' <end>' }}{% endif %}{{ ' ' }}{% endfor %}"
)
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% else %}"
    "{{ 'assistant : no ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is a cat ?"},
    {"role": "assistant", "content": "a animal"},
    {"role": "user", "content": "is a dog ?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word; pads with the end-of-sequence token, as many real ones do."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="no"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    fast.chat_template = PLAIN_TEMPLATE
    return fast


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def words(ids: np.ndarray) -> list[str]:
    return [WORDS[i] for i in ids]


def targets(sample: Sample) -> list[str]:
    return words(sample.labels[sample.labels != IGNORE])


def test_every_token_of_a_text_and_its_end_is_a_target(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    (sample,) = read_samples(write(tmp_path, {"text": "a cat is a animal", "id": 7}), tokenizer, seq_len=16)
    assert targets(sample) == words(sample.input_ids) == ["a", "cat", "is", "a", "animal", "<end>"]
    assert sample.num_targets == 5  # the first token has nothing before it to be predicted from


def test_only_completion_and_end_are_targets(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    (sample,) = read_samples(write(tmp_path, {"prompt": "What is a cat ?", "completion": "a animal"}), tokenizer, seq_len=16)
    assert words(sample.input_ids) == ["What", "is", "a", "cat", "?", "a", "animal", "<end>"]
    assert targets(sample) == ["a", "animal", "<end>"]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["by prefix", "by generation markers"])
def test_only_assistant_turns_of_a_chat_are_targets(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    (sample,) = read_samples(write(tmp_path, {"messages": CHAT}), tokenizer, seq_len=64)
    assert targets(sample) == ["a", "animal", "<end>", "yes", "<end>"]
    assert words(sample.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False).split()


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_one_turn_is_left(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    with pytest.raises(DataError, match=r":1: the chat template renders turn 1 differently once more turns follow"):
        read_samples(write(tmp_path, {"messages": CHAT}), tokenizer, seq_len=64)
    (sample,) = read_samples(write(tmp_path, {"messages": CHAT[:2]}), tokenizer, seq_len=64)
    assert targets(sample) == ["a", "animal"]


def test_padding_is_masked_by_position_and_never_by_id(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    samples = read_samples(write(tmp_path, {"text": "a"}, {"text": "a cat is"}), tokenizer, seq_len=16)
    batch = pad_samples(samples, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[4, 0, 0, 0], [4, 5, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[4, 0, IGNORE, IGNORE], [4, 5, 3, 0]]


def test_padding_goes_to_the_longest_of_the_micro_batch_and_a_multiple(
    tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    samples = read_samples(write(tmp_path, {"text": "a"}, {"text": "a cat is"}, {"text": "a " * 9}), tokenizer, seq_len=16)
    shapes = [tuple(b["input_ids"].shape) for b in build_micro_batches(samples, micro_batch=2, pad_token_id=0, seed=None)]
    assert shapes == [(2, 4), (1, 10)]
    shapes = [
        tuple(b["input_ids"].shape) for b in build_micro_batches(samples, micro_batch=2, pad_token_id=0, seed=None, pad_to_multiple=8)
    ]
    assert shapes == [(2, 8), (1, 16)]


def numbered(count: int) -> list[Sample]:
    return [Sample(input_ids=np.array([i, i], np.int32), labels=np.array([i, i], np.int32), line=i) for i in range(count)]


def order(samples: list[Sample], seed: int, epoch: int) -> list[int]:
    batches = build_micro_batches(samples, micro_batch=3, pad_token_id=0, seed=seed, epoch=epoch)
    return [row for batch in batches for row in batch["input_ids"][:, 0].tolist()]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    samples = numbered(50)
    assert order(samples, 1, 0) == order(samples, 1, 0)
    assert len({tuple(order(samples, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert sorted(order(samples, 1, 0)) == list(range(50))


def test_an_epoch_of_steps_shows_every_sample_once() -> None:
    samples = numbered(11)
    num_steps = steps_per_epoch(len(samples), micro_batch=2, accumulate=2)
    assert num_steps == 3
    steps = iterate_steps(samples, micro_batch=2, accumulate=2, pad_token_id=0, seed=0)
    for _ in range(2):
        epoch = [next(steps) for _ in range(num_steps)]
        assert [len(group) for group in epoch] == [2, 2, 2]
        assert sorted(row for group in epoch for batch in group for row in batch["input_ids"][:, 0].tolist()) == list(range(11))


@pytest.mark.parametrize(("held_out", "count"), [(0, 0), (3, 3), (0.25, 5), (0.001, 1)])
def test_held_out_samples_are_apart_and_the_same_for_a_seed(held_out: float, count: int) -> None:
    samples = numbered(20)
    training, aside = split_held_out(samples, held_out, seed=5)
    assert len(aside) == count
    assert sorted(s.line for s in [*training, *aside]) == list(range(20))
    assert [s.line for s in split_held_out(samples, held_out, seed=5)[1]] == [s.line for s in aside]


@pytest.mark.parametrize("held_out", [-1, 20, 1.5, 0.99])
def test_a_held_out_share_that_leaves_nothing_is_refused(held_out: float) -> None:
    with pytest.raises(DataError, match=r"--held-out .* of 20 samples"):
        split_held_out(numbered(20), held_out, seed=0)


def test_too_long_samples_are_refused_with_the_longest_or_cut(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, {"text": "a"}, {"text": "a " * 20}, "", {"text": "a " * 30}, {"text": "cat"})
    with pytest.raises(
        DataError, match=r"2 of 4 samples of .* more than 8 tokens, the longest 31 \(.*data.jsonl:4\); raise --seq-len, or .*--truncate"
    ):
        read_samples(path, tokenizer, seq_len=8)
    assert [len(sample.input_ids) for sample in read_samples(path, tokenizer, seq_len=8, truncate=True)] == [2, 8, 8, 2]


def test_a_sample_whose_targets_were_all_cut_is_refused(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, {"prompt": "a", "completion": "cat"}, {"prompt": "a " * 9, "completion": "cat"})
    with pytest.raises(DataError, match=r":2 has no token to learn from within --seq-len 8"):
        read_samples(path, tokenizer, seq_len=8, truncate=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["", " "], r"holds no sample"),
        ([{"text": "a"}, '{"text": '], r":2 is no JSON"),
        ([{"text": "a"}, "[1]"], r":2 is a JSON list, expected an object"),
        ([{"txt": "a"}], r":1 has the fields txt; expected exactly one of: text; prompt and completion; messages"),
        ([{"text": "a", "prompt": "b", "completion": "c"}], r":1 has the fields completion, prompt, text; expected exactly one"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], r":2 is a 'prompt' sample, the lines before it are 'text' samples"),
        ([{"prompt": "a"}], r":1 needs a string in 'completion', got nothing"),
        ([{"text": 5}], r":1 needs a string in 'text', got int"),
        ([{"messages": "hello"}], r":1 needs a list in 'messages', got str"),
        ([{"messages": ["hello"]}], r":1 has a message without role and content"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r":1 has no message of the assistant"),
        ([{"prompt": "a", "completion": ""}], r":1 has an empty completion"),
        ([{"text": "a"}, {"text": ""}], r":2 has no token to learn from"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast, rows: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(write(tmp_path, *rows), tokenizer, seq_len=16)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe\xfa"}\n')
    with pytest.raises(DataError, match=r":2 is no JSON: 'utf-8'"):
        read_samples(tmp_path / "data.jsonl", tokenizer, seq_len=16)


def test_no_such_file(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing\.jsonl: No such file"):
        read_samples(tmp_path / "nothing.jsonl", tokenizer, seq_len=16)


def test_chats_need_a_template_that_accepts_them(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, {"messages": CHAT})
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r":1 is refused by the chat template: roles must alternate"):
        read_samples(path, tokenizer, seq_len=64)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r":1 has messages but the tokenizer has no chat template"):
        read_samples(path, tokenizer, seq_len=64)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        read_samples(write(tmp_path, {"text": "a"}), tokenizer, seq_len=16)
