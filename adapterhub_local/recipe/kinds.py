"""The types that keys of a recipe take: what becomes of a TOML value, and what messages call them."""

import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.source import Source

KEYS = {name: keys(table) for name, table in TABLES.items()}
_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Source: "a file name or Hub dataset",
}
_PLURALS = {str: "non-empty texts", int: "whole numbers", float: "numbers", Source: "them"}


def kinds_of(table: str, key: str) -> tuple[Any, ...]:
    """The types that a key of a recipe takes."""
    return kinds_in(typing.get_type_hints(TABLES[table])[KEYS[table][key].name])


def kinds_in(hint: Any) -> tuple[Any, ...]:
    """The types that a type hint of a key allows."""
    return _alternatives(hint) if hint != Source else (hint,)


def convert(value: Any, allowed: Sequence[Any]) -> Any:
    """`value` as the first of the types that takes it, or None."""
    for kind in allowed:
        item = item_type(kind)
        if item is Source and isinstance(value, str) and value.strip():
            return (value,)
        if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if kind in (str, int, bool) and type(value) is kind:
            return value
        if item is not None and typing.get_origin(kind) is tuple and isinstance(value, list) and value is not None:
            parts = [convert(part, (str if item is Source else item,)) for part in value]
            if all(part is not None and part != "" for part in parts) and (parts or item is not Source):
                return tuple(parts)
        if item is not None and typing.get_origin(kind) is dict and isinstance(value, Mapping):
            table = {str(key): convert(part, _alternatives(item)) for key, part in value.items()}
            if all(part is not None for part in table.values()):
                return table
    return None


def item_type(kind: Any) -> Any:
    """What a list or table type holds; None for other types."""
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0]
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def type_name(kind: Any) -> str:
    """What messages call a type."""
    item = item_type(kind)
    if item is not None and item is not Source and item != Source and len(_alternatives(item)) > 1:
        kinds = [part for part in _alternatives(item) if part in _TYPE_NAMES]
        return f"a table of {' or '.join(_TYPE_NAMES[part] for part in kinds) if kinds else 'lists or tables of names'}"
    if item is Source:
        return f"{_TYPE_NAMES[Source]}, or a list of {_PLURALS[Source]}"
    if item is not None:
        return f"a {'table' if typing.get_origin(kind) is dict else 'list'} of {_PLURALS[item]}"
    return _TYPE_NAMES[kind]
