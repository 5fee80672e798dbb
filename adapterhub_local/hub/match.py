"""Which base of this home a pulled adapter belongs to: by fingerprint, by Hub id and revision, or as the user says.

Shapes that fit are only a hint: many models share them, so a match by shapes alone has to be confirmed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_local.base.bases import BaseInfo, find_base, list_bases
from adapterhub_local.base.origin import Origin, belongs, best
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.settings import Home

if TYPE_CHECKING:
    from adapterhub_local.lora.adapter import AdapterFile

FORCED = "shapes, forced"


@dataclass(frozen=True)
class Match:
    """The base and how it was recognised; without one, the names of bases whose shapes would fit."""

    base: BaseInfo | None = None
    by: str | None = None
    fitting: tuple[str, ...] = ()


def match_base(
    home: Home, wanted: Mapping[str, Any], adapter: "AdapterFile", chosen: str | None = None, *, force: bool = False
) -> Match:
    """The base for an adapter that says it was made for `wanted` (fingerprint, hub_id, revision; all optional).

    `chosen` is the base the user confirmed, which stands against another name, and with `force` against another
    fingerprint, as in `adopt`. Raises Incompatible against a fingerprint, or if the adapter's modules are not those of
    the base it names, NotFound if there is no base `chosen`.
    """
    from adapterhub_local.base.fit import fit  # loads torch

    bases = list_bases(home)
    origin = Origin(*(wanted.get(key) for key in ("fingerprint", "hub_id", "revision")))
    if chosen is not None:
        base = find_base(chosen, home)
        answer = belongs(origin, base)
        is_other = answer.level == "other" and origin.fingerprint is not None
        if is_other and not force:
            raise Incompatible(f"{adapter.path} was {answer.reason}: --force registers it anyway")
        fit(adapter, base)
        if is_other:
            return Match(base, FORCED)
        if answer.level == "exact":
            return Match(base, "fingerprint")
        same = (
            answer.level == "named" and origin.revision and origin.revision == base.revision and not origin.fingerprint
        )
        return Match(base, "hub_id and revision" if same else "shapes, confirmed")
    if found := best(origin, bases):
        if belongs(origin, found).level == "exact":
            return Match(found, "fingerprint")
        fit(adapter, found)
        is_same = origin.revision and origin.revision == found.revision
        return Match(found, "hub_id and revision" if is_same else "hub_id")
    return Match(fitting=tuple(base.name for base in bases if _fits(adapter, base)))


def _fits(adapter: "AdapterFile", base: BaseInfo) -> bool:
    from adapterhub_local.base.fit import fit

    try:
        fit(adapter, base)
    except (Incompatible, BadFile):
        return False
    return True
