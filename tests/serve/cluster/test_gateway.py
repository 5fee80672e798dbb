"""The gateway before real replicas: as a plain server answers, whatever happens to a replica."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import set_split
from serve.access import declared
from serve.cluster.call import Lost
from serve.cluster.pins import Pinned, Pins
from serve.cluster.relay import Relay
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.cluster.conftest import OPTIONS, Gateway
from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hello"}
GREEDY = {"temperature": 0, "max_tokens": 6}
STREAMS = {
    "/v1/chat/completions": {"messages": [USER], **GREEDY},
    "/v1/completions": {"prompt": "Hi", **GREEDY},
    "/v1/responses": {"input": "Hi", "temperature": 0, "max_output_tokens": 6},
    "/v1/messages": {"messages": [USER], **GREEDY},
    "/api/chat": {"messages": [USER], "options": {"temperature": 0, "num_predict": 6}},
    "/api/generate": {"prompt": "Hi", "options": {"temperature": 0, "num_predict": 6}},
}


@pytest.fixture(scope="module")
def plain(built_base, shared_registry: Registry) -> Iterator[Server]:
    """A server of its own over the same registry, to compare with."""
    running = Server(load_base(read_record(built_base), device="cpu"), shared_registry, options=OPTIONS)
    yield running
    running.stop()


def settled(text: str) -> str:
    """An answer without what is new in each: ids and times."""

    def clean(value):
        if isinstance(value, dict):
            return {name: clean(part) for name, part in value.items() if name not in NEW}
        return [clean(part) for part in value] if isinstance(value, list) else value

    lines = []
    for line in text.splitlines():
        head, _, found = line.partition("data: ") if line.startswith("data: ") else ("", "", line)
        try:
            lines.append(head + json.dumps(clean(json.loads(found))))
        except ValueError:
            lines.append(line)
    return "\n".join(lines)


NEW = {"id", "item_id", "created", "created_at", "completed_at", "cached_tokens", "cache_write_tokens"}
NEW |= {f"{part}_duration" for part in ("total", "load", "prompt_eval", "eval")}


@pytest.mark.parametrize("model", ["tiny", "alpha", "beta@prod", "tiny:gamma@1", "alpha@1*0.5+beta*0.25"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", STREAMS)
def test_answers_are_those_of_a_plain_server(
    gateway: Gateway, plain: Server, path: str, stream: bool, model: str
) -> None:
    """Whole or streamed, on every endpoint and for every way to name weights, the answer is a plain server's."""
    body = {"model": model, "stream": stream, **STREAMS[path]}
    ours, theirs = gateway.post(path, **body), plain.http.post(path, json=body)
    assert (ours.status_code, theirs.status_code) == (200, 200)
    assert settled(ours.text) == settled(theirs.text)
    for name in ("content-type", "x-qhub-adapter", "x-qhub-digest", "x-qhub-base", "cache-control"):
        assert ours.headers.get(name) == theirs.headers.get(name)
    assert ours.headers["x-qhub-replica"].startswith("r")
    assert len(ours.headers.get_list("x-request-id")) == 1


