"""`qhub diff`: how two versions differ."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter, is_router

if TYPE_CHECKING:
    from adapterhub_local.merge.compare import ModuleDifference


@click.command(name="diff")
@click.argument("left")
@click.argument("right")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every module included.")
def command(left: str, right: str, as_json: bool) -> None:
    """Compare two versions: recipe, data, metrics, and the deltas of their modules.

    What DoRA changes depends on the weights of the base, so that has to be here for it.
    """
    registry = Registry()
    versions = [registry.resolve(left), registry.resolve(right)]
    if is_router(versions[0].lineage) != is_router(versions[1].lineage):
        check_adapter(versions[1 if is_router(versions[1].lineage) else 0])
    from adapterhub_local.registry.differences import compare_lineages

    sides = [{**version.lineage, "metrics": registry.metrics(version)} for version in versions]
    changed = compare_lineages(*sides)
    modules = [] if is_router(versions[0].lineage) else _modules(registry, versions)
    same = versions[0].content_digest == versions[1].content_digest
    if as_json:
        print_json({
            "left": str(versions[0]), "right": str(versions[1]), "same_content": same,
            "lineage": {key: list(pair) for key, pair in changed.items()}, "modules": [vars(item) for item in modules],
        })  # fmt: skip
        return
    if changed:
        print_table(("", *map(str, versions)), [(key, *pair) for key, pair in changed.items()])
    if modules:
        _print_modules(versions, modules)
    echo("the files are the same" if same else "the files differ")


def _modules(registry: Registry, versions: Sequence[Version]) -> "list[ModuleDifference]":
    """How the deltas of two adapters differ, module by module."""
    paths = [version.path for version in versions]
    from adapterhub_local.base.bases import base_of
    from adapterhub_local.lora.adapter import open_adapter
    from adapterhub_local.merge.compare import compare_deltas

    one, other = (open_adapter(path, dora=True, tokens=True) for path in paths)
    bases = [base_of(version, registry.home) if side.magnitudes or side.tokens else None
             for version, side in zip(versions, (one, other), strict=True)]  # fmt: skip
    return list(compare_deltas(one, other, (bases[0], bases[1])))


def _print_modules(versions: Sequence[Version], modules: "Sequence[ModuleDifference]") -> None:
    products = [(item.cosine or 0.0) * (item.left or 0.0) * (item.right or 0.0) for item in modules]
    norms = [math.sqrt(sum((side or 0.0) ** 2 for side in column)) for column in
             ([item.left for item in modules], [item.right for item in modules])]  # fmt: skip
    cosine = sum(products) / (norms[0] * norms[1]) if norms[0] and norms[1] else None
    rows = [(item.module, _shown(item.left), _shown(item.right), _shown(item.cosine)) for item in modules]
    rows.append(("all", _shown(norms[0]), _shown(norms[1]), _shown(cosine)))
    print_table(("module", f"norm {versions[0]}", f"norm {versions[1]}", "cosine"), rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
