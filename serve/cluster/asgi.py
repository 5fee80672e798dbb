"""An application asked without a server: a call goes in, the messages of its answer come out as they are made."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.types import ASGIApp
from starlette.types import Message as Sent

from serve.cluster.call import Call, Message, Whole
from serve.requests.found import Found, Routed

HOST = "replica"  # not an address: nobody reaches the application over a network


async def messages(app: ASGIApp, call: Call) -> AsyncIterator[Sequence[Message]]:
    """The answer to a call: all messages that are there, each time some are.

    A caller who stops listening hangs up: the application is disconnected and ended. Raises what
    the application raises.
    """
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    is_given = False

    async def receive() -> Sent:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Sent) -> None:
        queue.put_nowait(message)

    async def run() -> None:
        try:
            await app(scope_of(call), receive, send)
        finally:
            queue.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while True:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            is_over = found[-1] is None
            if known := [message for message in found if message is not None]:
                yield known
            if is_over:
                await task
                return
    finally:
        gone.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def whole(app: ASGIApp, call: Call, replica: str) -> Whole:
    """The whole answer to a call."""
    status, headers, body = 500, (), b""
    async for found in messages(app, call):
        for message in found:
            if message["type"] == "http.response.start":
                status, headers = message["status"], tuple(message.get("headers", ()))
            else:
                body += message.get("body", b"")
    return Whole(replica, status, headers, body)


def scope_of(call: Call) -> dict[str, Any]:
    """What a server would say of the request; the gateway's findings are in its state."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": [*call.headers, (b"x-request-id", call.id.encode())],
        "client": None,
        "server": (HOST, None),
        "state": {
            "session": call.key,
            "found": Found(
                call.pinned, Routed(**call.routed) if call.routed is not None else None, call.is_asking, call.begun
            ),
        },
    }
