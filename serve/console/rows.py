"""One version as a row of a list: its main scores, aliases and tags, as many as a list has room for."""

from typing import Any

from serve.console import views
from serve.console.texts import LINE, cut

SCORES, MARKS = 2, 3  # of a row: what more there is has its number there, and is on the adapter's page


def row_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What a list shows of an entry of the library."""
    scores = views.scored(entry["metrics"], only_main=True)
    measured, votes = ([one for one in scores if views.is_vote(one) is wanted] for wanted in (False, True))
    tags, aliases = entry["tags"], list(entry["aliases"].items())
    base = entry["base"]
    return {
        "reference": entry["reference"],
        "version": entry["version"],
        "link": views.version_link(entry["reference"]),
        "description": cut(entry["description"], LINE),
        "scores": [views.score_row(*one) for one in measured[:SCORES]],
        "votes": [views.score_row(*one) for one in votes[:1]],
        "more_scores": max(0, len(measured) - SCORES) + max(0, len(votes) - 1),
        "aliases": [(cut(alias, 60), number) for alias, number in aliases[:MARKS]],
        "more_aliases": max(0, len(aliases) - MARKS),
        "base": cut(base["name"] or base["hub_id"] or "unknown", 80),
        "rank": views.count_text(entry["rank"]),
        "size": views.size_text(entry["size"]),
        "tags": [(cut(tag, 60), views.with_query("/console", tag=tag)) for tag in tags[:MARKS]],
        "more_tags": max(0, len(tags) - MARKS),
        "created": views.time_text(entry["created_at"]),
        "made_by": cut(entry["method"] or entry["kind"] or "unknown", 40),
    }
