"""Respond: an admitted request becomes a whole body or a stream of events, and ends however the connection ends."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from adapterhub_local.errors import QhubError
from adapterhub_local.keys import Key
from serve.answers.completions import Answer
from serve.answers.events import AnswerForm
from serve.answers.logged import Recorder, is_logged
from serve.answers.models import Target
from serve.auth import Gate
from serve.errors import EngineEnded, Unauthorized, error_body
from serve.requests.found import NOTHING
from serve.requests.generation import ChatRequest, GenerationRequest
from serve.routing import Asked
from serve.service import Admitted, Service
from serve.text.generate import Generation, Piece

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
LOOK_INTERVAL = 1.0  # seconds between looks at whether a key is still one
NEW_SECONDS = 5.0  # in which a key that a gateway knows is known here, too, if both follow one remote
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; nobody is there to read it


class NotRead(OSError):
    """A client does not take what it is sent."""


class EventStream(StreamingResponse):
    """The events of an answer; `close` runs however the connection ends, even before the first event.

    A client that does not take an event within `timeout` seconds is given up. Where a gateway wants to know them, the
    tokens that came go with the message of the next event, as `outputs`, and `can_move` with the first message.
    """

    def __init__(
        self, answer: AnswerForm, admitted: Admitted, close: Callable[[], None], timeout: float, headers: dict[str, str]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(_sent(answer, admitted), media_type=answer.media_type, headers=headers)
        self._generation, self._course = admitted.generation, admitted.course
        self._close = close
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation

        async def send_soon(message: Message) -> None:
            if generation.can_move:
                if message["type"] == "http.response.start":
                    message["can_move"] = True
                else:
                    message["outputs"] = generation.take_noted()
                    message["has_failed"] = self._course.failed is not None
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


async def respond(
    service: Service,
    body: GenerationRequest,
    request: Request,
    form: Callable[[Answer], AnswerForm] = lambda chat: chat,
) -> Response:
    """Answer a request; `form` gives the answer the form of the endpoint, if that is not OpenAI's.

    A stream begins with its first token: what fails before that is an error with a status of its own.
    """
    state = request.scope["state"]
    logs = is_logged(service.log, body)
    admitted = await _start(service, body, state)
    generation = admitted.generation
    watch = asyncio.create_task(_watch(state["gate"], state["key"], generation)) if state["key"] else None

    def finish() -> None:
        if watch is not None:
            watch.cancel()
        state["noted"].update(service.finish(admitted, state["started"], state["key"]))

    is_streamed = False
    try:
        headers = weights_headers(admitted.target)
        chat = Answer(
            admitted.target,
            isinstance(body, ChatRequest),
            service.reader.prompts.spelling,
            body.num_choices,
            body.num_alternatives,
            body.prompt_logprobs,
            has_usage=body.includes_usage,
            repeats_usage=body.repeats_usage,
            has_thoughts=isinstance(body, ChatRequest) and body.include_reasoning,
            echoes=admitted.echoes,
            ids=generation.ids,
            created=generation.begun.created,
        )
        answer = form(chat)
        if logs:
            generation.listener = _recorder(service, body, admitted, answer.answer_id, state)
            headers["X-Qhub-Logged"] = answer.answer_id
        if body.stream:
            if not await _unless_gone(request, _begun(generation)):
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            is_streamed = True
            return EventStream(answer, admitted, finish, service.http.send_timeout, headers)
        pieces = await _unless_gone(request, _collect(generation))
    finally:
        if not is_streamed:
            finish()
    if pieces is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if body.prompt_alternatives is None:
        return JSONResponse(answer.whole(pieces, generation), headers=headers)
    # a long one, which would hold up the streams of others
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(pieces, generation), headers=headers))


async def respond_whole(
    service: Service, body: Asked, request: Request, form: Callable[[Target, Generation], dict[str, Any]]
) -> Response:
    """Answer a request whose answer is not text: `form` makes its body of what is known of the prompts."""
    state = request.scope["state"]
    admitted = await _start(service, body, state)
    generation = admitted.generation
    try:
        pieces = await _unless_gone(request, _collect(generation))
    finally:
        state["noted"].update(service.finish(admitted, state["started"], state["key"]))
    if pieces is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    headers = weights_headers(admitted.target)
    return await asyncio.to_thread(lambda: JSONResponse(form(admitted.target, generation), headers=headers))


def weights_headers(target: Target) -> dict[str, str]:
    """Exactly which weights answer, for clients that look at no body."""
    headers = {"X-Qhub-Base": target.base.name}
    if target.routed is not None:
        routed = target.routed
        headers |= {"X-Qhub-Router": routed.router, "X-Qhub-Routed": routed.chosen}
        headers |= {"X-Qhub-Confidence": f"{routed.confidence:.4f}"}
    if target.version is not None:
        headers |= {"X-Qhub-Adapter": str(target.version), "X-Qhub-Digest": target.version.content_digest}
    return headers


def _recorder(
    service: Service, body: GenerationRequest, admitted: Admitted, answer_id: str, state: Mapping[str, Any]
) -> Recorder:
    """What has an answer logged once it is whole."""
    assert service.log is not None and isinstance(body, ChatRequest)  # noqa: PT018
    key = state["key"].id if state["key"] is not None else None
    head = {"id": answer_id, "key": key, "request_id": state["request_id"]}
    return Recorder(service.log, body, admitted.target, admitted.generation, head)


async def _start(service: Service, body: Asked, state: Mapping[str, Any]) -> Admitted:
    known = {name: state[name] for name in ("request_id", "started", "key", "course")}
    return await service.start(body, found=state.get("found", NOTHING), **known)


async def _watch(gate: Gate, key: Key, generation: Generation) -> None:
    """End an answer with an error soon after its key was revoked, or expired.

    A key that is new may not have come here yet, if it was another server that let it in.
    """
    loop = asyncio.get_running_loop()
    known_by, is_known = loop.time() + NEW_SECONDS, bool(generation.begun.outputs)
    while (is_valid := gate.is_valid(key)) or (not is_known and loop.time() < known_by):
        is_known = is_known or is_valid
        await asyncio.sleep(LOOK_INTERVAL)
    generation.fail(Unauthorized("this API key was revoked, or expired, before the answer was complete"))


async def _collect(generation: Generation) -> list[Piece]:
    return [piece async for piece in generation.pieces()]


async def _begun(generation: Generation) -> bool:
    await generation.begin()
    return True


async def _sent(answer: AnswerForm, admitted: Admitted) -> AsyncIterator[str]:
    """The events of an answer; an error after the first of them can only be an event, too."""
    try:
        async for event in answer.events(admitted.generation):
            yield event
    except Exception as error:
        if isinstance(error, EngineEnded) and admitted.generation.can_move:
            raise  # the gateway sees that the answer has no end, and has another replica go on with it
        if not isinstance(error, QhubError):
            logger.exception("a stream failed")
        body = error_body(error)
        admitted.course.failed = body.status
        yield answer.error_event(body)
    if answer.end:
        yield answer.end


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
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
