"""Access: every route declares who may ask, and a key sees of adapters only what it may ask."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.access import UNKNOWN, Access, Routes, Scope, access, declare, declared
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server

# what each route is for: one that is added must be added here, too
EXPECTED = {
    "/": Access(Scope.ANY),
    "/version": Access(Scope.ANY),
    "/openapi.json": Access(Scope.ANY),
    "/health": Access(Scope.OPEN),
    "/ready": Access(Scope.OPEN),
    "/metrics": Access(Scope.ANY),
    "/tokenize": Access(Scope.INFER, is_counted=True),
    "/detokenize": Access(Scope.INFER, is_counted=True),
    "/v1/models": Access(Scope.ANY),
    "/v1/models/{model:path}": Access(Scope.ANY),
    "/v1/chat/completions": Access(Scope.INFER, is_counted=True),
    "/v1/completions": Access(Scope.INFER, is_counted=True),
    "/v1/responses": Access(Scope.INFER, is_counted=True),
    "/v1/responses/{response_id}": Access(Scope.INFER),
    "/v1/responses/{response_id}/input_items": Access(Scope.INFER),
    "/v1/feedback": Access(Scope.INFER, is_counted=True),
    "/v1/embeddings": Access(Scope.INFER, is_counted=True),
    "/v1/score": Access(Scope.INFER, is_counted=True),
    "/v1/messages": Access(Scope.INFER, is_counted=True),
    "/v1/messages/count_tokens": Access(Scope.INFER, is_counted=True),
    "/api/chat": Access(Scope.INFER, is_counted=True),
    "/api/generate": Access(Scope.INFER, is_counted=True),
    "/api/tags": Access(Scope.ANY),
    "/api/show": Access(Scope.ANY),
    "/api/ps": Access(Scope.ANY),
    "/api/version": Access(Scope.ANY),
    "/v1/adapters": Access(Scope.ADMIN),
    "/v1/load_lora_adapter": Access(Scope.ADMIN),
    "/v1/unload_lora_adapter": Access(Scope.ADMIN),
    "/v1/registry/adapters": Access(Scope.ANY),
    "/v1/registry/adapters/{name:path}": Access(Scope.ANY),
    "/v1/registry/versions/{reference:path}": Access(Scope.ANY),
    "/v1/registry/lineage/{reference:path}": Access(Scope.ANY),
    "/v1/registry/compare": Access(Scope.ANY),
    "/v1/registry/compare/modules": Access(Scope.ADMIN),
    "/v1/registry/bases": Access(Scope.ANY),
    "/v1/registry/aliases/{name:path}": Access(Scope.ADMIN),
    "/v1/registry/tags/{reference:path}": Access(Scope.ADMIN),
    "/v1/registry/evaluations/{reference:path}": Access(Scope.ADMIN),
    "/v1/registry/votes": Access(Scope.ADMIN),
    "/v1/registry/approvals": Access(Scope.ADMIN),
    "/v1/registry/splits": Access(Scope.ADMIN),
    "/v1/keys": Access(Scope.ADMIN),
    "/v1/recipes": Access(Scope.ADMIN),
    "/v1/plans": Access(Scope.ADMIN),
    "/v1/registry/protections/{name:path}": Access(Scope.ADMIN),
    "/v1/registry/splits/{name:path}": Access(Scope.ADMIN),
    "/v1/registry/descriptions/{reference:path}": Access(Scope.ADMIN),
    "/v1/registry/history": Access(Scope.ADMIN),
    "/v1/runs": Access(Scope.ADMIN),
    "/v1/runs/{run}": Access(Scope.ADMIN),
    "/v1/runs/{run}/stop": Access(Scope.ADMIN),
    "/v1/jobs": Access(Scope.ADMIN),
    "/v1/jobs/{job}": Access(Scope.ADMIN),
    "/v1/jobs/{job}/cancel": Access(Scope.ADMIN),
    "/v1/merges": Access(Scope.ADMIN),
    "/v1/merges/methods": Access(Scope.ADMIN),
    "/v1/server": Access(Scope.ADMIN),
    "/console": Access(Scope.ANY),
    "/console/adapters/{name:path}": Access(Scope.ANY),
    "/console/compare": Access(Scope.ANY),
    "/console/compare/modules": Access(Scope.ADMIN),
    "/console/bases": Access(Scope.ANY),
    "/console/play": Access(Scope.INFER),
    "/console/server": Access(Scope.ADMIN),
    "/console/runs": Access(Scope.ADMIN),
    "/console/runs/{run}": Access(Scope.ADMIN),
    "/console/jobs/{job}": Access(Scope.ADMIN),
    "/console/alias": Access(Scope.ADMIN),
    "/console/alias/rollback": Access(Scope.ADMIN),
    "/console/alias/remove": Access(Scope.ADMIN),
    "/console/approvals": Access(Scope.ADMIN),
    "/console/description": Access(Scope.ADMIN),
    "/console/tags": Access(Scope.ADMIN),
    "/console/hold": Access(Scope.ADMIN),
    "/console/jobs/cancel": Access(Scope.ADMIN),
    "/console/merge": Access(Scope.ADMIN),
    "/console/merge/methods": Access(Scope.ADMIN),
    "/console/runs/new": Access(Scope.ADMIN),
    "/console/runs/plan": Access(Scope.ADMIN),
    "/console/runs/start": Access(Scope.ADMIN),
    "/console/tasks": Access(Scope.ANY),
    "/console/tasks/{task:path}": Access(Scope.ANY),
    "/console/history": Access(Scope.ADMIN),
    "/console/runs/stop": Access(Scope.ADMIN),
    "/console/runs/resume": Access(Scope.ADMIN),
    "/console/static/{name}": Access(Scope.OPEN),
    "/console/login": Access(Scope.OPEN),
    "/console/logout": Access(Scope.OPEN),
}
MIX = "sql-a*0.5+tone*0.5"


@pytest.fixture(scope="module")
def guarded(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two adapters that were asked, alone and mixed, and keys for one of them and for all."""
    home = Home(tmp_path_factory.mktemp("guarded"))
    registry, base = Registry(home), read_record(built_base)
    publish(registry, "sql-a", base, seed=1)
    publish(registry, "tone", base, seed=2)
    server = Server(load_base(base, device="cpu"), registry)
    for model in ("sql-a", "tone", MIX, "tiny"):
        assert server.complete(model=model, prompt="Hi").status_code == 200
    keys = Keys(home)
    server.keys = {
        "sql": keys.create(adapters=("sql*",))[1],
        "sql-admin": keys.create(scopes=("admin",), adapters=("sql*",))[1],
        "all": keys.create(scopes=("infer", "admin"))[1],
        "few": keys.create(rate="1/h")[1],
        "watching": keys.create(scopes=("metrics",))[1],
    }
    yield server
    server.stop()


