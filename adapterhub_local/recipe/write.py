"""Recipes as text: a commented one to begin with, and a resolved one that says where each value comes from."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.recipe import Recipe
from adapterhub_local.recipe.schema import TABLES

WIDTH = 110
HEADER = """\
# A recipe: everything one training run needs. Keys with a `#` before them are shown with their defaults.
#
#   qhub recipe check {file}       is everything there and right?
#   qhub data preview {file}       what will be learned, token by token
#   qhub train {file}
"""
FOOTER = """\
# Every combination of these is a run of its own; the best has the alias `best`.
# [sweep.grid]
# train.learning_rate = [2e-4, 5e-4, 1e-3]
"""


def starter(given: Mapping[str, Any], file: str = "recipe.toml") -> str:
    """A recipe with every key and its meaning; those in `given` (`base.name` -> value) are set, others commented."""
    lines = [HEADER.format(file=file)]
    for table, schema in TABLES.items():
        lines.append(f"[{table}]")
        for key, item in keys(schema).items():
            value = given.get(f"{table}.{key}", item.default)
            is_set = f"{table}.{key}" in given
            lines += _wrapped(item.metadata["meaning"])
            shown = "..." if value is MISSING or value is None else toml_value(value)
            lines.append(f"{'' if is_set else '# '}{key} = {shown}")
        lines.append("")
    return "\n".join([*lines, FOOTER])


def resolved(recipe: Recipe) -> dict[str, dict[str, dict[str, Any]]]:
    """Table -> key -> its value and where it comes from: a file and line, `--set`, or `default`."""
    return {
        table: {
            key: {"value": value, "from": recipe.origins.get(f"{table}.{key}", "default")}
            for key, value in values.items()
        }
        for table, values in recipe.to_json().items()
    }


def resolved_text(recipe: Recipe) -> str:
    """The resolved recipe as TOML, each line with its origin; what has no value is a comment."""
    lines = []
    for table, entries in resolved(recipe).items():
        lines.append(f"[{table}]")
        for key, entry in entries.items():
            value = entry["value"]
            line = f"{key} = {toml_value(value)}" if value is not None else f"# {key} is not set"
            lines.append(f"{line:<40}  # {entry['from']}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value as TOML spells it: text, numbers, lists and tables of them are spelled as in JSON, but for `=`."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _wrapped(meaning: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(meaning, WIDTH)]
