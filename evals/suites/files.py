"""Rows of JSON, JSON lines, TSV and parquet files, each with where it stands, and cells checked for their type."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any

from mmcompress.errors import InputError, UnsupportedError

MAX_CELL = 2**28
_BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One entry of a file; what is read from it is there and of the right type, or an `InputError` says it is not."""

    where: str
    cells: Any
    fault: str = "the entry is no object."

    def cell(self, name: str) -> Any:
        """Whatever stands under `name`."""
        if not isinstance(self.cells, Mapping):
            raise InputError(self.fault)
        if self.cells.get(name) is None:
            raise InputError(f"{name!r} is missing.")
        return self.cells[name]

    def has(self, name: str) -> bool:
        """Whether anything but an empty text stands under `name`."""
        return isinstance(self.cells, Mapping) and self.cells.get(name) not in (None, "")

    def text(self, name: str) -> str:
        """A text, or a whole number written out."""
        value = self.cell(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(f"{name!r} is {_kind(value)}, not a text.")
        return str(value)

    def number(self, name: str) -> int:
        """A whole number."""
        value = self.cell(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name!r} is {_kind(value)}, not a whole number.")
        return value

    def texts(self, name: str, within: str | None = None) -> tuple[str, ...]:
        """A list of at least one text, or one text; of the objects in it, what stands under `within`."""
        value = self.cell(name)
        listed = value if isinstance(value, list) else [value]
        if within is not None:
            listed = [entry.get(within) if isinstance(entry, Mapping) else entry for entry in listed]
        if not listed or not all(isinstance(entry, str | int) and not isinstance(entry, bool) for entry in listed):
            raise InputError(f"{name!r} is not a list of texts.")
        return tuple(str(entry) for entry in listed)


def json_rows(path: Path, key: str | None = None) -> Iterator[Row]:
    """Entries of the list or object that is the file, or that stands under `key` in it.

    An entry of an object has its name under the name "key".

    Raises:
        InputError: the file is no JSON, or not of this form.
    """
    text = _read(path)
    line, counted = 1, 0
    try:
        for name, value, at in _members(text, key):
            line, counted = line + text.count("\n", counted, at), at
            where = f"{path.name}, line {line}, entry {name}"
            yield Row(where, {**value, "key": name} if isinstance(name, str) and isinstance(value, dict) else value)
    except JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: no valid JSON: {error.msg}.") from error


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Lines of a file with a JSON object each; lines that are none are rows whose cells cannot be read."""
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError):
                cells = None
            yield Row(f"{path.name}, line {number}", cells, "the line is no JSON object.")


def tsv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a table with tabs between cells, quoted as in CSV; empty cells are left out.

    Raises:
        InputError: it is no such table, or lacks one of `columns`.
    """
    before = csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            absent = [column for column in columns if column not in (reader.fieldnames or ())]
            if absent:
                raise InputError(f"{path.name} has no column {', '.join(map(repr, absent))}.")
            while True:
                where = f"{path.name}, line {reader.line_num + 1}"
                row = next(reader, None)
                if row is None:
                    return
                if None in row or None in row.values():
                    yield Row(where, None, "it has not one cell for each column.")
                else:
                    yield Row(where, {name: cell for name, cell in row.items() if cell != ""})
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read as a table: {error}") from error
    finally:
        csv.field_size_limit(before)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet file.

    Raises:
        UnsupportedError: pyarrow is not installed.
        InputError: the file is no parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UnsupportedError(f"parquet files need pyarrow: pip install 'mmcompress[evals]' ({error})") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"{path.name}, row {number}", cells)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _members(text: str, key: str | None, at: int = 0) -> Iterator[tuple[str | int, Any, int]]:
    """Name or number, value and place of every member of a JSON list or object, those under `key` if given."""
    decoder = JSONDecoder()
    at = _past_blanks(text, at)
    opened = text[at : at + 1]
    if opened not in ("{", "["):
        raise JSONDecodeError("a list or an object was expected", text, at)
    closed = "}" if opened == "{" else "]"
    at = _past_blanks(text, at + 1)
    number = 0
    while text[at : at + 1] != closed:
        start, name = at, number
        if opened == "{":
            name, at = decoder.raw_decode(text, at)
            at = _past_blanks(text, at)
            if text[at : at + 1] != ":":
                raise JSONDecodeError("a colon was expected", text, at)
            at = _past_blanks(text, at + 1)
            if name == key:
                yield from _members(text, None, at)
                return
        value, at = decoder.raw_decode(text, at)
        if key is None:
            yield name, value, start
        number += 1
        at = _past_blanks(text, at)
        if text[at : at + 1] == ",":
            at = _past_blanks(text, at + 1)
        elif text[at : at + 1] != closed:
            raise JSONDecodeError("a comma was expected", text, at)
    if key is not None:
        raise JSONDecodeError(f"there is no {key!r} in it", text, at)


def _past_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a text",
    }
    return names.get(type(value), f"a {type(value).__name__}")
