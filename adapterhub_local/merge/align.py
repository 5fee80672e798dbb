"""The parents of a merge called by the same names: those of their base where it is here, else the shortest in use."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterhub_local.base.bases import BaseInfo, list_bases
from adapterhub_local.base.modules import linear_modules
from adapterhub_local.base.origin import Origin, best
from adapterhub_local.errors import BadFile
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.lora.names import fitted, plain
from adapterhub_local.registry import Registry

if TYPE_CHECKING:
    from adapterhub_local.merge.parent import Parent


def base_here(origin: Origin, registry: Registry) -> BaseInfo | None:
    """The base of this home that something says it was made for."""
    return best(origin, list_bases(registry.home)) if origin.is_known else None


def without_copies(adapter: AdapterFile, origin: Origin, registry: Registry) -> tuple[AdapterFile, tuple[str, ...]]:
    """The adapter without tensors that its base has as well, and their names.

    Raises BadFile if the base is not here to compare with, or has another tensor in their place.
    """
    if not adapter.copies:
        return adapter, ()
    info = base_here(origin, registry)
    if info is None:
        raise BadFile(
            f"{adapter.path}: {min(adapter.copies)!r} is not a LoRA factor of a linear layer. If it is the base's own "
            "weight, saved along, `qhub add` with its base leaves it out: add it first, and merge the version"
        )
    from adapterhub_local.base.fit import check_copies

    return replace(adapter, copies={}), check_copies(adapter, info)


def align(parents: Sequence["Parent"], info: BaseInfo | None) -> tuple["Parent", ...]:
    """The parents with one name for each module. Raises BadFile if two modules of a parent would become one."""
    known = set(linear_modules(info)) if info is not None else set()
    shortest: dict[str, str] = {}
    for parent in parents:
        for module in parent.adapter.modules:
            before = shortest.setdefault(plain(module), module)
            if (len(module), module) < (len(before), before):
                shortest[plain(module)] = module
    names = known | {name for key, name in shortest.items() if key not in known}
    done = []
    for parent in parents:
        own = fitted(parent.adapter.modules, known) if known else {module: module for module in parent.adapter.modules}
        own = {module: name if name in names else shortest.get(plain(name), name) for module, name in own.items()}
        taken: dict[str, str] = {}
        for module, name in own.items():
            if taken.setdefault(name, module) != module:
                raise BadFile(f"{parent.label}: {taken[name]} and {module} are the same module: which one counts?")
        done.append(replace(parent, adapter=parent.adapter.renamed(own)))
    return tuple(done)


def remarks(parents: Sequence["Parent"]) -> tuple[str, ...]:
    """What a person should know of parents that may be merged: how much they share, and whose base nobody knows."""
    found = []
    counts: dict[str, int] = {}
    for parent in parents:
        for module in parent.adapter.modules:
            counts[module] = counts.get(module, 0) + 1
    shared = sum(count > 1 for count in counts.values())
    if len(parents) > 1 and not shared:
        found.append("the adapters have no module in common: each is only scaled by its weight")
    elif len(parents) > 1 and shared < len(counts):
        found.append(f"{shared} of {len(counts)} modules are in more than one adapter, the others in one only")
    known = [Origin.of_lineage(parent.base).is_known for parent in parents]
    unknown = [parent for parent, is_known in zip(parents, known, strict=True) if not is_known]
    names = {parent.adapter.config.base_model for parent in unknown}
    if unknown and (any(known) or len(names) > 1):  # all of one name, or of none, may well be of one base
        which = "one base" if len(unknown) == len(parents) else "the base of the others"
        verb = "does" if len(unknown) == 1 else "do"
        found.append(f"{', '.join(map(_unknown, unknown))} {verb} not say for which base: taken to be for {which}")
    return tuple(found)


def _unknown(parent: "Parent") -> str:
    """The parent, with the folder that it names as its base: of some machine, so it decides nothing."""
    name = parent.adapter.config.base_model
    return f"{parent.name} (made on {name!r})" if name else parent.name
