"""Sessions: a browser that showed an API key once is known by a cookie, which no script and no other site can use.

The cookie is a random number; which key it stands for only the server knows, so a key that is revoked ends its sessions
at once. It counts for pages of our own origin alone: another page on the same machine, at another port, sends it too.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_local.errors import Corrupt
from adapterhub_local.keys import Key
from serve.auth import Gate
from serve.errors import Forbidden, Throttled, Unauthorized

COOKIE = "qhub_session"
SECONDS = 12 * 3600.0
MAX_SESSIONS = 1000
FAILURES, WINDOW = 10, 60.0  # wrong keys, and the seconds in which no more of them are looked at
HOME, LOGIN, STATIC = "/console", "/console/login", "/console/static/"


@dataclass(frozen=True)
class Session:
    """Which key a browser showed, and until when (time.monotonic) that counts."""

    key: Key
    expires: float


class Sessions:
    """The sessions of one server; a restart ends them all."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._sessions: dict[str, Session] = {}
        self._failures: deque[float] = deque()
        self._lock = threading.Lock()

    def open(self, token: str) -> str:
        """A cookie's value for whoever knows this API key. Raises Unauthorized, Throttled, Corrupt."""
        now = time.monotonic()
        with self._lock:
            while self._failures and self._failures[0] <= now - WINDOW:
                self._failures.popleft()
            if len(self._failures) >= FAILURES:
                raise Throttled("too many wrong keys were tried: try again later", self._failures[0] + WINDOW - now)
        key = self.gate.keys.find(token.strip())
        with self._lock:
            if key is None:
                self._failures.append(now)
                raise Unauthorized("this API key is unknown, revoked or expired: `qhub key create` makes one")
            for old in [name for name, one in self._sessions.items() if one.expires <= now]:
                del self._sessions[old]
            while len(self._sessions) >= MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            value = secrets.token_urlsafe(32)
            self._sessions[value] = Session(key, now + SECONDS)
        return value

    def close(self, value: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(value, None)

    def key(self, value: str) -> Key | None:
        """The key that a cookie stands for, as it is now; None once it is revoked, expired or gone."""
        with self._lock:
            found = self._sessions.get(value)
        if found is None or found.expires <= time.monotonic():
            return None
        try:
            return next((key for key in self.gate.keys.all() if key.id == found.key.id and key.is_valid()), None)
        except Corrupt:
            return None


class SessionLayer:
    """The layer that finds the session of a request; a page without one is the login page where keys are needed."""

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self.app = app
        self.sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        value = cookie_of(headers)
        state = scope.setdefault("state", {})
        is_visit = scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"  # by a link
        if value and "authorization" not in headers and (is_visit or is_own_page(headers)):
            state["session"] = self.sessions.key(value)
        path = scope["path"]
        is_page = (path == HOME or path.startswith(f"{HOME}/")) and path != LOGIN and not path.startswith(STATIC)
        is_unknown = state.get("session") is None and "authorization" not in headers
        if is_page and is_unknown and "text/html" in headers.get("accept", "") and not self._is_open():
            await _redirect(send, scope)
            return
        await self.app(scope, receive, send)

    def _is_open(self) -> bool:
        try:
            return self.sessions.gate.is_open()
        except Corrupt:
            return False


def cookie_of(headers: Mapping[str, str]) -> str:
    """The value of our cookie, empty if there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def is_own_page(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this server, or from no page at all, as far as browsers say.

    Browsers send Sec-Fetch-Site with every request to a loopback address or over TLS, and Origin with every POST.
    """
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def check_own_page(headers: Mapping[str, str]) -> None:
    """Raise Forbidden for a form that another site's page sends."""
    if not is_own_page(headers):
        raise Forbidden("this form was sent by another site's page: nothing was done")


async def _redirect(send: Send, scope: Scope) -> None:
    """To the login page, and back to the page that was asked for."""
    wanted = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
    target = f"{LOGIN}?next={quote(wanted, safe='/')}" if scope["method"] == "GET" else LOGIN
    start: Message = {
        "type": "http.response.start",
        "status": 303,
        "headers": [(b"location", target.encode("latin-1")), (b"content-length", b"0")],
    }
    await send(start)
    await send({"type": "http.response.body", "body": b""})
