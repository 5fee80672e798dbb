"""Which base of this home a pulled adapter belongs to: by fingerprint, by Hub id and revision, or as the user says.

Shapes that fit are only a hint: many models share them, so a match by shapes alone has to be confirmed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_local.base.bases import BaseInfo, find_base, list_bases
from adapterhub_local.errors import Incompatible
from adapterhub_local.settings import Home

if TYPE_CHECKING:
    from adapterhub_local.lora.adapter import AdapterFile


@dataclass(frozen=True)
class Match:
    """The base and what tells that it is the one; without one, the names of bases whose shapes would fit."""

    base: BaseInfo | None = None
    by: str | None = None
    fitting: tuple[str, ...] = ()


def match_base(home: Home, wanted: Mapping[str, Any], adapter: "AdapterFile", chosen: str | None = None) -> Match:
    """The base for an adapter that says it was made for `wanted` (fingerprint, hub_id, revision; all optional).

    `chosen` is the base the user confirmed. Raises Incompatible if the adapter's modules are not those of the
    base it names, NotFound if there is no base `chosen`.
    """
    from adapterhub_local.base.shapes import check_shapes  # loads torch

    bases = list_bases(home)
    fingerprint, hub_id, revision = (wanted.get(key) for key in ("fingerprint", "hub_id", "revision"))
    if chosen is not None:
        base = find_base(chosen, home)
        check_shapes(adapter, base)
        if base.fingerprint == fingerprint:
            return Match(base, "fingerprint")
        same = hub_id and base.hub_id == hub_id and base.revision == revision and revision and not fingerprint
        return Match(base, "hub_id and revision" if same else "shapes, confirmed")
    if fingerprint:
        if found := next((base for base in bases if base.fingerprint == fingerprint), None):
            return Match(found, "fingerprint")
    elif hub_id:
        named = [base for base in bases if base.hub_id == hub_id]
        exact = [base for base in named if revision and base.revision == revision]
        agreeing = exact or [base for base in named if not (revision and base.revision)]
        if agreeing:
            check_shapes(adapter, agreeing[0])
            return Match(agreeing[0], "hub_id and revision" if exact else "hub_id")
    return Match(fitting=tuple(base.name for base in bases if _fits(adapter, base)))


def _fits(adapter: "AdapterFile", base: BaseInfo) -> bool:
    from adapterhub_local.base.shapes import check_shapes

    try:
        check_shapes(adapter, base)
    except Incompatible:
        return False
    return True
