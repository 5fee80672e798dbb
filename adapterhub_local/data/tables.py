"""Rows of Parquet and Arrow files, and the names that a dataset's own metadata give to a column's numbers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.source import data_suffix


def arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .parquet or .arrow file. Raises BadData, or InputError where pyarrow is missing."""
    with _pyarrow(path):
        number = 0
        for batch in _batches(path):
            for row in _dicts(batch):
                number += 1
                where = f"{path} example {number}"
                yield where, BadData(f"{where}: {row}") if isinstance(row, KeyError) else row


def _dicts(batch: Any) -> list[Any]:
    """The rows of a batch, maps as tables (by default they would be lists of pairs); a KeyError for a row whose map has
    a key twice, of whose values one would be lost."""
    try:
        return list(batch.to_pylist(maps_as_pydicts="strict"))
    except KeyError:
        if batch.num_rows == 1:
            return [_Twice()]
        return [row for number in range(batch.num_rows) for row in _dicts(batch.slice(number, 1))]


class _Twice(KeyError):
    def __str__(self) -> str:
        return "a map has a key twice, and one of its values would be lost"


def class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Column -> the names of its numbers, as Hugging Face datasets keep them in a Parquet or Arrow file."""
    if data_suffix(path) not in (".parquet", ".arrow"):
        return {}
    with _pyarrow(path):
        metadata = _schema(path).metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


@contextmanager
def _pyarrow(path: Path) -> Iterator[None]:
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise InputError(
            f"{path}: Parquet and Arrow need the package pyarrow: pip install pyarrow, or convert the file to .jsonl"
        ) from None
    try:
        yield
    except ArrowException as error:
        kind = "Parquet" if data_suffix(path) == ".parquet" else "an Arrow file"
        raise BadData(f"{path} is not {kind}: {str(error).splitlines()[0]}") from None


def _batches(path: Path) -> Iterator[Any]:
    if data_suffix(path) == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1024)
        return
    with open(path, "rb") as stream:
        yield from _arrow_reader(stream)


def _arrow_reader(stream: Any) -> Any:
    """Batches of an Arrow stream, as `save_to_disk` writes them, or of an Arrow file."""
    from pyarrow import ArrowInvalid, ipc

    try:
        return ipc.open_stream(stream)
    except ArrowInvalid:
        stream.seek(0)
        reader = ipc.open_file(stream)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _schema(path: Path) -> Any:
    if data_suffix(path) == ".parquet":
        from pyarrow.parquet import read_schema

        return read_schema(path)
    with open(path, "rb") as stream:
        from pyarrow import ArrowInvalid, ipc

        try:
            return ipc.open_stream(stream).schema
        except ArrowInvalid:
            stream.seek(0)
            return ipc.open_file(stream).schema
