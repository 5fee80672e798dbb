"""What web pages and unclear requests are refused, the headers of every answer, and keys that are taken away."""

import json
import socket
import time

import pytest
from starlette.types import Scope

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import Corrupt, InputError
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.access import Access
from serve.access import Scope as AccessScope
from serve.auth import Gate
from serve.errors import BadFraming, Forbidden, Unauthorized
from serve.http.guard import Guard
from serve.options import HttpOptions
from tests.patience import PATIENCE
from tests.serve.conftest import Server

CHAT = "/v1/chat/completions"
ANSWERS = Access(AccessScope.INFER, is_counted=True)
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE")


def allows(
    gate: Gate, headers: dict[str, str], *, hosts: tuple = (), origins: tuple = (), method: str = "POST"
) -> bool:
    """Whether the guard lets a request with these headers pass."""
    guard = Guard(lambda *_: None, gate, hosts, origins)  # type: ignore[arg-type, return-value]
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: Scope = {"type": "http", "method": method, "path": "/", "headers": raw}
    try:
        guard._check(scope)
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        *(
            (name, True)
            for name in ("localhost", "LocalHost:8000", "localhost.", "127.0.0.1:1", "127.9.9.9", "[::1]:80")
        ),
        *(
            (name, False)
            for name in ("evil.example.com", "evil.example.com:8000", "localhost.evil.example", "127.0.0.1.x")
        ),
        *(
            (name, False)
            for name in ("10.0.0.1", "0.0.0.0", "[::2]", "", "a@localhost", "localhost:8000:1", "localhost/x")
        ),
    ],
)
def test_only_names_of_this_machine(home: Home, method: str, host: str, is_ours: bool) -> None:
    """Without keys a host that is not this machine's is refused on every method, and one that is allowed is not."""
    gate = Gate(Keys(home))
    assert allows(gate, {"host": host}, method=method) == is_ours
    assert allows(gate, {"host": "box.lan:8000"}, hosts=("Box.lan",), method=method)


