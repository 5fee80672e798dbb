"""Fit: whether an adapter belongs to the base, by what it says of its origin and by the shapes of its modules."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.names import is_router
from adapterhub_local.registry import Version
from serve.adapters.source import Source

if TYPE_CHECKING:  # it loads torch, which a gateway that asks `check_base` has no use for
    from adapterhub_local.lora.adapter import AdapterFile


def check_base(version: Source, base: BaseInfo) -> None:
    """Raise Incompatible unless the version was made for `base`, as far as its lineage says."""
    if not isinstance(version, Version) or belongs(Origin(version.base_fingerprint), base):
        return
    theirs = version.lineage.get("base", {}).get("name") or str(version.base_fingerprint)[:19]
    raise Incompatible(f"'{version}' was made for base '{theirs}', not for '{base.name}' which is served here")


def check_one_of(version: Source, bases: Sequence[BaseInfo]) -> None:
    """Raise Incompatible unless it was made for one of several bases."""
    *others, last = bases
    for base in others:
        try:
            check_base(version, base)
        except Incompatible:
            continue
        return
    check_base(version, last)


def check_origin(adapter: "AdapterFile", version: Source, base: BaseInfo) -> None:
    """Raise Incompatible if weights or config name another base; `check_base` reads the lineage only."""
    origin = Origin.of_adapter(adapter)
    if version.base_fingerprint is not None:  # whoever registered it has decided, whatever its config names
        origin = Origin(origin.fingerprint)
    if not (answer := belongs(origin, base)):
        raise Incompatible(f"'{version}' was {answer.reason}")


def check_modules(adapter: "AdapterFile", name: str, base: BaseInfo, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise Incompatible unless every module is one of `shapes`: module -> (in_features, out_features) of the base."""
    wrong = []
    for module, shape in adapter.shapes.items():
        if module not in shapes:
            why = "a router of experts, which stays as it is" if is_router(module) else "no such linear layer"
            wrong.append(f"{module} ({why})")
        elif (shape.in_features, shape.out_features) != shapes[module]:
            wrong.append(
                f"{module} ({shape.in_features} -> {shape.out_features}, not {' -> '.join(map(str, shapes[module]))})"
            )
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise Incompatible(f"'{name}' does not fit the base '{base.name}': {shown}")
