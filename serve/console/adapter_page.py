"""The page of one adapter: one of its versions in particular, and all of them, a page at a time."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response

from adapterhub_local.counts import counted
from adapterhub_local.registry.listing import Wanted
from serve.console import views
from serve.console.budget import fitted, part
from serve.console.pointing import alias_rows, gate_rows
from serve.console.render import render
from serve.console.rows import row_of
from serve.console.texts import LINE, cut, seal
from serve.registry_api.library import Library
from serve.registry_api.reading import key_of

# what a page shows at most; the JSON that it names has the rest
VERSIONS, SCORES, DATA, SAMPLES, NODES, MOVES, MARKS, NOTES, MADE_INTO, HELD = 50, 40, 30, 8, 40, 50, 30, 10, 50, 5
DRAWN_VERSIONS = 100  # the newest, whose scores are drawn
DESCRIPTION, SAMPLE, RECIPE = 2000, 800, 8000  # bytes


def adapter_page(
    library: Library,
    request: Request,
    name: str,
    v: str | None,
    message: str | None = None,
    status: int = 200,
    after: str | None = None,
) -> Response:
    """The page of one adapter, with a message of what did not work."""
    key = key_of(request)
    found = library.adapter(key, name, limit=DRAWN_VERSIONS)
    reference = f"{name}@{v}" if v else found["versions"][0]["reference"]
    resolved, may_change = library.resolve(key, reference), key is None or "admin" in key.scopes
    version, graph = library.version(key, reference), library.lineage(key, reference)
    wanted, page = Wanted(name=name, every=True), views.version_link(name)

    def made(share: float) -> Response:
        listed = library.adapters(key, wanted, after=after, limit=part(VERSIONS, share))
        return render(
            request, "adapter.html", status=status, name=name, message=message, total=found["total"],
            **_marks(found, version, share), **alias_rows(library, found, share),
            gates=gate_rows(library, found, resolved, share) if may_change else [],
            held=_held(library.hands.state(resolved, key)) if library.hands is not None and may_change else None,
            **_identity(version), **_scores(version, share),
            over_versions=views.metric_over_versions(found["versions"]),
            **_origin(version, graph, share), **_training(version, share),
            versions=_chosen([row_of(entry) for entry in listed.entries], version["version"], name, after),
            next=views.with_query(page, after=listed.after, v=v) + "#versions" if listed.after else None,
            first=views.with_query(page, v=v) + "#versions", is_later=bool(after),
            log=_log(found["alias_log"], share), num_moves=len(found["alias_log"]),
            json_link=f"/v1/registry/versions/{quote(version['reference'])}",
            all_json_link=f"/v1/registry/adapters/{quote(name)}",
        )  # fmt: skip

    return fitted(made)


def _marks(found: Mapping[str, Any], version: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Aliases and tags."""
    most, tags, aliases = part(MARKS, share), version["tags"], found["aliases"]
    return {
        "aliases": [(cut(alias, 130), number) for alias, number in list(aliases.items())[:most]],
        "more_aliases": max(0, len(aliases) - most),
        # an alias that is not in it is moved only if it is new: with hundreds of them by the command line
        "alias_state": json.dumps(dict(list(aliases.items())[: 3 * most])),
        "tags": [(cut(tag, 64), views.with_query("/console", tag=tag)) for tag in tags[:most]],
        "more_tags": max(0, len(tags) - most),
    }


def _identity(version: Mapping[str, Any]) -> dict[str, Any]:
    lineage = version["lineage"]
    base = views.mapping(lineage.get("base"))
    text = str(version["description"] or "")
    return {
        # what is longer than a page shows, or is no line, is not put into a field, which would send a part of it back
        "editable": text if cut(text, DESCRIPTION) == text else "", "description_state": seal(text),
        "reference": version["reference"], "number": version["version"], "description": cut(text, DESCRIPTION),
        "content": version["content_digest"], "manifest": version["manifest_digest"],
        "created": version["created_at"], "base": cut(base.get("name") or base.get("hub_id") or "unknown", LINE),
        "fingerprint": cut(str(base.get("fingerprint") or "")[:19]),
        "play_link": views.with_query("/console/play", m=[str(base.get("name") or "")[:300], version["reference"]]),
    }  # fmt: skip


