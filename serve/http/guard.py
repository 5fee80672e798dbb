"""Guard: the outermost layer. Refuses what a web page must not ask, and what is framed in two ways; adds headers.

A server without keys trusts whoever reaches it, which is meant to be this machine. A web browser reaches it too, on
behalf of every page that is open: a page may have its own name point to this machine (DNS rebinding), and may send some
requests without asking for leave. So without keys only this machine's names are answered, and no other pages.
"""

import ipaddress
import logging
import re
from collections.abc import Iterable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.auth import Gate
from serve.errors import BadFraming, Forbidden
from serve.http.front import own_path, refuse

logger = logging.getLogger("serve.access")
# what scripts of web pages may read
EXPOSED_HEADERS = [
    "X-Request-Id",
    "X-Qhub-Base",
    "X-Qhub-Adapter",
    "X-Qhub-Digest",
    "X-Qhub-Logged",
    "X-Qhub-Replica",
    "X-Qhub-Router",
    "X-Qhub-Routed",
    "X-Qhub-Confidence",
    "Retry-After",
]
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+)(?::\d{1,5})?")
_ORIGIN = re.compile(r"https?://(.+)", re.IGNORECASE)
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Guard:
    """`hosts` are names beside this machine's own, `origins` the pages that may ask (* for all)."""

    def __init__(self, app: ASGIApp, gate: Gate, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self.app = app
        self.gate = gate
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                known = {name.lower() for name, _ in headers}
                message["headers"] = headers + [item for item in HEADERS.items() if item[0] not in known]
            await send(message)

        try:
            self._check(scope)
        except (Forbidden, BadFraming) as error:
            fields = {"method": scope["method"], "path": scope["path"], "reason": str(error)}
            logger.warning("refused before it was read", extra={"fields": fields})
            await refuse(error, send_guarded, own_path(scope))
            return
        await self.app(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        """Raise Forbidden, BadFraming about a request that must not proceed."""
        if any(_all(scope, b"transfer-encoding")) and any(_all(scope, b"content-length")):
            raise BadFraming("a request has either Content-Length or Transfer-Encoding, this one has both")
        if not self.gate.is_open() or _is_in_process(scope):
            return  # a key is asked for, which no page has; or nobody asks over a network
        for host in _all(scope, b"host"):
            if not self._is_known(host):
                shown = host[:100]
                raise Forbidden(
                    f"'{shown}' is not a name of this machine: without API keys only localhost is answered. Start the "
                    "server with --allow-host NAME, or make a key with `qhub key create`"
                )
        origins = list(_all(scope, b"origin"))
        allowed = [origin for origin in origins if "*" in self.origins or origin.lower() in self.origins]
        is_allowed = "*" in self.origins or (bool(origins) and allowed == origins)
        for origin in origins:
            match = _ORIGIN.fullmatch(origin)
            if not (origin in allowed or (match and self._is_known(match[1]))):
                raise Forbidden(
                    f"pages of '{origin[:100]}' may not ask: start the server with --allow-origin, or make a key with "
                    "`qhub key create`"
                )
        # a page at another port of this machine is another's, too: it could not read an answer, but have things done
        site = next(_all(scope, b"sec-fetch-site"), "none")
        is_visit = scope["method"] in ("GET", "HEAD") and next(_all(scope, b"sec-fetch-mode"), "") == "navigate"
        if site in ("cross-site", "same-site") and not is_allowed and not is_visit:
            raise Forbidden("another site's page may not ask: start the server with --allow-origin")

    def _is_known(self, host: str) -> bool:
        """Whether a name, with or without a port, is this machine's, or one that is allowed."""
        match = _HOST.fullmatch(host.strip())
        if match is None:
            return False
        name = match[1].lower().removesuffix(".")
        if name == "localhost" or name in self.hosts:
            return True
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return False


def _is_in_process(scope: Scope) -> bool:
    """Whether a test's client calls the application itself: servers say at which address they were reached."""
    try:
        ipaddress.ip_address((scope.get("server") or ("127.0.0.1",))[0])
    except ValueError:
        return not str(scope["server"][0]).startswith("/")  # a socket's path
    return False


def _all(scope: Scope, name: bytes) -> Iterator[str]:
    """Every value of a header."""
    return (value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name)
