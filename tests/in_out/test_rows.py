"""Claims about `huggingface.rows`: every kind of file gives the same rows, and what cannot be read is refused by name."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from overspill.errors import DataError
from overspill.huggingface.data import read_samples
from overspill.huggingface.rows import DataSource, find_source, parse_fields
from overspill.huggingface.tokenization import IGNORE

ROWS = [{"prompt": f"w{i} w{i}", "completion": "42" if i == 3 else f'w{i}, "w" \n w{i}'} for i in range(30)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_json_sequence(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))


def write_gzip(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path) -> None:
    import pyarrow.feather

    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(ROWS), path)


def write_saved(path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "data.jsonl": write_jsonl,
    "data.ndjson.gz": write_gzip,
    "array.json": write_json_array,
    "sequence.json": write_json_sequence,
    "data.csv": write_csv,
    "data.tsv": write_csv,
    "data.parquet": write_parquet,
    "stream.arrow": write_arrow,
    "file.arrow": write_feather,
    "saved": write_saved,
}


def plain(source: DataSource) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in source.rows()]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_each_time(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    source = find_source(tmp_path / name)
    assert plain(source) == plain(source) == ROWS


def test_plain_files_need_no_datasets_and_others_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data.jsonl", "array.json", "data.csv", "data.parquet"):
        WRITERS[name](tmp_path / name)
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for name in ("data.jsonl", "array.json", "data.csv"):
        assert plain(find_source(tmp_path / name)) == ROWS
    with pytest.raises(DataError, match=r"data\.parquet is read through pyarrow, .* run: pip install datasets"):
        plain(find_source(tmp_path / "data.parquet"))
    with pytest.raises(DataError, match=r"some/name \(a name on the hub\) is read through the datasets library"):
        plain(find_source("some/name"))


def test_a_json_array_longer_than_any_read_is_decoded_as_it_comes(tmp_path: Path) -> None:
    rows = [{"text": "é" * (70_000 * (i % 3))} for i in range(7)]
    (tmp_path / "long.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert plain(find_source(tmp_path / "long.json")) == rows


def test_a_name_on_the_hub_is_loaded_with_its_configuration_split_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: object, **settings: object) -> list[dict[str, str]]:
        calls.append((*args, settings))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert plain(find_source("owner/name", config="small", split="test", stream=True)) == ROWS
    assert plain(find_source("name")) == ROWS
    assert calls == [("owner/name", "small", {"split": "test", "streaming": True}), ("name", None, {"split": "train", "streaming": False})]


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: object, **settings: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"cannot read owner/name through datasets: Couldn't reach 'owner/name' on the Hub; name an existing"
    ):
        plain(find_source("owner/name"))


def test_a_folder_is_its_files_in_order_without_other_splits(tmp_path: Path) -> None:
    for name in ("b/train-00001.jsonl", "b/train-00000.jsonl", "validation.jsonl", "README.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    source = find_source(tmp_path)
    assert [row["text"] for row in plain(source)] == ["b/train-00000.jsonl", "b/train-00001.jsonl"]
    assert source.notes == (f"2 files of {tmp_path} are not read (README.md, validation.jsonl)",)
    assert [row["text"] for row in plain(find_source(tmp_path, split="val"))] == ["validation.jsonl"]
    with pytest.raises(DataError, match=r"no file of the split 'test'; it has train, validation; name one with --split"):
        find_source(tmp_path, split="test")


def test_columns_are_read_as_the_fields_they_are_named_for(tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_text("id,question,answer\n1,a b,c\n")
    source = find_source(tmp_path / "qa.csv", fields=parse_fields("prompt=question, completion = answer"))
    assert plain(source) == [{"prompt": "a b", "completion": "c"}]
    with pytest.raises(
        DataError, match=r"qa\.csv:2 has no column 'reply' to read as 'completion' \(--fields\); it has: answer, id, question"
    ):
        plain(find_source(tmp_path / "qa.csv", fields={"completion": "reply"}))


@pytest.mark.parametrize("text", ["prompt", "prompt=", "question=prompt", "text=a,text=b", "text=a,"])
def test_wrong_fields_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--fields .* is not FIELD=COLUMN with a FIELD of text, prompt, completion, messages, each once"):
        parse_fields(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\na,b\n", r"a\.csv:2 has 2 columns, the header 1; quote its commas"),
        ("a.csv", "prompt,completion\na\n", r"a\.csv:2 has 1 columns, the header 2"),
        ("a.csv", 'text\n"a"b\n', r"a\.csv:2 is no CSV"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv is no UTF-8"),
        ("a.json", '[{"text": "a"}, {"text": ]', r"a\.json is no JSON at element 2"),
        ("a.json", '[{"text": "a"},', r"a\.json ends inside its array"),
        ("a.json", '[{"text": "a"}] [1]', r"a\.json goes on after the end of its array"),
        ("a.json", "[1]", r"a\.json:1 is a JSON int, expected an object"),
        ("a.jsonl.gz", b"no gzip", r"cannot read .*a\.jsonl\.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], r"cannot read .*a\.jsonl\.gz: Compressed file ended"),
        ("a.parquet", b"PAR1 not really", r"cannot read .*a\.parquet as parquet: "),
        ("a.arrow", b"ARROW1 not really", r"cannot read .*a\.arrow as arrow: "),
        ("a.docx", "", r"a\.docx is of no known kind; name JSONL, JSON, CSV"),
        ("a.csv", "", r"a\.csv holds no sample"),
        ("a.json", "[]", r"a\.json holds no sample"),
        ("a.txt", "", r"a\.txt holds no sample; write text of two tokens"),
        ("a.csv", "txt\na\n", r"a\.csv:2 has the fields txt; expected exactly one of"),
        ("a.csv", "text\n \n", r"a\.csv:2 has no token to learn from"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, word_tokenizer: transformers.PreTrainedTokenizerFast, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_samples(tmp_path / name, word_tokenizer, seq_len=16)


def test_folders_and_settings_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "none.jsonl").write_text("")
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.csv").write_text("text\n")
    for data, settings, message in [
        (tmp_path / "empty", {}, "has no file of a known kind .* that is not empty"),
        (tmp_path, {}, r"has files of 2 kinds \(b\.csv, a\.jsonl\); name one file"),
        (tmp_path / "a.jsonl", {"split": "train"}, r"--split train is for folders and names on the hub; .* is one file"),
        (tmp_path / "a.jsonl", {"config": "en"}, r"--data-config en is for names on the hub"),
        ("missing.jsonl", {}, r"cannot read missing\.jsonl: No such file or directory; name a file, a folder, or a data set on the hub"),
        ("./missing", {}, r"cannot read missing: No such file"),
        ("not a name", {}, r"cannot read not a name: No such file"),
    ]:
        with pytest.raises(DataError, match=message):
            find_source(data, **settings)
    write_saved(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved has no split 'test'; name one of train with --split"):
        plain(find_source(tmp_path / "saved", split="test"))


# -- running text ---------------------------------------------------------------------------------------------------------


def test_running_text_is_cut_into_blocks_in_which_every_token_is_a_target_once(
    tmp_path: Path, word_tokenizer: transformers.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overspill.huggingface.rows.PIECE_CHARACTERS", 20)  # many pieces
    lengths = (23, 7, 8)
    for number, length in enumerate(lengths):
        (tmp_path / f"{number}.txt").write_text("".join(f"w{i}\n" if i % 3 else f"w{i} " for i in range(length)))
    samples = read_samples(tmp_path, word_tokenizer, seq_len=8)
    for number, length in enumerate(lengths):
        mine = [sample for sample in samples if sample.source.endswith(f"{number}.txt")]
        assert [sample.line for sample in mine] == list(range(1, len(mine) + 1))
        document = [*range(1, length + 1), 0]
        assert [list(sample.labels) for sample in mine] == [list(sample.input_ids) for sample in mine]
        assert [token for sample in mine for token in sample.labels[1:].tolist()] == document[1:]
        assert all(len(sample.input_ids) == 8 for sample in mine[:-1]) and 2 <= len(mine[-1].input_ids) <= 8


def test_text_rows_are_cut_into_blocks_when_asked_for(tmp_path: Path, word_tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": " ".join(f"w{i}" for i in range(10))}) + "\n" + json.dumps({"text": "w1 w2"}) + "\n")
    samples = read_samples(path, word_tokenizer, seq_len=6, blocks=True)
    assert [sample.input_ids.tolist() for sample in samples] == [[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 0], [2, 3, 0]]
    assert [sample.line for sample in samples] == [1, 1, 2]
    assert all(IGNORE not in sample.labels for sample in samples)
    path.write_text(json.dumps({"prompt": "w1", "completion": "w2"}))
    with pytest.raises(DataError, match=r"texts\.jsonl:1 has no 'text'; --blocks cuts running text only"):
        read_samples(path, word_tokenizer, seq_len=6, blocks=True)
