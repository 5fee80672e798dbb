"""The request log of `qhub serve`: lines of answers and of feedback on them, in files that begin anew when one is full.

The server appends to a file of its own and never changes what is there, so a crash leaves at most one unfinished line.
Whatever a file holds, it can be read: what is not a record is reported with its place.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub_local.errors import BadData
from adapterhub_local.regular import open_regular

ANSWER, FEEDBACK = "answer", "feedback"  # kinds of records
FILE = re.compile(r"answers-\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8}\.jsonl")  # by name as by time
# how the line of every answer begins, so that it is known whose it is without reading all of it
_HEAD = re.compile(
    rb'\{"kind":"answer","id":"([\w.:-]{1,128})","key":(?:null|"([0-9a-f]{8})"),"num_choices":(\d{1,4}),'
)
# what some readers take for the end of a line, though JSON allows it in texts
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True)
class Head:
    """Which answer a line is of: its id, the id of the key that asked for it, and how many choices it has."""

    id: str
    owner: str | None
    num_choices: int


@dataclass(frozen=True)
class Entry:
    """A line of a log: what it says, or what is wrong with it. `where` names file and line."""

    where: str
    record: dict[str, Any] | None
    problem: str = ""


def new_name() -> str:
    """The name of a file that begins now: no other has it, and names are in the order of time."""
    return f"answers-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z-{uuid.uuid4().hex[:8]}.jsonl"


def now() -> str:
    """The time of a record: UTC, to the millisecond, so that times are compared as texts."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line(value: Any) -> bytes:
    """A value as one line of JSON, UTF-8, which every reader of lines takes for one. Raises ValueError, RecursionError
    for what JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_BREAKS)
    return text.encode(errors="backslashreplace") + b"\n"  # half a character is escaped, as JSON allows


def log_files(folder: Path) -> list[Path]:
    """The files of a log, oldest first; none if the folder is not there. Links of such names are not files of it."""
    try:
        with os.scandir(folder) as found:
            names = [each.name for each in found if FILE.fullmatch(each.name) and each.is_file(follow_symlinks=False)]
        return [folder / name for name in sorted(names)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def heads(file: BinaryIO) -> Iterator[Head]:
    """Whose the answers are from where an open file stands; it stands behind the last whole line afterwards."""
    at = file.tell()
    for row in file:
        if not row.endswith(b"\n"):  # it is being written
            break
        at += len(row)
        if match := _HEAD.match(row):
            yield Head(match[1].decode(), match[2].decode() if match[2] else None, int(match[3]))
    file.seek(at)


def read_log(folder: Path) -> Iterator[Entry]:
    """Every line of the log in `folder`, file by file. Raises BadData if there is none, or a file cannot be opened."""
    files = log_files(folder)
    if not files:
        what = "holds no request log" if folder.is_dir() else "is not a folder with a request log"
        raise BadData(f"{folder} {what}: `qhub serve --request-log FOLDER` writes one")
    for path in files:
        try:
            with open_regular(path) as file:
                for number, row in enumerate(file, 1):
                    if row.strip():
                        yield _entry(f"{path.name}:{number}", row)
        except FileNotFoundError:  # the server has made room meanwhile
            yield Entry(path.name, None, "the file was removed while the log was read, since the log was full")
        except OSError as error:
            raise BadData(f"{path} cannot be read: {error.strerror or error}") from None


def _entry(where: str, row: bytes) -> Entry:
    try:
        record = json.loads(row)
    except (ValueError, RecursionError):
        what = "not JSON" if row.endswith(b"\n") else "the line is not finished: the server ended while it wrote it"
        return Entry(where, None, what)
    problem = _wrong(record)
    return Entry(where, None if problem else record, problem)


def _wrong(record: Any) -> str:
    """What keeps a line from being a record; empty if it is one."""
    if not isinstance(record, Mapping) or record.get("kind") not in (ANSWER, FEEDBACK):
        return "neither an answer nor feedback"
    if not isinstance(record.get("id"), str) or not isinstance(record.get("time"), str):
        return "a record without id or time"
    if record["kind"] == FEEDBACK:
        rating, correction, choice = record.get("rating"), record.get("correction"), record.get("choice")
        is_rated = isinstance(rating, int | float) and not isinstance(rating, bool) and 0 <= rating <= 1
        if not (rating is None or is_rated) or not (correction is None or _is_message(correction)):
            return "feedback whose rating is not from 0 to 1, or whose correction is not a message"
        return "" if isinstance(choice, int) else "feedback that does not say on which choice"
    messages, tools, choices = record.get("messages"), record.get("tools"), record.get("choices")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        return "an answer without the messages that it answers"
    if not isinstance(tools, list) or not isinstance(record.get("base"), Mapping):
        return "an answer without its tools or its base"
    if not isinstance(choices, list) or not all(
        isinstance(choice, Mapping) and _is_message(choice.get("message")) for choice in choices
    ):
        return "an answer without its choices"
    return ""


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
