"""Behind balancers and proxies: statuses before streams, lines that nobody cuts, draining, sockets, roots and names."""

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx
import pytest
import uvicorn

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from serve.answers.events import line
from serve.errors import GenerationFailed
from serve.options import HttpOptions
from serve.server import http_config, listen_at
from tests.patience import PATIENCE
from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hello"}
STREAMS = {
    "/v1/chat/completions": {"messages": [USER], "stream": True},
    "/v1/completions": {"prompt": "Hi", "stream": True},
    "/v1/responses": {"input": "Hi", "stream": True},
    "/v1/messages": {"messages": [USER], "max_tokens": 5, "stream": True},
    "/api/chat": {"messages": [USER]},
    "/api/generate": {"prompt": "Hi"},
}


@pytest.fixture(scope="module")
def behind(built_base: Path, served_registry: Registry) -> Iterator[Server]:
    """A server with a name, below a proxy's path, that gives notice before it stops."""
    http = HttpOptions(root_path="/llm", replica="r-1", notice=1.5)
    running = Server(load_base(read_record(built_base), device="cpu"), served_registry, http=http)
    yield running
    running.stop()


@pytest.mark.parametrize("path", STREAMS)
def test_what_fails_before_the_first_token_has_a_status(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A stream that never begins is an error with a status of its own, which a balancer can try elsewhere."""

    def fail(*_: object) -> None:
        raise GenerationFailed("the model could not go on")

    monkeypatch.setattr(server.service.engine.runner, "forward", fail)
    response = server.http.post(path, json={"model": "alpha", **STREAMS[path]})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/json"
    assert "the model could not go on" in response.text
    monkeypatch.undo()
    assert server.http.post(path, json={"model": "alpha", **STREAMS[path]}).status_code == 200


def test_lines_that_no_reader_cuts() -> None:
    """What Unicode calls the end of a line is escaped in events, and everything else stays as it is."""
    text = "a\u0085b\u2028c\u2029d\ne\r\x0b\x0c\x1c\x1d\x1eé漢😀"
    assert len(line({"text": text}).splitlines()) == 1
    assert json.loads(line({"text": text})) == {"text": text}
    assert "é漢😀" in line(text)


def test_roots_names_and_slashes(behind: Server) -> None:
    """Requests come with the proxy's path or without, with slashes that mean nothing; errors keep their form."""
    for path in ("/v1/models", "/llm/v1/models", "/v1/models/", "//v1/models", "/llm/v1/models/alpha"):
        response = behind.http.get(f"{behind.url}{path}")
        assert response.status_code == 200, path
        assert response.headers["x-qhub-replica"] == "r-1"
    for root in ("", "/llm"):
        assert behind.http.post(f"{root}/v1/messages", json={}).json()["type"] == "error"
        assert isinstance(behind.http.post(f"{root}/api/chat", json={}).json()["error"], str)
        refused = behind.http.get(f"{root}/v1/nothing").json()["error"]
        assert "there is no GET /v1/nothing" in refused["message"]
    assert "x-qhub-replica" in behind.http.post("/v1/messages", json={}).headers


def test_proxies_are_believed_only_if_they_are_named(server: Server) -> None:
    """What a client says of itself in X-Forwarded-For is not believed unless its address is that of a known proxy."""
    app, seen = server._uvicorn.config.app, []

    async def look(scope, receive, send) -> None:
        seen.append(scope["client"][0] if scope["type"] == "http" else None)
        await app(scope, receive, send)

    for known in ([], ["127.0.0.1"]):
        config = http_config(look, port=0, proxy_headers=bool(known), forwarded_allow_ips=known, lifespan="off")
        running = uvicorn.Server(config)
        thread = Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        headers = {"X-Forwarded-For": "203.0.113.9"}
        assert httpx.get(f"http://127.0.0.1:{port}/version", headers=headers, trust_env=False).status_code == 200
        running.should_exit = True
        thread.join(10)
    assert [each for each in seen if each] == ["127.0.0.1", "203.0.113.9"]


@pytest.mark.parametrize(
    "options",
    [{"root_path": "llm"}, {"root_path": "/llm/"}, {"replica": "a b"}, {"forwarded": ("proxy",)}, {"notice": -1}],
    ids=str,
)
def test_options_that_cannot_be(options: dict) -> None:
    """A value that would not work is refused at start."""
    with pytest.raises(InputError):
        HttpOptions(**options)


def test_a_unix_socket(server: Server, tmp_path: Path) -> None:
    """A server at a socket answers there, for this user alone; one that was killed leaves nothing in the way."""
    path = tmp_path / "qhub.sock"
    listen_at(path).close()  # as one that was killed leaves it
    listener = listen_at(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    running = uvicorn.Server(http_config(server._uvicorn.config.app, lifespan="off"))
    thread = Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
        assert client.post("/v1/completions", json=body, timeout=PATIENCE).status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    with pytest.raises(InputError, match="Address already in use"):
        listen_at(path)
    running.should_exit = True
    thread.join(10)
    listener.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot listen at"):
        listen_at(tmp_path / "file")


def test_notice_before_the_end(behind: Server) -> None:
    """While a server that stops gives notice it is not ready, and still answers; then it closes."""
    assert behind.http.get("/ready").json() == {"ready": True, "state": "ready"}
    behind.begin_stop()
    deadline = time.monotonic() + PATIENCE
    while (ready := behind.http.get("/ready")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (ready.status_code, ready.json()["state"]) == (503, "draining")
    assert behind.complete(model="alpha", prompt="Hi", max_tokens=2).status_code == 200
    while behind._thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{behind.url}/ready", trust_env=False)
