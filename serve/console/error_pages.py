"""Errors that no page made (an unknown address, a field too long, a key that may not), as pages for browsers."""

import json

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.console.render import render
from serve.console.session import HOME, STATIC

MAX_ERROR = 1 << 16  # bytes of an error's body


class ErrorPages:
    """The layer that shows to a person what the layers and routes behind it say in JSON."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_for_a_person(scope):
            await self.app(scope, receive, send)
            return
        begun: Message | None = None
        body = b""

        async def look(message: Message) -> None:
            nonlocal begun, body
            if message["type"] == "http.response.start" and _is_error(message):
                begun = message
            elif begun is None:
                await send(message)
            else:
                body += message.get("body", b"")[:MAX_ERROR]
                if not message.get("more_body", False):
                    await _answer(scope, receive, send, begun, body)

        await self.app(scope, receive, look)


async def _answer(scope: Scope, receive: Receive, send: Send, begun: Message, body: bytes) -> None:
    """The page of an error, with the headers of what it stands for."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "the server could not answer this"
    status = begun["status"]
    page = render(Request(scope), "error.html", status=status, status_code=status, message=message)
    own = {name for name, _ in page.raw_headers} | {b"content-length", b"content-type"}
    page.raw_headers += [(name, value) for name, value in begun["headers"] if name.lower() not in own]
    await page(scope, receive, send)


def _is_for_a_person(scope: Scope) -> bool:
    path = scope["path"]
    is_page = (path == HOME or path.startswith(f"{HOME}/")) and not path.startswith(STATIC)
    accepted = b"".join(value for name, value in scope["headers"] if name.lower() == b"accept")
    return is_page and b"text/html" in accepted


def _is_error(message: Message) -> bool:
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return message["status"] >= 400 and any(kind.startswith(b"application/json") for kind in kinds)
