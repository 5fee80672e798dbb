"""Rows of data files: JSON lines, JSON, CSV, Parquet, Arrow or plain text, each row with the place it stands at.

Text is UTF-8, or UTF-16 with the mark at its start that Windows writes. A row that cannot be read is given as the
BadData that says why, so that the others are still looked at.
"""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from adapterhub_local.counts import counted
from adapterhub_local.data.compressed import open_bytes, unpacking
from adapterhub_local.data.tables import arrow_rows
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.source import SPLITS, SUFFIXES, data_suffix

Row = tuple[str, Any]  # (`file:line`, what stands there)
CHATS = frozenset(("messages", "conversations"))  # lists in one example, not of examples
DELIMITERS = ",;\t|^~\x1f\x01:"


def read_rows(path: Path, role: str = "train") -> Iterator[Row]:
    """The rows of a data file, read by its suffix; what is compressed is unpacked. One without a known suffix is read
    as JSON lines. `role` is train or test, which a JSON file may hold both of.

    Raises BadData with file and line for what cannot be read, InputError where a package is missing for it.
    """
    suffix = data_suffix(path) or ".jsonl"
    try:
        if suffix in (".parquet", ".arrow"):
            yield from arrow_rows(path)
            return
        with unpacking(path), _open(path) as file:
            if suffix in (".csv", ".tsv"):
                yield from _csv(file, path, "\t" if suffix == ".tsv" else None)
            elif suffix == ".json":
                yield from _json(file, path, role)
            elif suffix == ".txt":
                yield f"{path}", {"text": file.read()}
            else:
                yield from _json_lines(file, path, role)
    except FileNotFoundError:
        raise BadData(f"there is no data file {path}") from None
    except UnicodeError:
        raise BadData(f"{path}:{_undecodable(path)}: not UTF-8 text: save the file as UTF-8") from None
    except (OSError, EOFError) as error:
        raise BadData(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> TextIO:
    with open_bytes(path) as file:
        start = file.read(2)
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="")


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1  # UTF-16 that breaks off


