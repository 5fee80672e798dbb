"""Rows of data files: JSON lines, JSON, CSV, Parquet or plain text, each row with the place it stands at.

Text is UTF-8, or UTF-16 with the mark at its start that Windows writes.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.source import SUFFIXES, data_suffix
from adapterhub_local.regular import open_regular

Row = tuple[str, Any]  # (`file:line`, what stands there)
CHATS = frozenset(("messages", "conversations"))  # lists in one example, not of examples


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file, read by its suffix; `.gz` is unpacked. One without a known suffix is read as JSON lines.

    Raises BadData with file and line for what cannot be read, InputError where a package is missing for it.
    """
    suffix = data_suffix(path) or ".jsonl"
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            if suffix in (".csv", ".tsv"):
                yield from _csv(file, path, "\t" if suffix == ".tsv" else None)
            elif suffix == ".json":
                yield from _json(file, path)
            elif suffix == ".txt":
                yield f"{path}", {"text": file.read()}
            else:
                yield from _json_lines(file, path)
    except FileNotFoundError:
        raise BadData(f"there is no data file {path}") from None
    except UnicodeError:
        raise BadData(f"{path}:{_undecodable(path)}: not UTF-8 text: save the file as UTF-8") from None
    except (OSError, EOFError) as error:
        raise BadData(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> TextIO:
    with _open_bytes(path) as file:
        start = file.read(2)
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


def _open_bytes(path: Path) -> BinaryIO:
    file = open_regular(path)
    return gzip.open(file) if path.name.lower().endswith(".gz") else file  # type: ignore[return-value]


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1  # UTF-16 that breaks off


def _json_lines(file: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            if line.lstrip().startswith("[") and number == 1:  # a whole JSON file under this name
                yield from _json(io.StringIO(line + file.read()), path)
                return
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}", is_line=True)


def _json(file: TextIO, path: Path) -> Iterator[Row]:
    """A list of rows, a table that holds one (alone, or as `data`), one row, or JSON lines under this name."""
    text = file.read()
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.strip():
        yield from _json_lines(io.StringIO(text), path)
        return
    rows = _parsed(text, str(path)) if text.strip() else []
    if isinstance(rows, dict):
        name = next(iter(rows)) if len(rows) == 1 else "data"
        rows = rows[name] if name not in CHATS and isinstance(rows.get(name), list) else [rows]
    if not isinstance(rows, list):
        raise BadData(f"{path}: a JSON file must hold a list of examples")
    yield from ((f"{path} example {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: str, where: str, *, is_line: bool = False) -> Any:
    try:
        parsed = json.loads(text)
        if "\\ud" in text.lower():  # escapes of halves of characters, which only make sense in pairs
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadData(f"{where}: half a character: an escape such as \\ud83d without its other half") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too long a number"
        line = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) and not is_line else ""
        if is_line:
            path = Path(where.rpartition(":")[0])
            reason += "; write each example on one line" + (
                "" if data_suffix(path) else f", or end the name in what the file is: {', '.join(SUFFIXES)}"
            )
        raise BadData(f"{where}: not JSON: {reason}{line}") from None
    return parsed


def _csv(file: TextIO, path: Path, delimiter: str | None) -> Iterator[Row]:
    """Rows by the columns of the header; without a `delimiter` that of the header: a comma, or what Excel writes."""
    csv.field_size_limit(2**31 - 1)  # a long text is one field
    header = file.readline()
    if "\0" in header:
        raise BadData(f"{path}:1: not UTF-8 text: save the file as UTF-8")
    delimiter = delimiter or next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.DictReader(itertools.chain([header], file), delimiter=delimiter, strict=True)
    begins = 1
    try:
        columns = reader.fieldnames or ()
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise BadData(f"{path}:1: two columns are called '{twice[0]}'")
        for row in reader:
            where, begins = f"{path}:{reader.line_num}", reader.line_num
            if None in row or None in row.values():
                raise BadData(
                    f"{where}: this row does not have the {len(reader.fieldnames or ())} columns of the header"
                )
            yield where, row
    except csv.Error as error:
        raise BadData(f"{path}:{begins + 1}: not CSV: {error} in the row that begins here") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"{path}: Parquet needs the package pyarrow: pip install pyarrow, or convert the file to .jsonl"
        ) from None
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} example {number}", row
    except ArrowException as error:
        raise BadData(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None
