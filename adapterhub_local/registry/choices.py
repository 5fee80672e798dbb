"""What a list can be narrowed and sorted by: bases and metrics of all versions, or of those of some names alone."""

import json
from collections.abc import Sequence
from typing import Any

from adapterhub_local.registry.catalog import metrics_in
from adapterhub_local.registry.listing import bases_in
from adapterhub_local.registry.registry import LIVE, Registry

NO_SCORES = ("rows",)  # kept beside scores: how many examples they are of


def base_choices(registry: Registry, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """As `listing.bases_in`, of the versions of these names; None for all."""
    if names is None:
        return bases_in(registry)
    query = (
        "SELECT c.base_fingerprint AS fingerprint, c.num_versions, json_extract(s.lineage, '$.base.name') AS name,"  # noqa: S608
        " json_extract(s.lineage, '$.base.hub_id') AS hub_id"
        f" FROM (SELECT v.base_fingerprint, count(*) AS num_versions, max(v.id) AS id {LIVE}"
        " AND v.base_fingerprint IS NOT NULL AND v.name IN (SELECT value FROM json_each(?))"
        " GROUP BY v.base_fingerprint) c JOIN versions s ON s.id = c.id ORDER BY c.num_versions DESC, name"
    )
    return [dict(row) for row in registry.database.rows(query, (json.dumps(list(names)),))]


def metric_choices(registry: Registry, names: Sequence[str] | None) -> list[str]:
    """The metrics that versions of these names have scores of; None for all."""
    if names is None:
        found = metrics_in(registry)
    else:
        query = "SELECT DISTINCT metric FROM scores WHERE name IN (SELECT value FROM json_each(?)) ORDER BY metric"
        found = [row["metric"] for row in registry.database.rows(query, (json.dumps(list(names)),))]
    return [metric for metric in found if metric not in NO_SCORES]
