"""The page of the server: what its engines hold and do, who asked for what, keys, splits and jobs."""

from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serve.console import views
from serve.console.budget import fitted, part
from serve.console.render import render
from serve.console.texts import LINE, cut
from serve.registry_api.library import Library
from serve.registry_api.reading import key_of

MOST = 50  # rows of a table


def server_page(library: Library, request: Request) -> Response:
    """What the server does now, the newest jobs and keys, and where the rest is."""
    key = key_of(request)
    now: dict[str, Any] = library.engine() if library.engine is not None else {"engine": {}, "adapters": []}
    rows: dict[str, list[dict[str, Any]]] = {
        "adapters": [
            {**row, "name": cut(row["name"], LINE), "size": views.size_text(row["bytes"])} for row in now["adapters"]
        ],
        "used": [
            {**row, "adapter": cut(row["adapter"], LINE), "prompt": f"{row['prompt_tokens']:,}",
             "completion": f"{row['completion_tokens']:,}"}
            for row in (library.usage(key) if library.usage is not None else ())
        ],
        "keys": [_key_row(one) for one in library.keys(key)],
        "splits": [
            {"name": one["name"], "link": views.version_link(one["name"]), "sides": cut(_sides(one["split"]), LINE)}
            for one in library.splits(key)
        ],
        "jobs": [
            {**body, "words": cut(" ".join(body["command"]), LINE)}
            for body in (job.to_json() for job in library.all_jobs(key))
        ],
    }  # fmt: skip
    facts = _facts(now)

    def made(share: float) -> Response:
        most = part(MOST, share)
        values: dict[str, Any] = {name: found[:most] for name, found in rows.items()}
        values["more"] = {name: max(0, len(found) - most) for name, found in rows.items()}
        return render(request, "server.html", facts=facts, **values)

    return fitted(made)


def _facts(now: dict[str, Any]) -> list[tuple[str, str]]:
    """What each base's engine does now, one after the other."""
    return [fact for each in now.get("bases", [now]) for fact in _facts_of(each)]


def _facts_of(now: dict[str, Any]) -> list[tuple[str, str]]:
    engine = now["engine"]
    if not engine:
        return []
    return [
        ("Base", f"{now['base']['name']} {now['base']['fingerprint'][:19]}"),
        ("Requests", f"{engine['running']} running, {engine['waiting']} waiting"),
        ("KV cache", f"{views.size_text(engine['kv_bytes'])}, {100 * engine['kv_usage']:.0f} % in use"),
        ("Slots", f"{engine['slots_used']} of {engine['slots_total']} used"),
        ("Adapters", f"{engine['adapters_loaded']} in memory, {views.size_text(engine['adapter_bytes'])}"),
        ("Since the start", f"{engine['adapter_loads']} adapters read, {engine['adapter_evictions']} dropped"),
    ]


def _key_row(key: dict[str, Any]) -> dict[str, Any]:
    state = "revoked" if key["revoked_at"] else "valid" if key["is_valid"] else "expired"
    until = f" until {views.time_text(key['expires_at'])}" if key["expires_at"] and state == "valid" else ""
    limits = [key["rate"] or "", f"{key['concurrency']} at once" if key["concurrency"] else ""]
    return {
        **key,
        "state": f"{state}{until}",
        "limits": ", ".join(filter(None, limits)),
        "scopes": ", ".join(key["scopes"]),
        "adapters": cut(", ".join(key["adapters"]) or "all", LINE),
        "note": cut(key["note"], LINE),
    }


def _sides(split: list[dict[str, Any]]) -> str:
    """`canary 10 %, prod 90 %`."""
    total = sum(side["share"] for side in split)
    return ", ".join(f"{side['alias']} {100 * side['share'] / total:.3g} %" for side in split)
