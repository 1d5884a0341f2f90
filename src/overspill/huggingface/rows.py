"""Where training data comes from: files, folders of files, folders of `datasets`, hub names; read row by row.

A **row** is one JSON-like object; `tokenization` says which fields it may have. The kind of a file is known by its name:

* `.jsonl`, `.ndjson`: one JSON object a line; `.json`: an array of objects, or objects one after the other;
* `.csv`, `.tsv`: a header line, then one row a line; every value is a string;
* `.txt`, `.text`: running text, one document a file; it has no rows but pieces;
* `.parquet`, `.arrow`: through `pyarrow`, which the `datasets` library brings;
* a folder written by `Dataset.save_to_disk`, a name on the hub: through `datasets`.

Rule 1. A library is loaded only where it is needed. The kinds of the first three lines are read with Python's own readers, so that no
        copy of the data is left in a cache, and a completion of `42` stays a string; those files may end in `.gz`.
Rule 2. Nothing here holds more in memory than some rows (or a piece of `PIECE_CHARACTERS`), however long the file is.
Rule 3. A folder is read as one data set: its files in the order of their names, all of one kind. A file whose name has a word such
        as `test` or `validation` belongs to that split and is left out unless it is asked for; what is left out is said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from overspill.errors import DataError
from overspill.huggingface.row_files import RawRow, first_line, import_library, number_rows, open_text, read_file, read_lines

PIECE_CHARACTERS = 1 << 18
"""Running text is tokenized in pieces of about this size, cut at line ends: 1 << 20 took 190 MiB inside the tokenizer."""

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
            rows = number_rows(self._open_dataset(), self.name)
        else:
            rows = (row for path in self.files for row in read_file(path, self.kind))
        for row in rows:
            yield dataclasses.replace(row, fields=self._rename(row)) if self.fields else row

    def pieces(self) -> Iterator[tuple[Path, str]]:
        """(file, text) of running text; a file's pieces follow each other and give its text when joined."""
        assert self.is_running_text
        for path in self.files:
            with open_text(path) as file:
                piece: list[str] = []
                size = 0
                for line in read_lines(file, path):
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
        what = "a folder written by datasets" if self.kind == "saved" else "a name on the hub"
        datasets = import_library("datasets", f"{self.name} ({what})", "the datasets library")
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
            raise DataError(f"cannot read {self.name} through datasets: {first_line(error)}; {cure}") from error


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
