"""How the records of two versions differ: recipe, data, parents and scores."""

from collections.abc import Iterator, Mapping
from typing import Any

SECTIONS = ("kind", "task", "base", "adapter", "recipe", "data", "parents", "merge", "metrics")


def compare_lineages(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (left, right) where they differ, keys spelled `recipe.train.seed`; None where there is nothing."""
    flat = [dict(_flatten({key: side.get(key) for key in SECTIONS})) for side in (left, right)]
    keys = sorted({*flat[0], *flat[1]})
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{prefix}[{item.get('role', index)}]")
    elif value is not None:
        yield prefix, value
