"""The TOML of a recipe as written: the file, those it extends, and `--set`, each value with the place it comes from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadRecipe, NotFound
from adapterhub_local.recipe.toml import Places, parse_toml, read_toml

EXTENDS = "extends"


@dataclass(frozen=True)
class Layer:
    """The tables of one file, or of all overrides; `label` is what its messages begin with."""

    label: str
    path: Path
    tables: Mapping[str, Any]
    text: str = field(default="", repr=False)

    @cached_property
    def places(self) -> Places:
        return Places.of(self.text.split("\n"))

    @property
    def is_file(self) -> bool:
        """Whether it is a file's: what the command line or a sweep changes has no lines to name."""
        return self.label == str(self.path)

    def place(self, table: str, key: str | None) -> str:
        """`recipe.toml:12`, or the label alone where there is no line."""
        line = self.places.line(table, key)
        return f"{self.label}:{line}" if line else self.label


def read_layers(path: Path) -> list[Layer]:
    """The recipe at `path` and all it extends, the most general first.

    Raises NotFound if there is no such file, BadRecipe for what is not TOML, or for files that extend each other.
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
    where = f"{child.place(EXTENDS, None)}: extends: " if child else ""
    shown = str(path).encode("unicode_escape").decode()[:200]
    if "\0" in str(path):
        raise BadRecipe(f"{where}{shown} cannot be the name of a file")
    try:
        text, tables = read_toml(path)
    except FileNotFoundError:
        if child is None:
            raise NotFound(f"there is no recipe {path}: `qhub recipe init {path}` writes one to begin with") from None
        raise BadRecipe(f"{where}there is no recipe {path}") from None
    except OSError as error:
        raise BadRecipe(f"{where}{shown} cannot be read as text: {error.strerror or error}") from None
    except ValueError as error:
        yaml = path.suffix.lower() in (".yaml", ".yml")
        reason = "recipes are TOML, `qhub recipe init` writes one to begin with" if yaml else error
        raise BadRecipe(f"{path}: not TOML: {reason}") from None
    return Layer(str(path), path, tables, text)


def overriding(overrides: Sequence[str], path: Path, label: str = "--set") -> Layer:
    """The layer of overrides such as `train.seed=1`; a value is TOML, or plain text if it is none. Raises BadRecipe."""
    tables: dict[str, Any] = {}
    for override in overrides:
        target, equals, raw = override.partition("=")
        table, dot, key = target.strip().partition(".")
        if not (equals and dot and key):
            raise BadRecipe(f"--set {override}: write table.key=value, such as train.seed=1")
        try:
            value = parse_toml(f"value = {raw}")["value"]
        except ValueError:
            value = raw.strip()
        tables.setdefault(table, {})[key] = value
    return Layer(label, path, tables)


def nested_keys(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested tables with its dotted key; TOML makes tables of keys with dots."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from nested_keys(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