@pytest.mark.parametrize(
    ("headers", "origins", "is_allowed"),
    [
        ({"origin": "http://localhost:3000"}, (), True),
        ({"origin": "https://page.example"}, (), False),
        ({"origin": "null"}, (), False),
        ({"origin": "https://page.example"}, ("https://page.example",), True),
        ({"origin": "https://page.example.evil"}, ("https://page.example",), False),
        ({"origin": "null"}, ("*",), True),
        ({"sec-fetch-site": "cross-site"}, (), False),
        ({"sec-fetch-site": "cross-site", "origin": "https://page.example"}, ("https://page.example",), True),
        ({"origin": "http://localhost:3000", "sec-fetch-site": "cross-site"}, (), False),
        ({"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"}, (), False),
        ({"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"}, ("http://127.0.0.1:3000",), True),
        ({"sec-fetch-site": "same-site"}, (), False),
        ({"sec-fetch-site": "same-origin"}, (), True),
        ({"sec-fetch-site": "none"}, (), True),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, (), False),
    ],
)
def test_pages(home: Home, headers: dict[str, str], origins: tuple[str, ...], is_allowed: bool) -> None:
    """Our own pages and those that are allowed may ask, others (at another port, too) not; a link may be followed."""
    gate = Gate(Keys(home))
    assert allows(gate, {"host": "localhost", **headers}, origins=origins) == is_allowed
    visit = {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert allows(gate, visit, method="GET")


def test_with_keys_any_name_will_do(home: Home) -> None:
    """Where a key is needed, pages have none: names and origins are the proxy's affair."""
    Keys(home).create()
    assert allows(Gate(Keys(home)), {"host": "api.example.com", "origin": "https://page.example"})


def test_allowed_hosts_are_names() -> None:
    """An address is not taken for the name of a host."""
    with pytest.raises(InputError, match="without scheme"):
        HttpOptions(hosts=("http://box.lan",))


@pytest.mark.parametrize("change", ["removed", "emptied", "damaged"])
def test_keys_once_seen_keep_the_server_closed(home: Home, change: str) -> None:
    """A file of keys that goes away, is emptied or damaged opens nothing, and its keys count no more."""
    gate = Gate(Keys(home))
    _, token = Keys(home).create()
    if change == "removed":
        gate = Gate(Keys(home))  # seen at the start alone
        home.keys.unlink()
    else:
        assert not gate.is_open()
        home.keys.write_text('{"keys": []}' if change == "emptied" else "{")
    for header in (None, f"Bearer {token}"):
        with pytest.raises((Unauthorized, Corrupt)):
            gate.identify(CHAT, ANSWERS, header)
    _, token = Keys(home).create() if change != "damaged" else (None, "")
    assert change == "damaged" or gate.identify(CHAT, ANSWERS, f"Bearer {token}") is not None


@pytest.fixture
def closed(built_base, home: Home):
    """A server with a key."""
    home.root.mkdir(parents=True, exist_ok=True)
    keys = Keys(home)
    key, token = keys.create()
    running = Server(
        load_base(read_record(built_base), device="cpu"), Registry(home), http=HttpOptions(max_body=50_000)
    )
    running.http.headers["Authorization"] = f"Bearer {token}"
    running.key = key
    yield running
    running.stop()


def test_a_server_with_keys(closed: Server, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Revoking a key ends its streams; health shows little without a key; a body too large gets its answer."""
    hidden = closed.http.get("/health", headers={"Authorization": ""})
    assert hidden.json() == {"status": "ok"}
    assert {"base", "engine"} <= closed.http.get("/health").json().keys()
    for header in ("X-Content-Type-Options", "X-Frame-Options", "Content-Security-Policy"):
        assert header in hidden.headers
    assert hidden.headers["Cache-Control"] == "no-store"

    port = int(closed.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain:  # sends all before it reads
        auth = closed.http.headers["Authorization"]
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\nContent-Length: 5000000\r\n\r\n"
        plain.sendall(head.encode() + b"x" * 5_000_000)
        assert b" 413 " in plain.recv(4096).split(b"\r\n")[0]
    both = "POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain:
        plain.sendall(f"{both}\r\n0\r\n\r\n".encode())
        answer = b"".join(iter(lambda: plain.recv(4096), b""))  # to the end: the connection is closed
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert answer.count(b"HTTP/1.1") == 1

    closed.slow_down(monkeypatch)  # so that the file of the keys is written while it answers
    long = {"model": "tiny", "prompt": "Hello", "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 8}
    with closed.http.stream("POST", "/v1/completions", json=long) as response:
        lines = response.iter_lines()
        next(lines)
        Keys(home).revoke(closed.key.id)
        start = time.monotonic()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert time.monotonic() - start < PATIENCE
    assert json.loads(events[-2])["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("is_shared", [False, True])
def test_prefixes_of_keys(built_base, home: Home, is_shared: bool) -> None:
    """What one key's prompt computed is found by itself, by others only if they may, and never with another salt."""
    tokens = [Keys(home).create()[1] for _ in range(2)]
    http = HttpOptions(share_prefixes=is_shared)
    running = Server(load_base(read_record(built_base), device="cpu"), Registry(home), http=http)

    def cached(token: str, **more: str) -> int:
        running.http.headers["Authorization"] = f"Bearer {token}"
        answer = running.complete(model="tiny", prompt="a secret beginning " * 4, max_tokens=1, **more).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    try:
        assert cached(tokens[0]) == 0
        assert cached(tokens[0]) > 0
        assert (cached(tokens[1]) > 0) == is_shared
        assert cached(tokens[0], cache_salt="one") == 0
        assert cached(tokens[0], cache_salt="one") > 0
        assert cached(tokens[0], cache_salt="two") == 0
        assert running.complete(model="tiny", prompt="a", cache_salt="").status_code == 400
    finally:
        running.stop()


def test_framing(home: Home) -> None:
    """Both ways to say where a body ends are not clear, with keys and without."""
    guard = Guard(lambda *_: None, Gate(Keys(home)), (), ())  # type: ignore[arg-type, return-value]
    headers = [(b"host", b"localhost"), (b"Content-Length", b"5"), (b"transfer-encoding", b"chunked")]
    with pytest.raises(BadFraming):
        guard._check({"type": "http", "method": "POST", "path": "/", "headers": headers})
