"""Relay: an answer of some replica becomes the gateway's, whatever happens to the replica.

What has not begun is tried on another replica. What has begun ends with an error its client can read.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Response
from starlette.types import Message as Sent
from starlette.types import Receive, Scope, Send

from serve.answers.events import line
from serve.cluster.call import DRAINING, Call, Engines, Lost, Message
from serve.cluster.pins import affinity_of
from serve.errors import ErrorBody, NoReplica, TimedOut
from serve.http.failures import ELSEWHERE
from serve.http.front import own_path, refuse

logger = logging.getLogger("serve.cluster")
TRIES = 5  # replicas that a request is sent to before it is given up
PAUSE = 0.2  # seconds before the next, times the number of those that failed
DROPPED = frozenset([b"x-request-id", b"connection", b"transfer-encoding"])  # the gateway has its own
GONE = "the replica that made this answer is gone, before it was complete: ask again"
LOST = ErrorBody(503, GONE, "server_error", None, "replica_lost", (("Retry-After", "1"),))


class NotRead(OSError):
    """A client does not take what it is sent."""


class Chosen(Exception):
    """A router chose an adapter for a request; `details` says which."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        super().__init__(details)
        self.details = details

    def call(self, call: Call) -> Call:
        """The request as the replica gets it that comes first for that adapter."""
        affinity = affinity_of([(self.details["digest"], 1.0)])
        routed, versions = self.details["routed"], self.details["versions"]
        return replace(call, pinned=versions, affinity=affinity, routed=routed, is_asking=False)


class Relay(Response):
    """The answer to `call`. `note` gets "retried" or "lost" each time that happens.

    An answer must begin within `patience` seconds. A client that does not take what it is sent within `timeout` seconds
    is given up.
    """

    def __init__(
        self, engines: Engines, call: Call, note: Callable[[str], None], timeout: float = 30.0, patience: float = 600.0
    ) -> None:
        super().__init__()
        self.engines = engines
        self.call = call
        self.note = note
        self.timeout = timeout
        self.patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. A client that hangs up ends the work on the replica."""

        async def send_soon(message: Sent) -> None:
            try:
                async with asyncio.timeout(self.timeout):
                    await send(message)
            except TimeoutError:
                logger.warning("a client took nothing for %g s: given up", self.timeout)
                raise NotRead from None

        work = asyncio.create_task(self._answer(scope, send_soon))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(NotRead):  # the connection is closed, since the answer is not complete
                if work.done():
                    work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work

    async def _answer(self, scope: Scope, send: Send) -> None:
        """Ask replicas until an answer has begun, and send it on."""
        call, path = self.call, own_path(scope)
        deadline = asyncio.get_running_loop().time() + self.patience
        for attempt in range(1, TRIES + 1):
            try:
                await self._attempt(call, send, path, deadline)
                return
            except Chosen as chosen:
                call = chosen.call(call)
                continue
            except Lost as error:
                self.note("retried")
                _warn(call, error)
                if error.replica is not None:
                    call = replace(call, avoid=(*call.avoid, error.replica))
            except TimeoutError:
                await refuse(TimedOut("no replica has begun an answer in the time that one may take", 504), send, path)
                return
            await asyncio.sleep(PAUSE * attempt)
        await refuse(NoReplica("no replica could answer this request: ask again"), send, path)

    async def _attempt(self, call: Call, send: Send, path: str, deadline: float) -> None:
        """Send one replica's answer on. Raises Lost or TimeoutError if there is none, and nothing was sent; Chosen if
        the answer is another replica's to give."""
        held: list[Message] = []  # until the answer has begun
        has_begun, is_over, num_events = False, False, 0
        try:
            async with asyncio.timeout_at(deadline) as patience:
                async for message in _each(self.engines.answer(call)):
                    if message["type"] == DRAINING:
                        raise Lost("it is drained", message["replica"])
                    held.append(message)
                    is_over = is_over or _is_over(message)
                    if not has_begun and _has_begun(held):
                        if (redirect := _chosen(held)) is not None:
                            raise redirect
                        has_begun = True
                        patience.reschedule(None)
                    for each in held if has_begun else ():
                        num_events += each.get("body", b"").count(b"event: ")
                        await send(_own(each))
                    if has_begun:
                        held.clear()
        except Lost as error:
            if not has_begun:
                raise
            if not is_over:
                self.note("lost")
                _warn(call, error)
                await send({"type": "http.response.body", "body": lost_events(path, num_events)})
        if not has_begun:
            raise Lost("it gave no answer")


def _warn(call: Call, error: Lost) -> None:
    logger.warning("a replica was lost", extra={"fields": {"request_id": call.id, "reason": str(error)}})


async def _each(batches: AsyncIterator[Sequence[Message]]) -> AsyncIterator[Message]:
    async for batch in batches:
        for message in batch:
            yield message


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _has_begun(held: Sequence[Message]) -> bool:
    """Whether an answer may be sent on: a stream from its first event, another one when it is whole."""
    bodies = [message for message in held if message["type"] == "http.response.body"]
    if not bodies:
        return False
    return _is_over(bodies[-1]) or (_is_stream(held[0]) and any(message.get("body") for message in bodies))


def _chosen(held: Sequence[Message]) -> Chosen | None:
    """What a replica says if a whole answer is that a router chose an adapter."""
    if held[0].get("status") != 421 or _kind(held[0]) != ELSEWHERE.encode():
        return None
    return Chosen(json.loads(b"".join(message.get("body", b"") for message in held)))


def _is_over(message: Message) -> bool:
    return bool(message["type"] == "http.response.body" and not message.get("more_body", False))


def _is_stream(start: Message) -> bool:
    return _kind(start).startswith((b"text/event-stream", b"application/x-ndjson"))


def _kind(start: Message) -> bytes:
    headers = start.get("headers", ())
    return next((bytes(value) for name, value in headers if name.lower() == b"content-type"), b"")


def _own(message: Message) -> dict[str, Any]:
    """A replica's message as the gateway's."""
    if message["type"] != "http.response.start":
        return dict(message)
    headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in DROPPED]
    return {**message, "headers": headers}


def lost_events(path: str, num_events: int = 0) -> bytes:
    """What ends a stream to a client of this path when its replica is gone, behind so many named events."""
    body = LOST.to_json(path)
    if path.startswith("/api/"):
        return f"{line(body)}\n".encode()
    if path.startswith("/v1/messages"):
        return f"event: error\ndata: {line(body)}\n\n".encode()
    if path.startswith("/v1/responses"):
        flat = {"type": "error", "code": LOST.code, "message": LOST.message, "param": None,
                "sequence_number": num_events}  # fmt: skip
        return f"event: error\ndata: {line(flat | body)}\n\n".encode()
    return f"data: {line(body)}\n\ndata: [DONE]\n\n".encode()
