"""Attacks from a real browser: a hostile page, with a person signed in beside it, tries every route in every way."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.marks import add_tags
from adapterhub_local.settings import home as home_at
from adapterhub_local.train.past_runs import LOG, RECORD, holding
from serve.http.app import create_app
from serve.registry_api.starting import FOLDER
from tests.patience import PATIENCE
from tests.recipes import MINIMAL
from tests.serve.conftest import OPTIONS
from tests.serve.console.attacker import Watched, attack, contents, hostile_site, targets
from tests.serve.console.conftest import REBOUND, SITE, Console, fill

RUN = "20260101-000000-tone"
SECRETS = ["says how a review feels", "sentiment@2", "llama", RUN, "sha256:"]
MESSAGES = [{"role": "user", "content": "Hi"}]
MERGE = {"adapters": ["sentiment@2", "origin@1"], "weights": [0.5, 0.5]}
# what every route that changes or starts something would act on, as JSON, or as the fields of a form below /console
BODIES: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72]},
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 2},
    "/v1/completions": {"model": "sentiment", "prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 16},
    "/v1/feedback": {"id": "chatcmpl-1", "rating": 1},
    "/v1/embeddings": {"model": "tiny", "input": "Hi"},
    "/v1/score": {"model": "tiny", "prompt": "Hi", "choices": ["a", "b"]},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES},
    "/api/chat": {"model": "tiny", "messages": MESSAGES, "options": {"num_predict": 2}},
    "/api/generate": {"model": "tiny", "prompt": "Hi", "options": {"num_predict": 2}},
    "/api/show": {"model": "tiny"},
    "/v1/load_lora_adapter": {"lora_name": "origin", "pinned": True},
    "/v1/unload_lora_adapter": {"lora_name": "tone", "force": True},
    "/v1/registry/compare/modules": {"left": "sentiment@1", "right": "sentiment@2"},
    "PUT /v1/registry/aliases/{name:path}": {"alias": "prod", "version": 2},
    "POST /v1/registry/aliases/{name:path}": {"alias": "prod"},
    "/v1/registry/tags/{reference:path}": {"add": ["evil"]},
    "/v1/registry/evaluations/{reference:path}": {"task": "evil", "scores": {"adapter": {"accuracy": 1.0}}},
    "/v1/registry/votes": {"id": "evil-vote", "left": "sentiment@1", "right": "sentiment@2", "winner": "left"},
    "/v1/registry/approvals": {"reference": "sentiment@1", "alias": "prod"},
    "/v1/registry/protections/{name:path}": {"alias": "canary", "approvals": 1},
    "/v1/registry/splits/{name:path}": {"split": []},
    "/v1/registry/descriptions/{reference:path}": {"text": "evil"},
    "/v1/plans": {"recipe": "sums.toml"},
    "/v1/runs": {"recipe": "sums.toml"},
    "/v1/runs/{run}/stop": {},
    "/v1/merges": MERGE,
    "/console/alias": {"name": "sentiment", "alias": "prod", "version": 2, "state": json.dumps({"prod": 1})},
    "/console/alias/rollback": {"name": "sentiment", "alias": "prod", "expect": 2, "to": 1},
    "/console/alias/remove": {"name": "sentiment", "alias": "prod", "expect": 2},
    "/console/approvals": {"reference": "sentiment@2", "alias": "prod"},
    "/console/description": {"reference": "origin@1", "text": "evil", "state": "about origin"},
    "/console/hold": {"reference": "tone@1", "do": "load"},
    "/console/merge/methods": {
        "m": MERGE["adapters"],
        "w": ["0.5", "0.5"],
        "f": ["weighted_sum"],
        "data": "recipe:sums.toml",
        "examples": 1,
    },
    "/v1/merges/methods": {**MERGE, "methods": ["weighted_sum"], "recipe": "sums.toml", "examples": 1},
    "/console/tags": {"reference": "sentiment@2", "tag": "evil", "do": "add"},
    "/console/compare/modules": {"left": "sentiment@1", "right": "sentiment@2"},
    "/console/merge": {"m": MERGE["adapters"], "w": ["0.5", "0.5"]},
    "/console/runs/plan": {"recipe": "sums.toml"},
    "/console/runs/start": {"recipe": "sums.toml"},
    "/console/runs/stop": {"run": RUN},
    "/console/runs/resume": {"run": RUN},
    "/console/login": {"key": "qhub-00000000-" + "a" * 43},
    "/console/logout": {"out": "1"},
}
QUERIES = {
    "/v1/registry/compare": "?left=sentiment@1&right=sentiment@2",
    "/console/compare": "?left=sentiment@1&right=sentiment@2",
    "/v1/registry/aliases/{name:path}": "?alias=prod",
    "/v1/registry/protections/{name:path}": "?alias=canary",
}
SAFE = ("GET", "OPTIONS")
# what is refused to our own page, too, by what it is about: these need a log, a state, a plan, or a job that goes on
NEEDING_MORE = {
    "POST /v1/feedback", "POST /v1/jobs/{job}/cancel", "POST /console/jobs/cancel", "POST /console/alias/remove",
    "POST /console/login", "POST /console/runs/start", "POST /console/runs/resume",
}  # fmt: skip


class Attacked(Console):
    """A server with a model, adapters, a run that goes on and a person signed in; `token` is the key, if it has one."""

    def __init__(self, registry: Registry, base: Any, token: str | None) -> None:
        self.watched = Watched(create_app(load_base(base, device="cpu"), registry=registry, options=OPTIONS))
        super().__init__(registry, self.watched)
        self.token = token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False)
        stored = self.http.post("/v1/responses", json=BODIES["/v1/responses"]).json()["id"]
        self.http.post("/v1/load_lora_adapter", json={"lora_name": "tone"})
        job = self.http.post("/v1/plans", json={"recipe": "homeless.toml"}).json()["id"]  # which ends at once
        values = {"model": "tiny", "response_id": stored, "name": "sentiment", "reference": "sentiment@2", "run": RUN,
                  "job": job, "task": "sentiment"}  # fmt: skip
        self.targets = targets(self.watched, values, BODIES, QUERIES)
        for target in self.targets:
            target.path = target.path.replace("/static/sentiment", "/static/play.js")
        while self.http.get(f"/v1/jobs/{job}").json()["state"] == "running":
            pass

    def state(self) -> dict[str, Any]:
        """All that an attack could change: what is in the home, in memory and in the server's counts."""
        server = self.http.get("/v1/server").json()
        engine = {name: server["engine"][name] for name in ("running", "waiting", "adapters_loaded", "adapter_loads")}
        counted = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith("qhub_tokens_total")]
        answers = {path: self.http.get(path).json() for path in ("/v1/jobs", "/v1/keys", "/v1/runs", "/v1/adapters")}
        paths = [one.path for one in self.targets if one.method == "GET" and one.route.startswith("/v1/responses/{")]
        stored = [self.http.get(path).status_code for path in paths]
        return {"home": contents(self.registry), "engine": engine, "tokens": counted, "stored": stored, **answers}


