"""The HTTP application: OpenAI's endpoints over one engine. Only this module knows the web framework."""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry
from serve.answer import Answer
from serve.engine.build import build_engine
from serve.engine.loop import EngineLoop
from serve.engine.options import EngineOptions
from serve.engine.request import Request as EngineRequest
from serve.errors import ErrorBody, error_body
from serve.generate import Generation, Piece
from serve.leases import Leases
from serve.models import Target, find_target, list_models
from serve.prompt import PromptReader, end_tokens
from serve.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, GenerationRequest

logger = logging.getLogger(__name__)
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; nobody is there to read it


class Service:
    """What the endpoints share: the base, the registry that is asked at every request, and the engine."""

    def __init__(self, base: LoadedBase, registry: Registry, options: EngineOptions | None = None) -> None:
        self.base = base
        self.registry = registry
        self.engine = build_engine(base, options)
        self.loop = EngineLoop(self.engine)
        self.leases = Leases(registry)
        vocabulary_size = base.model.get_input_embeddings().weight.shape[0]
        self.reader = PromptReader(base.tokenizer, vocabulary_size)
        self.end_tokens = end_tokens(base.model, base.tokenizer)

    async def start(self, body: GenerationRequest) -> tuple[Target, Generation]:
        """Admit a request: what the model's name means now, its adapter in memory, its prompt in the queue."""
        target, requests = await asyncio.to_thread(self._prepare, body)
        try:
            return target, Generation(self.loop, requests, self.base.tokenizer)
        except Exception:
            for request in requests:
                self._release(request)
            raise

    def _prepare(self, body: GenerationRequest) -> tuple[Target, list[EngineRequest]]:
        """The engine's requests, each holding its adapter. Reads files: not for the event loop."""
        target = find_target(body.model, self.base.info, self.registry)
        if isinstance(body, ChatRequest):
            prompts = [self.reader.chat(body.messages)]
        else:
            assert isinstance(body, CompletionRequest)
            prompts = [self.reader.plain(prompt) for prompt in body.prompts]
        if target.version is not None:
            self.leases.hold(target.version)
        requests: list[EngineRequest] = []
        try:
            for prompt in prompts:
                max_tokens = self._max_tokens(body, len(prompt))
                for choice in range(body.num_choices):
                    params = body.sampling_params(choice, max_tokens, self.end_tokens)
                    adapter = self.engine.pool.acquire(target.version) if target.version else None
                    requests.append(EngineRequest(uuid.uuid4().hex, prompt, params, adapter))
        except Exception:
            for request in requests:
                self._release(request)
            raise
        return target, requests

    def _max_tokens(self, body: GenerationRequest, num_prompt: int) -> int:
        """The longest answer wanted, by default what the context has room for. Raises ContextTooLong."""
        wanted = body.max_tokens
        if isinstance(body, ChatRequest):
            wanted = body.max_completion_tokens or wanted or max(1, self.engine.max_length - num_prompt)
        wanted = wanted or DEFAULT_COMPLETION_TOKENS
        self.engine.check_length(num_prompt, wanted)
        return wanted

    def _release(self, request: EngineRequest) -> None:
        if request.adapter is not None:
            self.engine.pool.release(request.adapter)


class EventStream(StreamingResponse):
    """Server-sent events; `close` runs however the connection ends, even before the first event."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def create_app(base: LoadedBase, *, registry: Registry | None = None, options: EngineOptions | None = None) -> FastAPI:
    """The application that serves `base` and the adapters of `registry` (default: the one at $QHUB_HOME).

    The base's model is changed in place and belongs to the application from now on. Raises Incompatible
    if its architecture cannot be served.
    """
    service = Service(base, registry or Registry(), options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        service.leases.start()
        yield
        await asyncio.to_thread(service.loop.stop)
        await asyncio.to_thread(service.leases.stop)

    app = FastAPI(title="adapterhub-local", lifespan=lifespan)
    app.state.service = service
    _handle_errors(app)

    @app.get("/health")
    async def health() -> Response:
        """Whether the engine runs, and what it does."""
        body = {
            "status": "ok" if service.loop.is_alive else "stopped",
            "base": {"name": base.info.name, "fingerprint": base.info.fingerprint},
            "engine": service.engine.snapshot(),
        }
        return JSONResponse(body, 200 if service.loop.is_alive else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The base and every name, version and alias of its adapters."""
        return {"object": "list", "data": list_models(base.info, service.registry)}

    @app.get("/v1/models/{model:path}")
    def model(model: str) -> dict[str, Any]:
        """One model, by any reference."""
        target = find_target(model, base.info, service.registry)
        root = target.version.content_digest if target.version else base.info.fingerprint
        known = next((one for one in list_models(base.info, service.registry) if one["root"] == root), {})
        parent = base.info.name if target.version else None
        return {
            "object": "model",
            "created": 0,
            "owned_by": "qhub",
            **known,
            "id": model,
            "root": root,
            "parent": parent,
        }

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(service, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more texts."""
        return await _answer(service, body, request)

    return app


async def _answer(service: Service, body: GenerationRequest, request: Request) -> Response:
    target, generation = await service.start(body)
    answer = Answer(target, isinstance(body, ChatRequest), service.base.tokenizer)
    if body.stream:
        return EventStream(_events(answer, generation, body), generation.close)
    try:
        pieces = await _unless_gone(request, _collect(generation))
    finally:
        generation.close()
    if pieces is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(answer.whole(pieces, generation.usage(body.num_choices)))


async def _collect(generation: Generation) -> list[Piece]:
    return [piece async for piece in generation.pieces()]


async def _events(answer: Answer, generation: Generation, body: GenerationRequest) -> AsyncIterator[str]:
    """The chunks of an answer; an error after the first of them can only be an event, too."""
    usage = {"usage": None} if body.includes_usage else {}
    lengths = [0] * len(generation.requests)
    try:
        if answer.is_chat:
            for index in range(len(generation.requests)):
                yield _event(answer.first_chunk(index) | usage)
        async for piece in generation.pieces():
            if piece.text or piece.finish_reason or (piece.sampled and piece.sampled.logprob is not None):
                yield _event(answer.chunk(piece, lengths[piece.index]) | usage)
            lengths[piece.index] += len(piece.text)
        if body.includes_usage:
            yield _event(answer.usage_chunk(generation.usage(body.num_choices)))
    except Exception as error:
        if not isinstance(error, QhubError):
            logger.exception("a stream failed")
        yield _event(error_body(error).to_json())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[Piece]]) -> list[Piece] | None:
    """The result of `work`, or None if the client hung up before it was there."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()


def _handle_errors(app: FastAPI) -> None:
    """Every error as an OpenAI error body."""

    @app.exception_handler(QhubError)
    async def known(_: Request, error: QhubError) -> JSONResponse:
        return _error_response(error_body(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error_response(_invalid_body(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error_response(ErrorBody(error.status_code, message, "invalid_request_error"))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return _error_response(error_body(error))


def _invalid_body(error: RequestValidationError) -> ErrorBody:
    """The first thing that is wrong with a request's body, and the parameter it is about."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ErrorBody(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", "invalid_request_error")
    path = [str(part) for part in first["loc"] if part != "body"]
    param = first.get("ctx", {}).get("param") or (path[0] if path else None)
    where = ".".join(path) or param
    message = f"{where}: {first['msg']}" if where else f"{first['msg']} (as application/json)"
    return ErrorBody(400, message, "invalid_request_error", param)


def _error_response(body: ErrorBody) -> JSONResponse:
    headers = {"Retry-After": "1"} if body.status == 429 else None
    return JSONResponse(body.to_json(), body.status, headers)
