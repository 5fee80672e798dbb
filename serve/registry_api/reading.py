"""The endpoints that read: adapters, versions, lineage, bases, runs, jobs and the server."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request

from adapterhub_local.keys import Key
from adapterhub_local.registry.catalog import Condition
from adapterhub_local.registry.history import history
from adapterhub_local.registry.listing import MAX_PAGE, Wanted
from serve.access import Scope, access
from serve.registry_api.answers import (
    Adapter,
    AdapterList,
    BaseList,
    ChangeList,
    Comparison,
    LineageGraph,
    SplitList,
    VersionAnswer,
    answers,
)
from serve.registry_api.course_answers import JobAnswer, JobList, KeyList, RunAnswer, RunList, ServerAnswer
from serve.registry_api.library import Library
from serve.registry_api.run_log import log_from

Text = Annotated[str | None, Query(max_length=500)]
MAX_LOG = 1 << 20  # bytes of a log that one answer has


def key_of(request: Request) -> Key | None:
    """The key of a request, None where none is needed."""
    key: Key | None = request.scope["state"]["key"]
    return key


def wanted_from(
    q: Text = None,
    base: Text = None,
    tag: Annotated[list[str] | None, Query(max_length=20)] = None,
    metric: Annotated[list[str] | None, Query(max_length=20)] = None,
    task: Text = None,
    kind: Text = None,
    sort: Text = None,
    versions: Annotated[str | None, Query(pattern="^(all|newest)?$")] = None,
    name: Text = None,
) -> Wanted:
    """What a list is asked for; an empty field, as forms send it, asks for nothing."""
    return Wanted(
        words=q or "",
        name=name or None,
        base=base or None,
        tags=[one for one in tag or () if one],
        conditions=[Condition.parse(one) for one in metric or () if one],
        task=task or None,
        kind=kind or None,
        every=versions == "all",
        sort=sort or "name",
    )


def add_reading(app: FastAPI, library: Library) -> None:
    """Add the endpoints."""

    @app.get("/v1/registry/adapters", responses=answers(AdapterList))
    @access(Scope.ANY)
    def adapters(
        request: Request,
        q: Text = None,
        base: Text = None,
        tag: Annotated[list[str] | None, Query()] = None,
        metric: Annotated[list[str] | None, Query()] = None,
        task: Text = None,
        kind: Text = None,
        sort: Text = None,
        versions: Annotated[str | None, Query(pattern="^(all|newest)?$")] = None,
        name: Text = None,
        after: Text = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> dict[str, Any]:
        """A page of adapters, one entry a name, or all `versions`: those that fit words, base, tags and scores."""
        wanted = wanted_from(q, base, tag, metric, task, kind, sort, versions, name)
        found = library.adapters(key_of(request), wanted, after=after, limit=limit)
        return {"object": "list", "data": found.entries, "total": found.total, "after": found.after}

    @app.get("/v1/registry/adapters/{name:path}", responses=answers(Adapter))
    @access(Scope.ANY)
    def adapter(
        name: str, request: Request, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE
    ) -> dict[str, Any]:
        """One adapter: its newest versions, aliases with protections, approvals and moves, and its split."""
        return library.adapter(key_of(request), name, limit=limit)

    @app.get("/v1/registry/versions/{reference:path}", responses=answers(VersionAnswer))
    @access(Scope.ANY)
    def version(reference: str, request: Request, report: bool = False) -> dict[str, Any]:
        """One version: files, lineage, tags and scores; with `report`, what its merge lost in each module."""
        return library.version(key_of(request), reference, with_report=report)

    @app.get("/v1/registry/history", responses=answers(ChangeList))
    @access(Scope.ADMIN)
    def changes(
        request: Request,
        name: Text = None,
        event: Annotated[list[str] | None, Query()] = None,
        actor: Text = None,
        after: Text = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> dict[str, Any]:
        """What changed and who changed it, newest first; a key for some adapters sees what is about these."""
        found = history(
            library.registry, name=name or None, events=event or (), actor=actor or None, after=after or None,
            limit=limit, allowed=library.visible_names(key_of(request)),
        )  # fmt: skip
        return {"object": "list", "data": found.entries, "after": found.after}

    @app.get("/v1/registry/lineage/{reference:path}", responses=answers(LineageGraph))
    @access(Scope.ANY)
    def lineage(reference: str, request: Request) -> dict[str, Any]:
        """What a version was made of, as nodes and edges, and what was made of it."""
        return library.lineage(key_of(request), reference)

    @app.get("/v1/registry/compare", responses=answers(Comparison))
    @access(Scope.ANY)
    def compare(left: str, right: str, request: Request) -> dict[str, Any]:
        """What differs between two versions in recipe, data and scores."""
        return library.compare(key_of(request), left, right)

    @app.get("/v1/registry/bases", responses=answers(BaseList))
    @access(Scope.ANY)
    def bases(request: Request) -> dict[str, Any]:
        """The bases that are here, and those that versions were made for and that are not."""
        return {"object": "list", "data": library.bases(key_of(request))}

    @app.get("/v1/runs", responses=answers(RunList))
    @access(Scope.ADMIN)
    def runs(
        request: Request, after: Text = None, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50
    ) -> dict[str, Any]:
        """A page of the training runs, the newest first."""
        found = library.runs(key_of(request), after=after, limit=limit)
        return {"object": "list", "data": found.entries, "total": found.total, "after": found.after}

    @app.get("/v1/runs/{run}", responses=answers(RunAnswer))
    @access(Scope.ADMIN)
    def run(run: str, request: Request, offset: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        """One run, and its log from a byte on: ask again with `offset` as the `next` of the answer before."""
        found = library.run(key_of(request), run)
        entries, following = log_from(found.folder, offset, MAX_LOG)
        return {**library.run_entry(found), "log": entries, "next": following}

    @app.get("/v1/jobs", responses=answers(JobList))
    @access(Scope.ADMIN)
    def jobs(request: Request) -> dict[str, Any]:
        """The jobs that this server started, the newest first, without their results."""
        found = library.all_jobs(key_of(request))
        return {"object": "list", "data": [{**job.to_json(), "result": None} for job in found]}

    @app.get("/v1/jobs/{job}", responses=answers(JobAnswer))
    @access(Scope.ADMIN)
    def job(job: str, request: Request) -> dict[str, Any]:
        """One job: whether it runs, and what came of it."""
        return library.job(key_of(request), job).to_json()

    @app.get("/v1/keys", responses=answers(KeyList))
    @access(Scope.ADMIN)
    def keys(request: Request) -> dict[str, Any]:
        """The API keys with what they allow, revoked ones included, the newest first."""
        return {"object": "list", "data": library.keys(key_of(request))}

    @app.get("/v1/registry/splits", responses=answers(SplitList))
    @access(Scope.ADMIN)
    def splits(request: Request) -> dict[str, Any]:
        """The names whose traffic is split between aliases."""
        return {"object": "list", "data": library.splits(key_of(request))}

    @app.get("/v1/server", responses=answers(ServerAnswer))
    @access(Scope.ADMIN)
    def server(request: Request) -> dict[str, Any]:
        """What the server does now: base, requests, memory and adapters; without an engine only that there is none."""
        followed = {"remote": library.remote()} if library.remote is not None else {}
        if library.engine is None:
            return {**followed, "base": None, "engine": None, "adapters": []}
        return {**library.engine(), "usage": library.usage(key_of(request)) if library.usage is not None else []}
