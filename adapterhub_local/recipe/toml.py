"""TOML as people write it, read within bounds: what is not a file, too long or nested too deeply is refused at once."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.regular import read_regular

MAX_BYTES = 256 << 10  # a recipe has some thousand
MAX_PROBLEMS = 50  # named one by one; of the others only how many there are
MAX_NAME = 60  # letters of a name that are shown, and in which a slip of the finger is looked for
_SEEN = 1000  # letters of a line in which its key is looked for
# tomllib takes time with the square of a key's parts; no key of ours has more than five
_LONG_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]{1,1000}+|"[^"\n]{0,1000}+"|'[^'\n]{0,1000}+')[ \t]{0,9}+\.[ \t]{0,9}+){20}""", re.ASCII
)
_HEADER = re.compile(r"\s*\[\[?\s*([^\]]+?)\s*\]")
_KEY = re.compile(r"\s*[\"']?([A-Za-z0-9_.-]+)[\"']?\s*=")


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and tables of the file at `path`. Raises OSError if it cannot be read, ValueError if it is not TOML."""
    raw = read_regular(path, MAX_BYTES)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OSError(0, "it is not UTF-8", str(path)) from None
    text = text.replace("\r\n", "\n")
    return text, parse_toml(text)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables in `text`. Raises ValueError, also for what the parser's stack or numbers cannot hold."""
    if _LONG_KEY.search(text):
        raise ValueError("it has a key of more than 20 parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@dataclass
class Places:
    """Where tables and keys are written, found in one pass; tomllib does not report them.

    `tables` are the tables of each name, in order, each with its keys; line numbers count from 1.
    """

    tables: dict[str, list[int]] = field(default_factory=dict)
    below: dict[str, int] = field(default_factory=dict)  # the first table inside each
    roots: dict[str, int] = field(default_factory=dict)  # what is written before any table, to its first dot
    keys: dict[str, int] = field(default_factory=dict)  # dotted names, those of tables and all they begin with
    own: dict[tuple[str, int, str], int] = field(default_factory=dict)  # (table, which of its name, key)

    @classmethod
    def of(cls, lines: Sequence[str]) -> "Places":
        found = cls()
        current = ""
        for number, line in enumerate(lines, 1):
            if match := _HEADER.match(line, 0, _SEEN):
                current = match[1].strip("\"'")
                found.tables.setdefault(current, []).append(number)
                found.keys.setdefault(current, number)
                for start in _starts(current):
                    found.below.setdefault(start, number)
            if not (named := _KEY.match(line, 0, _SEEN)):
                continue
            full = f"{current}.{named[1]}" if current else named[1]
            for start in (full, *_starts(full)):
                found.keys.setdefault(start, number)
            if not current:
                found.roots.setdefault(named[1].partition(".")[0], number)
            found.own.setdefault((current, len(found.tables.get(current, ())) - 1, named[1]), number)
        return found

    def line(self, table: str, key: str | None) -> int | None:
        """The line of a key of a table, or of the table."""
        if key is not None and (number := self.keys.get(f"{table}.{key}")):
            return number
        if key is None and table in self.roots:
            return self.roots[table]
        return self.tables[table][-1] if table in self.tables else self.below.get(table)


def _starts(name: str) -> list[str]:
    """`a` and `a.b` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, min(len(parts), 20))]


def short(name: str) -> str:
    """A name as messages show it."""
    return name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