WRONG = [
    ("/v1/completions", {"model": "nothing", "prompt": "Hi"}),
    ("/v1/completions", {"model": "alpha@9", "prompt": "Hi"}),
    ("/v1/completions", {"model": "alpha", "prompt": "Hi", "temperature": 9}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/completions", {"model": 7, "prompt": "Hi", "stream": True}),
    ("/v1/completions", {"model": "tiny", "adapters": [{"ref": "alpha", "weight": "x"}], "prompt": "Hi"}),
    ("/v1/completions", {"model": "alpha+" * 40 + "alpha", "prompt": "Hi"}),
    ("/v1/messages", {"model": "nothing", "messages": [USER], "max_tokens": 3}),
    ("/api/chat", {"model": "nothing", "messages": [USER]}),
    ("/v1/nothing", {}),
]


@pytest.mark.parametrize(("path", "body"), WRONG, ids=str)
def test_mistakes_are_reported_as_by_a_plain_server(gateway: Gateway, plain: Server, path: str, body: dict) -> None:
    """A request that is refused gets the same status and the same error."""
    ours, theirs = gateway.post(path, **body), plain.http.post(path, json=body)
    assert ours.status_code == theirs.status_code >= 400
    if path != "/v1/nothing":
        assert ours.json() == theirs.json()


def test_bodies_that_are_not_json(gateway: Gateway, plain: Server) -> None:
    """What cannot be read is refused in the replica's words."""
    headers = {"content-type": "application/json"}
    for text in ("{", "[]", "null", '"alpha"', '{"model": ' + "[" * 500):
        ours = gateway.http.post("/v1/completions", content=text, headers=headers)
        theirs = plain.http.post("/v1/completions", content=text, headers=headers)
        assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json()), text


def test_whole_answers_are_never_cut(gateway: Gateway) -> None:
    """An answer that is not streamed is made again, however far its replica had come."""
    body = {"model": "delta", "prompt": "Hi", **GREEDY}
    expected = settled(gateway.post("/v1/completions", **body).text)
    for after in range(2):
        gateway.engines.breaks[:] = [after]
        response = gateway.post("/v1/completions", **body)
        assert (response.status_code, settled(response.text)) == (200, expected)
    assert not gateway.engines.breaks


