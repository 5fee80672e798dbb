"""The HTTP application: OpenAI's endpoints over one engine, and those that operate it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.keys import Key, Keys
from adapterhub_local.registry import Registry
from serve.access import Routes, Scope, access
from serve.adapters.source import Folder
from serve.answers.models import list_models, model_entry
from serve.auth import Gate, allowed_by, sees_keys_by
from serve.engine.options import EngineOptions
from serve.follow import Follower
from serve.http.anthropic import add_anthropic
from serve.http.blank import blank_app
from serve.http.console import add_console
from serve.http.failures import handle_errors
from serve.http.feedback import add_feedback
from serve.http.front import Front, key_of
from serve.http.guard import EXPOSED_HEADERS, Guard
from serve.http.hands import Hands
from serve.http.ollama import add_ollama
from serve.http.operations import add_operations
from serve.http.probes import add_probes
from serve.http.respond import respond
from serve.http.responses import add_responses
from serve.jobs import Jobs
from serve.limits import Limits
from serve.options import HttpOptions
from serve.redis_limits import RedisLimits
from serve.registry_api.library import Library
from serve.requests.generation import ChatRequest, CompletionRequest
from serve.requests.model_ref import AUTO
from serve.service import Service
from serve.services import Services
from serve.text.tokenize import DetokenizeRequest, TokenizeRequest, tokenize
from serve.threads import compute_alone
from serve.traces import Traces


def create_app(
    base: LoadedBase | Sequence[LoadedBase],
    *,
    registry: Registry | None = None,
    options: EngineOptions | None = None,
    http: HttpOptions | None = None,
    limits: Limits | None = None,
    follower: Follower | None = None,
) -> FastAPI:
    """The application that serves `base`, or several, and the adapters of `registry` (default: the one at $QHUB_HOME).

    `limits` counts what keys ask (default: as `http.limits` says, else this application alone). `follower`, which has
    begun, keeps the registry as a remote says while the application runs. The base's model is changed in place and
    belongs to the application from now on. Raises Incompatible if its architecture cannot be served, and InputError if
    `http` names a collector of traces and the extra for them is not installed.
    """
    registry = registry or Registry()
    services = Services([base] if isinstance(base, LoadedBase) else base, registry, options, http, follower)
    http = http or HttpOptions()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # adapters are read in these threads
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(None, "work", compute_alone))
        for service in services:
            service.loop.start()
            service.leases.start(service.engine.leased)
        if follower is not None:
            follower.start()
        yield
        if follower is not None:
            await asyncio.to_thread(follower.stop)
        for service in services:
            await asyncio.to_thread(service.loop.stop)
            await asyncio.to_thread(service.leases.stop)
        await asyncio.to_thread(services.close)
        if traces is not None:
            await asyncio.to_thread(traces.close)
        library.jobs.close()
        await gate.limits.close()

    app = blank_app(lifespan, root_path=http.root_path)
    app.state.services = services
    traces = Traces(http.otlp, http.replica) if http.otlp is not None else None
    gate = Gate(Keys(registry.home), is_required=http.require_keys, limits=limits or _limits(http))
    metrics = services.first.metrics

    def usage(key: Key | None) -> list[dict[str, Any]]:
        return metrics.used(allowed_by(key), sees_keys_by(key))

    library = Library(registry, Jobs(registry.home), services.now, usage=usage, hands=Hands(services))
    routes: Routes  # known once all are added
    app.add_middleware(
        Front,
        access=lambda scope: routes.access(scope),
        gate=gate,
        options=lambda: services.first.http,
        metrics=metrics,
        traces=traces,
    )
    add_console(app, library, gate, services.first.base.info)
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
    _add_answers(app, services)
    add_responses(app, services)
    add_feedback(app, services)
    add_anthropic(app, services)
    add_ollama(app, services)
    add_probes(app, services)
    add_operations(app, services)
    routes = Routes(app)
    return app


def _limits(http: HttpOptions) -> Limits | None:
    return RedisLimits(http.limits) if http.limits is not None else None


def _add_answers(app: FastAPI, services: Services) -> None:
    """The endpoints of OpenAI's clients."""

    @app.get("/v1/models")
    @access(Scope.ANY)
    def models(request: Request) -> dict[str, Any]:
        """The base and every name, version and alias of its adapters, as far as the request's key allows them."""
        allows = allowed_by(key_of(request))
        data = [model for service in services for model in _models(service, allows)]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model:path}")
    @access(Scope.ANY)
    def model(model: str, request: Request) -> dict[str, Any]:
        """One model, by any reference."""
        service = services.of_now(model, key_of(request))
        target = service.find(service.read(model), key_of(request))
        base = service.base.info
        limits = {"max_model_len": service.engine.max_length}
        if model == AUTO and (router := service.router()):
            return model_entry(model, router.created_at, router.content_digest, base.name) | limits
        if target.version is None:
            return model_entry(model, base.created_at, base.fingerprint, None) | limits
        created = getattr(target.version, "created_at", base.created_at)  # a mix was made by nobody
        return model_entry(model, created, target.version.content_digest, base.name) | limits

    @app.post("/v1/chat/completions")
    @access(Scope.INFER, counted=True)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await respond(await services.of(body.model, key_of(request)), body, request)

    @app.post("/v1/completions")
    @access(Scope.INFER, counted=True)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more texts."""
        return await respond(await services.of(body.model, key_of(request)), body, request)

    @app.post("/tokenize")
    @access(Scope.INFER, counted=True)
    def tokens(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Text or messages as token ids."""
        service = services.of_now(body.model, key_of(request)) if body.model else services.first
        return tokenize(service.reader.prompts, body, service.engine.max_length)

    @app.post("/detokenize")
    @access(Scope.INFER, counted=True)
    def text(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
        """Token ids as text."""
        service = services.of_now(body.model, key_of(request)) if body.model else services.first
        return {"prompt": service.reader.prompts.text(body.tokens)}


def _models(service: Service, allows: Callable[[str], bool]) -> list[dict[str, Any]]:
    """What a base answers to: its name, and those of its adapters, folders included."""
    base = service.base.info
    known = list_models(base, service.registry, allows, service.router()) + [
        model_entry(name, folder.created_at, folder.content_digest, base.name)
        for name, folder in service.loaded.sources().items()
        if isinstance(folder, Folder) and allows(name)
    ]
    return [model | {"max_model_len": service.engine.max_length} for model in known]
