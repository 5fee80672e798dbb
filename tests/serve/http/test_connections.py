"""Connections that do not ask: thousands that are idle, headers that come a byte at a time, and those that do."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from serve.http import connections
from serve.http.connections import ImpatientProtocol
from tests.patience import PATIENCE

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def hello(scope, receive, send) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server of the application that waits half a second for headers."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    config = uvicorn.Config(
        hello, port=0, http=ImpatientProtocol, log_level="error", lifespan="off", timeout_keep_alive=60
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join(20)


def answer(asking: socket.socket) -> bytes:
    """What comes up to the end of the body."""
    asking.sendall(REQUEST)
    found = b""
    while not found.endswith(b"ok"):
        found += asking.recv(1000)
    return found


def connect(port: int) -> socket.socket:
    """A connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


@pytest.mark.parametrize("beginning", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"G"])
def test_who_does_not_ask_is_given_up(port: int, beginning: bytes) -> None:
    """A connection on which no whole request comes is closed, also if a byte comes from time to time."""
    with connect(port) as slow:
        slow.sendall(beginning)
        slow.settimeout(0.1)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if slow.recv(100) == b"":
                    return
            except TimeoutError:
                if beginning:
                    slow.sendall(b"x")
            except ConnectionError:
                return
        pytest.fail("it is still open")


def test_who_asks_is_kept(port: int) -> None:
    """A connection that had its answer stays open longer than headers may take, for the next request."""
    with connect(port) as kept:
        for _ in range(2):
            assert answer(kept).startswith(b"HTTP/1.1 200")
            time.sleep(0.8)
        kept.sendall(REQUEST[:20])  # and one that has begun the next is given up
        assert kept.recv(1000) == b""


def test_many_idle_connections(port: int) -> None:
    """Two thousand connections that say nothing keep nobody from being answered."""
    idle = [connect(port) for _ in range(2000)]
    try:
        with connect(port) as asking:
            assert answer(asking).startswith(b"HTTP/1.1 200")
    finally:
        for one in idle:
            one.close()
