"""The application of a replica whose answers are vLLM's: models are looked up and checked here, and named by digest.

vLLM keeps what it was given for a name as long as it runs, so it gets `name@sha256:...`, which can never mean anything
else; `adapterhub_local.vllm` is its plugin that reads these.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import Incompatible, NotFound
from adapterhub_local.keys import Key
from adapterhub_local.refs import Mix, Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.remotes import Remote
from adapterhub_local.vllm import find_computed
from serve.answers.models import list_models, model_entry
from serve.auth import allowed_by, check_models
from serve.errors import BadParameter, ModelNotFound
from serve.http.blank import blank_app
from serve.http.failures import handle_errors
from serve.requests.model_ref import ModelRef, read_model

ANSWERED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
ASKED = ("/health", "/metrics", "/version", "/openapi.json")
ABSENT = ("/v1/score", "/api/chat", "/api/generate", "/api/show", "/api/tags", "/api/version", "/api/ps")
PER_CONNECTION = frozenset([b"connection", b"keep-alive", b"transfer-encoding", b"server", b"date"])


class Adapters:
    """The versions that this replica's vLLM may be asked for, and those that it was asked for. One thread at a time."""

    def __init__(self, registry: Registry, base: BaseInfo, remote: Remote | None, max_length: int) -> None:
        self.registry = registry
        self.base = base
        self.remote = remote
        self.max_length = max_length
        self._used: dict[str, dict[str, Any]] = {}  # by digest, as /v1/adapters lists them

    def find(self, reference: Reference) -> Version:
        """The version, if vLLM computes it. Raises ModelNotFound, BadParameter."""
        try:
            return find_computed(self.registry, reference, self.base, self.remote)
        except Incompatible as error:
            raise BadParameter(str(error), "model") from None
        except NotFound as error:
            served = f"base '{self.base.name}' and its adapters, see /v1/models"
            raise ModelNotFound(f"{error} (served are {served})") from None

    def begin(self, version: Version) -> dict[str, Any]:
        """Count one more request to it; `end` is given what this returns."""
        entry = self._used.setdefault(
            version.content_digest,
            {"digest": version.content_digest, "name": str(version), "state": "ready", "in_slot": False,
             "is_held": False, "is_pinned": False, "bytes": 0, "requests_now": 0, "requests": 0, "last_used": None},
        )  # fmt: skip
        entry["requests_now"] += 1
        entry["requests"] += 1
        entry["last_used"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return entry

    @property
    def names(self) -> list[str]:
        """What vLLM was asked for since its start."""
        return sorted(entry["name"] for entry in self._used.values())

    def used(self, key: Key | None) -> list[dict[str, Any]]:
        """The same as /v1/adapters lists it, as far as the key allows. Which are in memory vLLM does not say."""
        allows = allowed_by(key)
        return [entry for entry in self._used.values() if allows(Reference.parse(entry["name"]).name)]


def create_vllm_app(client: httpx.AsyncClient, adapters: Adapters, replica: str) -> FastAPI:
    """The application: `client` reaches vLLM. Calls come with the key that the gateway found."""
    app = blank_app(_nothing)
    handle_errors(app)

    async def answer(request: Request) -> Response:
        body = await request.body()
        asked = _object(body)
        version = None
        if asked is not None:
            version = await _version(asked, request, adapters)
            body = json.dumps(asked).encode()
        return Forwarded(client, request, body, replica, adapters, version)

    async def forward(request: Request) -> Response:
        return Forwarded(client, request, b"", replica, adapters)

    async def refuse(request: Request) -> Response:
        raise ModelNotFound(f"vLLM answers here, which has no {request.scope['path']}: `qhub serve` has it")

    for path in ANSWERED:
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    for path in ASKED:
        app.add_api_route(path, forward, methods=["GET"], response_model=None)
    for path in ABSENT:
        app.add_api_route(path, refuse, methods=["GET", "POST"], response_model=None)
    app.add_api_route("/ready", forward, methods=["GET"], response_model=None)
    _add_models(app, adapters)
    return app


def _add_models(app: FastAPI, adapters: Adapters) -> None:
    base, limits = adapters.base, {"max_model_len": adapters.max_length}

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        known = list_models(base, adapters.registry, allowed_by(_key(request)))
        return {"object": "list", "data": [model | limits for model in known]}

    @app.get("/v1/models/{model:path}")
    def model(model: str, request: Request) -> dict[str, Any]:
        ref = read_model(model, base.name)
        check_models(_key(request), ref.names)
        if ref.mix is None:
            return model_entry(model, base.created_at, base.fingerprint, None) | limits
        version = adapters.find(_single(ref, request))
        return model_entry(model, version.created_at, version.content_digest, base.name) | limits

    @app.get("/v1/adapters")
    def used(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": adapters.used(_key(request))}


class Forwarded(Response):
    """vLLM's answer as it comes. A caller who hangs up ends it there, too."""

    def __init__(
        self, client: httpx.AsyncClient, request: Request, body: bytes, replica: str, adapters: Adapters,
        version: Version | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        path = "/health" if request.scope["path"] == "/ready" else request.scope["path"]
        url = httpx.URL(path=path, query=request.scope["query_string"])
        headers = [each for each in request.scope["headers"] if each[0] != b"content-length"]
        self._client = client
        self._request = client.build_request(request.method, client.base_url.join(url), headers=headers, content=body)
        self._own = (b"x-qhub-replica", replica.encode())
        self._adapters, self._version = adapters, version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises httpx.HTTPError if vLLM ends."""
        entry = self._adapters.begin(self._version) if self._version is not None else None
        try:
            answer = await self._client.send(self._request, stream=True)
            try:
                headers = [each for each in answer.headers.raw if each[0].lower() not in PER_CONNECTION]
                start = {"type": "http.response.start", "status": answer.status_code}
                await send({**start, "headers": [*headers, self._own]})
                async for part in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            finally:
                await answer.aclose()
            await send({"type": "http.response.body", "body": b""})
        finally:
            if entry is not None:
                entry["requests_now"] -= 1


async def _version(asked: dict[str, Any], request: Request, adapters: Adapters) -> Version | None:
    """The version that answers, which `asked` names by its digest from here on; None for the base, and for what vLLM
    will refuse. Raises ModelNotFound, BadParameter, Forbidden."""
    if not isinstance(asked.get("model"), str):
        return None
    ref = read_model(asked["model"], adapters.base.name, _terms(asked.pop("adapters", None)))
    check_models(_key(request), ref.names)
    if ref.mix is None:
        return None
    version = await asyncio.to_thread(adapters.find, _single(ref, request))
    asked["model"] = str(Reference(version.name, digest=version.manifest_digest))
    return version


def _single(ref: ModelRef, request: Request) -> Reference:
    """The one adapter that is asked for, as the gateway has looked it up. Raises BadParameter for a mix."""
    versions = request.scope["state"]["found"].versions
    mix = Mix.parse(versions) if versions is not None else ref.mix
    assert mix is not None, "only adapters are looked up"
    if not mix.is_single:
        raise BadParameter(
            "vLLM answers with one adapter, by its whole weight: merge them with `qhub merge` and name the version",
            "model",
        )
    return mix.terms[0][0]


def _terms(found: Any) -> list[tuple[str, float]]:
    """The field `adapters` of a request. Raises BadParameter."""
    try:
        return [(str(term["ref"]), float(term.get("weight", 1.0))) for term in found or ()]
    except (TypeError, LookupError, AttributeError, ValueError):
        raise BadParameter('adapters must be a list of {"ref": ..., "weight": ...}', "adapters") from None


def _object(body: bytes) -> dict[str, Any] | None:
    """A body that is a JSON object; of any other vLLM says what is wrong."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _key(request: Request) -> Key | None:
    key: Key | None = request.scope["state"]["session"]
    return key


@asynccontextmanager
async def _nothing(_: FastAPI) -> AsyncIterator[None]:
    yield
