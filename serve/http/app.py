"""The HTTP application: OpenAI's endpoints over one engine, and those that operate it."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.keys import Key, Keys
from adapterhub_local.registry import Registry
from serve.access import Routes, Scope, access
from serve.adapters.source import Folder
from serve.answers.models import Target, adapter_entry, list_models, model_entry
from serve.auth import Gate, allowed_by, check_models
from serve.console.session import HOME
from serve.engine.options import EngineOptions
from serve.follow import Follower
from serve.http.anthropic import add_anthropic
from serve.http.blank import PACKAGE, blank_app
from serve.http.console import add_console
from serve.http.failures import handle_errors, paths_of
from serve.http.front import Front
from serve.http.guard import EXPOSED_HEADERS, Guard
from serve.http.ollama import add_ollama
from serve.http.probes import add_probes
from serve.http.respond import respond, weights_headers
from serve.http.responses import add_responses
from serve.jobs import Jobs
from serve.limits import Limits
from serve.options import HttpOptions
from serve.redis_limits import RedisLimits
from serve.registry_api.library import Library
from serve.requests.generation import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from serve.requests.model_ref import AUTO
from serve.service import Service
from serve.text.tokenize import DetokenizeRequest, TokenizeRequest, tokenize
from serve.threads import compute_alone


def create_app(
    base: LoadedBase,
    *,
    registry: Registry | None = None,
    options: EngineOptions | None = None,
    http: HttpOptions | None = None,
    limits: Limits | None = None,
    follower: Follower | None = None,
) -> FastAPI:
    """The application that serves `base` and the adapters of `registry` (default: the one at $QHUB_HOME).

    `limits` counts what keys ask (default: as `http.limits` says, else this application alone). `follower`, which has
    begun, keeps the registry as a remote says while the application runs. The base's model is changed in place and
    belongs to the application from now on. Raises Incompatible if its architecture cannot be served.
    """
    registry = registry or Registry()
    service = Service(base, registry, options, http, follower)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # adapters are read in these threads
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(None, "work", compute_alone))
        service.loop.start()
        service.leases.start(service.engine.leased)
        if follower is not None:
            follower.start()
        yield
        if follower is not None:
            await asyncio.to_thread(follower.stop)
        await asyncio.to_thread(service.loop.stop)
        await asyncio.to_thread(service.leases.stop)
        service.close()
        library.jobs.close()
        await gate.limits.close()

    app = blank_app(lifespan, root_path=service.http.root_path)
    app.state.service = service
    gate = Gate(Keys(registry.home), is_required=service.http.require_keys, limits=limits or _limits(service.http))
    library = Library(registry, Jobs(registry.home), service.now)
    routes: Routes  # known once all are added
    app.add_middleware(
        Front,
        access=lambda scope: routes.access(scope),
        gate=gate,
        options=lambda: service.http,
        metrics=service.metrics,
    )
    add_console(app, library, gate, base.info)
    if service.http.origins:  # outermost: a browser asks whether it may ask without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.http.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(Guard, gate=gate, hosts=service.http.hosts, origins=service.http.origins)
    handle_errors(app)
    _add_answers(app, service)
    add_responses(app, service)
    add_anthropic(app, service)
    add_ollama(app, service)
    add_probes(app, service)
    _add_operations(app, service)
    routes = Routes(app)
    return app


def _limits(http: HttpOptions) -> Limits | None:
    return RedisLimits(http.limits) if http.limits is not None else None


def _add_answers(app: FastAPI, service: Service) -> None:
    """The endpoints of OpenAI's clients."""
    base = service.base.info

    @app.get("/v1/models")
    @access(Scope.ANY)
    def models(request: Request) -> dict[str, Any]:
        """The base and every name, version and alias of its adapters, as far as the request's key allows them."""
        allows = allowed_by(_key(request))
        known = list_models(base, service.registry, allows, service.router()) + [
            model_entry(name, folder.created_at, folder.content_digest, base.name)
            for name, folder in service.loaded.sources().items()
            if isinstance(folder, Folder) and allows(name)
        ]
        data = [model | {"max_model_len": service.engine.max_length} for model in known]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model:path}")
    @access(Scope.ANY)
    def model(model: str, request: Request) -> dict[str, Any]:
        """One model, by any reference."""
        target = service.find(service.read(model), _key(request))
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
        return await respond(service, body, request)

    @app.post("/v1/completions")
    @access(Scope.INFER, counted=True)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more texts."""
        return await respond(service, body, request)

    @app.post("/tokenize")
    @access(Scope.INFER, counted=True)
    def tokens(body: TokenizeRequest) -> dict[str, Any]:
        """Text or messages as token ids."""
        return tokenize(service.reader.prompts, body, service.engine.max_length)

    @app.post("/detokenize")
    @access(Scope.INFER, counted=True)
    def text(body: DetokenizeRequest) -> dict[str, Any]:
        """Token ids as text."""
        return {"prompt": service.reader.prompts.text(body.tokens)}


def _add_operations(app: FastAPI, service: Service) -> None:
    """The endpoints of those who operate the server."""
    base = service.base.info

    @app.get("/", response_model=None)
    @access(Scope.ANY)
    def index(request: Request) -> Response | dict[str, Any]:
        """Name, version and paths of this server; a browser is redirected to the console."""
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(HOME, 303)
        return {"name": PACKAGE, "version": app.version, "base": base.name, "paths": paths_of(app)}

    @app.get("/openapi.json", include_in_schema=False)
    @access(Scope.ANY)
    def openapi() -> dict[str, Any]:
        """The endpoints and their bodies, for tools."""
        return app.openapi()

    @app.get("/version")
    @access(Scope.ANY)
    def version() -> dict[str, str]:
        """The version of the server."""
        return {"version": app.version}

    @app.get("/health")
    @access(Scope.OPEN)
    async def health(request: Request) -> Response:
        """Whether the engine is alive, and what it does; the details need a key where keys are needed."""
        status = 200 if service.loop.is_alive else 503
        state = request.scope["state"]
        if state["key"] is None and not state["is_open"]:
            return JSONResponse({"status": "ok" if service.loop.is_alive else "stopped"}, status)
        body = {
            "status": "ok" if service.loop.is_alive else "stopped",
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            "engine": service.engine.snapshot().to_json(),
        }
        return JSONResponse(body, status)

    @app.get("/ready")
    @access(Scope.OPEN)
    async def ready() -> Response:
        """Whether requests are accepted; a server that is about to stop answers 503 before it closes."""
        is_ready = service.loop.is_alive and not service.is_stopping
        state = "ready" if is_ready else "draining" if service.loop.is_alive else "stopped"
        followed = {} if service.follower is None else {"remote": "away" if service.follower.is_away else "following"}
        return JSONResponse({"ready": is_ready, "state": state, **followed}, 200 if is_ready else 503)

    @app.get("/metrics")
    @access(Scope.ANY)
    def metrics(request: Request) -> Response:
        """Metrics for Prometheus; of adapters, those that the request's key may ask."""
        text = service.metrics.text(allowed_by(_key(request)))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/adapters")
    @access(Scope.ADMIN)
    def adapters(request: Request) -> dict[str, Any]:
        """Every adapter in memory or used since the start that the request's key may ask: state, memory and use."""
        allows = allowed_by(_key(request))
        shown = [adapter_entry(status) for status in service.adapters() if all(map(allows, status.label.names))]
        return {"object": "list", "data": shown}

    @app.post("/v1/load_lora_adapter")
    @access(Scope.ADMIN)
    def load(body: LoadRequest, request: Request) -> Response:
        """Hold an adapter in memory until it is unloaded: a reference, or a folder below the configured root."""
        check_models(_key(request), service.names(body.lora_name))
        if body.lora_path is None:
            service.bring(body.lora_name)
        source = service.loaded.load(body.lora_name, body.lora_path, replace=body.load_inplace, pinned=body.pinned)
        headers = weights_headers(Target(body.lora_name, base, source))
        text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(text, headers=headers)

    @app.post("/v1/unload_lora_adapter")
    @access(Scope.ADMIN)
    async def unload(body: UnloadRequest, request: Request) -> Response:
        """Release an adapter, and free it when the requests that use it are done; `force` ends them."""
        check_models(_key(request), service.names(body.lora_name))
        freed = await service.unload(body.lora_name, force=body.force)
        text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return PlainTextResponse(text, headers={"X-Qhub-Freed-Bytes": str(freed)})


def _key(request: Request) -> Key | None:
    key: Key | None = request.scope["state"]["key"]
    return key
