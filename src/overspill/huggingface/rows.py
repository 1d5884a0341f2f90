"""Where training data comes from: files, folders of files, folders of `datasets`, hub names; read row by row.

A **row** is one JSON-like object; `tokenization` says which fields it may have. The kind of a file is known by its name:

* `.jsonl`, `.ndjson`: one JSON object a line; `.json`: an array of objects, or objects one after the other;
* `.csv`, `.tsv`: a header line, then one row a line; every value is a string;
* `.txt`, `.text`: running text, one document a file; it has no rows but pieces;
* `.parquet`, `.arrow`, a folder written by `Dataset.save_to_disk`, a name on the hub: through the `datasets` library.

Rule 1. Everything but the last line is read with Python's own readers, so that `datasets` is needed only where it is used, no copy
        of the data is left in a cache, and a completion of `42` stays a string. Those files may end in `.gz`.
Rule 2. Nothing here holds more than one row (or one piece of `PIECE_CHARACTERS`) in memory.
Rule 3. A folder is read as one data set: its files in the order of their names, all of one kind. A file whose name has a word such
        as `test` or `validation` belongs to that split and is left out unless it is asked for; what is left out is said.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from overspill.errors import DataError

PIECE_CHARACTERS = 1 << 20
"""Running text is tokenized in pieces of about this size, cut at line ends. Chosen, not tuned."""

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_READABLE = "JSONL, JSON, CSV, TSV, text, Parquet or Arrow"
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
_HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row before it is tokenized."""

    source: str
    """The file, or the name on the hub."""
    line: int
    """In it, from 1: lines where the file has lines, else rows."""
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set that was found and not yet read."""

    name: str
    """As the user gave it."""
    kind: str
    """A value of `_KINDS`, "saved" (`save_to_disk`) or "hub"."""
    files: tuple[Path, ...] = ()
    """Of the kinds with files, in the order in which they are read."""
    split: str = "train"
    """Of kinds "saved" and "hub"."""
    config: str | None = None
    """Of kind "hub": which of the configurations of that name."""
    stream: bool = False
    """Of kind "hub": read over the network as it is needed, in place of downloading it first."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Field that `tokenization` knows -> column that is to be read as it."""
    notes: tuple[str, ...] = ()
    """What a person should know: files that were left out."""

    @property
    def is_running_text(self) -> bool:
        """Whether it has `pieces` and no `rows`."""
        return self.kind == "text"

    @property
    def fingerprint(self) -> str:
        """Of names and sizes, without reading: the same on another machine, another when a file grew."""
        parts = [self.kind, self.split, str(self.config), json.dumps(sorted(self.fields.items()))]
        parts += [f"{path.name} {path.stat().st_size}" for path in self.files] or [self.name]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def rows(self) -> Iterator[RawRow]:
        """Every row, from the first; each call starts anew.

        Raises:
            DataError: a file cannot be read, is not of its kind, or lacks a column; the message has the line.
        """
        assert not self.is_running_text
        if self.kind in ("saved", "hub"):
            rows = _number(self._open_dataset(), self.name)
        else:
            rows = (row for path in self.files for row in _read_file(path, self.kind))
        for row in rows:
            yield dataclasses.replace(row, fields=self._rename(row)) if self.fields else row

    def pieces(self) -> Iterator[tuple[Path, str]]:
        """(file, text) of running text; a file's pieces follow each other and give its text when joined."""
        assert self.is_running_text
        for path in self.files:
            with _open_text(path) as file:
                piece: list[str] = []
                size = 0
                for line in _lines(file, path):
                    piece.append(line)
                    size += len(line)
                    if size >= PIECE_CHARACTERS:
                        yield path, "".join(piece)
                        piece, size = [], 0
                if piece:
                    yield path, "".join(piece)

    def _rename(self, row: RawRow) -> dict[str, Any]:
        renamed = {}
        for field, column in self.fields.items():
            if column not in row.fields:
                columns = ", ".join(sorted(map(str, row.fields))) or "none"
                raise DataError(f"{row.where} has no column {column!r} to read as {field!r} (--fields); it has: {columns}")
            renamed[field] = row.fields[column]
        return renamed

    def _open_dataset(self) -> Any:
        datasets = _import_datasets(f"{self.name} ({'a folder written by datasets' if self.kind == 'saved' else 'a name on the hub'})")
        try:
            if self.kind == "saved":
                found = datasets.load_from_disk(self.name)
                if isinstance(found, dict) and self.split not in found:
                    raise DataError(f"{self.name} has no split {self.split!r}; name one of {', '.join(found)} with --split")
                return found[self.split] if isinstance(found, dict) else found
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=self.stream)
        except DataError:
            raise
        except Exception as error:  # the library's own errors have no common base
            cure = "name an existing file, folder or hub data set, and its --split and --data-config"
            raise DataError(f"cannot read {self.name} through datasets: {_first_line(error)}; {cure}") from error


