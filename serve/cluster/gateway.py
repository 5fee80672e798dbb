"""Gateway: the application before all replicas. It checks keys, counts, looks names up once, and hands requests on.

The console and the registry's API are its own; answers are the replicas'. It loads no torch.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import Counter

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.access import Access, Routes, Scope, access, declare
from serve.auth import Gate
from serve.cluster.call import Call, Engines
from serve.cluster.following import shortly
from serve.cluster.heard import Heard
from serve.cluster.merged import merged_adapters, merged_metrics, merged_models
from serve.cluster.pins import Pinned, Pins
from serve.cluster.relay import MOVES, Relay
from serve.console.session import HOME
from serve.errors import NoReplica
from serve.follow import Follower
from serve.http.blank import PACKAGE, blank_app
from serve.http.console import add_console
from serve.http.failures import handle_errors, paths_of
from serve.http.front import Front, own_path
from serve.http.guard import EXPOSED_HEADERS, Guard
from serve.jobs import Jobs
from serve.limits import Limits
from serve.metrics import Metrics
from serve.options import HttpOptions
from serve.registry_api.library import Library
from serve.requests.begun import Begun
from serve.traces import Traces

ANSWERED = Access(Scope.INFER, True)
ASKED = Access(Scope.ANY)
# what a replica answers: one that has the adapter, or for what is only asked any
FORWARDED: dict[tuple[str, str], Access] = {
    **{
        ("POST", path): ANSWERED
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/feedback",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/embeddings",
            "/v1/score",
            "/tokenize",
            "/detokenize",
            "/api/chat",
            "/api/generate",
        )
    },
    **{
        ("GET", path): ASKED
        for path in ("/v1/models", "/v1/models/{model:path}", "/api/tags", "/api/version", "/version", "/openapi.json")
    },
    ("POST", "/api/show"): ASKED,
    **dict.fromkeys(
        (
            ("GET", "/v1/responses/{response_id}"),
            ("DELETE", "/v1/responses/{response_id}"),
            ("GET", "/v1/responses/{response_id}/input_items"),
        ),
        Access(Scope.INFER),
    ),
}
# of a request's headers, what is the gateway's affair alone; a replica learns which key was found
OWN_HEADERS = frozenset(
    b"authorization x-api-key cookie host origin connection keep-alive expect transfer-encoding x-request-id".split()
)
BY_HAND = (
    "a cluster reads an adapter where its first request lands: ask for it. To keep it in a slot of every replica, name "
    "it under pin in [replicas] of cluster.toml"
)


def create_gateway(
    base: BaseInfo,
    registry: Registry,
    engines: Engines,
    http: HttpOptions,
    limits: Limits | None = None,
    follower: Follower | None = None,
    moves: int = MOVES,
) -> FastAPI:
    """The application that answers for `engines`, replicas of `base` over the same registry.

    A begun stream whose replica is lost goes on at another one, up to `moves` times. If `http` names a router, replicas
    have it, too. `follower`, which has begun, keeps the registry as a remote says while the application runs. Replicas
    then have a registry that follows the same remote, if it is not the same one.
    """
    library = Library(registry, Jobs(registry.home), remote=follower.state if follower is not None else None)
    pins = Pins(base.name, registry, follower, has_router=http.router is not None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if follower is not None:
            follower.start()
        yield
        if follower is not None:
            await asyncio.to_thread(follower.stop)
        pins.close()
        library.jobs.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)
        await gate.limits.close()

    app = blank_app(lifespan)
    gate = Gate(Keys(registry.home), is_required=http.require_keys, limits=limits)
    metrics = Metrics(_no_engine)
    routes: Routes  # known once all are added
    traces = Traces(http.otlp) if http.otlp is not None else None
    app.add_middleware(
        Front,
        access=lambda scope: routes.access(scope),
        gate=gate,
        options=lambda: http,
        metrics=metrics,
        traces=traces,
    )
    add_console(app, library, gate, base)
    if http.origins:  # outermost: a browser asks whether it may ask without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(Guard, gate=gate, hosts=http.hosts, origins=http.origins)
    handle_errors(app)
    _add_answers(app, pins, engines, http, _notes(metrics), moves)
    _add_operations(app, base, engines, metrics, follower)
    routes = Routes(app)
    return app


def call_of(request: Request, body: bytes = b"", pinned: Pinned | None = None) -> Call:
    """A request as replicas get it."""
    scope = request.scope
    pinned = pinned or Pinned()
    return Call(
        id=scope["state"]["request_id"],
        method=scope["method"],
        path=own_path(scope),
        query=scope["query_string"],
        headers=tuple(
            (bytes(name), bytes(value))
            for name, value in scope["headers"]
            if name not in OWN_HEADERS and not name.startswith((b"sec-fetch-", b"x-forwarded-"))
        ),
        body=body,
        key=scope["state"]["key"],
        pinned=pinned.versions,
        affinity=pinned.affinity,
        is_asking=pinned.is_auto,
        begun=Begun(),
    )


def _add_answers(
    app: FastAPI, pins: Pins, engines: Engines, http: HttpOptions, note: Callable[[str], None], moves: int
) -> None:
    async def forward(request: Request) -> Response:
        body = await request.body()
        pinned = None
        if request.scope["method"] == "POST" and body:
            pinned = await pins.find(body, own_path(request.scope), request.scope["state"]["key"])
        return Relay(engines, call_of(request, body, pinned), note, http.send_timeout, http.timeout, moves)

    for (method, path), declared in FORWARDED.items():
        app.add_api_route(path, forward, methods=[method], response_model=None, include_in_schema=False)
        declare(app.routes[-1], declared)


def _add_operations(
    app: FastAPI, base: BaseInfo, engines: Engines, metrics: Metrics, follower: Follower | None
) -> None:
    heard = Heard(engines)

    @app.get("/", response_model=None)
    @access(Scope.ANY)
    def index(request: Request) -> Response | dict[str, Any]:
        """What this is, and where what is; a browser is led to the console."""
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(HOME, 303)
        return {"name": PACKAGE, "version": app.version, "base": base.name, "paths": paths_of(app)}

    @app.get("/health")
    @access(Scope.OPEN)
    async def health(request: Request) -> Response:
        """Whether a replica lives, and with a key how many."""
        found = [each for each in await heard.answers(call_of(request)) if each.status == 200]
        body: dict[str, Any] = {"status": "ok" if found else "stopped"}
        state = request.scope["state"]
        if state["key"] is not None or state["is_open"]:
            body |= {"base": {"name": base.name, "fingerprint": base.fingerprint}, "replicas": len(found)}
        return JSONResponse(body, 200 if found else 503)

    @app.get("/ready")
    @access(Scope.OPEN)
    async def ready(request: Request) -> Response:
        """Whether a replica takes requests."""
        found = any(each.status == 200 for each in await heard.answers(call_of(request)))
        state = {"ready": found, "state": "ready" if found else "stopped", **shortly(follower)}
        return JSONResponse(state, 200 if found else 503)

    @app.get("/metrics")
    @access(Scope.ANY)
    async def metrics_(request: Request) -> Response:
        """What the gateway counts, and what replicas do, each with its name; as far as the request's key allows."""
        found = await engines.answers(call_of(request))
        text = await asyncio.to_thread(merged_metrics, metrics.registry, found)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/adapters")
    @access(Scope.ADMIN)
    async def adapters(request: Request) -> Response:
        """Every adapter in memory or used since the start that the request's key may ask, and on which replicas."""
        return JSONResponse({"object": "list", "data": merged_adapters(await _every(engines, request))})

    @app.get("/api/ps")
    @access(Scope.ANY)
    async def running(request: Request) -> Response:
        """The base, and the adapters in the memory of any replica that the request's key may ask."""
        return JSONResponse({"models": merged_models(await _every(engines, request))})

    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        app.add_api_route(path, _refuse_by_hand, methods=["POST"], response_model=None)


@access(Scope.ADMIN)
async def _refuse_by_hand() -> Response:
    """What is loaded by hand would be on one replica of several."""
    raise InputError(BY_HAND)


async def _every(engines: Engines, request: Request) -> list[Any]:
    answers = await engines.answers(call_of(request))
    found = [each for each in answers if each.status == 200]
    if not found and any(each.status == 404 for each in answers):
        raise NotFound(f"the replicas of this cluster have no {own_path(request.scope)}")
    if not found:
        raise NoReplica("no replica answered: ask again")
    return found


def _notes(metrics: Metrics) -> Callable[[str], None]:
    """Counts what happens to requests when replicas end."""
    counter = Counter(
        "qhub_gateway_lost",
        "Requests whose replica ended: sent to another, streams that went on there, and those that ended with an error",
        ["outcome"],
        registry=metrics.registry,
    )
    for outcome in ("retried", "moved", "lost"):
        counter.labels(outcome)
    return lambda outcome: counter.labels(outcome).inc()


def _no_engine() -> Any:
    raise LookupError("a gateway has no engine of its own")
