"""Operating the server: readiness, adapters in memory, loading by hand, request ids, limits, the log."""

import dataclasses
import json
import logging
import socket
import time
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import set_split
from serve.http.front import JsonLines
from serve.options import HttpOptions
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def lora_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that adapters may be loaded from."""
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def operated(built_base, lora_root: Path, tmp_path_factory: pytest.TempPathFactory):
    """A server with a registry of its own, a root for folders, and short patience."""
    registry = Registry(tmp_path_factory.mktemp("operated"))
    base = read_record(built_base)
    publish(registry, "alpha", base, seed=1, rank=8, alias="prod")
    publish(registry, "beta", base, seed=2, rank=4)
    http = HttpOptions(
        max_body=50_000, max_tokens=100, timeout=PATIENCE, body_timeout=0.5, send_timeout=0.5, lora_root=lora_root
    )
    running = Server(load_base(base, device="cpu"), registry, http=http)
    for name, version in (("good", registry.resolve("beta")), ("other", registry.resolve("alpha"))):
        (lora_root / name).mkdir()
        for file in version.path.iterdir():
            (lora_root / name / file.name).write_bytes(file.read_bytes())
    yield running
    running.stop()


def test_ready(operated: Server) -> None:
    """/ready is 200 while requests are taken."""
    assert operated.http.get("/ready").json() == {"ready": True, "state": "ready"}


def test_request_ids(operated: Server) -> None:
    """A request id comes back, in errors too; without one, or with one that could forge a log, there is a new one."""
    given = operated.http.get("/v1/models", headers={"X-Request-Id": "abc-1"})
    assert given.headers["X-Request-Id"] == "abc-1"
    failed = operated.http.post("/v1/completions", json={}, headers={"X-Request-Id": "abc-2"})
    assert (failed.status_code, failed.headers["X-Request-Id"]) == (400, "abc-2")
    made = {
        operated.http.get("/health", headers=headers).headers["X-Request-Id"]
        for headers in ({}, {"X-Request-Id": '"}'})
    }
    assert len(made) == 2
    assert '"}' not in made


def test_log_of_a_request(operated: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Each request is one JSON line with its id, what answered, tokens and times."""
    with caplog.at_level(logging.INFO, "serve.access"):
        body = {"model": "alpha@prod", "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
        operated.http.post("/v1/completions", json=body, headers={"X-Request-Id": "logged"})
        deadline = time.monotonic() + PATIENCE
        while not (
            records := [r for r in caplog.records if r.name == "serve.access" and r.fields["request_id"] == "logged"]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    line = json.loads(JsonLines().format(records[0]))
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["model"], line["adapter"], line["completion_tokens"]) == ("alpha@prod", "alpha@1", 3)
    assert 0 < line["first_token_ms"] <= line["ms"]
    assert line["digest"] == operated.registry.resolve("alpha").content_digest


def slow_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every step of the engine a time that other things can happen in."""
    step = server.service.engine.step

    def slow():
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(server.service.engine, "step", slow)


def test_gateway_gauge_names_running_adapters(operated: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an adapter answers, the gauge of the gateway's protocol names it as running."""
    operated.slow_down(monkeypatch)
    body = {"model": "beta", "prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 0}
    with operated.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        seen = operated.samples()
    running = [key for key in seen if key[0] == "vllm:lora_requests_info"]
    assert any("beta@1" in key for key in running)
    operated.wait_until_idle()


def test_gauge_of_residency_has_every_spelling(operated: Server, tiny_base: BaseInfo) -> None:
    """An adapter in memory is shown under each name that clients may write for it now, and no other."""
    registry = operated.registry
    for seed in (71, 72):
        publish(registry, "where", tiny_base, seed=seed, alias="prod")

    def shown() -> set[str]:
        loaded = [labels for name, *labels in operated.samples() if name == "vllm:lora_adapter_loaded"]
        return {label for labels in loaded for label in labels if label.startswith("where")}

    assert not shown()
    operated.complete(model="where@1", prompt="Hello")
    assert shown() == {"where@1"}
    registry.set_alias("where", "prod", 1)
    assert shown() == {"where@1", "where@prod"}
    set_split(registry, "where", [("prod", 1)])
    assert shown() == {"where", "where@1", "where@prod"}
    set_split(registry, "where", [])
    operated.complete(model="where*0.5", prompt="Hello")  # its part is read, too
    assert shown() == {"where", "where@1", "where@2", "where@prod", "where@2*0.5"}


def test_adapters(operated: Server) -> None:
    """/v1/adapters says of each adapter where it is, what it takes, how often and when it was asked."""
    operated.complete(model="alpha", prompt="Hello")
    entry = next(one for one in operated.http.get("/v1/adapters").json()["data"] if one["name"] == "alpha@1")
    assert entry["digest"] == operated.registry.resolve("alpha").content_digest
    assert (entry["state"], entry["in_slot"], entry["is_pinned"]) == ("ready", True, False)
    assert entry["bytes"] > 0
    assert entry["requests"] >= 1
    assert entry["requests_now"] == 0
    assert entry["last_used"].endswith("Z")


def load(server: Server, name: str, path: str | None = None, **more) -> httpx.Response:
    """POST /v1/load_lora_adapter."""
    body = {"lora_name": name, **({"lora_path": path} if path is not None else {}), **more}
    return server.http.post("/v1/load_lora_adapter", json=body)


def unload(server: Server, name: str) -> httpx.Response:
    """POST /v1/unload_lora_adapter."""
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_load_and_unload_a_folder(operated: Server) -> None:
    """A folder below the root is served under its name, as vLLM does it, and is gone from memory after unloading."""
    expected = operated.complete(model="beta", prompt="Hello").json()["choices"]
    done = load(operated, "mine", "good")
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert operated.complete(model="mine", prompt="Hello").json()["choices"] == expected
    assert operated.complete(model="tiny:mine", prompt="Hello").json()["adapter"]["name"] == "mine"
    models = {model.id: model for model in operated.client.models.list()}
    assert models["mine"].parent == "tiny"
    assert operated.client.models.retrieve("mine").root == models["mine"].root
    assert load(operated, "mine", "good").status_code == 400
    replaced = load(operated, "mine", "other", load_inplace=True)
    assert replaced.status_code == 200
    changed = operated.complete(model="mine", prompt="Hello").json()
    assert changed["choices"] != expected
    assert changed["adapter"]["version"] == 2
    gone = unload(operated, "mine")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert int(gone.headers["X-Qhub-Freed-Bytes"]) > 0
    assert operated.complete(model="mine", prompt="Hello").status_code == 404
    assert unload(operated, "mine").status_code == 404
    assert all(not users for users in operated.service.engine.pool.users().values())


def test_hold_a_version(operated: Server) -> None:
    """A reference of the registry is held in memory until it is unloaded."""
    assert load(operated, "alpha@prod").status_code == 200
    digest = operated.registry.resolve("alpha").content_digest
    entry = next(one for one in operated.http.get("/v1/adapters").json()["data"] if one["digest"] == digest)
    assert entry["is_held"]
    assert operated.service.engine.pool.users()[digest] == 1
    assert unload(operated, "alpha@prod").status_code == 200
    assert operated.service.engine.pool.users().get(digest, 0) == 0


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("x", "../operated", 403),
        ("x", "/etc", 403),
        ("x", "link", 403),
        ("x", "linked_file", 403),
        ("x", "nothing", 404),
        ("x", "nul\0", 404),
        ("x", "a" * 5000, 404),
        ("x", "empty", 400),
        ("x", "broken", 400),
        ("x", "zero", 400),
        ("alpha", "good", 409),
        ("../x", "good", 400),
        ("nothing", None, 404),
        ("", None, 400),
    ],
)
def test_bad_loads(operated: Server, lora_root: Path, name: str, path: str | None, status: int) -> None:
    """Paths out of the root, links included, what is not an adapter, and taken names are refused and hold nothing."""
    for folder in ("empty", "broken", "linked_file", "zero"):
        (lora_root / folder).mkdir(exist_ok=True)
    if not (lora_root / "link").exists():
        (lora_root / "link").symlink_to("/etc")
        (lora_root / "linked_file" / "adapter_config.json").write_text("{}")
        (lora_root / "linked_file" / "adapter_model.safetensors").symlink_to("/etc/passwd")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (lora_root / "broken" / file).write_text("{}")
    response = load(operated, name, path)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert not operated.service.loaded.sources()
    assert operated.complete(model="alpha", prompt="Hi").status_code == 200


