"""The recipe as JSON Schema (draft 7), with which editors complete keys, show their meaning and mark mistakes."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field
from typing import Any

from adapterhub_local.recipe.field import Check, keys
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.source import Source
from adapterhub_local.recipe.sweep import KEYS, METRICS

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", Source: "string"}


def json_schema() -> dict[str, Any]:
    """The schema of a whole recipe. A recipe that extends another may leave out what that gives, so nothing is required
    of it."""
    tables = {name: _table(schema) for name, schema in TABLES.items()}
    needed = {name: schema for name, schema in tables.items() if "required" in schema}
    whole = {
        "required": [*needed],
        "properties": {name: {"required": table.pop("required")} for name, table in needed.items()},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "qhub recipe",
        "description": "Everything a training run of adapterhub-local needs",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "extends": {"type": "string", "description": "a recipe, relative to this one, whose keys this one changes"},
            **tables,
            "sweep": _sweep(),
        },
        "if": {"required": ["extends"]},
        "else": whole,
    }


def _table(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    properties = {name: _key(item, hints[item.name]) for name, item in keys(schema).items()}
    table = {"type": "object", "additionalProperties": False, "properties": properties}
    required = [name for name, item in keys(schema).items() if item.default is MISSING]
    return {**table, "required": required} if required else table


def _key(item: Field[Any], hint: Any) -> dict[str, Any]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not types.NoneType]
    check = item.metadata["check"]
    limits = check.schema if isinstance(check, Check) else {}
    shapes = [shape for kind in kinds for shape in _shapes(kind)]
    described: dict[str, Any] = {"description": item.metadata["meaning"]}
    if item.default is not MISSING and item.default is not None:
        described["default"] = item.default
    return described | ({**shapes[0], **limits} if len(shapes) == 1 else {"anyOf": shapes, **limits})


def _shapes(kind: Any) -> list[dict[str, Any]]:
    """How a value of this type may be written."""
    if kind in _TYPES:
        return [{"type": _TYPES[kind]}]
    item = typing.get_args(kind)[-1] if typing.get_origin(kind) is dict else typing.get_args(kind)[0]
    if typing.get_origin(kind) is dict:
        is_union = typing.get_origin(item) in (typing.Union, types.UnionType)
        shapes = [shape for part in (typing.get_args(item) if is_union else (item,)) for shape in _shapes(part)]
        return [{"type": "object", "additionalProperties": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}}]
    listed = {"type": "array", "items": {"type": _TYPES[item]}, "minItems": 1}
    return [{"type": "string"}, listed] if item == Source else [listed]


def _sweep() -> dict[str, Any]:
    lists = {
        table: {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: {"type": "array", "minItems": 1} for name in keys(schema)},
        }
        for table, schema in TABLES.items()
    }
    dotted = {f"{table}.{name}": {"type": "array"} for table, schema in TABLES.items() for name in keys(schema)}
    varied: Mapping[str, Any] = {"type": "object", "additionalProperties": False, "properties": {**lists, **dotted}}
    meanings = {
        "grid": {**varied, "description": "keys with lists of values: every combination is a run"},
        "paired": {**varied, "description": "keys with equally long lists: the first values together, and so on"},
        "metric": {"enum": list(METRICS), "default": "loss", "description": "what the best run is chosen by"},
        "alias": {"type": "string", "default": "best", "description": "alias of the best run's version"},
        "max_runs": {"type": "integer", "minimum": 1, "default": 64, "description": "more runs than that are an error"},
    }
    assert set(meanings) == set(KEYS)
    return {"type": "object", "additionalProperties": False, "properties": meanings}
