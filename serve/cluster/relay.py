"""Relay: an answer of some replica becomes the gateway's, whatever happens to the replica.

What has not begun is tried on another replica. A stream that has begun goes on at another one, behind the tokens that
have come; where that cannot be, it ends with an error that its client can read.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Response
from starlette.types import Message as Sent
from starlette.types import Receive, Scope, Send

from serve.answers.events import line
from serve.cluster.call import DRAINING, Call, Engines, Lost, Message
from serve.cluster.pins import affinity_of
from serve.errors import Busy, ErrorBody, NoReplica, TimedOut
from serve.http.failures import ELSEWHERE
from serve.http.front import own_path, refuse

logger = logging.getLogger("serve.cluster")
TRIES = 5  # replicas that a request is sent to before it is given up
PASSING = (429, 503)  # statuses of a replica that another one, or the same one later, need not give
REPLICA = "x-qhub-replica"
DONE = b"data: [DONE]\n\n"
MOVES = 2  # times that a begun stream goes on at another one, if nothing else is asked for
PAUSE = 0.2  # seconds before the next, times the number of those that failed
DROPPED = frozenset([b"x-request-id", b"connection", b"transfer-encoding"])  # the gateway has its own
GONE = "the replica that made this answer is gone, before it was complete: ask again"
LOST = ErrorBody(503, GONE, "server_error", None, "replica_lost", (("Retry-After", "1"),))


class NotRead(OSError):
    """A client does not take what it is sent."""


class NotTheSame(Exception):
    """What another replica makes of a stream does not begin with what was sent of it."""


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


@dataclass
class Stream:
    """What of a stream its client was sent, and the tokens that had come by then."""

    has_begun: bool = False
    is_taken: bool = False  # the replica that was asked last has begun it, or gone on with it
    can_move: bool = False
    routed: Mapping[str, Any] | None = None  # what its replica's router has chosen for it
    is_over: bool = False
    has_failed: bool = False  # it has the replica's own error
    num_bytes: int = 0
    num_events: int = 0  # those that have a name
    last: bytes = b""  # event, or events
    digest: Any = field(default_factory=hashlib.sha256)
    outputs: list[list[Any]] = field(default_factory=list)

    def sent(self, message: Message) -> None:
        """Note a message."""
        body = message.get("body", b"")
        self.num_bytes += len(body)
        self.num_events += body.startswith(b"event: ") + body.count(b"\n\nevent: ")
        self.has_failed = self.has_failed or message.get("has_failed", False)
        self.digest.update(body)
        self.last = body or self.last
        self.outputs += message.get("outputs", ())
        self.is_over = self.is_over or _is_over(message)


class Relay(Response):
    """The answer to `call`. `note` gets "retried", "moved" or "lost" each time that happens.

    An answer must begin, or go on, within `patience` seconds. A stream goes on at another replica `moves` times: what
    it asks for may be what ends them. A client that does not take what it is sent within `timeout` seconds is given up.
    """

    def __init__(
        self,
        engines: Engines,
        call: Call,
        note: Callable[[str], None],
        timeout: float = 30.0,
        patience: float = 600.0,
        moves: int = MOVES,
    ) -> None:
        super().__init__()
        self.engines = engines
        self.call = replace(call, begun=replace(call.begun, is_noted=moves > 0))
        self.note = note
        self.timeout = timeout
        self.patience = patience
        self.moves = moves

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
        """Ask replicas until an answer has been made, and send it on."""
        call, path, stream = self.call, own_path(scope), Stream()
        loop = asyncio.get_running_loop()
        started = loop.time()
        left, moves, deadline = TRIES, self.moves, started + self.patience
        while left:
            left -= 1
            try:
                await (self._go_on if stream.has_begun else self._attempt)(call, send, stream, deadline)
                return
            except Chosen as chosen:
                call = chosen.call(call)
                continue
            except Lost as error:
                _warn(call, error)
                if stream.has_failed or is_complete(path, stream.last):  # only its end is missing
                    await send({"type": "http.response.body", "body": missing_end(path, stream.last)})
                    return
                if not stream.has_begun:
                    self.note("retried")
                elif stream.is_taken:
                    if not stream.can_move or not moves:
                        break
                    left, moves, deadline = TRIES, moves - 1, loop.time() + self.patience
                call = call.again(stream.outputs, loop.time() - started, error.replica)
                if call.is_asking and stream.routed is not None:  # the router has been asked, and the answer is begun
                    call = replace(call, routed=stream.routed, is_asking=False)
            except Busy:
                if not stream.has_begun:
                    raise
            except TimeoutError:
                if stream.has_begun:
                    break
                await refuse(TimedOut("no replica has begun an answer in the time that one may take", 504), send, path)
                return
            except NotTheSame as error:
                fields = {"request_id": call.id, "reason": str(error)}
                logger.error("a stream could not go on", extra={"fields": fields})
                break
            await asyncio.sleep(PAUSE * (TRIES - left))
        if not stream.has_begun:
            await refuse(NoReplica("no replica could answer this request: ask again"), send, path)
            return
        self.note("lost")
        await send({"type": "http.response.body", "body": lost_events(path, stream.num_events)})

    async def _attempt(self, call: Call, send: Send, stream: Stream, deadline: float) -> None:
        """Send one replica's answer on. Raises Lost, and TimeoutError if it does not begin, when nothing was sent;
        Chosen if the answer is another replica's to give."""
        held: list[Message] = []  # until the answer has begun
        async with asyncio.timeout_at(deadline) as patience:
            async for message in self._messages(call):
                held.append(message)
                if not stream.has_begun and _has_begun(held):
                    if (redirect := _chosen(held)) is not None:
                        raise redirect
                    stream.has_begun = stream.is_taken = True
                    stream.can_move = held[0].get("can_move", False)
                    stream.routed = _routed(held[0])
                    patience.reschedule(None)
                if stream.has_begun:
                    for each in held:
                        await send(_own(each))
                        stream.sent(each)
                    held.clear()
        if not stream.has_begun:
            raise Lost("it gave no answer")

    async def _go_on(self, call: Call, send: Send, stream: Stream, deadline: float) -> None:
        """Send on what another replica makes of a begun stream, behind what was sent of it already.

        Raises Lost, TimeoutError if it is not there in time, NotTheSame if it does not begin as what was sent.
        """
        left, digest, stream.is_taken = stream.num_bytes, hashlib.sha256(), False
        async with asyncio.timeout_at(deadline) as patience:
            async for message in self._messages(call):
                if message["type"] == "http.response.start":
                    if message["status"] in PASSING:
                        raise Lost(f"it does not go on now: status {message['status']}", _header(message, REPLICA))
                    if message["status"] != 200:
                        raise NotTheSame(f"status {message['status']}")
                    stream.is_taken = True
                    continue
                body = message.get("body", b"")
                if left:
                    digest.update(body[:left])
                    left, body = max(0, left - len(body)), body[left:]
                    if left and not _is_over(message):
                        continue
                    if digest.digest() != stream.digest.digest():
                        raise NotTheSame("another beginning")
                    patience.reschedule(None)
                    self.note("moved")
                rest = {**message, "body": body}
                await send(_own(rest))
                stream.sent(rest)
        if not stream.is_over:
            raise Lost("its answer has no end")

    async def _messages(self, call: Call) -> AsyncIterator[Message]:
        """One replica's answer, its end when nothing is left to be done for it: whoever asks again at once finds the
        place free that it had. Raises Lost, also if it is drained."""
        end: Message | None = None
        try:
            async for batch in self.engines.answer(call):
                for message in batch:
                    if message["type"] == DRAINING:
                        raise Lost("it is drained", message["replica"])
                    if _is_over(message):
                        end = message
                    else:
                        yield message
        except Lost:
            if end is None:
                raise
        if end is not None:
            yield end


