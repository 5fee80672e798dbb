"""The endpoints of those who operate the server: what it is, how it does, and what is held in memory."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from adapterhub_local.errors import Incompatible
from adapterhub_local.keys import Key
from serve.access import Scope, access
from serve.adapters.source import Source
from serve.answers.models import Target, adapter_entry
from serve.auth import allowed_by, check_models, sees_keys_by
from serve.console.session import HOME
from serve.errors import BadParameter
from serve.http.blank import PACKAGE
from serve.http.failures import paths_of
from serve.http.front import key_of
from serve.http.hands import Hands
from serve.http.respond import weights_headers
from serve.labelled import labelled
from serve.requests.generation import LoadRequest, UnloadRequest
from serve.requests.model_ref import AUTO
from serve.service import Service
from serve.services import Services

OF_ALL = ("qhub_http_", "qhub_errors", "qhub_ready")  # metrics of requests, whichever base they were for


def add_operations(app: FastAPI, services: Services) -> None:
    """The endpoints of those who operate the server."""
    hands = Hands(services)

    @app.get("/", response_model=None)
    @access(Scope.ANY)
    def index(request: Request) -> Response | dict[str, Any]:
        """Name, version and paths of this server; a browser is redirected to the console."""
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(HOME, 303)
        names = [service.base.info.name for service in services]
        others = {"bases": names} if len(names) > 1 else {}
        return {"name": PACKAGE, "version": app.version, "base": names[0], **others, "paths": paths_of(app)}

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
        is_alive = services.are_alive
        body: dict[str, Any] = {"status": "ok" if is_alive else "stopped"}
        state = request.scope["state"]
        if state["key"] is not None or state["is_open"]:
            found = [_state(service) for service in services]
            body |= found[0] | ({"bases": found} if len(found) > 1 else {})
        return JSONResponse(body, 200 if is_alive else 503)

    @app.get("/ready")
    @access(Scope.OPEN)
    async def ready() -> Response:
        """Whether requests are accepted; a server that is about to stop answers 503 before it closes."""
        is_ready = services.are_ready
        state = "ready" if is_ready else "draining" if services.are_alive else "stopped"
        follower = services.follower
        followed = {} if follower is None else {"remote": "away" if follower.is_away else "following"}
        return JSONResponse({"ready": is_ready, "state": state, **followed}, 200 if is_ready else 503)

    @app.get("/metrics")
    @access(Scope.ANY)
    def metrics(request: Request) -> Response:
        """Metrics for Prometheus; of adapters those that the key may ask, of keys itself, or for `admin` all."""
        text = _metrics(services, key_of(request))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/adapters")
    @access(Scope.ADMIN)
    def adapters(request: Request) -> dict[str, Any]:
        """Every adapter in memory or used since the start that the request's key may ask: state, memory and use."""
        allows = allowed_by(key_of(request))
        shown = [
            adapter_entry(status) | ({"base": service.base.info.name} if len(services.all) > 1 else {})
            for service in services
            for status in service.adapters()
            if all(map(allows, status.label.names))
        ]
        return {"object": "list", "data": shown}

    @app.post("/v1/load_lora_adapter")
    @access(Scope.ADMIN)
    def load(body: LoadRequest, request: Request) -> Response:
        """Hold an adapter in memory until it is unloaded: a reference, or a folder below the configured root."""
        key = key_of(request)
        if body.lora_path is None:
            service, source = hands.load(body.lora_name, key, replace=body.load_inplace, pinned=body.pinned)
        else:
            service = services.of_now(body.lora_name, key)
            check_models(key, service.names(body.lora_name))
            service, source = _load_folder(services, body)
        headers = weights_headers(Target(body.lora_name, service.base.info, source))
        text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(text, headers=headers)

    @app.post("/v1/unload_lora_adapter")
    @access(Scope.ADMIN)
    async def unload(body: UnloadRequest, request: Request) -> Response:
        """Release an adapter, and free it when the requests that use it are done; `force` ends them."""
        freed = await hands.unload(body.lora_name, key_of(request), force=body.force)
        text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return PlainTextResponse(text, headers={"X-Qhub-Freed-Bytes": str(freed)})


def _state(service: Service) -> dict[str, Any]:
    base = service.base.info
    named = {"name": base.name, "fingerprint": base.fingerprint}
    return {"base": named, "engine": service.engine.snapshot().to_json()}


def _metrics(services: Services, key: Key | None) -> str:
    """Of one base as they are; of several with the base's name as a label, but for those of requests."""
    seen = (allowed_by(key), sees_keys_by(key))
    texts = [(service.base.info.name, service.metrics.text(*seen).decode()) for service in services]
    if len(texts) == 1:
        return texts[0][1]
    return labelled(texts[:1], None, lambda family: family.startswith(OF_ALL)) + labelled(
        texts, "base", lambda family: not family.startswith(OF_ALL)
    )


def _load_folder(services: Services, body: LoadRequest) -> tuple[Service, Source]:
    """A folder as an adapter of the first base that it fits. Raises Incompatible if it fits none.

    Its name is one over all bases: what another base held under it is dropped when it is replaced.
    """
    name, path = body.lora_name, body.lora_path
    if name == AUTO or name in {service.base.info.name for service in services}:
        message = f"'{name}' is a model that is served here already: give the adapter another name"
        raise BadParameter(message, "lora_name")
    before = next((service for service in services if service.loaded.find(name) is not None), None)
    if before is not None and not body.load_inplace:
        before.loaded.load(name, path)  # which refuses it
    *others, last = services
    for service in others:
        try:
            found = service, service.loaded.load(name, path, replace=body.load_inplace, pinned=body.pinned)
            break
        except Incompatible:
            continue
    else:
        found = last, last.loaded.load(name, path, replace=body.load_inplace, pinned=body.pinned)
    if before is not None and before is not found[0]:
        before.loaded.unload(name)
    return found