def _json_lines(file: TextIO, path: Path, role: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            if number == 1 and line.lstrip().startswith("[") and not _is_json(line):  # a whole JSON file of this name
                yield from _json(io.StringIO(line + file.read()), path, role)
                return
            if number == 1 and line.strip() == "{":
                raise BadData(
                    f"{path}:1: an example goes over several lines: write each on one line, or all as one list in a "
                    ".json file"
                )
            where = f"{path}:{number}"
            try:
                yield where, _parsed(line, where, is_line=True)
            except BadData as error:
                yield where, error


def _json(file: TextIO, path: Path, role: str) -> Iterator[Row]:
    """A list of rows, a table that holds one (alone, as `data`, or a split), columns, one row, or JSON lines."""
    text = file.read()
    first, _, rest = text.lstrip().partition("\n")
    is_line = (first.startswith("{") and first.rstrip().endswith("}")) or (first.startswith("[") and _is_json(first))
    if is_line and rest.strip():
        yield from _json_lines(io.StringIO(text), path, role)
        return
    rows = _parsed(text, str(path)) if text.strip() else []
    if isinstance(rows, dict):
        rows = _rows_of(rows, role)
    if not isinstance(rows, list):
        raise BadData(f"{path}: a JSON file must hold a list of examples")
    yield from ((f"{path} example {number}", row) for number, row in enumerate(rows, 1))


def _rows_of(table: dict[str, Any], role: str) -> list[Any]:
    splits = {name: rows for name, rows in table.items() if isinstance(rows, list)}
    for name in SPLITS[role]:
        if name in splits and set(splits) <= {known for names in SPLITS.values() for known in names}:
            return splits[name]
    name = next(iter(table)) if len(table) == 1 else "data"
    held = table.get(name)
    is_column = len(table) == 1 and isinstance(held, list) and bool(held) and isinstance(held[0], str)
    if isinstance(held, list) and name not in CHATS and not is_column and not {"columns", "index"} & table.keys():
        return list(held)
    return _from_columns(table) or [table]


def _from_columns(table: dict[str, Any]) -> list[Any]:
    """The rows of a table of columns, in each of the ways in which pandas writes one; none if it is a row itself."""
    columns, values = table.get("columns"), table.get("data")
    if isinstance(columns, list) and isinstance(values, list) and set(table) <= {"columns", "index", "data"}:
        return [dict(zip(columns, row, strict=False)) if isinstance(row, list) else row for row in values]
    if all(isinstance(column, dict) and column for column in table.values()):
        numbers = {tuple(column) for column in table.values()}
        if len(numbers) == 1 and all(number.isdigit() for number in next(iter(numbers))):
            return [
                dict(zip(table, row, strict=True)) for row in zip(*(c.values() for c in table.values()), strict=True)
            ]
    lists = [column for column in table.values() if isinstance(column, list)]
    if not lists or len(lists) < len(table) or len({len(column) for column in lists}) > 1:
        return []
    if any(isinstance(value, dict) for column in lists for value in column[:1]):  # messages, or tools: of one row
        return []
    return [dict(zip(table, row, strict=True)) for row in zip(*lists, strict=True)]


def _is_json(text: str) -> bool:
    """Whether a line is JSON, of a list of tables: messages, each line a conversation."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and {"role", "from"} & part.keys() for part in value)
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON. Raises ValueError if it has a key twice: one of the values would be lost."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice in one table")
    return table


def _parsed(text: str, where: str, *, is_line: bool = False) -> Any:
    try:
        parsed = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text.lower():  # escapes of halves of characters, which only make sense in pairs
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadData(f"{where}: half a character: an escape such as \\ud83d without its other half") from None
    except (ValueError, RecursionError) as error:
        if str(error).startswith("the key "):
            raise BadData(f"{where}: {error}") from None
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a number is too long"
        line = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) and not is_line else ""
        if is_line:
            path = Path(where.rpartition(":")[0])
            reason += ("; write each example on one line" if isinstance(error, json.JSONDecodeError) else "") + (
                "" if data_suffix(path) else f", or end the file's name in its format: {', '.join(SUFFIXES)}"
            )
        raise BadData(f"{where}: not JSON: {reason}{line}") from None
    return parsed


def _delimiter(header: str, following: str) -> str:
    """What separates the columns of a header: the first mark that divides it outside of quotes; rare ones only if they
    divide the next line in the same way."""
    for mark in DELIMITERS:
        try:
            first, second = (len(next(csv.reader([line], delimiter=mark), [])) for line in (header, following))
        except csv.Error:
            continue
        if first > 1 and (mark in DELIMITERS[:4] or first == second):
            return mark
    return ","


def _csv(file: TextIO, path: Path, delimiter: str | None) -> Iterator[Row]:
    """Rows by the columns of the header, without the blanks that stand after its delimiters."""
    csv.field_size_limit(2**31 - 1)  # a long text is one field
    header, following = file.readline(), file.readline()
    if "\0" in header:
        raise BadData(f"{path}:1: not UTF-8 text: save the file as UTF-8")
    delimiter = delimiter or _delimiter(header, following)
    is_spaced = f"{delimiter} " in header and delimiter != "\t"
    lines = itertools.chain([header, following] if following else [header], file)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True, skipinitialspace=is_spaced)
    begins = 1
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise BadData(f"{path}:1: two columns are called '{twice[0]}'")
        reader.fieldnames = columns
        for row in reader:
            where, begins = f"{path}:{reader.line_num}", reader.line_num
            if None in row or None in row.values():
                yield (
                    where,
                    BadData(f"{where}: this row does not have the {counted(len(columns), 'column')} of the header"),
                )
                continue
            yield where, row
    except csv.Error as error:
        raise BadData(f"{path}:{begins + 1}: not CSV: {error} in the row that begins here") from None
