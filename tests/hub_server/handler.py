"""Handler: one request, from its bytes to its answer, and the ways in which tests spoil it. Resources know the rest."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from tests.hub_server.repo import Commit, Repo

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Access(Enum):
    """Who may ask: holders of the token, anyone, or whoever knows an address that was signed before."""

    TOKEN = "token"
    ANYONE = "anyone"
    SIGNED = "signed"


@dataclass(frozen=True)
class Route:
    """Methods and path of what `function` answers; groups of the pattern are its arguments."""

    methods: str
    pattern: str
    function: Callable
    access: Access = Access.TOKEN


@dataclass(frozen=True)
class Request:
    """A request that was answered."""

    method: str
    path: str
    body: bytes
    status: int


class Answer(Exception):
    """An answer given from anywhere: status, body, headers."""

    def __init__(self, status: int, body: object = b"", **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class Handler(BaseHTTPRequestHandler):
    """A connection's requests, one after the other."""

    hub: "HubServer"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    wbufsize = -1

    def handle_one(self) -> None:
        path = urlsplit(self.path).path
        self.body = self._read_body()
        if self.hub.before is not None and self.hub.before(self.command, path) is False:
            self.close_connection = True  # the request was lost on its way
            return
        with self.hub.lock:
            kind = self.hub.disturbance(path)
            try:
                if (left := self.hub.requests_left) is not None:  # how many are answered before it asks to wait
                    self.hub.requests_left = left - 1 if left else self.hub.window
                    if not left:
                        raise Answer(429, {"error": "Too many requests"}, RateLimit=f'"api";r=0;t={self.hub.reset}')
                if kind == "drop" or isinstance(kind, int):
                    raise Answer(kind if isinstance(kind, int) else 0, {"error": "no"}, Retry_After="0")
                answer = self._route(path)
            except Answer as raised:
                answer = raised
            self.hub.requests.append(Request(self.command, path, self.body, answer.status))
        if kind in ("drop", "lose"):
            self.close_connection = True
            return
        self._send(answer, kind)

    def _send(self, answer: Answer, kind: str | int | None) -> None:
        body = answer.body
        if kind == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(answer.status)
        for key, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif kind == "slow":
            for start in range(0, len(body), max(1, len(body) // 5)):
                self.wfile.write(body[start : start + max(1, len(body) // 5)])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests look at `requests` instead."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str) -> Answer:
        for route in self.hub.routes:
            match = re.fullmatch(route.pattern, path)
            if match and self.command in route.methods.split("|"):
                values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                self._authorise(route.access)
                if new := self.hub.renamed.get(values.get("repo", "")):
                    raise Answer(307, b"", Location=self.path.replace(values["repo"], new, 1))
                return route.function(self, **values) or Answer(200, {})
        return Answer(404, {"error": f"no such page: {self.command} {path}"})

    def _authorise(self, access: Access) -> None:
        given = self.headers.get("Authorization")
        is_wrong = given is not None and given != f"Bearer {self.hub.token}"
        if access is not Access.SIGNED and (is_wrong or (given is None and access is Access.TOKEN)):
            raise Answer(401, {"error": "Invalid username or password."})

    def check_right(self) -> None:
        """Answer 403 to those who may not write."""
        if not self.hub.may_write and "create_pr" not in urlsplit(self.path).query:
            raise Answer(403, {"error": "You don't have the rights to write here"})

    def repo(self, name: str) -> Repo:
        """The repository, or 404, or 401 where it may be private."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and "Authorization" not in self.headers):
            status = 404 if "Authorization" in self.headers else 401
            raise Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def commit(self, repo: str, revision: str) -> Commit:
        """What a branch, tag, pull request or hash names, or 404."""
        found = self.repo(repo)
        oid = found.resolve(revision)
        if oid is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return found.commits[oid]
