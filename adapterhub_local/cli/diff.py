"""`qhub diff`: how two versions differ."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.client import Server, chosen_server
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
    server = chosen_server()
    found = _here(left, right) if server is None else _there(server, left, right)
    if as_json:
        print_json(found)
        return
    sides = found["left"], found["right"]
    if found["lineage"]:
        print_table(("", *sides), [(key, *pair) for key, pair in found["lineage"].items()])
    if found["modules"]:
        _print_modules(sides, found["modules"])
    echo("the files are the same" if found["same_content"] else "the files differ")


def _here(left: str, right: str) -> dict[str, Any]:
    registry = Registry()
    versions = [registry.resolve(left), registry.resolve(right)]
    if is_router(versions[0].lineage) != is_router(versions[1].lineage):
        check_adapter(versions[1 if is_router(versions[1].lineage) else 0])
    from adapterhub_local.registry.differences import compare_lineages

    sides = [{**version.lineage, "metrics": registry.metrics(version)} for version in versions]
    changed = compare_lineages(*sides)
    modules = [] if is_router(versions[0].lineage) else _modules(registry, versions)
    return {
        "left": str(versions[0]), "right": str(versions[1]),
        "same_content": versions[0].content_digest == versions[1].content_digest,
        "lineage": {key: list(pair) for key, pair in changed.items()}, "modules": [vars(item) for item in modules],
    }  # fmt: skip


def _there(server: Server, left: str, right: str) -> dict[str, Any]:
    """The same, measured by the server."""
    both = {"left": left, "right": right}
    if all(is_router(server.get(f"/registry/versions/{each}")["lineage"]) for each in both.values()):
        return {**server.get("/registry/compare", **both), "modules": []}
    found: dict[str, Any] = server.result(server.post("/registry/compare/modules", both))
    return found


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


def _print_modules(sides: Sequence[str], modules: Sequence[Mapping[str, Any]]) -> None:
    products = [(item["cosine"] or 0.0) * (item["left"] or 0.0) * (item["right"] or 0.0) for item in modules]
    norms = [math.sqrt(sum((item[side] or 0.0) ** 2 for item in modules)) for side in ("left", "right")]
    cosine = sum(products) / (norms[0] * norms[1]) if norms[0] and norms[1] else None
    rows = [(item["module"], *(_shown(item[key]) for key in ("left", "right", "cosine"))) for item in modules]
    rows.append(("all", _shown(norms[0]), _shown(norms[1]), _shown(cosine)))
    print_table(("module", f"norm {sides[0]}", f"norm {sides[1]}", "cosine"), rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
