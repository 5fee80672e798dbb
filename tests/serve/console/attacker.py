"""A hostile page in a real browser: what it may be told of a server, what it sends, and what came of it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub_local.registry import Registry
from serve.access import Scope as Asked
from serve.access import declared
from serve.console.session import LOGIN
from tests.serve.console.conftest import Console

SCRIPT = Path(__file__).with_name("attack.js").read_text(encoding="utf-8")
ERROR = "chrome-error:"  # begins the address of a frame that is not shown
PLACES = re.compile(r"\{(\w+)(?::path)?\}")


@dataclass(frozen=True)
class Arrival:
    """A request that reached the server, and what the browser said of it."""

    method: str
    path: str
    headers: Mapping[str, str]


class Watched:
    """An application that remembers what reached it."""

    def __init__(self, app: Any) -> None:
        self.app: ASGIApp = app
        self.routes = app.routes
        self.arrived: list[Arrival] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self.arrived.append(Arrival(scope["method"], scope["path"], headers))
        await self.app(scope, receive, send)


@dataclass
class Target:
    """A method of a route, with real values in its places, and what it would act on: JSON, or fields below /console."""

    route: str
    method: str
    path: str
    body: Mapping[str, Any]

    def at(self, url: str) -> dict[str, Any]:
        """As the script reads it, of the server at this address."""
        each = [(name, given if isinstance(given, list) else [given]) for name, given in self.body.items()]
        fields = [[name, str(one)] for name, values in each for one in values]
        return {"url": url + self.path, "method": self.method, "json": json.dumps(self.body), "form": fields}


def targets(app: Any, values: Mapping[str, str], bodies: Mapping[str, Any], queries: Mapping[str, str]) -> list[Target]:
    """Every method of every route. Raises KeyError for a place in a path that `values` has nothing for.

    A route that `bodies` does not name is sent something nevertheless.
    """
    made = []
    for route in app.routes:
        path = PLACES.sub(lambda found: quote(values[found[1]], safe="@/"), route.path) + queries.get(route.path, "")
        for method in sorted(route.methods - {"HEAD"}):
            body = bodies.get(f"{method} {route.path}", bodies.get(route.path, {"any": "thing"}))
            made.append(Target(route.path, method, path, body))
    return made


@contextmanager
def hostile_site() -> Iterator[int]:
    """The port at which an attacker's page is."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>evil</title><body>")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its parent names it
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def contents(registry: Registry) -> dict[str, Any]:
    """All that a home holds: every row of its database, and every other file."""
    root = registry.home.root
    tables = [name for (name,) in registry.database.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
    rows = {name: sorted(map(repr, map(tuple, registry.database.rows(f'SELECT * FROM "{name}"')))) for name in tables}
    files = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
        if not path.name.startswith("registry.db")
    }
    return {"rows": rows, "files": files}


def attack(context: Any, victim: Console, aims: list[Target], page_at: str, secrets: list[str], turn: int) -> list[str]:
    """Open the hostile page at `page_at`, let it try everything, and say what it got; the page is closed after it."""
    page = context.new_page()
    origin = page_at[: page_at.index("/", 8)]
    is_same = origin.rpartition(":")[2] == victim.url.rpartition(":")[2]  # its name was another address's before
    if is_same:
        page.route(page_at, lambda route: route.fulfill(body="<!doctype html><body>", content_type="text/html"))
    page.goto(page_at)
    frames: list[str] = []
    page.on("framenavigated", lambda frame: frames.append(frame.url))
    at = origin if is_same else victim.url
    found = page.evaluate(
        f"given => ({SCRIPT})(given)", {"targets": [aim.at(at) for aim in aims], "patience": 20_000, "turn": turn}
    )
    page.close()
    told = [f"a frame shows {url}" for url in frames if not url.startswith((ERROR, "about:blank"))]
    routes = {aim.path: aim.route for aim in aims}
    for one in found:
        path = one["url"].removeprefix(at)
        is_public = path.startswith(LOGIN) or _scope(victim.app, routes.get(path, "")) is Asked.OPEN
        is_harmless = is_same and (one["status"] >= 400 or is_public)
        known = [secret for secret in secrets if secret in one["text"]]
        if known or not is_harmless:
            told.append(f"{one['way']}: {one['method']} {path} {one['status']} {known or one['text'][:80]!r}")
    return told


def _scope(app: Any, path: str) -> Asked | None:
    try:
        return next(declared(route).scope for route in app.routes if route.path == path)
    except LookupError:
        return None