def find_source(
    data: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    stream: bool = False,
    fields: Mapping[str, str] | None = None,
) -> DataSource:
    """Find out what `data` is, without reading it.

    Args:
        data: a file, a folder, or a name on the hub (tried only when nothing of that name is here).
        split: of a folder or hub name; None: train.
        config: of a hub name.
        fields: see `DataSource.fields`.

    Raises:
        DataError: nothing of that name, no file of a known kind, files of several kinds, an empty file, a setting that cannot apply.
    """
    path = Path(data).expanduser()
    common: dict[str, Any] = dict(name=str(data), fields=dict(fields or {}))
    if path.exists() and config is not None:
        raise DataError(f"--data-config {config} is for names on the hub; {data} is a file or folder here; leave it out")
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _with_fields(DataSource(kind="saved", split=split or "train", **common))
        kind, files, notes = _find_files(path, split or "train")
        return _with_fields(DataSource(kind=kind, files=files, notes=notes, **common))
    looks_local = bool(path.suffix and _kind_of(path)) or path.is_absolute() or str(data).startswith((".", "~"))
    if not path.exists() and not looks_local and re.fullmatch(_HUB_NAME, str(data)):
        return _with_fields(DataSource(kind="hub", split=split or "train", config=config, stream=stream, **common))
    try:
        path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file, a folder, or a data set on the hub") from error
    if split is not None:
        raise DataError(f"--split {split} is for folders and names on the hub; {data} is one file; leave it out")
    found = _kind_of(path)
    if found is None:
        raise DataError(f"{path} is of no known kind; name {_READABLE}, by its ending")
    return _with_fields(DataSource(kind=found, files=(path,), **common))


def parse_fields(text: str | None) -> dict[str, str]:
    """`prompt=question, completion=answer` as a mapping.

    Raises:
        DataError: it is not of that form, or names a field that no format has.
    """
    known = ("text", "prompt", "completion", "messages")
    fields: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        field, equals, column = (item.strip() for item in part.partition("="))
        if not equals or not column or field not in known or field in fields:
            raise DataError(f"--fields {text!r}: {part.strip()!r} is not FIELD=COLUMN with a FIELD of {', '.join(known)}, each once")
        fields[field] = column
    return fields


def _with_fields(source: DataSource) -> DataSource:
    if source.fields and source.is_running_text:
        raise DataError(f"--fields names columns, and {source.name} is running text; leave it out")
    return source


def _kind_of(path: Path) -> str | None:
    name = path.name.lower()
    packed = name.endswith(".gz")
    kind = _KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if packed and kind in ("parquet", "arrow") else kind


def _find_files(folder: Path, split: str) -> tuple[str, tuple[Path, ...], tuple[str, ...]]:
    """(kind, files of the split, notes) of a folder (rule 3)."""
    visible = [p for p in sorted(folder.rglob("*")) if p.is_file() and not any(q.startswith(".") for q in p.relative_to(folder).parts)]
    found = [path for path in visible if _kind_of(path) and path.stat().st_size > 0]
    wanted = _SPLIT_WORDS.get(split, split)
    chosen = [path for path in found if _split_of(path.relative_to(folder)) == wanted]
    if not chosen:
        if found:
            others = ", ".join(sorted({_split_of(path.relative_to(folder)) for path in found}))
            raise DataError(f"{folder} has no file of the split {split!r}; it has {others}; name one with --split")
        raise DataError(f"{folder} has no file of a known kind ({_READABLE}) that is not empty")
    kinds = sorted({str(_kind_of(path)) for path in chosen})
    if len(kinds) > 1:
        examples = ", ".join(next(p.name for p in chosen if _kind_of(p) == kind) for kind in kinds)
        raise DataError(f"{folder} has files of {len(kinds)} kinds ({examples}); name one file, or a folder with one kind")
    left_out = [path for path in visible if path not in set(chosen)]
    notes = []
    if left_out:
        names = ", ".join(str(path.relative_to(folder)) for path in left_out[:3])
        notes.append(f"{len(left_out)} files of {folder} are not read ({names}{' …' if len(left_out) > 3 else ''})")
    return kinds[0], tuple(chosen), tuple(notes)


