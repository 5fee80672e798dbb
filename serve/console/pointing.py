"""What of an adapter's page is about aliases: where each points, what protects it, and what a version lacks for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.actor import current_actor
from adapterhub_local.counts import counted
from adapterhub_local.registry import Version
from adapterhub_local.registry.marks import rollback_target
from adapterhub_local.registry.protecting import lacking
from serve.console import views
from serve.console.budget import part
from serve.console.texts import LINE, cut
from serve.registry_api.library import Library

ALIASES, REASONS, APPROVERS = 12, 6, 6  # rows of the table, reasons and approvals of one row
PLACE = "/console/alias"


def alias_rows(library: Library, found: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A row an alias, those that are protected first, and what may be done with it."""
    name, aliases = found["name"], found["aliases"]
    protections = {one["alias"]: one for one in found["protections"]}
    order = [*protections, *(alias for alias in aliases if alias not in protections)]
    shown = order[: part(ALIASES, share)]
    return {
        "alias_rows": [_row(library, name, alias, aliases.get(alias), protections.get(alias)) for alias in shown],
        "more_alias_rows": len(order) - len(shown),
    }


def gate_rows(library: Library, found: Mapping[str, Any], version: Version, share: float) -> list[dict[str, Any]]:
    """Protected alias by alias: what this version lacks before whoever looks may move it there, and who approved it."""
    approvals = [one for one in found["approvals"] if one["reference"] == str(version)]
    lacks, me = lacking(library.registry, version), current_actor()
    rows = []
    for protection in found["protections"][: part(ALIASES, share)]:
        alias = protection["alias"]
        given = [str(one["actor"]) for one in approvals if one["alias"] == alias]
        reasons = lacks.get(alias, [])
        rows.append(
            {
                "alias": alias,
                "is_there": found["aliases"].get(alias) == version.number,
                "reasons": [cut(reason, 400) for reason in reasons[: part(REASONS, share)]],
                "more_reasons": max(0, len(reasons) - part(REASONS, share)),
                "approved_by": [cut(actor, LINE) for actor in given[: part(APPROVERS, share)]],
                "more_approved_by": max(0, len(given) - part(APPROVERS, share)),
                "is_mine": me in given,
                "has_approvals": bool(protection["approvals"]),
            }
        )
    return rows


def protection_text(protection: Mapping[str, Any] | None) -> str:
    """`exact_match>=0.8 and 1 approval`, empty for an alias that moves freely."""
    if protection is None:
        return ""
    approvals: Sequence[str] = [counted(protection["approvals"], "approval")] if protection["approvals"] else []
    return cut(" and ".join([*map(str, protection["require"]), *approvals]), 300)


def _row(
    library: Library, name: str, alias: str, number: int | None, protection: Mapping[str, Any] | None
) -> dict[str, Any]:
    back = rollback_target(library.registry, name, alias) if number is not None else None
    asked = {"name": name, "alias": alias}
    return {
        "alias": cut(alias, LINE),
        "number": number,
        "link": views.with_query(views.version_link(name), v=number) if number is not None else None,
        "protection": protection_text(protection),
        "back": back,
        "back_link": views.with_query(PLACE, **asked, do="rollback") if back is not None else None,
        "remove_link": views.with_query(PLACE, **asked, do="remove") if number is not None else None,
    }