@contextmanager
def attacked(folder: Path, built_base: Path, *, has_keys: bool) -> Iterator[Attacked]:
    registry = Registry(home_at(folder))
    shutil.copytree(built_base, registry.home.bases / "tiny")
    base = read_record(registry.home.bases / "tiny")
    fill(registry, base)
    for version in (2, 1):  # so that it can be rolled back
        registry.set_alias("sentiment", "prod", version)
    (registry.home.root / FOLDER).mkdir()
    (registry.home.root / FOLDER / "sums.toml").write_text(MINIMAL, encoding="utf-8")
    homeless = MINIMAL.replace('"tiny"', '"nothing"')
    (registry.home.root / FOLDER / "homeless.toml").write_text(homeless, encoding="utf-8")
    (registry.home.root / FOLDER / "train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n', encoding="utf-8")
    run = registry.home.runs / RUN
    run.mkdir(parents=True)
    (run / LOG).write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    (run / RECORD).write_text(json.dumps({"status": "running", "name": "tone", "steps": 9, "pid": 1}), encoding="utf-8")
    token = Keys(registry.home).create(scopes=("infer", "admin"))[1] if has_keys else None
    with holding(run):
        running = Attacked(registry, base, token)
        try:
            yield running
        finally:
            running.http.close()
            running.stop()


@pytest.mark.parametrize("has_keys", [True, False], ids=["signed in", "without keys"])
def test_no_other_page_gets_or_changes_anything(browser: Any, built_base: Path, tmp_path: Path, has_keys: bool) -> None:
    """From another port, another site and a rebound name every route is asked in every way a page has: for nothing."""
    with attacked(tmp_path, built_base, has_keys=has_keys) as victim, hostile_site() as port:
        context = browser.new_context()
        context.set_default_timeout(PATIENCE * 1000)
        if victim.token:
            page = context.new_page()
            page.goto(f"{victim.url}/console/login")
            page.get_by_label("API key").fill(victim.token)
            page.keyboard.press("Enter")
            page.wait_for_url(f"{victim.url}/console")
            page.close()
        before = victim.state()
        own = victim.url.rpartition(":")[2]
        got = {}
        pages = (f"http://127.0.0.1:{port}/", f"http://{SITE}:{port}/", f"http://{REBOUND}:{own}/attack")
        for turn, where in enumerate(pages):
            victim.watched.arrived.clear()
            got[where] = attack(context, victim, victim.targets, where, SECRETS, turn)
            _check_all_was_tried(victim, is_same=REBOUND in where)
        assert not any(got.values()), got
        assert victim.state() == before
        _check_person_is_still_here(context, victim)
        if has_keys:  # else they are the same
            _check_bodies_are_real(victim)
        context.close()


def _check_all_was_tried(victim: Attacked, *, is_same: bool) -> None:
    """Every route was reached by the browser: where a method needs leave, by the question for it, which is refused.

    A rebound name is the server's own for the browser, which then asks for no leave; and as it is not a
    loopback one, no Sec-Fetch-Site says where a request comes from.
    """
    arrived = {(one.method, one.path) for one in victim.watched.arrived}
    modes = {one.headers.get("sec-fetch-mode") for one in victim.watched.arrived}
    assert modes == {None} if is_same else {"cors", "no-cors", "navigate"} <= modes
    for target in victim.targets:
        path = target.path.partition("?")[0]
        asked = target.method if is_same or target.method in ("GET", "POST") else "OPTIONS"
        assert (asked, path) in arrived, target
    others = {"PUT", "DELETE"} if is_same else {"OPTIONS"}
    assert {method for method, _ in arrived} == {"GET", "POST", *others}


def _check_person_is_still_here(context: Any, victim: Attacked) -> None:
    page = context.new_page()
    page.goto(f"{victim.url}/console")
    assert page.get_by_role("link", name="sentiment@2").count() == 1
    assert page.get_by_role("button", name="Sign out").count() == bool(victim.token)
    page.close()


def _check_bodies_are_real(victim: Attacked) -> None:
    """What was refused to the page is done for one of our own: so it was refused for where it came from."""
    own = {"Origin": victim.url, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    refused = {}
    order = ("POST", "PUT", "DELETE")
    unsafe = [one for one in victim.targets if one.method in order]
    for target in sorted(unsafe, key=lambda one: (order.index(one.method), not one.route.startswith("/console"))):
        sent = {"data" if target.route.startswith("/console") else "json": target.body} if target.body else {}
        answer = victim.http.request(
            target.method, target.path, headers=own, **sent if target.method != "DELETE" else {}
        )
        if answer.status_code >= 400 and "jobs are running already" not in answer.text:
            refused[f"{target.method} {target.route}"] = answer.text[-300:]
    assert refused.keys() == NEEDING_MORE, refused


def open_app(registry: Registry) -> FastAPI:
    """An application with what ours does not have: routes that look at nothing."""
    app = FastAPI(openapi_url=None)

    @app.post("/open/tag")
    async def tag(request: Request) -> Response:
        origin = request.headers.get("origin", "")
        add_tags(registry, registry.resolve("tone"), ("evil",))
        leave = {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true"}
        return Response("done", media_type="text/plain", headers=leave)

    @app.get("/open/page")
    def page(request: Request) -> Response:
        return HTMLResponse("<h1>says how a review feels</h1>")

    @app.get("/open/script")
    def script(request: Request) -> Response:
        return Response("window.secret = 1", media_type="text/javascript")

    return app


def test_an_open_route_is_noticed(browser: Any, registry: Registry, built_base: Path) -> None:
    """The same attack on routes that look at nothing changes, reads, frames and runs, and each is reported."""
    fill(registry, read_record(built_base))
    victim = Console(registry, open_app(registry))
    try:
        context = browser.new_context()
        before = contents(registry)
        aims = targets(victim.app, {}, {}, {})
        with hostile_site() as port:
            pages = f"http://{SITE}:{port}/", f"http://{REBOUND}:{victim.url.rpartition(':')[2]}/attack"
            told, again = (
                [one for turn in range(3) for one in attack(context, victim, aims, page, SECRETS, turn)]
                for page in pages
            )
        assert contents(registry) != before
        for way in ("readable fetch: POST /open/tag", "a frame shows", "script: GET /open/script"):
            assert any(one.startswith(way) for one in told), told
        for way in ("fetch: GET /open/page 200 ['says how", "window: POST /open/tag", "style: GET /open/page"):
            assert any(one.startswith(way) for one in again), again
        context.close()
    finally:
        victim.stop()