def _scores(version: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Scores, and what is to be known about them."""
    rows, most = views.scored(version["metrics"]), part(SCORES, share)
    notes = version["lineage"].get("notes")
    texts = notes if isinstance(notes, list) else [notes] if notes else []
    return {
        "scores": [views.score_row(*row) for row in rows[:most]], "more_scores": max(0, len(rows) - most),
        "notes": [cut(note, 300) for note in texts[:NOTES]], "more_notes": max(0, len(texts) - NOTES),
    }  # fmt: skip


def _origin(version: Mapping[str, Any], graph: Mapping[str, Any], share: float) -> dict[str, Any]:
    """What it was made of, and what was made of it."""
    entries, most = version["lineage"].get("data") or (), part(DATA, share)
    entries = entries if isinstance(entries, list) else [entries]
    drawn, num_left = views.lineage_graph(graph, part(NODES, share))
    into = graph["made_into"]
    return {
        "graph": drawn, "num_left": num_left, "is_cut": graph["is_cut"],
        "made_into": [(made, views.version_link(made)) for made in into[: part(MADE_INTO, share)]],
        "more_made_into": max(0, len(into) - part(MADE_INTO, share)),
        "data": [_data(entry) for entry in entries[:most]], "more_data": max(0, len(entries) - most),
    }  # fmt: skip


def _training(version: Mapping[str, Any], share: float) -> dict[str, Any]:
    lineage = version["lineage"]
    training, samples = views.mapping(lineage.get("training")), lineage.get("samples")
    samples = [one for one in samples if isinstance(one, dict)] if isinstance(samples, list) else []
    most = part(SAMPLES, share)
    recipe = views.mapping(lineage.get("recipe")).get("text")
    return {
        "curve": views.training_curve(training, f"Losses of {version['reference']}"), "training": _facts(training),
        "samples": [_sample(sample, part(SAMPLE, share)) for sample in samples[:most]],
        "more_samples": max(0, len(samples) - most), "recipe": cut(recipe, part(RECIPE, share)),
    }  # fmt: skip


def _chosen(rows: list[dict[str, Any]], number: int, name: str, after: str | None) -> list[dict[str, Any]]:
    """The rows with the two that are to be compared: the version in sight and the one before it."""
    position = next((index for index, row in enumerate(rows) if row["version"] == number), 0)
    older = min(position + 1, len(rows) - 1)
    for index, row in enumerate(rows):
        row |= {"is_left": index == older, "is_right": index == position, "is_chosen": row["version"] == number}
        row["link"] = views.with_query(views.version_link(name), v=row["version"], after=after)
    return rows


def _facts(training: Any) -> list[str]:
    texts = []
    for name, form in (("steps", "{:,.0f} steps"), ("seconds", "{:,.0f} s"), ("tokens_per_second", "{:,.0f} tokens/s"),
                       ("peak_memory_mb", "{:,.0f} MB at most"), ("examples", "{:,.0f} examples")):  # fmt: skip
        if (value := views.number(training.get(name))) is not None:
            texts.append(form.format(value))
    return texts


def _sample(sample: Mapping[str, Any], most: int) -> dict[str, str]:
    texts = {name: cut(sample.get(name), most) for name in ("prompt", "wanted", "base", "adapter")}
    return {**texts, "title": cut(str(sample.get("prompt") or "")[-80:], LINE)}


def _data(entry: Any) -> dict[str, str]:
    if not isinstance(entry, Mapping):
        entry = {"file": entry}
    return {
        **{name: cut(entry.get(name), LINE) for name in ("role", "file")},
        "rows": views.count_text(entry.get("rows")),
        "digest": cut(str(entry.get("digest") or "")[:19]),
    }


def _held(state: Mapping[str, Any]) -> dict[str, Any]:
    """How the server keeps a version now, in words, and under which names."""
    words = [str(state["state"])] if state.get("state") else ["not in memory"]
    words += ["in a slot"] if state.get("in_slot") else []
    words += ["pinned"] if state.get("is_pinned") else []
    words += [views.size_text(state["bytes"])] if state.get("bytes") else []
    words += [f"{counted(state['requests_now'], 'request')} now"] if state.get("requests_now") else []
    names = state["held_as"]
    return {
        "text": ", ".join(words),
        "names": names[:HELD],
        "more": max(0, len(names) - HELD),
        "is_pinned": bool(state.get("is_pinned")),
    }


def _log(moves: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    return [
        {**move, "when": views.time_text(move["changed_at"]), "who": cut(move.get("actor") or "not recorded", LINE)}
        for move in reversed(moves[-part(MOVES, share) :])
    ]
