"""The pages that show: adapters, one adapter, comparisons, bases, the server, runs, jobs; and the files they need."""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.registry.catalog import metrics_in
from adapterhub_local.registry.listing import SORTS, bases_in
from adapterhub_local.train.past_runs import PastRun, is_asked_to_stop
from serve.access import Scope, access
from serve.console import views
from serve.console.render import HEADERS, render, shown, static
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of, wanted_from

PAGE = 50


def add_pages(app: FastAPI, library: Library) -> None:
    """Add them."""

    @app.get("/console/static/{name}", include_in_schema=False)
    @access(Scope.OPEN)
    def file(name: str, request: Request) -> Response:
        """A script or a style of the pages."""
        found = static(name)
        if found is None:
            raise NotFound(f"there is no file '{name[:80]}' of the pages")
        data, kind, tag = found
        headers = {**HEADERS, "ETag": tag, "Cache-Control": "max-age=3600"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    @app.get("/console", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def adapters(
        request: Request,
        q: Text = None,
        base: Text = None,
        tag: Text = None,
        metric: Text = None,
        task: Text = None,
        sort: Text = None,
        versions: Text = None,
        after: Text = None,
    ) -> Response:
        """A row a name, with scores against the base."""
        tags, conditions = ([one] if one else None for one in (tag, metric))
        wanted = wanted_from(q, base, tags, conditions, task, None, sort, "all" if versions == "all" else None)
        found = library.adapters(key_of(request), wanted, after=after, limit=PAGE)
        asked = {"q": q, "base": base, "tag": tag, "metric": metric, "task": task, "sort": sort, "versions": versions}
        return render(
            request, "adapters.html", rows=[_row(entry) for entry in found.entries], total=found.total,
            wanted={name: value or "" for name, value in asked.items()}, is_filtered=any(asked.values()),
            sorts=[*SORTS, *metrics_in(library.registry)],
            bases=[_base_choice(one) for one in bases_in(library.registry)],
            next=views.with_query("/console", **asked, after=found.after) if found.after else None,
            first=views.with_query("/console", **asked), is_later=bool(after),
        )  # fmt: skip

    @app.get("/console/adapters/{name:path}", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def adapter(name: str, request: Request, v: Text = None) -> Response:
        """All about one adapter, and one of its versions in particular."""
        return adapter_page(library, request, name, v)

    @app.get("/console/compare", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def compare(
        request: Request, left: Text = None, right: Text = None, other: Text = None, job: Text = None
    ) -> Response:
        """Two versions side by side."""
        right = other or right
        if not left or not right:
            raise InputError("choose two versions to compare")
        return compare_page(library, request, left, right, job)

    @app.get("/console/bases", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def bases(request: Request) -> Response:
        """The bases, and how many versions were made for each."""
        return render(request, "bases.html", bases=[_base_row(base) for base in library.bases()])

    @app.get("/console/server", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def server(request: Request) -> Response:
        """What the server does now."""
        now: dict[str, Any] = library.engine() if library.engine is not None else {"engine": {}, "adapters": []}
        held = [{**row, "size": views.size_text(row["bytes"])} for row in now["adapters"]]
        jobs = [job.to_json() for job in library.jobs.all()]
        return render(request, "server.html", facts=_facts(now), adapters=held, jobs=jobs)

    @app.get("/console/runs", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def runs(request: Request, after: Text = None) -> Response:
        """The training runs, the newest first."""
        found = library.runs(key_of(request), after=after, limit=PAGE)
        return render(
            request, "runs.html", runs=[_run_row(run) for run in found.entries], total=found.total,
            next=views.with_query("/console/runs", after=found.after) if found.after else None, is_later=bool(after),
        )  # fmt: skip

    @app.get("/console/runs/{run}", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def run(run: str, request: Request, job: Text = None) -> Response:
        """One run: its curve while it runs, and how to stop it; with the job that resumes it, how that goes."""
        found = library.run(key_of(request), run)
        log = library.logs.curves(found.folder)
        loss, held_out, rate = (log.curves[name].points() for name in ("loss", "eval_loss", "learning_rate"))
        row = _run_row(library.run_entry(found))
        starting = _starting(library, found, job)
        return render(
            request, "run.html", run=row, is_live=row["status"] == "running" or starting["is_live"],
            curve=views.curve(loss, held_out, rate, f"Losses of {found.id}"), recipe=found.record.get("text"),
            left=_time_left(found.status, list(log.timed), found.record.get("steps")),
            stop_asked=found.status == "running" and is_asked_to_stop(found.folder),
            can_start=bool(found.record.get("path")), starting=starting,
        )  # fmt: skip

    @app.get("/console/jobs/{job}", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def job(job: str, request: Request) -> Response:
        """One job while it runs, and where its result is."""
        body = library.jobs.find(job).to_json()
        reference = views.mapping(body["result"]).get("reference")
        link = views.version_link(str(reference)) if reference else None
        return render(request, "job.html", job=body, link=link, link_text=reference)


def adapter_page(
    library: Library, request: Request, name: str, v: str | None, message: str | None = None, status: int = 200
) -> Response:
    """The page of one adapter, with a message of what did not work."""
    key = key_of(request)
    found = library.adapter(key, name)
    reference = f"{name}@{v}" if v else found["versions"][0]["reference"]
    version = library.version(key, reference)
    lineage, graph = version["lineage"], library.lineage(key, reference)
    versions = [_row(entry) for entry in found["versions"]]
    position = next((i for i, row in enumerate(versions) if row["entry"]["version"] == version["version"]), 0)
    older = min(position + 1, len(versions) - 1)
    for index, row in enumerate(versions):
        row |= {"is_left": index == older, "is_right": index == position}
    base = views.mapping(lineage.get("base"))
    training = views.mapping(lineage.get("training"))
    return render(
        request, "adapter.html", status=status, name=name, shown=version, message=message,
        aliases=found["aliases"], alias_state=json.dumps(found["aliases"]),
        scores=views.score_rows(version["metrics"]), over_versions=views.metric_over_versions(found["versions"]),
        graph=views.lineage_graph(graph), is_cut=graph["is_cut"],
        made_into=[{"text": made, "link": views.version_link(made)} for made in graph["made_into"][:50]],
        data=[_text_entry(entry) for entry in lineage.get("data") or ()],
        curve=views.training_curve(training, f"Losses of {version['reference']}"), training=_training_facts(training),
        samples=_samples(lineage), versions=versions, total=found["total"], log=_log(found["alias_log"]),
        all_link=views.with_query("/console", q=name, versions="all"), base=base,
        tag_links={tag: views.with_query("/console", tag=tag) for tag in version["tags"]},
        recipe=views.short_text(views.mapping(lineage.get("recipe")).get("text")),
        play_link=views.with_query("/console/play", m=[base.get("name") or "", version["reference"]]),
    )  # fmt: skip


def compare_page(library: Library, request: Request, left: str, right: str, job: str | None) -> Response:
    """Two versions side by side; with a job, what it measured of their modules."""
    key = key_of(request)
    compared = library.compare(key, left, right)
    left, right = compared["left"], compared["right"]
    sides = [views.score_rows(library.version(key, reference)["metrics"]) for reference in (left, right)]
    by_name = [{(row.task, row.metric): row for row in side} for side in sides]
    scores = [
        {"task": task, "metric": metric, "sides": [side.get((task, metric)) for side in by_name]}
        for task, metric in dict.fromkeys([*by_name[0], *by_name[1]])
    ]
    settings = [
        {"what": what, "left": views.short_text(pair[0]), "right": views.short_text(pair[1])}
        for what, pair in compared["lineage"].items()
        if not what.startswith("metrics.")
    ]
    measured: dict[str, Any] | None = None
    if job and (key is None or "admin" in key.scopes):
        measured = library.jobs.find(job).to_json()
        if measured["kind"] != "diff" or measured["command"][2:4] != [left, right]:
            raise NotFound("that job is about something else")
    modules = views.mapping(measured["result"]).get("modules", []) if measured else []
    return render(
        request, "compare.html", left=left, right=right, left_link=views.version_link(left),
        right_link=views.version_link(right), same_content=compared["same_content"], scores=scores, settings=settings,
        job=measured, heat=views.cosines(modules, f"Cosines of {left} and {right} by module and layer"),
        modules=[{"module": row["module"], **{side: _figure(row[side]) for side in ("left", "right", "cosine")}}
                 for row in modules],
    )  # fmt: skip


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "entry": entry,
        "link": views.version_link(entry["reference"]),
        "scores": views.score_rows(entry["metrics"], only_main=True)[:4],
        "size": views.size_text(entry["size"]),
        "created": views.time_text(entry["created_at"]),
        "tag_links": {tag: views.with_query("/console", tag=tag) for tag in entry["tags"]},
    }


def _base_choice(base: dict[str, Any]) -> dict[str, str]:
    value = str(base["name"] or base["hub_id"] or base["fingerprint"])
    return {"value": value, "text": f"{value} ({base['num_versions']:,})"}


def _base_row(base: dict[str, Any]) -> dict[str, Any]:
    parameters = views.number(base.get("num_parameters"))
    return {
        **base,
        "link": views.with_query("/console", base=base.get("name") or base.get("hub_id") or base["fingerprint"]),
        "architecture": base.get("architecture") or "",
        "parameters": f"{parameters / 1e6:,.1f} M" if parameters else "",
        "size": views.size_text(base["size"]) if base.get("size") else "",
        "context": f"{base['max_length']:,}" if base.get("max_length") else "",
    }


def _run_row(run: dict[str, Any]) -> dict[str, Any]:
    losses = {name: views.number(run[key]) for name, key in (("loss_text", "loss"), ("eval_text", "eval_loss"))}
    return {
        **run,
        **{name: "" if value is None else f"{value:.4f}" for name, value in losses.items()},
        "started": views.time_text(run["started_at"]),
        "version_link": views.version_link(str(run["version"])) if run["version"] else None,
    }


def _time_left(status: str, log: list[dict[str, Any]], steps: Any) -> str | None:
    """About how long a run still takes, by its last steps."""
    timed = [entry for entry in log if "loss" in entry and views.number(entry.get("seconds")) is not None][-20:]
    if status != "running" or len(timed) < 2 or not isinstance(steps, int):
        return None
    rate = (timed[-1]["seconds"] - timed[0]["seconds"]) / max(1, timed[-1]["step"] - timed[0]["step"])
    left = max(0.0, rate * (steps - timed[-1]["step"]))
    return f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"


def _starting(library: Library, run: PastRun, job: str | None) -> dict[str, Any]:
    """How the job goes that was started to resume a run, until the run itself says how it goes."""
    if not job:
        return {"is_live": False, "error": None}
    found = library.jobs.find(job)
    if found.kind != "train":
        raise NotFound("that job is about something else")
    if run.has_started_since(found.started):
        return {"is_live": False, "error": None}
    return {"is_live": found.state == "running", "error": found.error}


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


def _training_facts(training: Any) -> list[str]:
    texts = []
    for name, form in (("steps", "{:,.0f} steps"), ("seconds", "{:,.0f} s"), ("tokens_per_second", "{:,.0f} tokens/s"),
                       ("peak_memory_mb", "{:,.0f} MB at most"), ("examples", "{:,.0f} examples")):  # fmt: skip
        if (value := views.number(training.get(name))) is not None:
            texts.append(form.format(value))
    return texts


def _samples(lineage: dict[str, Any]) -> list[dict[str, str]]:
    kept = lineage.get("samples")
    names = ("prompt", "wanted", "base", "adapter")
    return [
        {name: views.short_text(sample.get(name)) for name in names}
        for sample in (kept if isinstance(kept, list) else [])[:20]
        if isinstance(sample, dict)
    ]


def _text_entry(entry: Any) -> dict[str, str]:
    return {name: views.short_text(views.mapping(entry).get(name)) for name in ("role", "file", "rows", "digest")}


def _log(moves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**move, "when": views.time_text(move["changed_at"])} for move in reversed(moves[-100:])]


def _figure(value: Any) -> str:
    shown_number = views.number(value)
    return "" if shown_number is None else f"{shown_number:.4g}"
