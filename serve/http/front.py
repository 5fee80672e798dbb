"""What every request passes first: its id, its key, limits on its body, and its line in the log."""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_local.actor import acting_as, named
from adapterhub_local.errors import QhubError
from adapterhub_local.keys import Key
from serve.access import Access
from serve.auth import Gate
from serve.course import Course
from serve.errors import BadFraming, TimedOut, TooLarge, error_body
from serve.http.bodies import check_values
from serve.metrics import Metrics
from serve.options import HttpOptions
from serve.traces import Span, Traces

logger = logging.getLogger("serve.access")
MAX_DISCARDED = 32 << 20  # bytes of a body too large that are read so that the answer is
DISCARD_SECONDS = 10.0
ELSEWHERE = 421  # a replica's answer to its gateway, that another replica has the adapter
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Front:
    """The layer behind the guard. `scope["state"]` carries to the endpoints: request_id, key, whether none is needed
    (is_open), the gate, started, the request's course, and `noted`, where they leave what else the log should say;
    `status` is what was answered, 0 if nothing was.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Callable[[Scope], Access],
        gate: Gate,
        options: Callable[[], HttpOptions],
        metrics: Metrics,
        traces: Traces | None = None,
    ) -> None:
        self.app = app
        self.access = access  # what the route of a request declares
        self.gate = gate
        self.options = options  # what is demanded now
        self.metrics = metrics
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "key": None, "started": time.monotonic(), "noted": {}, "status": 0}
        state |= {"is_open": False, "gate": self.gate, "course": Course()}
        scope = {**scope, "path": _plain(scope["path"])}
        if "content-type" not in headers and own_path(scope).startswith("/api/"):
            # Ollama reads JSON whatever it is called, and clients of its call it nothing
            scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]
        if scope["method"] == "HEAD":  # answered as a GET, whose body the HTTP layer keeps back
            scope = {**scope, "method": "GET"}
        access = self.access(scope)
        span = None
        if self.traces is not None and access.is_counted:
            span = self.traces.begin(scope["method"], own_path(scope), headers, state["started"])
            if span.traceparent:  # who does a part of the work, such as a replica, is below it
                others = [each for each in scope["headers"] if each[0].lower() != b"traceparent"]
                scope["headers"] = [*others, (b"traceparent", span.traceparent.encode())]

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                own = [(b"x-request-id", request_id.encode())]
                if (replica := self.options().replica) is not None:
                    own.append((b"x-qhub-replica", replica.encode()))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._admit(scope, receive, send_named, headers, access)
        except Exception as error:
            if state["status"]:  # the answer has begun: all that is left is to break it off
                raise
            logger.error("a request failed", exc_info=error, extra={"fields": {"request_id": request_id}})
            await refuse(error, send_named, own_path(scope))
        finally:
            self._note(scope, access, span)

    async def _admit(
        self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str], access: Access
    ) -> None:
        path, state = own_path(scope), scope["state"]
        with contextlib.suppress(QhubError):
            state["is_open"] = self.gate.is_open()
        try:
            key = state["key"] = self.gate.identify(path, access, _authorization(headers), state.get("session"))
            body = await self._body(receive, headers)
            check_values(body)
            lease = await self.gate.enter(access, key)
        except QhubError as error:
            await refuse(error, send, path)
            return
        try:
            with acting_as(_actor(scope)):
                await self.app(scope, _replayed(body, receive), send)
        finally:
            await self.gate.leave(lease, state["status"])

    async def _body(self, receive: Receive, headers: Mapping[str, str]) -> bytes:
        """The whole body. Raises TooLarge, TimedOut."""
        limit = self.options().max_body
        problem = f"the body of a request may have {limit:,} bytes"
        length = headers.get("content-length", "0")
        if length.isdigit() and (len(length) > 15 or int(length) > limit):
            is_little = len(length) <= 15 and int(length) <= limit + MAX_DISCARDED
            if is_little and "expect" not in headers:
                await self._discard(receive)
            raise TooLarge(problem)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.options().body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b""
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        break
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise TimedOut(f"the body did not come within {self.options().body_timeout:g} s", 408) from None
        chunks.clear()
        if message.get("more_body", False):
            await self._discard(receive)
        raise TooLarge(problem)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: most clients look for an answer only when they have sent everything."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(DISCARD_SECONDS, self.options().body_timeout)):
                while size <= MAX_DISCARDED:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    def _note(self, scope: Scope, access: Access, span: Span | None) -> None:
        state = scope["state"]
        status, key = state["status"], state["key"].id if state["key"] is not None else None
        seconds = time.monotonic() - state["started"]
        route = getattr(scope.get("route"), "path", None) or "other"
        self.metrics.note_request(scope["method"], route, status, seconds)
        failed = state["course"].failed or status
        if access.is_counted and (not failed or failed >= 400) and failed != ELSEWHERE:
            self.metrics.note_error(state["course"], failed)
        entry = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": own_path(scope),
            "status": status or None,
            "ms": round(seconds * 1000, 1),
            "client": scope["client"][0] if scope.get("client") else None,
            "key": key,
            **state["noted"],
        }
        if span is not None and self.traces is not None:
            about = {"qhub.request_id": state["request_id"], **({"qhub.key_id": key} if key is not None else {})}
            self.traces.end(span, state["course"], status, about)
            entry["trace_id"] = span.trace_id
        logger.info("request", extra={"fields": entry})


def key_of(request: Request) -> Key | None:
    """The key that a request showed, None where none is needed."""
    key: Key | None = request.scope["state"]["key"]
    return key


def own_path(scope: Scope) -> str:
    """The path of a request as this server knows it, without the one below which a proxy shows it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _actor(scope: Scope) -> str:
    """Whom the records of a change name: the key that was shown, else the address that the request came from."""
    if (key := scope["state"]["key"]) is not None:
        return f"key:{key.id}"
    return named(f"http:{scope['client'][0] if scope.get('client') else 'socket'}")


def _plain(path: str) -> str:
    """A path without what means nothing in it: slashes that are doubled at its beginning, or that end it."""
    return "/" + path.strip("/")


def _authorization(headers: Mapping[str, str]) -> str | None:
    """The key as it is sent; Anthropic's clients have a header of their own for it."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, and then what comes after it."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def refuse(error: Exception, send: Send, path: str) -> None:
    """Answer a request to `path` with an error."""
    body = error_body(error)
    content = json.dumps(body.to_json(path)).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content))), *body.headers]
    if body.status in (408, 413) or isinstance(error, BadFraming):  # the rest of the body is not read
        headers.append(("Connection", "close"))
    encoded: list[tuple[bytes, bytes]] = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": body.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message and what a record carries in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
