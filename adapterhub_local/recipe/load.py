"""Read a recipe strictly: every mistake at once, each with file, line, key and the nearest known key."""

import difflib
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadRecipe, NotFound
from adapterhub_local.recipe.schema import TABLES, Recipe

_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a file name"}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file at `path`, with `overrides` such as `train.seed=1` applied.

    Raises NotFound if there is no file, BadRecipe with one line for each thing that is wrong: not
    TOML, unknown tables or keys, wrong types, values out of range, missing data files.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path} cannot be read as text: {error}") from None
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib lets through what int() and the stack refuse
        raise BadRecipe(f"{path}: not TOML: {error}") from None
    reading = _Reading(path, text)
    for override in overrides:
        _apply(override, tables)
    for name in tables:
        if name not in TABLES:
            reading.problem(name, None, f"unknown table [{name}]{_nearest(name, TABLES)}")
    values = {name: reading.table(name, tables.get(name, {})) for name in TABLES}
    if not reading.problems:
        reading.check_together(values)
    if reading.problems:
        raise BadRecipe("\n".join(reading.problems))
    return Recipe(**values, text=text, path=path)


class _Reading:
    """One pass over a recipe: the values, and every problem with its line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, text.splitlines()
        self.problems: list[str] = []

    def problem(self, table: str, key: str | None, message: str) -> None:
        line = _line_of(self.lines, table, key)
        self.problems.append(f"{self.path}{f':{line}' if line else ''}: {message}")

    def table(self, name: str, given: Any) -> Any:
        if not isinstance(given, Mapping):
            self.problem(name, None, f"'{name}' must be a table: write [{name}]")
            return None
        known = {item.name: item for item in fields(TABLES[name])}
        for key in given:
            if key not in known:
                self.problem(name, key, f"unknown key '{key}' in [{name}]{_nearest(key, known)}")
        hints = typing.get_type_hints(TABLES[name])
        values = {}
        for key, item in known.items():
            if key in given:
                values[key] = self._value(name, item, hints[key], given[key])
            elif item.default is MISSING:
                self.problem(name, None, f"[{name}] needs '{key}': {item.metadata['meaning']}")
        return TABLES[name](**values) if not self.problems else None

    def _value(self, table: str, item: Field, hint: Any, value: Any) -> Any:
        allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        converted = _convert(value, allowed)
        if converted is None:
            wanted = " or ".join(_type_name(kind) for kind in allowed if kind is not types.NoneType)
            self.problem(table, item.name, f"{table}.{item.name} must be {wanted}, not {value!r}")
            return None
        check = item.metadata["check"]
        if check is not None and (wrong := check(converted)):
            self.problem(table, item.name, f"{table}.{item.name} = {value!r}: {wrong}")
        if isinstance(converted, Path):
            converted = self.path.parent / os.path.expanduser(converted)
            if not os.path.isfile(converted):  # Path.is_file raises for a name that is too long
                self.problem(table, item.name, f"{table}.{item.name}: there is no file {converted}")
        return converted

    def check_together(self, values: Mapping[str, Any]) -> None:
        """What no single key can tell."""
        train = values["train"]
        if train.micro_batch_size and train.batch_size % train.micro_batch_size:
            self.problem("train", "micro_batch_size", f"micro_batch_size must divide batch_size ({train.batch_size})")
        data = values["data"]
        if train.eval_every and data.test is None:
            self.problem("train", "eval_every", "train.eval_every needs data.test: held-out chats to evaluate on")
        if train.patience and not train.eval_every:
            self.problem("train", "patience", "train.patience needs train.eval_every: how often to evaluate")
        if data.test is not None and data.test.resolve() == data.train.resolve():
            self.problem("data", "test", "data.test is data.train: hold out other examples to evaluate on")


def _convert(value: Any, allowed: tuple[Any, ...]) -> Any:
    """`value` as the first of the types that takes it, or None."""
    for kind in allowed:
        if kind is Path and isinstance(value, str) and value:
            return Path(value)
        if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if kind in (str, int, bool) and type(value) is kind:
            return value
        if typing.get_origin(kind) is dict and isinstance(value, Mapping):
            items = {name: _convert(item, (typing.get_args(kind)[1],)) for name, item in value.items()}
            if all(item is not None for item in items.values()):
                return items
        is_list = typing.get_origin(kind) is tuple and isinstance(value, list)
        if is_list and all(isinstance(item, str) and item for item in value):
            return tuple(value)
    return None


def _type_name(kind: Any) -> str:
    return _TYPE_NAMES.get(kind, "a list of names")


def _apply(override: str, tables: dict[str, Any]) -> None:
    """Set one `table.key=value`; the value is TOML, or plain text if it is none."""
    target, equals, raw = override.partition("=")
    table, dot, key = target.strip().partition(".")
    if not (equals and dot and key):
        raise BadRecipe(f"--set {override}: write table.key=value, such as train.seed=1")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        value = raw.strip()
    if not isinstance(tables.setdefault(table, {}), dict):
        raise BadRecipe(f"--set {override}: '{table}' is not a table in the recipe")
    tables[table][key] = value


def _line_of(lines: Sequence[str], table: str, key: str | None) -> int | None:
    """The line where a table, or a key in it, is written; tomllib does not tell."""
    current, header = "", None
    for number, line in enumerate(lines, 1):
        if match := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            current = match[1].strip("\"'")
            header = number if current == table else header
        named = re.match(r"\s*[\"']?([A-Za-z0-9_.-]+)[\"']?\s*=", line)
        if named and key is not None and (current, named[1]) in ((table, key), ("", f"{table}.{key}")):
            return number
        if named and key is None and current == "" and named[1].partition(".")[0] == table:
            return number
    return header


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean '{near[0]}'?" if near else f": known are {', '.join(known)}"
