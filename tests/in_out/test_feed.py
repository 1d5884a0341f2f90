"""Claims about feeds: going on from any position gives the steps that would have come, and a stream holds no more than its buffer."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from overspill.errors import DataError
from overspill.huggingface.data import ResidentRows, StepFeed, fingerprint_samples, iterate_steps
from overspill.huggingface.data_position import DataPosition
from overspill.huggingface.packing import pack_samples
from overspill.huggingface.rows import RawRow, find_source
from overspill.huggingface.streaming import StreamedRows, shuffle_buffered
from overspill.huggingface.tokenization import Sample

NUM_SAMPLES = 23
KINDS = ("resident", "resident packed", "stream", "stream packed", "stream of text")
STREAM: dict[str, Any] = dict(seq_len=16, truncate=False, blocks=False, packing=False, held_out=2, buffer_rows=5, seed=3)


def numbered(count: int) -> list[Sample]:
    """Sample i has 2 + i % 5 tokens, all of them i."""
    samples = []
    for i in range(count):
        ids = np.full(2 + i % 5, i + 1, np.int32)
        samples.append(Sample(input_ids=ids, labels=ids, line=i))
    return samples


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i} " * (1 + i % 5)}) + "\n" for i in range(NUM_SAMPLES)))
    return path


def build_feed(kind: str, lines: Path, tokenizer: Any, *, seed: int = 3, **settings: Any) -> StepFeed:
    """A new feed over the same data, as another process would build it."""
    common: dict[str, Any] = dict(micro_batch=2, accumulate=2, pad_token_id=0, seed=seed, packed="packed" in kind)
    if kind.startswith("resident"):
        samples = numbered(NUM_SAMPLES)
        rows = pack_samples(samples, seq_len=16, seed=seed) if "packed" in kind else [(sample,) for sample in samples]
        return StepFeed(ResidentRows(rows, seed=seed), **{**common, **settings})
    if kind == "stream of text":
        lines.with_suffix(".txt").write_text(" ".join(f"w{i}" for i in range(200)))
        source = find_source(lines.with_suffix(".txt"))
        return StepFeed(StreamedRows(source, tokenizer, **{**STREAM, "seq_len": 9, "seed": seed}), **{**common, **settings})
    streamed = StreamedRows(find_source(lines), tokenizer, **{**STREAM, "packing": "packed" in kind, "seed": seed})
    return StepFeed(streamed, **{**common, **settings})


def plain(step: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: tensor.tolist() for key, tensor in batch.items()} for batch in step]


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_every_position_gives_the_steps_that_would_have_come(
    kind: str, lines: Path, word_tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    feed = build_feed(kind, lines, word_tokenizer)
    positions, steps = [feed.position], []
    while len(steps) < 20:
        steps.append(plain(next(feed)))
        positions.append(feed.position)
    assert feed.position.epoch > 0
    for number, position in enumerate(positions[:-3]):
        again = build_feed(kind, lines, word_tokenizer)
        again.seek(DataPosition.from_plain(json.loads(json.dumps(position.to_plain()))))
        assert again.position == position
        assert [plain(next(again)) for _ in range(3)] == steps[number : number + 3]
        assert again.position == positions[number + 3]


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_show_the_same_samples_in_other_orders(kind: str, lines: Path, word_tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    feed = build_feed(kind, lines, word_tokenizer)
    epochs: dict[int, list[Any]] = {0: [], 1: []}
    step = plain(next(feed))
    while feed.position.epoch < 2:
        epochs[feed.position.epoch] += [row for batch in step for row in batch["input_ids"]]
        step = plain(next(feed))
    tokens = [sorted(token for row in rows for token in row if token) for rows in epochs.values()]
    assert tokens[0] == tokens[1] != []
    assert epochs[0] != epochs[1]


def test_a_position_of_other_data_seed_or_settings_is_refused_with_what_differs(
    lines: Path, word_tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    feed = build_feed("resident", lines, word_tokenizer, settings={"held-out": 2})
    next(feed)
    position = feed.position
    assert (position.epoch, position.index) == (0, 4)
    other = build_feed("resident packed", lines, word_tokenizer, seed=4, micro_batch=3, settings={"held-out": 2})
    with pytest.raises(
        DataError,
        match=r"cannot go on from epoch 0, row 4: this run differs in --seed 3 there, 4 here; --micro-batch 2 there, 3 here; "
        r"--packing False there, True here; the data \(fingerprint \w{12} there, \w{12} here\); give the same data",
    ):
        other.seek(position)
    stream = build_feed("stream", lines, word_tokenizer)
    next(stream)
    with lines.open("a") as file:
        file.write('{"text": "w1"}\n')
    with pytest.raises(DataError, match=r"differs in the data \(fingerprint"):
        build_feed("stream", lines, word_tokenizer).seek(stream.position)
    with pytest.raises(ValueError, match=r"unknown field\(s\) indx"):
        DataPosition.from_plain({"indx": 3})


def test_the_fingerprint_sees_tokens_labels_and_order() -> None:
    samples = numbered(5)
    changed = dataclasses.replace(samples[0], labels=np.array([-100, 1], np.int32))
    orders = (samples, samples[::-1], samples[:4], [changed, *samples[1:]])
    assert len({fingerprint_samples(order) for order in orders}) == 4
    assert fingerprint_samples(numbered(5)) == fingerprint_samples(samples)


def test_a_position_beyond_the_data_is_refused(lines: Path, word_tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    for kind in KINDS:
        feed = build_feed(kind, lines, word_tokenizer)
        feed.seek(dataclasses.replace(feed.position, index=1000))
        with pytest.raises(DataError, match=r"cannot pass over 1000 rows .*the position belongs to other data"):
            next(feed)


def test_no_rows_to_train_on_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(DataError, match="has no row to train on"):
        next(iterate_steps([], micro_batch=1, accumulate=1, pad_token_id=0, seed=0))


# -- streaming ------------------------------------------------------------------------------------------------------------


def test_a_stream_reads_no_further_than_its_buffer(
    tmp_path: Path, word_tokenizer: transformers.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def endless(self: object) -> Iterator[RawRow]:
        nonlocal read
        read = 0
        for line in itertools.count(1):
            read += 1
            yield RawRow(source="endless", line=line, fields={"text": f"w{line % 400}"})

    (tmp_path / "a.jsonl").write_text("{}")
    source = find_source(tmp_path / "a.jsonl")
    monkeypatch.setattr(type(source), "rows", endless)
    for packing in (False, True):
        rows = StreamedRows(source, word_tokenizer, **{**STREAM, "packing": packing, "buffer_rows": 50})
        assert len(rows.held_out) == 2
        feed = StepFeed(rows, micro_batch=2, accumulate=1, pad_token_id=0, seed=3, packed=packing)
        for _ in range(20):
            next(feed)
        samples_given = 20 * 2 * (16 // 2 if packing else 1)
        assert read <= 2 + 50 + samples_given + (16 * 8 if packing else 0) + 1


def test_held_out_rows_of_a_stream_are_the_first_and_never_trained_on(
    lines: Path, word_tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    rows = StreamedRows(find_source(lines), word_tokenizer, **STREAM)
    assert [sample.input_ids[0] for sample in rows.held_out] == [1, 2]
    seen = [int(sample.input_ids[0]) for row in rows.epoch(0, skip=0) for sample in row]
    assert sorted(seen) == list(range(3, NUM_SAMPLES + 1))
    with pytest.raises(DataError, match=r"holds 23 samples, and --held-out 23 leaves none to train on"):
        StreamedRows(find_source(lines), word_tokenizer, **{**STREAM, "held_out": 23})


def test_a_buffer_shuffles_by_seed_and_moves_no_row_forward_by_more_than_its_size() -> None:
    order = list(shuffle_buffered(range(1000), buffer_rows=20, seed=1))
    assert sorted(order) == list(range(1000))
    assert (
        order == list(shuffle_buffered(range(1000), buffer_rows=20, seed=1)) != list(shuffle_buffered(range(1000), buffer_rows=20, seed=2))
    )
    assert max(row - place for place, row in enumerate(order)) < 20
    assert list(shuffle_buffered(range(9), buffer_rows=1, seed=1)) == list(range(9))


def test_a_wrong_row_of_a_stream_is_named_when_it_is_reached(lines: Path, word_tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    for line, message in (
        ({"txt": "a"}, r"data\.jsonl:101 has the fields txt"),
        ({"text": "w1 " * 20}, r"data\.jsonl:101 has 21 tokens, more than 16; raise --seq-len, or cut it with --truncate"),
    ):
        lines.write_text('{"text": "w1"}\n' * 100 + json.dumps(line) + "\n")
        rows = StreamedRows(find_source(lines), word_tokenizer, **STREAM)
        with pytest.raises(DataError, match=message):
            list(rows.epoch(0, skip=0))
