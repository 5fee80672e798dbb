"""The model `auto`: a router chooses who answers, at every endpoint, within what a key may ask, and says so."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import Incompatible, InputError, NotFound
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.__main__ import command
from serve.http.front import JsonLines
from serve.options import HttpOptions
from tests.routers import TASKS, make_router, prompts
from tests.serve.conftest import Server

NOBODYS = "\u4f60\u597d\uff0c\u4e16\u754c"


@pytest.fixture(scope="module")
def routed(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with three adapters and two routers of them."""
    folder = tmp_path_factory.mktemp("auto")
    registry = Registry(folder / "home")
    registry.home.bases.mkdir(parents=True)
    (registry.home.bases / "tiny").symlink_to(built_base)
    make_router(registry, read_record(built_base), folder, alias="prod")
    make_router(registry, read_record(built_base), folder, threshold=1.0)
    return registry


@pytest.fixture(scope="module")
def auto(built_base: Path, routed: Registry) -> Iterator[Server]:
    """A server whose router is `router@prod`."""
    running = Server(load_base(read_record(built_base), device="cpu"), routed, http=HttpOptions(router="router@prod"))
    yield running
    running.stop()


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ENDPOINTS = {
    "chat": ("/v1/chat/completions", lambda text: {"messages": message(text), "max_tokens": 4}),
    "chat stream": ("/v1/chat/completions", lambda text: {"messages": message(text), "max_tokens": 4, "stream": True}),
    "completions": ("/v1/completions", lambda text: {"prompt": text, "max_tokens": 4}),
    "one of a list": ("/v1/completions", lambda text: {"prompt": [text], "max_tokens": 4}),
    "tokens": ("/v1/completions", lambda text: {"prompt": [*text.encode()], "max_tokens": 4}),
    "responses": ("/v1/responses", lambda text: {"input": text, "max_output_tokens": 16}),
    "messages": ("/v1/messages", lambda text: {"messages": message(text), "max_tokens": 4}),
    "ollama chat": ("/api/chat", lambda text: {"messages": message(text), "stream": False}),
    "ollama generate": ("/api/generate", lambda text: {"prompt": text, "stream": False, "options": {"num_predict": 4}}),
    "score": ("/v1/score", lambda text: {"messages": message(text), "choices": ["a", "b"]}),
    "score a text": ("/v1/score", lambda text: {"prompt": text, "choices": ["a", "b"]}),
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_is_routed(endpoint: str, auto: Server) -> None:
    """The adapter of the prompt answers, exactly as if it had been named, and headers say which and how sure."""
    path, body = ENDPOINTS[endpoint]
    (text,) = prompts("beta", 1, seed=7)
    if endpoint == "tokens":
        text = auto.http.post("/detokenize", json={"tokens": [*text.encode()]}).json()["prompt"] and text
        tokens = auto.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        answer = auto.http.post(path, json={"model": "auto", "prompt": tokens, "max_tokens": 4, "temperature": 0})
    else:
        answer = auto.http.post(path, json={"model": "auto", **body(text)})
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Qhub-Router"] == "router@1"
    assert answer.headers["X-Qhub-Routed"] == "beta@prod"
    assert answer.headers["X-Qhub-Adapter"] == "beta@1"
    assert 0.8 < float(answer.headers["X-Qhub-Confidence"]) <= 1


def test_the_answer_is_the_adapters(auto: Server) -> None:
    """What auto answers is what the chosen adapter answers when it is named, and the base what no adapter is for."""
    for text, name in [*((prompts(task, 1, seed=7)[0], f"{task}@prod") for task in TASKS), (NOBODYS, "tiny")]:
        chosen, named = (auto.complete(model=model, prompt=text) for model in ("auto", name))
        assert chosen.json()["choices"] == named.json()["choices"]
        assert chosen.headers["X-Qhub-Routed"] == name
        assert "X-Qhub-Routed" not in named.headers
        assert chosen.json()["model"] == "auto"


def test_follow_ups_stay(auto: Server) -> None:
    """A conversation that an adapter answers goes on with it, whatever is said next; one that begins with a greeting
    gets its adapter when it is clear."""
    first, other = prompts("alpha", 1, seed=4)[0], prompts("beta", 1, seed=4)[0]
    said = [*message(first), {"role": "assistant", "content": "7"}, *message(other)]
    later = [*message(NOBODYS), {"role": "assistant", "content": "hello"}, *message(other)]
    for messages, expected in ((said, "alpha@prod"), (later, "beta@prod"), (message(NOBODYS), "tiny")):
        body = {"model": "auto", "messages": messages, "max_tokens": 2}
        assert auto.http.post("/v1/chat/completions", json=body).headers["X-Qhub-Routed"] == expected


@pytest.mark.parametrize(
    ("path", "body", "param", "sentence"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt", "one prompt in each"),
        ("/v1/completions", {"prompt": [[1], [2]]}, "prompt", "one prompt in each"),
        ("/v1/completions", {"prompt": [10**6]}, "prompt", "token"),
        ("/v1/embeddings", {"input": "a"}, "model", "name the model"),
        ("/v1/completions", {"prompt": "a", "adapters": [{"ref": "alpha"}]}, "model", "ask for"),
    ],
)
def test_what_cannot_be_routed_is_refused(path: str, body: dict, param: str, sentence: str, auto: Server) -> None:
    """A request that auto cannot mean one adapter for is a 4xx with its reason and parameter."""
    answer = auto.http.post(path, json={"model": "auto", **body})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert sentence in answer.json()["error"]["message"]


def test_a_router_is_not_a_model(auto: Server) -> None:
    """Asked for by name, or loaded, a router is refused with what it is; it is not listed, and `auto` is."""
    answer = auto.complete(model="router@prod", prompt="a")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert "router@1 is a router" in answer.json()["error"]["message"]
    assert auto.http.post("/v1/load_lora_adapter", json={"lora_name": "router"}).status_code == 400
    listed = [model["id"] for model in auto.http.get("/v1/models").json()["data"]]
    assert "auto" in listed
    assert "alpha@prod" in listed
    assert not [name for name in listed if name.startswith("router")]
    assert auto.http.get("/v1/models/auto").json()["parent"] == "tiny"
    assert "auto" in [model["name"] for model in auto.http.get("/api/tags").json()["models"]]
    assert auto.http.post("/api/show", json={"model": "auto"}).status_code == 200
    assert auto.http.post("/api/generate", json={"model": "auto"}).status_code == 200


def test_metrics_and_log_say_what_was_chosen(auto: Server) -> None:
    """Choices are counted by adapter and reason; the line of a request has router, choice, confidence and reason."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("serve.access")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        auto.complete(model="auto", prompt=prompts("gamma", 1, seed=8)[0])
        auto.complete(model="auto", prompt=NOBODYS)
        auto.complete(model="alpha", prompt=NOBODYS)
        auto.http.get("/version")  # whose line comes after those
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [line for line in lines if line["path"] == "/v1/completions"]
    assert [(line.get("router"), line.get("routed"), line.get("route_reason")) for line in told] == [
        ("router@1", "gamma@prod", "sure"), ("router@1", "tiny", "unlike"), (None, None, None)
    ]  # fmt: skip
    assert 0.8 < told[0]["confidence"] <= 1
    metrics = auto.http.get("/metrics").text
    assert 'qhub_routed_total{adapter="gamma",reason="sure"}' in metrics
    assert 'qhub_routed_total{adapter="tiny",reason="unlike"}' in metrics


def test_tokens_are_counted_for_what_is_chosen(auto: Server) -> None:
    """Anthropic's counting reads `auto` as answering does."""
    answer = auto.http.post("/v1/messages/count_tokens", json={"model": "auto", "messages": message("1 + 1 = ?")})
    assert answer.json()["input_tokens"] > 5


def test_an_alias_moves_the_router(auto: Server, routed: Registry) -> None:
    """A router that the alias moves to chooses from the next request on; what is not a router is refused until then."""
    (text,) = prompts("beta", 1, seed=9)
    try:
        routed.set_alias("router", "prod", 2)  # which is never sure enough
        answer = auto.complete(model="auto", prompt=text)
        assert (answer.headers["X-Qhub-Router"], answer.headers["X-Qhub-Routed"]) == ("router@2", "tiny")
    finally:
        routed.set_alias("router", "prod", 1)
    assert auto.complete(model="auto", prompt=text).headers["X-Qhub-Routed"] == "beta@prod"


def test_a_key_reaches_what_it_may_ask(built_base: Path, routed: Registry) -> None:
    """A key's requests go to adapters it is for, else to the base if it is for that, else they are refused."""
    keys = Keys(routed.home)
    tokens = {name: keys.create(adapters=names)[1]
              for name, names in (("all", ()), ("one", ("alpha", "tiny")), ("bare", ("alpha",)))}  # fmt: skip
    server = Server(load_base(read_record(built_base), device="cpu"), routed, http=HttpOptions(router="router@prod"))
    try:

        def ask(key: str, text: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {tokens[key]}"}
            body = {"model": "auto", "prompt": text, "max_tokens": 2}
            return server.http.post("/v1/completions", json=body, headers=headers)

        mine, theirs = prompts("alpha", 1, seed=3)[0], prompts("beta", 1, seed=3)[0]
        chosen = [(key, text, ask(key, text)) for key in tokens for text in (mine, theirs)]
        found = [answer.headers.get("X-Qhub-Routed") for _, _, answer in chosen]
        assert found == ["alpha@prod", "beta@prod", "alpha@prod", "tiny", "alpha@prod", None]
        refused = chosen[-1][2]
        assert refused.status_code == 403
        assert "'auto' found no adapter for this that the key is for, and it is not for 'tiny'" in refused.text
        assert "beta" not in refused.text
    finally:
        server.stop()
        routed.home.keys.unlink()


def test_what_may_be_chosen_can_be_bounded(built_base: Path, routed: Registry) -> None:
    """--router-allow bounds the adapters, --router-threshold how sure the router must be."""
    (mine,), (theirs,) = prompts("alpha", 1, seed=3), prompts("beta", 1, seed=3)
    for options, expected in (
        (HttpOptions(router="router", router_allows=("al*",), router_threshold=0.5), ["alpha@prod", "tiny"]),
        (HttpOptions(router="router@1", router_threshold=1.0), ["tiny", "tiny"]),
    ):
        server = Server(load_base(read_record(built_base), device="cpu"), routed, http=options)
        try:
            answers = [server.complete(model="auto", prompt=text) for text in (mine, theirs)]
            assert [answer.headers["X-Qhub-Routed"] for answer in answers] == expected
        finally:
            server.stop()


def test_without_a_router_there_is_no_auto(server: Server) -> None:
    """A server without a router says at every endpoint that it has none, and how it gets one."""
    for path, body in ENDPOINTS.values():
        answer = server.http.post(path, json={"model": "auto", **body("a")})
        assert answer.status_code == 404
        assert "this server has no router. `qhub router train` makes one, `qhub serve --router NAME`" in answer.text
    assert "auto" not in [model["id"] for model in server.http.get("/v1/models").json()["data"]]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"router": "none"}, NotFound, "there is no adapter 'none'"),
        ({"router": "alpha"}, Incompatible, "alpha@1 is not a router but an adapter"),
        ({"router_threshold": 0.5}, InputError, "give --router NAME"),
        ({"router": "router", "router_threshold": 1.5}, InputError, "a probability is at most 1"),
    ],
)
def test_a_server_does_not_start_with_what_is_no_router(
    options: dict, error: type[Exception], sentence: str, built_base: Path, routed: Registry
) -> None:
    """What cannot route is refused at the start, not at the first request."""
    with pytest.raises(error, match=sentence):
        Server(load_base(read_record(built_base), device="cpu"), routed, http=HttpOptions(**options))


def test_a_route_that_leads_nowhere_stops_the_start(built_base: Path, tmp_path: Path) -> None:
    """A router whose adapter has lost its alias is refused at the start with what is missing."""
    from adapterhub_local.registry.marks import remove_alias

    registry = Registry(tmp_path / "home")
    registry.home.bases.mkdir(parents=True)
    (registry.home.bases / "tiny").symlink_to(built_base)
    make_router(registry, read_record(built_base), tmp_path, tasks=TASKS[:1])
    remove_alias(registry, "alpha", "prod")
    with pytest.raises(NotFound, match="there is no 'alpha@prod'"):
        Server(load_base(read_record(built_base), device="cpu"), registry, http=HttpOptions(router="router"))


def test_the_options_are_shown() -> None:
    """`qhub serve --help` says what a router is for."""
    text = CliRunner().invoke(command, ["--help"]).output
    assert all(option in text for option in ("--router REF", "--router-threshold", "--router-allow"))
