"""The pages that show: adapters, one adapter, comparisons, bases, the server, runs, jobs; and the files they need."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.keys import Key
from adapterhub_local.registry.catalog import metrics_in
from adapterhub_local.registry.listing import SORTS, bases_in
from adapterhub_local.train.past_runs import PastRun, is_asked_to_stop
from serve.access import Scope, access
from serve.console import views
from serve.console.adapter_page import adapter_page
from serve.console.budget import fitted, part
from serve.console.render import HEADERS, render, shown, static
from serve.console.rows import row_of
from serve.console.server_page import server_page
from serve.console.texts import LINE, cut
from serve.registry_api.library import Library
from serve.registry_api.reading import Text, key_of, wanted_from

PAGE = 50
NO_SCORES = ("rows",)  # kept beside scores: how many examples they are of
CHOICES = 40  # bases or metrics that a field offers
MAX_RECIPE = 20_000  # bytes of a run's recipe
CHANGES, MODULES, CELL = 60, 150, 300  # of a comparison: settings, modules, bytes of a value


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
        # a page names the version of its files; scripts that scripts load have none, and are asked for again
        kept = "max-age=3600" if "v" in request.query_params else "no-cache"
        headers = {**HEADERS, "ETag": tag, "Cache-Control": kept}
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
        names = library.visible_names(key_of(request))
        asked = {"q": q, "base": base, "tag": tag, "metric": metric, "task": task, "sort": sort, "versions": versions}
        bases = bases_in(library.registry, names)
        metrics = [each for each in metrics_in(library.registry, names) if each not in NO_SCORES]
        choices: dict[str, Any] = {
            "sorts": [*SORTS, *filter(_is_short, metrics)][:CHOICES],
            "bases": [_base_choice(one) for one in bases[:CHOICES]],
            "more_bases": max(0, len(bases) - CHOICES),
        }

        def made(share: float) -> Response:
            found = library.adapters(key_of(request), wanted, after=after, limit=part(PAGE, share))
            return render(
                request, "adapters.html", rows=[row_of(entry) for entry in found.entries], total=found.total,
                wanted={name: value or "" for name, value in asked.items()}, is_filtered=any(asked.values()), **choices,
                next=views.with_query("/console", **asked, after=found.after) if found.after else None,
                first=views.with_query("/console", **asked), is_later=bool(after),
            )  # fmt: skip

        return fitted(made)

    @app.get("/console/adapters/{name:path}", include_in_schema=False)
    @access(Scope.ANY)
    @shown
    def adapter(name: str, request: Request, v: Text = None, after: Text = None) -> Response:
        """All about one adapter, and one of its versions in particular."""
        return adapter_page(library, request, name, v, after=after)

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
        found = _own_bases(library, request)
        return fitted(
            lambda share: render(
                request, "bases.html", bases=[_base_row(base) for base in found[: part(PAGE, share)]], total=len(found)
            )
        )

    @app.get("/console/server", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def server(request: Request) -> Response:
        """What the server does now."""
        return server_page(library, request)

    @app.get("/console/runs", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def runs(request: Request, after: Text = None) -> Response:
        """The training runs, the newest first."""

        def made(share: float) -> Response:
            found = library.runs(key_of(request), after=after, limit=part(PAGE, share))
            return render(
                request, "runs.html", runs=[_run_row(run) for run in found.entries], total=found.total,
                next=views.with_query("/console/runs", after=found.after) if found.after else None,
                is_later=bool(after),
            )  # fmt: skip

        return fitted(made)

    @app.get("/console/runs/{run}", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def run(run: str, request: Request, job: Text = None) -> Response:
        """One run: its curve while it runs, and how to stop it; with the job that resumes it, how that goes."""
        found = library.run(key_of(request), run)
        log = library.logs.curves(found.folder)
        loss, held_out, rate = (log.curves[name].points() for name in ("loss", "eval_loss", "learning_rate"))
        row = _run_row(library.run_entry(found))
        starting = _starting(library, key_of(request), found, job)
        curve = views.curve(loss, held_out, rate, f"Losses of {found.id}")
        text = found.record.get("text")
        return fitted(lambda share: render(
            request, "run.html", run=row, is_live=row["status"] == "running" or starting["is_live"],
            curve=curve, recipe=cut(text, part(MAX_RECIPE, share)) if text else None,
            left=_time_left(found.status, list(log.timed), found.record.get("steps")),
            stop_asked=found.status == "running" and is_asked_to_stop(found.folder),
            can_start=bool(found.record.get("path")), starting=starting,
        ))  # fmt: skip

    @app.get("/console/jobs/{job}", include_in_schema=False)
    @access(Scope.ADMIN)
    @shown
    def job(job: str, request: Request) -> Response:
        """One job while it runs, and where its result is."""
        body = library.job(key_of(request), job).to_json()
        reference = views.mapping(body["result"]).get("reference")
        link = views.version_link(str(reference)) if reference else None
        return render(
            request, "job.html", job=body, command=cut(" ".join(body["command"])), link=link, link_text=reference
        )


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
    changes = [(what, pair) for what, pair in compared["lineage"].items() if not what.startswith("metrics.")]
    measured: dict[str, Any] | None = None
    if job and (key is None or "admin" in key.scopes):
        measured = library.job(key, job).to_json()
        if measured["kind"] != "diff" or measured["command"][2:4] != [left, right]:
            raise NotFound("that job is about something else")
    modules = views.mapping(measured["result"]).get("modules", []) if measured else []
    described = f"Cosines of {left} and {right} by module and layer"

    def made(share: float) -> Response:
        heat = views.cosines(modules, described, part(views.MAX_SQUARES, share))
        cell, most, rows = part(CELL, share), part(CHANGES, share), part(MODULES, share)
        return render(
            request, "compare.html", left=left, right=right, left_link=views.version_link(left),
            right_link=views.version_link(right), same_content=compared["same_content"],
            scores=scores[:most], more_scores=max(0, len(scores) - most), heat=heat, job=measured,
            settings=[{"what": cut(what, LINE), "left": cut(pair[0], cell), "right": cut(pair[1], cell)}
                      for what, pair in changes[:most]], more_settings=max(0, len(changes) - most),
            json_link=views.with_query("/v1/registry/compare", left=left, right=right), num_modules=len(modules),
            modules=[{"module": cut(row["module"], LINE),
                      **{side: _figure(row[side]) for side in ("left", "right", "cosine")}} for row in modules[:rows]],
        )  # fmt: skip

    return fitted(made)


def _base_choice(base: dict[str, Any]) -> dict[str, str]:
    value = str(base["name"] or base["hub_id"] or base["fingerprint"])
    value = value if _is_short(value) else str(base["fingerprint"])  # by which it is found too
    return {"value": value, "text": f"{cut(base['name'] or base['hub_id'] or value, 80)} ({base['num_versions']:,})"}


def _is_short(text: str) -> bool:
    """Whether a field can offer a text as it is."""
    return cut(text, LINE) == text


def _own_bases(library: Library, request: Request) -> list[dict[str, Any]]:
    """The bases that a key has to do with: those that its versions were made for, and the one that is served."""
    key, served = key_of(request), request.app.state.base_fingerprint
    sees_all = library.visible_names(key) is None
    return [each for each in library.bases(key) if sees_all or each["num_versions"] or each["fingerprint"] == served]


def _base_row(base: dict[str, Any]) -> dict[str, Any]:
    parameters = views.number(base.get("num_parameters"))
    return {
        **{name: cut(base.get(name), LINE) for name in ("hub_id", "architecture")},
        "name": cut(base.get("name") or base.get("hub_id") or "unknown", LINE),
        "fingerprint": cut(str(base["fingerprint"] or "")[:19]),
        "is_here": base["is_here"],
        "num_versions": base["num_versions"],
        "link": views.with_query("/console", base=_base_choice(base)["value"]),
        "parameters": f"{parameters / 1e6:,.1f} M" if parameters else "",
        "size": views.size_text(base["size"]) if base.get("size") else "",
        "context": f"{base['max_length']:,}" if base.get("max_length") else "",
    }


def _run_row(run: dict[str, Any]) -> dict[str, Any]:
    # what a run's record says of it is of a file that anything may have written
    texts = {name: cut(run[name], LINE) for name in ("name", "base", "status", "steps", "version")}
    losses = {name: views.number(run[key]) for name, key in (("loss_text", "loss"), ("eval_text", "eval_loss"))}
    return {
        **run,
        **texts,
        "reason": cut(run["reason"]),
        **{name: "" if value is None else f"{value:.4f}" for name, value in losses.items()},
        "started": views.time_text(run["started_at"]),
        "version_link": views.version_link(str(run["version"]))
        if run["version"] and _is_short(str(run["version"]))
        else None,
    }


def _time_left(status: str, log: list[dict[str, Any]], steps: Any) -> str | None:
    """About how long a run still takes, by its last steps."""
    timed = [entry for entry in log if "loss" in entry and views.number(entry.get("seconds")) is not None][-20:]
    if status != "running" or len(timed) < 2 or not isinstance(steps, int):
        return None
    rate = (timed[-1]["seconds"] - timed[0]["seconds"]) / max(1, timed[-1]["step"] - timed[0]["step"])
    left = max(0.0, rate * (steps - timed[-1]["step"]))
    return views.duration_text(left)


def _starting(library: Library, key: Key | None, run: PastRun, job: str | None) -> dict[str, Any]:
    """How the job goes that was started to resume a run, until the run itself says how it goes."""
    if not job:
        return {"is_live": False, "error": None}
    found = library.job(key, job)
    if found.kind != "train":
        raise NotFound("that job is about something else")
    if run.has_started_since(found.started):
        return {"is_live": False, "error": None}
    return {"is_live": found.state == "running", "error": found.error}


def _figure(value: Any) -> str:
    shown_number = views.number(value)
    return "" if shown_number is None else f"{shown_number:.4g}"