def _warn(call: Call, error: Lost) -> None:
    logger.warning("a replica was lost", extra={"fields": {"request_id": call.id, "reason": str(error)}})


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
    return (_header(start, "content-type") or "").encode()


def _header(start: Message, name: str) -> str | None:
    headers = start.get("headers", ())
    return next((bytes(value).decode() for key, value in headers if key.lower() == name.encode()), None)


def _routed(start: Message) -> Mapping[str, Any] | None:
    """What a router has chosen for an answer, as its headers have it."""
    router, chosen, confidence = (_header(start, f"x-qhub-{name}") for name in ("router", "routed", "confidence"))
    if router is None or chosen is None or confidence is None:
        return None
    return {"router": router, "chosen": chosen, "confidence": float(confidence), "reason": "moved"}


def _own(message: Message) -> dict[str, Any]:
    """A replica's message as the gateway's."""
    if message["type"] != "http.response.start":
        return {name: value for name, value in message.items() if name not in ("outputs", "has_failed")}
    headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in DROPPED]
    return {"type": message["type"], "status": message["status"], "headers": headers}


def is_complete(path: str, last: bytes) -> bool:
    """Whether nothing comes behind these last events of a stream to a client of this path."""
    if path.startswith("/api/"):
        return bool(last.strip()) and json.loads(last.splitlines()[-1]).get("done") is True
    if path.startswith("/v1/messages"):
        return b"event: message_stop\n" in last
    if path.startswith("/v1/responses"):
        return b"event: response.completed\n" in last or b"event: response.incomplete\n" in last
    return last.endswith(DONE)


def missing_end(path: str, last: bytes) -> bytes:
    """What is missing of a stream to a client of this path whose last events are there."""
    is_named = path.startswith(("/api/", "/v1/messages", "/v1/responses"))
    return b"" if is_named or last.endswith(DONE) else DONE


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