def test_without_a_root_nothing_is_read(server: Server, lora_root: Path) -> None:
    """A server that was given no root loads no folder at all."""
    assert load(server, "x", str(lora_root)).status_code == 403


def test_large_bodies(operated: Server) -> None:
    """A body over the limit is 413, whether it says its length or not."""
    big = json.dumps({"model": "alpha", "prompt": "x" * 60_000}).encode()
    said = operated.http.post("/v1/completions", content=big)
    chunked = operated.http.post("/v1/completions", content=iter([big[:30_000], big[30_000:]]))
    for response in (said, chunked):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_slow_body(operated: Server) -> None:
    """A body that does not come is 408 after the time for it, and the connection is closed."""
    with socket.create_connection(("127.0.0.1", int(operated.url.rpartition(":")[2])), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408")


def test_token_limit(operated: Server) -> None:
    """An answer may not be longer than the server allows; a chat that asks for no length stays below it."""
    refused = operated.complete(model="tiny", prompt="Hi", max_tokens=101)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "ignore_eos": True}
    assert operated.http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 100


def test_time_limit(operated: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that takes longer than the server allows is 504, or an error event, and its row is free again."""
    operated.slow_down(monkeypatch)
    monkeypatch.setattr(operated.service, "http", dataclasses.replace(operated.service.http, timeout=0.5))
    body = {"model": "alpha", "prompt": "Hello", "max_tokens": 100, "ignore_eos": True}
    late = operated.http.post("/v1/completions", json=body)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with operated.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        events = [line for line in response.iter_lines() if line]
    assert "timeout" in events[-2]
    operated.wait_until_idle()


def test_slow_reader(operated: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops reading a stream is given up, and its rows and adapters are free again before the end."""
    operated.slow_down(monkeypatch)
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 8}
    data = json.dumps({**body, "logprobs": True, "top_logprobs": 20}).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    listener = operated._uvicorn.servers[0].sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what the system keeps for a reader that may come
    before = operated.service.engine.stats.num_sampled
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(operated.url.rpartition(":")[2])))
        connection.sendall(head % len(data) + data)
        while operated.service.engine.stats.num_sampled == before:
            time.sleep(0.01)
        operated.wait_until_idle()
    assert operated.service.engine.stats.num_sampled - before < 600, "the answers were computed to the end"
    assert operated.service.engine.snapshot().running_adapters == ()
    assert all(not users for users in operated.service.engine.pool.users().values())


def test_unexpected_errors(operated: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A mistake of ours is a 500 that shows nothing of the inside, with the request's id, which the log has, too."""

    def broken() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(operated.service, "adapters", broken)
    response = operated.http.get("/v1/adapters", headers={"X-Request-Id": "broken-1"})
    assert (response.status_code, response.headers["X-Request-Id"]) == (500, "broken-1")
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert any(getattr(record, "fields", {}).get("request_id") == "broken-1" for record in caplog.records)
