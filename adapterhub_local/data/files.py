"""Rows of data files: JSON lines, JSON, CSV, Parquet or plain text, each row with the place it stands at."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.source import data_suffix

Row = tuple[str, Any]  # (`file:line`, what stands there)


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
                yield from _csv(file, path, "\t" if suffix == ".tsv" else ",")
            elif suffix == ".json":
                yield from _json(file, path)
            elif suffix == ".txt":
                yield f"{path}", {"text": file.read()}
            else:
                yield from _json_lines(file, path)
    except FileNotFoundError:
        raise BadData(f"there is no data file {path}") from None
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise BadData(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> TextIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _json_lines(file: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _json(file: TextIO, path: Path) -> Iterator[Row]:
    """A list of rows, a table that holds one such list, or JSON lines under this name."""
    text = file.read()
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.strip():
        yield from _json_lines(io.StringIO(text), path)
        return
    rows = _parsed(text, str(path)) if text.strip() else []
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 and len(rows) == 1 else [rows]
    if not isinstance(rows, list):
        raise BadData(f"{path}: a JSON file must hold a list of examples")
    yield from ((f"{path} example {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too long a number"
        line = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) and error.lineno > 1 else ""
        raise BadData(f"{where}: not JSON: {reason}{line}") from None


def _csv(file: TextIO, path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a long text is one field
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise BadData(
                    f"{where}: this row does not have the {len(reader.fieldnames or ())} columns of the header"
                )
            yield where, row
    except csv.Error as error:
        raise BadData(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"{path}: Parquet needs pyarrow: pip install 'adapterhub-local[parquet]', or convert the file to .jsonl"
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
