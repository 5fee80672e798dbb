"""A store that refuses or is silent: each way in a sentence of its own, in seconds, and nothing asked without end."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapterhub_local.errors import NotFound, QhubError, RemoteError
from adapterhub_local.registry.object_store import code_of, with_bounds
from adapterhub_local.registry.remotes import Remote
from adapterhub_local.registry.store import Store, open_store
from tests.patience import PATIENCE

REFUSALS = {
    "InvalidAccessKeyId": (403, "the access key is not known there"),
    "SignatureDoesNotMatch": (403, "the secret key does not belong to the access key"),
    "AccessDenied": (403, "are not allowed to do this"),
    "ExpiredToken": (400, "has expired"),
    "RequestTimeTooSkewed": (403, "the clock of this machine"),
    "PermanentRedirect": (301, "in another region"),
    "AuthorizationHeaderMalformed": (400, "in another region"),
    "SlowDown": (503, "it is busy"),
    "NoSuchBucket": (404, "there is no such bucket"),
}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some keys, which these stores look at no further."""
    for key, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)


@contextmanager
def refusing(status: int, code: str) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request with this error of S3; its address, and what it was asked."""
    asked: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Tests look at `asked` instead."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def store(endpoint: str) -> Store:
    """A remote on that server."""
    return open_store(Remote("team", "s3://bucket/some", {"endpoint_url": endpoint}))


WORK: dict[str, Callable[[Store], object]] = {
    "size": lambda store: store.size("a"),
    "names": lambda store: store.names("a"),
    "read": lambda store: store.read("a", 10),
    "put": lambda store: store.put("a", b"x"),
}


# an answer to HEAD has no body: its 404 is an object that is not there, and of the others only 403 is asked about
ASKED = [
    (code, work) for code in REFUSALS for work in ("names", "put", "size") if work != "size" or REFUSALS[code][0] == 403
]


@pytest.mark.parametrize(("code", "work"), ASKED)
def test_each_refusal_has_its_sentence(code: str, work: str) -> None:
    """Whatever was asked, and although an answer to HEAD carries no reason."""
    status, told = REFUSALS[code]
    before = time.monotonic()
    with refusing(status, code) as (endpoint, asked), pytest.raises(QhubError, match=told) as caught:
        WORK[work](store(endpoint))
    assert time.monotonic() - before < PATIENCE
    assert isinstance(caught.value, NotFound if code == "NoSuchBucket" else RemoteError)
    assert len(asked) < 400  # a redirect without a region is followed a hundred times, each of three times


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_a_server_that_does_not_answer_is_given_up(kind: str) -> None:
    """One that takes the connection and says nothing, and one that is not there: known within ten seconds, whatever
    was asked; all of it is asked at once."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(len(WORK)) as pool:
        port = server.getsockname()[1]
        if kind == "closed":
            server.close()

        def ask(work: str) -> float:
            before = time.monotonic()
            with pytest.raises(RemoteError, match="did not answer"):
                WORK[work](store(f"http://127.0.0.1:{port}"))
            return time.monotonic() - before

        assert max(pool.map(ask, WORK)) < PATIENCE  # 10 s where nothing else runs


def test_options_of_the_user_stay() -> None:
    """Bounds are added to the options of S3 and to no other, and never replace what was asked for."""
    assert with_bounds("gs", {"token": 1}) == {"token": 1}
    options = with_bounds("s3", {"a": 1, "config_kwargs": {"read_timeout": 60}})
    assert options["config_kwargs"]["read_timeout"] == 60
    assert options["config_kwargs"]["connect_timeout"] < 10
    assert options["a"] == 1
    assert code_of(KeyError("x")) == "KeyError"
