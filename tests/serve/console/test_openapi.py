"""The published description of the answers: every route has one, and real answers have what it says, and no more."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fastjsonschema
import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from adapterhub_local.train.past_runs import LOG, RECORD, holding
from serve.registry_api.starting import FOLDER
from tests.recipes import MINIMAL
from tests.serve.conftest import Server
from tests.serve.console.conftest import Console, fill

RUN = "20260101-000000-tone"
PLAN = {"recipe": "sums.toml"}
VOTE = {"id": "a-new-vote", "left": "sentiment@1", "right": "sentiment@2", "winner": "left"}
MERGE = {"adapters": ["sentiment@2", "origin@1"], "weights": [0.5, 0.5]}
REGISTRY = "/v1/registry"
JOB = f"POST {REGISTRY}/compare/modules"
# what is asked of each route; several times where its answers differ in form
ASKED: dict[str, list[tuple[str, Any]]] = {
    f"GET {REGISTRY}/adapters": [("?limit=2", None), ("?versions=all", None), ("?q=nothing-such", None)],
    f"GET {REGISTRY}/adapters/{{name}}": [("sentiment", None), ("both", None)],
    f"GET {REGISTRY}/versions/{{reference}}": [("both@1?report=true", None), ("sentiment@2", None)],
    f"GET {REGISTRY}/lineage/{{reference}}": [("both@1", None)],
    f"GET {REGISTRY}/compare": [("?left=sentiment@1&right=both@1", None)],
    f"GET {REGISTRY}/bases": [("", None)],
    f"GET {REGISTRY}/history": [("?limit=200", None)],
    f"GET {REGISTRY}/splits": [("", None)],
    f"PUT {REGISTRY}/aliases/{{name}}": [("sentiment", {"alias": "prod", "version": 2})],
    f"POST {REGISTRY}/aliases/{{name}}": [("sentiment", {"alias": "prod"})],
    f"DELETE {REGISTRY}/aliases/{{name}}": [("both?alias=old", None)],
    f"POST {REGISTRY}/approvals": [("", {"reference": "sentiment@2", "alias": "prod"})],
    f"PUT {REGISTRY}/protections/{{name}}": [("tone", {"alias": "prod", "require": ["tone.exact_match>=0.8"]})],
    f"DELETE {REGISTRY}/protections/{{name}}": [("tone?alias=prod", None)],
    f"PUT {REGISTRY}/splits/{{name}}": [("sentiment", {"split": [{"alias": "prod", "share": 1}]})],
    f"PUT {REGISTRY}/descriptions/{{reference}}": [("tone", {"text": "about tone"})],
    f"PUT {REGISTRY}/tags/{{reference}}": [("tone", {"add": ["new"]})],
    f"POST {REGISTRY}/evaluations/{{reference}}": [("tone", {"task": "new", "scores": {"adapter": {"accuracy": 1.0}}})],
    f"POST {REGISTRY}/votes": [("", VOTE)],
    JOB: [("", {"left": "sentiment@1", "right": "sentiment@2"})],
    "POST /v1/jobs/{job}/cancel": [("{job}/cancel", None)],  # which has begun just now
    "POST /v1/merges": [("", MERGE)],
    "POST /v1/merges/methods": [("", {**MERGE, **PLAN, "methods": ["weighted_sum"]})],
    "GET /v1/jobs": [("", None)],
    "GET /v1/jobs/{job}": [("{job}", None)],
    "POST /v1/plans": [("", PLAN)],
    "GET /v1/recipes": [("", None)],
    "GET /v1/runs": [("", None)],
    "POST /v1/runs": [("", PLAN)],
    "GET /v1/runs/{run}": [(RUN, None)],
    "POST /v1/runs/{run}/stop": [(f"{RUN}/stop", None)],
    "GET /v1/keys": [("", None)],
    "GET /v1/server": [("", None)],
}
# routes whose answers are described elsewhere, or are not JSON
OTHERS = {
    "/v1/chat/completions": "OpenAI's form, or a stream of it", "/v1/completions": "OpenAI's form, or a stream of it",
    "/v1/responses": "OpenAI's form, or a stream of it", "/v1/models": "OpenAI's form",
    "/v1/responses/{response_id}": "OpenAI's form", "/v1/responses/{response_id}/input_items": "OpenAI's form",
    "/v1/models/{model}": "OpenAI's form", "/v1/embeddings": "OpenAI's form", "/v1/score": "of probes",
    "/v1/messages": "Anthropic's form, or a stream of it", "/v1/messages/count_tokens": "Anthropic's form",
    "/v1/feedback": "of the log", "/v1/adapters": "vLLM's and SGLang's clients",
    "/v1/load_lora_adapter": "text, as vLLM's", "/v1/unload_lora_adapter": "text, as vLLM's",
    "/api/chat": "Ollama's form, or a stream of it", "/api/generate": "Ollama's form, or a stream of it",
    "/api/show": "Ollama's form", "/api/tags": "Ollama's form", "/api/ps": "Ollama's form",
    "/api/version": "Ollama's form", "/tokenize": "vLLM's form", "/detokenize": "vLLM's form", "/health": "of probes",
    "/ready": "of probes", "/metrics": "Prometheus' text", "/version": "vLLM's form", "/": "a redirect for browsers",
}  # fmt: skip
Schema = dict[str, Any]


@pytest.fixture(scope="module")
def described(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a model over a registry with something of everything, and a run that goes on."""
    registry = Registry(home_at(tmp_path_factory.mktemp("described")))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    base = read_record(registry.home.bases / "tiny")
    fill(registry, base)
    for alias, version in (("prod", 2), ("prod", 1)):
        registry.set_alias("sentiment", alias, version)
    registry.set_alias("both", "old", 1)
    folder = registry.home.root / FOLDER
    folder.mkdir()
    (folder / "sums.toml").write_text(MINIMAL, encoding="utf-8")
    (folder / "broken.toml").write_text("[base]\nname = 3\n", encoding="utf-8")
    (folder / "train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n', encoding="utf-8")
    run = registry.home.runs / RUN
    run.mkdir(parents=True)
    (run / LOG).write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    (run / RECORD).write_text(json.dumps({"status": "running", "name": "tone", "steps": 9}), encoding="utf-8")
    token = Keys(registry.home).create(scopes=("infer", "admin"), rate="900/s", adapters=("*",))[1]
    with holding(run):
        server = Server(load_base(base, device="cpu"), registry)
        server.http.headers["Authorization"] = f"Bearer {token}"
        server.complete(model="sentiment", prompt="Hi", max_tokens=2)
        yield server
        server.stop()


def closed(schema: Any) -> Any:
    """A schema by which an object has no more than is described, unless it says that it may."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {name: closed(part) for name, part in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def validators(document: Schema) -> dict[tuple[str, str], Callable[[Any], Any]]:
    """By operation and status: what raises JsonSchemaException for an answer that is not as described."""
    components = closed(document["components"])
    by_model: dict[str, Callable[[Any], Any]] = {}
    found = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
                if set(schema) == {"$ref"}:
                    if (model := schema["$ref"]) not in by_model:
                        by_model[model] = fastjsonschema.compile({"components": components, **schema})
                    found[f"{method.upper()} {path}", status] = by_model[model]
    return found


def ask(server: Server, route: str, more: str, body: Any) -> httpx.Response:
    """A request to a route, whose places are the first word of `more`."""
    method, path = route.split(" ")
    path = path.partition("{")[0] + more if "{" in path else path + more
    return server.http.request(method, path, json=body)


def test_answers_are_as_described(described: Server) -> None:
    """Every answer of these routes has its schema, and so has every error."""
    document = described.http.get("/openapi.json").json()
    known = validators(document)
    jobs = []
    for route, requests in ASKED.items():
        for more, body in requests:
            answer = ask(described, route, more.replace("{job}", jobs[0] if jobs else ""), body)
            if "jobs are running already" in answer.text:  # then a job before it was answered, in the same form
                known[route, "4XX"](answer.json())
                assert known[route, "202"] is known[JOB, "202"]
                continue
            assert answer.is_success, (route, answer.text)
            known[route, str(answer.status_code)](answer.json())
            jobs += [answer.json()["id"]] if answer.status_code == 202 else []
        refused = described.http.request(*route.split(" "), headers={"Authorization": ""})
        assert refused.status_code == 401
        known[route, "4XX"](refused.json())


def test_no_route_is_without_a_description(described: Server) -> None:
    """Each route is among those whose answers are described and asked for here, or among those with a reason not to."""
    document = described.http.get("/openapi.json").json()
    operations = {f"{method.upper()} {path}" for path, found in document["paths"].items() for method in found}
    asked = {route for route in operations if route.split(" ")[1] not in OTHERS}
    assert asked == ASKED.keys()
    assert OTHERS.keys() <= document["paths"].keys()
    described_routes = {route for route, _ in validators(document)}
    assert asked <= described_routes
    assert "HTTPValidationError" not in json.dumps([document["paths"][route.split(" ")[1]] for route in asked])


def test_the_console_alone_is_described_alike(console: Console, described: Server) -> None:
    """Without a model the same routes have the same descriptions, and the server's answer fits them."""
    alone = httpx.get(f"{console.url}/openapi.json", trust_env=False).json()
    beside = described.http.get("/openapi.json").json()
    for path, operations in alone["paths"].items():
        assert operations == beside["paths"][path]
    answer = httpx.get(f"{console.url}/v1/server", trust_env=False).json()
    validators(alone)["GET /v1/server", "200"](answer)


def test_a_wrong_answer_is_noticed(described: Server) -> None:
    """An answer with a field more, a field less or another type fits no description."""
    known = validators(described.http.get("/openapi.json").json())
    validate = known["GET /v1/registry/adapters", "200"]
    answer = described.http.get("/v1/registry/adapters").json()
    for wrong in (answer | {"more": 1}, {"object": "list"}, answer | {"total": "5"}, answer | {"data": [{}]}):
        with pytest.raises(fastjsonschema.JsonSchemaException):
            validate(wrong)
