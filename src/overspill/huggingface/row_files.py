"""Files of rows, read from the first row to the last without ever holding more than some of them (`rows`, rules 1 and 2).

Each reader yields `RawRow`s and raises `DataError` with file and line: a file that cannot be opened, bytes that are no UTF-8, a line
that is no JSON, a row with other columns than its header.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from overspill.errors import DataError

_ARROW_ROWS = 1024
"""Rows that are made Python objects at a time. Chosen, not tuned."""


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


def read_file(path: Path, kind: str) -> Iterator[RawRow]:
    if kind in ("parquet", "arrow"):
        pyarrow = import_library("pyarrow", str(path), "pyarrow, which comes with the datasets library")
        try:
            batches = _parquet_batches(path) if kind == "parquet" else _arrow_batches(path)
            yield from number_rows((row for batch in batches for row in batch.to_pylist()), str(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as {kind}: {first_line(error)}; write it again") from error
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
    with open_text(path) as file:
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
    with open_text(path) as file:
        reader = csv.DictReader(read_lines(file, path), delimiter=delimiter, strict=True)
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


def number_rows(rows: Any, source: str) -> Iterator[RawRow]:
    for line, row in enumerate(rows, 1):
        yield RawRow(source=source, line=line, fields=row)


def open_text(path: Path) -> IO[str]:
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


def read_lines(file: IO[str], path: Path) -> Iterator[str]:
    line = 0
    try:
        for text in file:
            line += 1
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 after line {line}: {error}; convert it") from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    # pre_buffer keeps every column chunk of the file: +100 MiB of memory for a file of 92 MiB, +12 MiB without.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=_ARROW_ROWS, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            batches: Iterator[Any] = iter(pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file formats
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, len(batch), _ARROW_ROWS):
                yield batch.slice(start, _ARROW_ROWS)


def import_library(module: str, what: str, through: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{what} is read through {through}, which is not installed; run: pip install datasets") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
