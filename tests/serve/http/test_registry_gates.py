"""Protected aliases over HTTP: API and console refuse alike, approvals are of keys, the history says which."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from adapterhub_local.registry import Registry
from adapterhub_local.registry.history import history
from adapterhub_local.registry.key_log import create_key
from adapterhub_local.registry.protecting import protect
from serve.http.console import console_app
from serve.listen import http_config
from serve.options import HttpOptions
from tests.stores import LINEAGE, files


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two versions of `a` with scores; prod points to the first and wants a score and an approval."""
    made = Registry(tmp_path / "home")
    for seed, score in enumerate((0.5, 0.9)):
        made.publish("a", files(seed), {**LINEAGE, "metrics": {"task": {"adapter": {"exact_match": score}}}})
    made.set_alias("a", "prod", 1)
    protect(made, "a", "prod", ["task.exact_match>=0.8"], 1)
    return made


@pytest.fixture
def client(registry: Registry) -> Iterator[httpx.Client]:
    """A client of `qhub console`'s application on the loopback."""
    server = uvicorn.Server(http_config(console_app(registry, HttpOptions()), port=0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as made:
        yield made
    server.should_exit = True
    thread.join(20)


def test_two_keys_move_a_protected_alias(registry: Registry, client: httpx.Client) -> None:
    """The mover's own approval is not enough, another admin key's is; every change names its key."""
    keys = [create_key(registry, scopes=("admin",)) for _ in range(2)]
    mover, other = ({"Authorization": f"Bearer {token}"} for _, token in keys)
    said = client.put("/v1/registry/aliases/a", headers=mover, json={"alias": "prod", "version": 1 + 1})
    assert said.status_code == 409
    assert f"1 approval from others than key:{keys[0][0].id} and has 0" in said.json()["error"]["message"]
    approval = {"reference": "a@2", "alias": "prod"}
    assert client.post("/v1/registry/approvals", headers=mover, json=approval).status_code == 200
    assert client.put("/v1/registry/aliases/a", headers=mover, json={"alias": "prod", "version": 2}).status_code == 409
    given = client.post("/v1/registry/approvals", headers=other, json=approval).json()["approvals"]
    assert [one["actor"] for one in given] == [f"key:{key.id}" for key, _ in keys]
    moved = client.put("/v1/registry/aliases/a", headers=mover, json={"alias": "prod", "version": 2})
    assert moved.json()["aliases"] == {"prod": 2}
    back = client.post("/v1/registry/aliases/a", headers=mover, json={"alias": "prod"})
    assert back.status_code == 409
    assert "must have 'task.exact_match>=0.8' and has 0.5" in back.json()["error"]["message"]
    assert client.delete("/v1/registry/aliases/a?alias=prod", headers=mover).status_code == 409
    changes = client.get("/v1/registry/history?name=a&event=alias&event=approval", headers=mover).json()["data"]
    who = [(entry["event"], entry["actor"]) for entry in changes[:3]]
    assert who == [("alias", f"key:{keys[0][0].id}"), ("approval", f"key:{keys[1][0].id}"),
                   ("approval", f"key:{keys[0][0].id}")]  # fmt: skip


def test_the_console_refuses_on_its_page(registry: Registry, client: httpx.Client) -> None:
    """A form that moves a protected alias is answered by the page with the reason."""
    form = {"name": "a", "alias": "prod", "version": "2", "state": '{"prod": 1}'}
    said = client.post("/console/alias", data=form)
    assert said.status_code == 409
    assert "1 approval from others than http:127.0.0.1" in said.text
    assert registry.aliases("a") == {"prod": 1}


def test_a_server_without_keys_names_the_address(registry: Registry, client: httpx.Client) -> None:
    """Where no key is needed a change is that of an address, not of whoever runs the server."""
    assert client.put("/v1/registry/tags/a@1", json={"add": ["good"]}).status_code == 200
    assert history(registry).entries[0]["actor"] == "http:127.0.0.1"
    assert "QHUB_ACTOR" not in os.environ


def test_who_moved_an_alias_is_for_those_who_may_move_it(registry: Registry, client: httpx.Client) -> None:
    """A key that may only ask sees what is protected, and not by whom; the history is for admin keys."""
    tokens = [create_key(registry, scopes=(scope,))[1] for scope in ("infer", "admin")]
    infer, admin = ({"Authorization": f"Bearer {token}"} for token in tokens)
    hidden = client.get("/v1/registry/adapters/a", headers=infer).json()
    shown = client.get("/v1/registry/adapters/a", headers=admin).json()
    assert [one["actor"] for one in (*hidden["alias_log"], *hidden["protections"])] == [None, None]
    assert all(one["actor"] for one in (*shown["alias_log"], *shown["protections"]))
    assert hidden["protections"][0]["require"] == ["task.exact_match>=0.8"]
    assert client.get("/v1/registry/history", headers=infer).status_code == 403


def test_a_key_for_some_adapters_sees_their_changes_only(registry: Registry, client: httpx.Client) -> None:
    """Neither other names nor keys are in what it is shown; a bad place or kind is refused."""
    registry.publish("b", files(5), LINEAGE)
    token = create_key(registry, scopes=("admin",), adapters=("b",))[1]
    headers = {"Authorization": f"Bearer {token}"}
    assert {entry["name"] for entry in client.get("/v1/registry/history", headers=headers).json()["data"]} == {"b"}
    for query in ("event=rename", "after=x", "limit=0"):
        assert client.get(f"/v1/registry/history?{query}", headers=headers).status_code in (400, 422)
    for name in ("a", "never"):  # another's, or nobody's: it cannot be seen which
        refused = client.get(f"/v1/registry/history?name={name}", headers=headers)
        assert refused.status_code == 404
        assert f"there is no adapter '{name}'" in refused.json()["error"]["message"]
