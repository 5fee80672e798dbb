"""Train a router: from the prompts of registered adapters to a version that chooses among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.bases import BaseInfo, base_of
from adapterhub_local.durable import staging
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.progress import Quiet, Reporter
from adapterhub_local.refs import Reference, check_alias, check_name
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter, is_router
from adapterhub_local.router.classifier import fit
from adapterhub_local.router.features import Embeddings, embeddings_of
from adapterhub_local.router.files import FEATURES, RouterFiles
from adapterhub_local.router.measure import (
    BASE_NAME,
    Measured,
    Requirement,
    check,
    measure,
    measure_unseen,
    milliseconds,
    stacked,
)
from adapterhub_local.router.prompts import Prompts, prompts_of, read_prompts

TASK = "routing"
TIMED = 100  # prompts


@dataclass(frozen=True)
class Trained:
    """A router that was registered, what was measured, and what a person should know."""

    version: Version
    measured: Measured
    milliseconds: float
    notes: Sequence[str]


def train_router(
    registry: Registry,
    name: str,
    references: Sequence[str],
    *,
    data: Mapping[str, Sequence[Path]] | None = None,
    base_data: Sequence[Path] = (),
    look_in: Path = Path(),
    limit: int = 2000,
    threshold: float = 0.5,
    coverage: float = 0.99,
    requirements: Sequence[str] = (),
    alias: str | None = None,
    description: str | None = None,
    reporter: Reporter | None = None,
) -> Trained:
    """Learn which of the adapters `references` a prompt is for, and register that as the next version of `name`.

    A route is kept as it is written: `topic@prod` will follow the alias. `data` are files of prompts by adapter name,
    for those that are not found in the folder `look_in` by their lineage; `base_data` are prompts that the base is to
    answer; `limit` prompts of each file are read. An adapter is chosen with a probability of at least `threshold`, and
    for texts that are as near to its prompts as the share `coverage` of them are to each other.

    Raises InputError for what cannot be learnt from, Incompatible for adapters of several bases, QhubError where a
    requirement is not met: nothing is registered then.
    """
    check_name(name)
    if alias is not None:
        check_alias(alias)
    if not 0.0 <= threshold <= 1.0 or not 0.5 <= coverage < 1.0:
        raise InputError("the threshold is a probability from 0 to 1, the coverage a share from 0.5 to below 1")
    wanted = [Requirement.parse(text) for text in requirements]
    show, given = reporter or Quiet(), dict(data or {})
    routes = [Reference.parse(text) for text in references]
    versions = [check_adapter(registry.resolve(route)) for route in routes]
    if any(not is_router(version.lineage) for version in registry.versions(name)):
        raise InputError(f"'{name}' is an adapter: give the router a name of its own")
    info = _one_base(versions, registry)
    names = [route.name for route in routes]
    if len(set(names)) < len(names):
        raise InputError("an adapter is named twice: a router has one route to each, such as sentiment@prod")
    if unknown := sorted(given.keys() - set(names)):
        raise InputError(f"--data is of '{unknown[0]}', which is not one of the adapters: {', '.join(names)}")
    prompts = [prompts_of(version, given.get(version.name, ()), look_in, limit) for version in versions]
    if base_data:
        prompts.append(read_prompts(base_data, BASE_NAME, limit))
    embeddings = embeddings_of(info)
    parts = _features(prompts, embeddings, show)
    kept = tuple(routes) + ((None,) if base_data else ())
    train, held, test = parts
    classifier = fit(
        *stacked(train), *stacked(held), len(kept), coverage=coverage, unbounded=len(routes) if base_data else None
    )
    files = RouterFiles(kept, classifier, threshold, coverage, info.fingerprint)
    measured = measure(files, *stacked(test), measure_unseen(files, train, held, test))
    check(measured, wanted)
    asked = [text for part in prompts for text in part.test]
    took = milliseconds(files, embeddings, asked[:: max(1, len(asked) // TIMED)])
    lineage = _lineage(versions, info, prompts, files, measured, description)
    with staging(registry.home.tmp) as folder:
        version = registry.publish(name, files.write(folder), lineage, alias=alias)
    return Trained(version, measured, took, _notes(prompts, kept))


def _one_base(versions: Sequence[Version], registry: Registry) -> BaseInfo:
    if not versions:
        raise InputError("name the adapters that the router is to choose among, such as sentiment@1 topic@prod")
    bases = {str(version): base_of(version, registry.home) for version in versions}
    first, info = next(iter(bases.items()))
    for label, base in bases.items():
        if base.fingerprint != info.fingerprint:
            raise Incompatible(
                f"{first} is for base '{info.name}' and {label} for '{base.name}': a router is for adapters of one base"
            )
    return info


def _features(prompts: Sequence[Prompts], embeddings: Embeddings, show: Reporter) -> list[list[torch.Tensor]]:
    """The features of what is learnt from, held back and measured on, each a list by route."""
    total = 3 * len(prompts)
    parts: list[list[torch.Tensor]] = [[], [], []]
    with show.counting("reading prompts") as progress:
        for route, found in enumerate(prompts):
            for place, texts in enumerate((found.train, found.held, found.test)):
                parts[place].append(embeddings.mean(texts))
                progress(3 * route + place + 1, total)
    return parts


def _lineage(
    versions: Sequence[Version],
    info: BaseInfo,
    prompts: Sequence[Prompts],
    files: RouterFiles,
    measured: Measured,
    description: str | None,
) -> dict[str, Any]:
    parents = [
        {
            "reference": str(version),
            "manifest_digest": version.manifest_digest,
            "content_digest": version.content_digest,
            "weight": 1.0,
        }
        for version in versions
    ]
    return {
        "kind": "router",
        "task": TASK,
        **({"description": description} if description else {}),
        "base": info.lineage(),
        "parents": parents,
        "data": [record for part in prompts for record in part.records],
        "metrics": {TASK: {"adapter": measured.scores()}},
        "router": {
            "routes": [BASE_NAME if route is None else str(route) for route in files.routes],
            "features": FEATURES,
            "threshold": files.threshold,
            "coverage": files.coverage,
            "temperature": files.classifier.temperature,
            "prompts": {"train": sum(len(part.train) for part in prompts),
                        "held": sum(len(part.held) for part in prompts)},
            **measured.to_json(),
        },
    }  # fmt: skip


def _notes(prompts: Sequence[Prompts], routes: Sequence[Reference | None]) -> list[str]:
    notes = []
    seen: dict[str, int] = {}
    for place, part in enumerate(prompts):
        shared: dict[int, int] = {}
        for text in part.all:
            if (other := seen.setdefault(text, place)) != place:
                shared[other] = shared.get(other, 0) + 1
        for other, count in shared.items():
            both = " and ".join(str(routes[one] or BASE_NAME) for one in (other, place))
            notes.append(f"{count:,} prompts are of both {both}: no router can learn which of them these are for")
    return notes