def _split_of(path: Path) -> str:
    words = [word for part in path.parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")


def _read_file(path: Path, kind: str) -> Iterator[RawRow]:
    if kind in ("parquet", "arrow"):
        datasets = _import_datasets(str(path))
        try:  # streaming: rows are read where they lie and not copied into a cache
            yield from _number(datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True), str(path))
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # pyarrow's and the library's errors have no common base
            raise DataError(f"cannot read {path} as {kind}: {_first_line(error)}; write it again") from error
        return
    try:
        yield from {"jsonl": _read_json_lines, "json": _read_json, "csv": _read_csv}[kind](path)
    except (OSError, EOFError) as error:  # EOFError: a .gz that ends early
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; name a file that can be read") from error


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except ValueError as error:  # covers bytes that are no UTF-8
                raise DataError(f"{path}:{line} is no JSON: {error}") from error
            yield _object(row, str(path), line)


def _read_json(path: Path) -> Iterator[RawRow]:
    """The elements of an array, or objects one after the other, decoded as they come (rule 2)."""
    decoder = json.JSONDecoder()
    with _open_text(path) as file:
        text, end_of_file, number, in_array = "", False, 0, False
        while True:
            text = text.lstrip("\ufeff \t\r\n," if number else "\ufeff \t\r\n")
            if not in_array and number == 0 and text.startswith("["):
                in_array, text = True, text[1:].lstrip()
            if text.startswith("]") and in_array:
                if (text[1:] + _read_text(file, path, 1 << 16)).strip():
                    raise DataError(f"{path} goes on after the end of its array (element {number}); write one array")
                return
            try:
                row, end = decoder.raw_decode(text)
            except ValueError as error:
                if end_of_file:
                    if text or in_array:
                        what = "ends inside its array" if not text else f"is no JSON at element {number + 1}: {error}"
                        raise DataError(f"{path} {what}") from error
                    return
                # What is left is the start of an element: at least as much again is read, so that long ones cost no square.
                more = _read_text(file, path, max(1 << 16, len(text)))
                text, end_of_file = text + more, not more
                continue
            number += 1
            yield _object(row, str(path), number)
            text = text[end:]


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # the module's default refuses a cell of more than 128 KiB
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    with _open_text(path) as file:
        reader = csv.DictReader(_lines(file, path), delimiter=delimiter, strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}:{reader.reader.line_num} is no CSV: {error}") from error
            if row is None:
                return
            if None in row or None in row.values():
                count = len(row) + len(row[None]) - 1 if None in row else sum(value is not None for value in row.values())
                raise DataError(
                    f"{path}:{reader.line_num} has {count} columns, the header {len(reader.fieldnames or ())}; quote its commas"
                )
            yield RawRow(source=str(path), line=reader.line_num, fields=row)


def _object(row: Any, source: str, line: int) -> RawRow:
    if not isinstance(row, dict):
        raise DataError(f"{source}:{line} is a JSON {type(row).__name__}, expected an object")
    return RawRow(source=source, line=line, fields=row)


def _number(rows: Any, source: str) -> Iterator[RawRow]:
    for line, row in enumerate(rows, 1):
        yield RawRow(source=source, line=line, fields=row)


def _open_text(path: Path) -> IO[str]:
    # newline="": line ends stay as they are, as csv wants it and as text was written.
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[return-value]
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file that can be read") from error


def _read_text(file: IO[str], path: Path, size: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8: {error}; convert it") from error


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    line = 0
    try:
        for text in file:
            line += 1
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 after line {line}: {error}; convert it") from error


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{what} is read through the datasets library, which is not installed; run: pip install datasets") from error
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
