"""Rows of csv, tsv, jsonl and parquet files, each with its place, and every cell of a table the text that it is."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalsets.sets.record import Record
from suite.errors import SuiteError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
HEADERLESS = ("question", "A", "B", "C", "D", "answer")
"""The columns of MMLU's files, which do not name them."""
COLUMNS = {"Question": "question", "Answer": "answer"}
"""Columns of CMMLU by the names that others use."""


def rows(path: Path, *, texts: bool = False) -> Iterator[Record]:
    """Each row with its place. With `texts` the numbers of JSON stay as they are written: 1.10 is "1.10".

    Raises SuiteError with the place of whatever cannot be read.
    """
    if path.suffix == ".jsonl":
        return _jsonl(path, texts)
    if path.suffix == ".parquet":
        return _parquet(path)
    return _table(path)


def names_columns(path: Path) -> bool:
    """Whether the first line of a csv or tsv file names its columns."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return _names(next(csv.reader(file, delimiter=_delimiter(path)), [])) is not None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _table(path: Path) -> Iterator[Record]:
    """Rows of a csv or tsv file with the line on which each ends."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=_delimiter(path))
        try:
            first = next(reader, [])
            header = _names(first)
            if header is None:
                header = list(HEADERLESS)
                yield Record(dict(zip(header, first, strict=True)), path, reader.line_num)
            if len(set(header)) < len(header):
                raise SuiteError("two columns have one name", where=f"{path}:1")
            for values in reader:
                if len(values) != len(header) and values:
                    what = f"{len(values)} values in a table of {len(header)} columns"
                    raise SuiteError(what, where=f"{path}:{reader.line_num}", hint="quote values that contain commas")
                if values:
                    yield Record(dict(zip(header, values, strict=True)), path, reader.line_num)
        except csv.Error as error:
            raise SuiteError(f"not valid CSV: {error}", where=f"{path}:{reader.line_num}") from None
        except UnicodeDecodeError as error:
            raise SuiteError(f"not UTF-8: {error}", where=str(path)) from None


def _names(first: list[str]) -> list[str] | None:
    """The columns that a first line names, "Question" and "" of CMMLU as "question" and "id"; None if it is a row."""
    if len(first) == len(HEADERLESS) and first[-1].strip() in ("A", "B", "C", "D") and "question" not in first:
        return None
    known = COLUMNS | ({"": "id"} if "id" not in first else {})
    return [known.get(name.strip(), name.strip()) for name in first]


def _jsonl(path: Path, texts: bool) -> Iterator[Record]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SuiteError(f"not UTF-8: {error}", where=str(path)) from None
    as_written: dict[str, Any] = {"parse_int": str, "parse_float": str} if texts else {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, **as_written)
        except ValueError as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise SuiteError(f"not valid JSON: {what}", where=f"{path}:{number}") from None
        except RecursionError:
            raise SuiteError("JSON is nested too deeply", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise SuiteError("expected an object {...} on each line", where=f"{path}:{number}")
        yield Record(row, path, number)


def _parquet(path: Path) -> Iterator[Record]:
    """Rows of a parquet file, by number; a cell without a value is not in its row."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise SuiteError(f"not a parquet file: {error}", where=str(path)) from None
    for number, row in enumerate(table.to_pylist(), 1):
        plain = {
            name: value if isinstance(value, str | list | dict | bool) else str(value) for name, value in row.items()
        }
        named = {COLUMNS.get(name, name): plain[name] for name in row if row[name] is not None}
        yield Record(named, path, number)
