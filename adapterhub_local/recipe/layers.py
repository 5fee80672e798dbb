"""The TOML of a recipe as written: the file, those it extends, and `--set`, each value with the place it comes from."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadRecipe, NotFound

EXTENDS = "extends"


@dataclass(frozen=True)
class Layer:
    """The tables of one file, or of all overrides; `label` is what its messages begin with."""

    label: str
    path: Path
    tables: Mapping[str, Any]
    text: str = field(default="", repr=False)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def is_file(self) -> bool:
        """Whether it is a file's: what the command line or a sweep changes has no lines to name."""
        return self.label == str(self.path)

    def place(self, table: str, key: str | None) -> str:
        """`recipe.toml:12`, or the label alone where there is no line."""
        line = line_of(self.lines, table, key)
        return f"{self.label}:{line}" if line else self.label


def read_layers(path: Path) -> list[Layer]:
    """The recipe at `path` and all it extends, the most general first.

    Raises NotFound if there is no such file, BadRecipe for what is no TOML, or for files that extend each other.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        layer = _read(path, layers[-1] if layers else None)
        if path.resolve() in seen:
            round_trip = " > ".join(item.path.name for item in (*layers, layer))
            raise BadRecipe(f"{layers[-1].place(EXTENDS, None)}: recipes extend each other: {round_trip}")
        seen.append(path.resolve())
        layers.append(layer)
        parent = layer.tables.get(EXTENDS)
        if parent is None:
            return layers[::-1]
        if not isinstance(parent, str) or not parent.strip():
            raise BadRecipe(f"{layer.place(EXTENDS, None)}: extends must be the name of another recipe")
        path = layer.path.parent / os.path.expanduser(parent)


def _read(path: Path, child: Layer | None) -> Layer:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if child is None:
            raise NotFound(f"there is no recipe {path}: `qhub recipe init {path}` writes one to begin with") from None
        raise BadRecipe(f"{child.place(EXTENDS, None)}: extends: there is no recipe {path}") from None
    except (OSError, ValueError) as error:
        where = f"{child.place(EXTENDS, None)}: extends: " if child else ""
        shown = str(path).encode("unicode_escape").decode()[:200]
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadRecipe(f"{where}{shown} cannot be read as text: {reason or str(error)[:200]}") from None
    try:
        return Layer(str(path), path, tomllib.loads(text), text)
    except (ValueError, RecursionError) as error:  # tomllib lets through what int() and the stack refuse
        yaml = path.suffix.lower() in (".yaml", ".yml")
        told = "recipes are TOML, `qhub recipe init` writes one to begin with" if yaml else error
        raise BadRecipe(f"{path}: not TOML: {told}") from None


def overriding(overrides: Sequence[str], path: Path, label: str = "--set") -> Layer:
    """The layer of overrides such as `train.seed=1`; a value is TOML, or plain text if it is none. Raises BadRecipe."""
    tables: dict[str, Any] = {}
    for override in overrides:
        target, equals, raw = override.partition("=")
        table, dot, key = target.strip().partition(".")
        if not (equals and dot and key):
            raise BadRecipe(f"--set {override}: write table.key=value, such as train.seed=1")
        try:
            value = tomllib.loads(f"value = {raw}")["value"]
        except (ValueError, RecursionError):
            value = raw.strip()
        tables.setdefault(table, {})[key] = value
    return Layer(label, path, tables)


def line_of(lines: Sequence[str], table: str, key: str | None) -> int | None:
    """The line where a table, or a key in it, is written; tomllib does not tell."""
    current, header = "", None
    for number, line in enumerate(lines, 1):
        if match := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            current = match[1].strip("\"'")
            header = number if current == table or (header is None and current.startswith(f"{table}.")) else header
            if key is not None and current == f"{table}.{key}":
                return number
        named = re.match(r"\s*[\"']?([A-Za-z0-9_.-]+)[\"']?\s*=", line)
        if not named:
            continue
        full = f"{current}.{named[1]}" if current else named[1]
        if key is not None and (full == f"{table}.{key}" or full.startswith(f"{table}.{key}.")):
            return number
        if key is None and current == "" and named[1].partition(".")[0] == table:
            return number
    return header


def nested_keys(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested tables with its dotted key; TOML makes tables of keys with dots."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from nested_keys(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