def ask(server: Server, key: str | None, method: str, path: str, **body) -> httpx.Response:
    """A request with one of the server's keys."""
    headers = {"Authorization": f"Bearer {server.keys[key]}"} if key is not None else {}
    return server.http.request(method, path, headers=headers, **({"json": body} if method == "POST" else {}))


def test_every_route_declares_its_access(guarded: Server) -> None:
    """The application has exactly the routes that are expected, each with the access that is expected of it."""
    routes = guarded._uvicorn.config.app.routes
    assert {route.path: declared(route) for route in routes} == EXPECTED


def test_a_route_without_a_declaration_is_refused(tmp_path: Path) -> None:
    """A route or a folder that declares nothing stops the start; what declares something is found by its address."""
    app = FastAPI(openapi_url=None)
    app.add_api_route("/a/{rest:path}", access(Scope.INFER, counted=True)(lambda rest: rest))
    app.mount("/files", StaticFiles(directory=tmp_path))
    with pytest.raises(LookupError, match="/files declares no access"):
        Routes(app)
    declare(app.routes[-1], Access(Scope.ADMIN))
    routes = Routes(app)

    def found(path: str, method: str = "GET") -> Access:
        return routes.access({"type": "http", "path": path, "method": method, "root_path": "", "headers": []})

    assert found("/a/b/c") == found("/a/x", "POST") == Access(Scope.INFER, is_counted=True)
    assert found("/files/x.css") == Access(Scope.ADMIN)
    app.add_api_route("/both", access(Scope.ANY)(lambda: None), methods=["GET"])
    app.add_api_route("/both", access(Scope.ADMIN)(lambda: None), methods=["POST"])
    routes = Routes(app)
    assert [found("/both", method).scope for method in ("GET", "POST", "PUT")] == [Scope.ANY, Scope.ADMIN, Scope.ANY]
    assert found("/b") == UNKNOWN == Access(Scope.ANY)
    app.add_api_route("/forgotten", lambda: None)
    with pytest.raises(LookupError, match="/forgotten declares no access"):
        Routes(app)


@pytest.mark.parametrize("path", sorted(EXPECTED))
def test_what_is_declared_holds(guarded: Server, path: str) -> None:
    """Without a key only what is open answers, and a key without the scope is refused, by any method."""
    address, scope = re.sub(r"\{(model|name|reference):path\}", "sql-a", path), EXPECTED[path].scope
    for method in ("GET", "POST", "DELETE"):
        assert (ask(guarded, None, method, address).status_code == 401) == (scope is not Scope.OPEN)
        assert (ask(guarded, "sql", method, address).status_code == 403) == (scope is Scope.ADMIN)
        assert (ask(guarded, "sql-admin", method, address).status_code == 403) == (scope is Scope.INFER)


def test_texts_and_tokens_count(guarded: Server) -> None:
    """Turning text into tokens and back is work like an answer: it counts against the rate of its key."""
    assert ask(guarded, "few", "POST", "/tokenize", prompt="Hello").status_code == 200
    assert ask(guarded, "few", "POST", "/detokenize", tokens=[72]).status_code == 429
    assert ask(guarded, "few", "GET", "/v1/models").status_code == 200


