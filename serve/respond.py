"""Respond: an admitted request becomes a whole body or a stream of events, and ends however the connection ends."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from adapterhub_local.errors import QhubError
from serve.answer import Answer
from serve.errors import error_body
from serve.generate import Generation, Piece
from serve.models import Target
from serve.protocol import ChatRequest, GenerationRequest
from serve.service import Service

logger = logging.getLogger(__name__)
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; nobody is there to read it


class NotRead(OSError):
    """A client does not take what it is sent."""


class EventStream(StreamingResponse):
    """Server-sent events; `close` runs however the connection ends, even before the first event.

    A client that does not take an event within `timeout` seconds is given up.
    """

    def __init__(
        self, events: AsyncIterator[str], close: Callable[[], None], timeout: float, headers: dict[str, str]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            try:
                async with asyncio.timeout(self._timeout):
                    await send(message)
            except TimeoutError:
                logger.warning("a client took no event for %g s: given up", self._timeout)
                raise NotRead from None

        try:
            await super().__call__(scope, receive, send_soon)
        except NotRead:
            return  # the connection is closed, since the response is not complete
        finally:
            self._close()


async def respond(service: Service, body: GenerationRequest, request: Request) -> Response:
    """Answer a request of either endpoint."""
    state = request.scope["state"]
    admitted = await service.start(body, request_id=state["request_id"], started=state["started"], key=state["key"])

    def finish() -> None:
        state["said"].update(service.finish(admitted))

    try:
        headers = weights_headers(admitted.target)
        answer = Answer(
            admitted.target,
            isinstance(body, ChatRequest),
            service.base.tokenizer,
            body.num_alternatives is not None,
            admitted.echoes,
        )
        if body.stream:
            events = _events(answer, admitted.generation, body)
            return EventStream(events, finish, service.http.send_timeout, headers)
        pieces = await _unless_gone(request, _collect(admitted.generation))
    finally:
        if not body.stream:
            finish()
    if pieces is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(answer.whole(pieces, admitted.generation.usage(body.num_choices)), headers=headers)


def weights_headers(target: Target) -> dict[str, str]:
    """Exactly which weights answer, for clients that look at no body."""
    headers = {"X-Qhub-Base": target.base.name}
    if target.version is not None:
        headers |= {"X-Qhub-Adapter": str(target.version), "X-Qhub-Digest": target.version.content_digest}
    return headers


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
            if piece.text or piece.calls or piece.finish_reason or (piece.sampled and answer.has_logprobs):
                yield _event(answer.chunk(piece, lengths[piece.index]) | usage)
            lengths[piece.index] += len(piece.text)
        if body.includes_usage:
            yield _event(answer.usage_chunk(generation.usage(body.num_choices)))
    except Exception as error:
        if not isinstance(error, QhubError):
            logger.exception("a stream failed")
        yield f"data: {json.dumps(error_body(error).to_json())}\n\n"
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