def test_when_every_replica_is_lost(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that no replica can answer gets a 503 that says to ask again, not a hanging connection."""
    monkeypatch.setattr("serve.cluster.relay.PAUSE", 0.0)
    gateway.engines.breaks[:] = [0] * 5
    response = gateway.post("/v1/completions", model="alpha", prompt="Hi")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_replica")
    assert response.headers["retry-after"] == "1"
    assert not gateway.engines.breaks


def test_an_answer_that_never_begins(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that no replica takes in time is a 504, not a connection that hangs."""

    async def nothing(call):
        await asyncio.sleep(60)
        yield []

    monkeypatch.setattr("serve.cluster.gateway.Relay", lambda *given: Relay(*given[:-2], 0.2))
    monkeypatch.setattr(gateway.engines, "answer", nothing)
    response = gateway.post("/v1/completions", model="alpha", prompt="Hi", stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_the_patience_for_a_begin_is_one(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many replicas are lost one after the other, an answer has begun in the time for one, or is a 504."""
    tried = []

    async def late(call):
        tried.append(call)
        await asyncio.sleep(0.3)
        raise Lost("gone")
        yield []

    monkeypatch.setattr("serve.cluster.relay.PAUSE", 0.0)
    monkeypatch.setattr("serve.cluster.gateway.Relay", lambda *given: Relay(*given[:-2], 0.5))
    monkeypatch.setattr(gateway.engines, "answer", late)
    response = gateway.post("/v1/completions", model="alpha", prompt="Hi", stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert len(tried) == 2


def test_a_replica_that_is_drained_is_left_out(gateway: Gateway) -> None:
    """Requests for an adapter whose replica is drained are answered by another, and come back afterwards."""
    home = gateway.post("/v1/completions", model="gamma", prompt="Hi", max_tokens=2).headers["x-qhub-replica"]
    gateway.engines.draining.add(home)
    other = gateway.post("/v1/completions", model="gamma", prompt="Hi", max_tokens=2)
    gateway.engines.draining.clear()
    assert other.status_code == 200
    assert other.headers["x-qhub-replica"] != home
    assert gateway.post("/v1/completions", model="gamma", prompt="Hi", max_tokens=2).headers["x-qhub-replica"] == home


def test_equal_contents_go_to_one_replica(gateway: Gateway) -> None:
    """However an adapter is named, its requests go to the same replica, pinned to what it is."""
    gateway.engines.asked.clear()
    for model in ("alpha", "alpha@1", "alpha@prod", "tiny:alpha", "alpha@latest"):
        assert gateway.post("/v1/completions", model=model, prompt="Hi", max_tokens=1).status_code == 200
    assert len({name for name, _ in gateway.engines.asked}) == 1
    digest = gateway.registry.resolve("alpha@1").manifest_digest
    assert {call.pinned for _, call in gateway.engines.asked} == {f"alpha@{digest}"}


def test_an_alias_that_moves_counts_at_once(gateway: Gateway) -> None:
    """The next request has the new version; a split gives each user one side, on whatever replica."""
    registry = gateway.registry
    for seed in (31, 32):
        publish(registry, "moving", gateway.base, seed=seed, rank=4, alias="prod")
    assert gateway.post("/v1/completions", model="moving@prod", prompt="Hi").headers["x-qhub-adapter"] == "moving@2"
    registry.set_alias("moving", "prod", 1)
    assert gateway.post("/v1/completions", model="moving@prod", prompt="Hi").headers["x-qhub-adapter"] == "moving@1"
    registry.set_alias("moving", "canary", 2)
    set_split(registry, "moving", [("canary", 50), ("prod", 50)])
    sides = {}
    for _ in range(2):
        for user in map(str, range(8)):
            answer = gateway.post("/v1/completions", model="moving", prompt="Hi", max_tokens=1, user=user)
            assert sides.setdefault(user, answer.headers["x-qhub-adapter"]) == answer.headers["x-qhub-adapter"]
    assert set(sides.values()) == {"moving@1", "moving@2"}


@pytest.mark.parametrize("text", ["", "{}", "[]", "1", '{"model": "alpha", "adapters": 3}', '{"model": null}', "\xff"])
def test_pins_of_strange_bodies(shared_registry: Registry, text: str) -> None:
    """A body that names nothing is pinned to nothing, and no error comes of it."""
    pins = Pins("tiny", shared_registry)
    assert asyncio.run(pins.find(text.encode("latin-1"), "/v1/completions")) == Pinned()
    pins.close()


def test_every_endpoint_of_the_server_is_one_of_the_gateway(gateway: Gateway, loaded_base) -> None:
    """Whatever a plain server has, the gateway has too, open to the same keys and counted alike."""
    replica = next(iter(gateway.engines.apps.values()))
    ours = {(route.path, method): declared(route) for route in gateway.app.routes for method in route.methods or ()}
    theirs = {(route.path, method): declared(route) for route in replica.routes for method in route.methods or ()}
    assert theirs.items() <= ours.items()


def test_feedback_is_refused_with_the_way_out(gateway: Gateway) -> None:
    """No replica keeps a request log, and each says who does."""
    refused = gateway.http.post("/v1/feedback", json={"id": "chatcmpl-1", "rating": 1})
    assert refused.status_code == 404
    assert "qhub serve --request-log" in refused.json()["error"]["message"]


def test_what_all_replicas_say(gateway: Gateway) -> None:
    """Metrics name the replica of each value, adapters where they are, and health counts replicas."""
    for model in ("alpha", "beta", "gamma", "delta"):
        gateway.post("/v1/completions", model=model, prompt="Hi", max_tokens=1)
    families = {each.name: each for each in text_string_to_metric_families(gateway.http.get("/metrics").text)}
    steps = families["qhub_engine_steps"].samples
    assert sorted(sample.labels["replica"] for sample in steps) == ["r0", "r1"]
    assert families["qhub_replicas"].samples[0].value == 2
    assert all("replica" not in sample.labels for sample in families["qhub_http_requests"].samples)
    used = {each.labels["adapter"] for each in families["qhub_usage_requests"].samples if each.labels["key"] == "none"}
    assert {"alpha", "beta", "gamma", "delta"} <= used
    assert sorted(sample.labels["replica"] for sample in families["qhub_ready"].samples) == ["r0", "r1"]
    listed = {each["name"]: each for each in gateway.http.get("/v1/adapters").json()["data"]}
    for name in ("alpha", "beta", "gamma", "delta"):
        (home,) = [name for name, state in listed[f"{name}@1"]["replicas"].items() if state == "ready"][:1]
        assert home in ("r0", "r1")
    assert gateway.http.get("/health").json()["replicas"] == 2
    assert gateway.http.get("/ready").json() == {"ready": True, "state": "ready"}
    names = {model["name"] for model in gateway.http.get("/api/ps").json()["models"]}
    assert {"tiny", "alpha@1"} <= names


def test_nothing_is_loaded_by_hand(gateway: Gateway) -> None:
    """Loading on one replica of several is refused, with what to do instead."""
    for verb in ("load", "unload"):
        response = gateway.post(f"/v1/{verb}_lora_adapter", lora_name="alpha")
        assert response.status_code == 400
        assert "pin in [replicas] of cluster.toml" in response.json()["error"]["message"]


def test_a_client_that_hangs_up_frees_its_row(gateway: Gateway) -> None:
    """When a client of a stream leaves, the replica's engine is told and has nothing left to do."""
    body = {"model": "alpha", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 0}
    with gateway.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + PATIENCE
    while any(app.state.services.first.engine.snapshot().running for app in gateway.engines.apps.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_keys(built_base, tmp_path) -> None:
    """Keys are checked and counted by the gateway; a replica learns who asks, and never the key itself."""
    registry = Registry(tmp_path / "keyed")
    base = read_record(built_base)
    publish(registry, "alpha", base, seed=1, rank=4)
    publish(registry, "beta", base, seed=2, rank=4)
    keys = Keys(registry.home)
    _, token = keys.create(adapters=("alpha",), rate="10/min")
    _, admin = keys.create(scopes=("admin",))
    _, stranger = keys.create()
    gateway = Gateway(built_base, registry, 2)
    try:
        mine, other = ({"Authorization": f"Bearer {each}"} for each in (token, admin))
        body = {"model": "alpha", "prompt": "Hi", "max_tokens": 1}

        def status(headers, **changes) -> int:
            return gateway.http.post("/v1/completions", json=body | changes, headers=headers).status_code

        assert status({}) == 401
        assert status({"Authorization": "Bearer qhub-nothing"}) == 401
        assert status(other) == 403
        assert status(mine, model="beta") == 403  # given back to the rate
        assert [status(mine) for _ in range(12)] == [200] * 10 + [429] * 2
        assert not any(b"bearer" in value.lower() for _, call in gateway.engines.asked for _, value in call.headers)
        assert gateway.http.get("/v1/adapters", headers=mine).status_code == 403
        assert gateway.http.get("/v1/adapters", headers=other).status_code == 200
        shown = gateway.http.get("/v1/models", headers=mine).json()["data"]
        assert {each["id"] for each in shown} == {"alpha", "alpha@1"}
        seen, seen_by_admin = (gateway.http.get("/metrics", headers=each).text for each in (mine, other))
        assert "beta" not in seen
        identity = token.split("-")[1]
        for text in (seen, seen_by_admin):  # counted once, by the replica that answered
            rows = [each for each in text.splitlines() if each.startswith("qhub_usage_requests_total{")]
            (row,) = [each for each in rows if f'key="{identity}"' in each]
            assert row.endswith(" 10.0")
        assert status(other | {"Authorization": f"Bearer {stranger}"}, model="beta") == 200
        assert stranger.split("-")[1] not in gateway.http.get("/metrics", headers=mine).text
        assert gateway.http.get("/ready").status_code == 200
    finally:
        gateway.stop()


def test_the_gateway_loads_no_torch() -> None:
    """A gateway is a small process; it imports what defines a replica, too."""
    modules = "serve.cluster.gateway, serve.cluster.control, serve.cluster.replica"
    code = f"import sys, {modules}; print({{'torch', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, capture_output=True, text=True)
    assert done.stdout == "set()\n"