@pytest.mark.parametrize("model", ["sql-a*0", "tiny:sql-a*0", "sql-a*0.5+sql-a*-0.5", "sql-a*0+sql-a@1*0"])
def test_an_adapter_times_nothing_is_the_base(guarded: Server, model: str) -> None:
    """A key that is not for the base does not get it as nothing of an adapter; one for all does."""
    body = {"model": model, "prompt": "Hi", "max_tokens": 1}
    for key, status in (("sql", 403), ("all", 200)):
        assert ask(guarded, key, "POST", "/v1/completions", **body).status_code == status
        assert ask(guarded, key, "GET", f"/v1/models/{model}").status_code == status
    refused = ask(guarded, "sql", "POST", "/v1/completions", **body)
    assert "this key is not for 'tiny'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("model", ["tone", MIX, "sql-a+tone*0"])
def test_all_that_is_named_must_be_allowed(guarded: Server, model: str) -> None:
    """A mix is for keys of all its adapters, also of those that weigh nothing."""
    assert ask(guarded, "sql", "POST", "/v1/completions", model=model, prompt="Hi").status_code == 403
    assert ask(guarded, "all", "POST", "/v1/completions", model=model, prompt="Hi").status_code == 200


def test_metrics_show_what_a_key_may_ask(guarded: Server) -> None:
    """A key sees the counts of its own adapters and of the server, never another's name; one for all sees all."""
    own, everything = (ask(guarded, key, "GET", "/metrics").text for key in ("sql", "all"))
    assert 'qhub_tokens_total{adapter="sql-a"' in own
    for hidden in ("tone", 'adapter="tiny"'):
        assert hidden not in own
        assert hidden in everything
    for line in ("qhub_adapters_loaded 3.0", "vllm:num_requests_running 0.0"):
        assert line in own.splitlines()
        assert line in everything.splitlines()


def test_a_key_that_only_watches(guarded: Server) -> None:
    """It sees the metrics as an administrator's key does, and gets no answer and no change."""
    ids = [token.split("-")[1] for name, token in guarded.keys.items() if name == "sql"]
    assert ask(guarded, "sql", "POST", "/v1/completions", model="sql-a", prompt="Hi", max_tokens=2).status_code == 200
    for name in ("watching", "all"):
        text = ask(guarded, name, "GET", "/metrics").text
        assert all(f'key="{each}"' in text for each in ids)
    body = {"model": "sql-a", "prompt": "Hi"}
    assert ask(guarded, "watching", "POST", "/v1/completions", **body).status_code == 403
    assert ask(guarded, "watching", "POST", "/v1/load_lora_adapter", lora_name="sql-a").status_code == 403


def test_usage_shows_who_asked_to_administrators(guarded: Server) -> None:
    """A key sees its own use alone, an administrator that of all keys, each of the adapters that it may ask."""
    ids = {name: token.split("-")[1] for name, token in guarded.keys.items()}
    for key in ("sql", "all"):
        assert ask(guarded, key, "POST", "/v1/completions", model="sql-a", prompt="Hi").status_code == 200
    assert ask(guarded, "all", "POST", "/v1/completions", model="tone", prompt="Hi").status_code == 200
    assert ask(guarded, "sql", "POST", "/v1/completions", model="tone", prompt="Hi").status_code == 403
    shown = {key: ask(guarded, key, "GET", "/metrics").text for key in ("sql", "sql-admin", "all", "few")}
    row = 'qhub_usage_tokens_total{{adapter="{1}",key="{0}",kind="prompt"}}'.format
    for reader, seen in {
        "sql": [("sql", "sql-a")],
        "sql-admin": [("sql", "sql-a"), ("all", "sql-a")],
        "all": [("sql", "sql-a"), ("all", "sql-a"), ("all", "tone")],
        "few": [],
    }.items():
        for asker, adapter in [("sql", "sql-a"), ("all", "sql-a"), ("all", "tone")]:
            assert (row(ids[asker], adapter) in shown[reader]) == ((asker, adapter) in seen), (reader, asker, adapter)
        hidden = set(ids) - {asker for asker, _ in seen}
        assert not [asker for asker in hidden if f'"{ids[asker]}"' in shown[reader]]
    for name in ("qhub_adapter_first_token_seconds_count", "qhub_adapter_answer_seconds_count"):
        assert f'{name}{{adapter="tone"}}' in shown["few"]
        assert f'{name}{{adapter="tone"}}' not in shown["sql"]
        assert f'{name}{{adapter="sql-a"}}' in shown["sql"]
    assert 'qhub_errors_total{adapter="-",status="403"}' in shown["sql"]


def test_adapters_show_what_a_key_may_ask(guarded: Server) -> None:
    """An administrator of some adapters sees, loads and unloads these alone."""
    shown = [each["name"] for each in ask(guarded, "sql-admin", "GET", "/v1/adapters").json()["data"]]
    assert shown == ["sql-a@1"]
    assert len(ask(guarded, "all", "GET", "/v1/adapters").json()["data"]) == 3
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert ask(guarded, "sql-admin", "POST", path, lora_name="tone").status_code == 403
        assert ask(guarded, "sql-admin", "POST", path, lora_name="sql-a").status_code == 200
