"""How two adapters differ: settings and scores from their lineages, and norm and cosine of each module's delta."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.merge.algebra import inner, norm

SECTIONS = ("kind", "task", "base", "adapter", "recipe", "data", "parents", "merge", "metrics")


@dataclass(frozen=True)
class ModuleDifference:
    """Frobenius norms of one module's two deltas, None where an adapter leaves it alone, and their cosine."""

    module: str
    left: float | None
    right: float | None
    cosine: float | None


def compare_lineages(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (left, right) where they differ, keys spelled `recipe.train.seed`; None where there is nothing."""
    flat = [dict(_flatten({key: side.get(key) for key in SECTIONS})) for side in (left, right)]
    keys = sorted({*flat[0], *flat[1]})
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}


def compare_deltas(left: AdapterFile, right: AdapterFile) -> Iterator[ModuleDifference]:
    """One module at a time; no dense matrix is made. Modules of different shapes have no cosine."""
    for module in sorted({*left.shapes, *right.shapes}):
        ours = left.delta(module) if module in left.shapes else None
        theirs = right.delta(module) if module in right.shapes else None
        norms = [norm(delta) if delta is not None else None for delta in (ours, theirs)]
        cosine = None
        if ours is not None and theirs is not None and norms[0] and norms[1]:
            shapes = [
                (adapter.shapes[module].in_features, adapter.shapes[module].out_features) for adapter in (left, right)
            ]
            if shapes[0] == shapes[1]:
                cosine = max(-1.0, min(1.0, inner(ours, theirs) / (norms[0] * norms[1])))
        yield ModuleDifference(module, norms[0], norms[1], cosine)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{prefix}[{item.get('role', index)}]")
    elif value is not None:
        yield prefix, value
