"""What those who come from other servers try first: addresses, defaults, and mistakes that explain themselves."""

from collections.abc import Iterator
from importlib.metadata import version

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.errors import InputError
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.options import HttpOptions
from tests.serve.conftest import Server

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def paged(built_base, served_registry: Registry) -> Iterator[Server]:
    """A server that web pages of one origin may ask."""
    base: LoadedBase = load_base(read_record(built_base), device="cpu")
    running = Server(base, served_registry, http=HttpOptions(origins=(PAGE,)))
    yield running
    running.stop()


def test_tokens_and_back(server: Server) -> None:
    """`/tokenize` gives the ids that a request counts, of texts and messages; `/detokenize` gives the text back."""
    plain = server.http.post(
        "/tokenize", json={"model": "tiny", "prompt": "Good day", "return_token_strs": True}
    ).json()
    assert plain["tokens"] == server.service.base.tokenizer.encode("Good day")
    assert plain["count"] == len(plain["tokens"]) == len(plain["token_strs"])
    assert plain["max_model_len"] == server.service.engine.max_length
    assert server.http.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": "Good day"}
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    answer = server.http.post(CHAT, json={"model": "tiny", "messages": MESSAGES, "max_tokens": 1}).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]
    assert chat["token_strs"] is None
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"content": "a"}, "content"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ):
        response = server.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), (path, body)
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_what_there_is(server: Server) -> None:
    """`/` lists the addresses, `/version` says the version; each GET answers HEAD alike, without a body."""
    index = server.http.get("/").json()
    assert {CHAT, "/v1/models", "/health", "/metrics", "/tokenize"} <= set(index["paths"])
    assert index["base"] == "tiny"
    assert server.http.get("/version").json() == {"version": version("adapterhub-local")}
    for path in ("/", "/health", "/v1/models", "/metrics"):
        head = server.http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == server.http.get(path).headers["content-type"]
    assert server.http.head(CHAT).status_code == 405


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/chat/completions", "did you mean /v1/chat/completions?"),
        ("GET", "/models", "did you mean /v1/models?"),
        ("POST", "/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/images/generations", "text only"),
        ("GET", "/v1/nothing", "GET / lists what there is"),
    ],
)
def test_addresses_that_are_none(server: Server, method: str, path: str, says: str) -> None:
    """An address that is none is 404 with the nearest one, or what to do instead."""
    response = server.http.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "unknown_url")
    assert says in error["message"]


def test_web_pages(paged: Server, server: Server) -> None:
    """Pages of an allowed origin may ask, also in vain; others get no leave, and without the option nobody does."""
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    leave = paged.http.options(CHAT, headers={"Origin": PAGE, **asks})
    assert (leave.status_code, leave.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in leave.headers["access-control-allow-headers"].lower()
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 1}
    for path, sent, status in ((CHAT, body, 200), (CHAT, {}, 400), ("/nothing", {}, 404)):
        answer = paged.http.post(path, json=sent, headers={"Origin": PAGE})
        assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (status, PAGE)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    for asked, origin in ((paged, "https://other.example"), (server, PAGE)):
        refused = asked.http.options(CHAT, headers={"Origin": origin, **asks})
        assert refused.status_code >= 400
        assert "access-control-allow-origin" not in refused.headers
        assert "access-control-allow-origin" not in asked.http.get("/health", headers={"Origin": origin}).headers
    with pytest.raises(InputError, match="not an origin"):
        HttpOptions(origins=("page.example/path",))


def test_web_pages_need_keys_too(built_base, tmp_path) -> None:
    """A page may ask whether it may ask without a key, and is told that a key is missing."""
    registry = Registry(tmp_path / "home")
    Keys(registry.home).create()
    running = Server(load_base(read_record(built_base), device="cpu"), registry, http=HttpOptions(origins=("*",)))
    try:
        asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        assert running.http.options(CHAT, headers=asks).status_code == 200
        refused = running.http.post(CHAT, json={}, headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*")
    finally:
        running.stop()


IMAGE = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "y"}}]}


@pytest.mark.parametrize(
    ("path", "change", "param", "code", "says"),
    [
        (CHAT, {"messages": [IMAGE]}, "messages", "invalid_value", "messages.0.content.1.type: Input should be 'text'"),
        (CHAT, {"temprature": 1}, "temprature", "unknown_parameter", "did you mean temperature?"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter", "not supported"),
        (CHAT, {"messages": None}, "messages", "invalid_type", "messages: Input should be a valid list"),
        (CHAT, {"max_tokens": "7"}, "max_tokens", "invalid_type", "valid integer"),
        (CHAT, {"temperature": 9}, "temperature", "invalid_value", "less than or equal to 2"),
        (CHAT, {"tool_choice": "any"}, "tool_choice", "invalid_value", "'none', 'auto' or 'required', or: "),
        (CHAT, {"max_tokens": 10**6}, "messages", "context_length_exceeded", "the context is"),
        (
            "/v1/completions",
            {"prompt": "a", "max_tokens": 10**6},
            "prompt",
            "context_length_exceeded",
            "the context is",
        ),
        (
            "/v1/completions",
            {"prompt": {"a": 1}},
            "prompt",
            "invalid_type",
            "a valid string, or: Input should be a valid list",
        ),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt", "invalid_type", "prompt.1: Input should be a valid string"),
        ("/v1/completions", {}, "prompt", "missing_required_parameter", "prompt: Field required"),
        (CHAT, {"model": "beta:alpha"}, "model", "model_not_found", "ask for 'alpha', or 'tiny:alpha'"),
        (CHAT, {"model": "beta", "adapters": [{"ref": "alpha"}]}, "model", "model_not_found", "ask for 'alpha', or"),
    ],
)
def test_mistakes_explain_themselves(server: Server, path: str, change: dict, param: str, code: str, says: str) -> None:
    """A mistake is reported with the place in the body, OpenAI's code, and what was expected of the nearest form."""
    body = {"model": "alpha", **({"messages": MESSAGES} if path == CHAT else {}), **change}
    response = server.http.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code in (400, 404), response.text
    assert (error["param"], error["code"]) == (param, code), error
    assert says in error["message"]


def test_bodies_of_another_type(server: Server) -> None:
    """A body that is not declared as JSON is refused with the header it needs: pages send such without asking."""
    body = b'{"model": "alpha", "prompt": "a"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert response.status_code == 400
        assert "'Content-Type: application/json'" in response.json()["error"]["message"]


def test_what_other_clients_send_unasked(server: Server) -> None:
    """vLLM's and OpenAI's parameters at values that change nothing are taken; at others they are refused by name."""
    neutral = {"skip_special_tokens": True, "include_stop_str_in_output": False, "priority": 0, "length_penalty": 1.0}
    neutral |= {"verbosity": "medium", "prompt_cache_retention": "24h", "store": True, "prompt_logprobs": None}
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 1}
    assert server.http.post(CHAT, json={**body, **neutral}).status_code == 200
    for change in ({"skip_special_tokens": False}, {"length_penalty": 2.0}, {"best_of": 2}):
        error = server.http.post(CHAT, json={**body, **change}).json()["error"]
        assert (error["param"], error["code"]) == (next(iter(change)), "unsupported_parameter")


def test_usage_and_lengths(server: Server) -> None:
    """Usage says how much of a prompt was computed before, and models how long prompt and answer may be."""
    prompt = [7, 9] * 40
    first = server.complete(model="gamma", prompt=prompt, max_tokens=1).json()["usage"]
    again = server.complete(model="gamma", prompt=prompt, max_tokens=1, n=2).json()["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 80}
    assert 64 <= again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"] == 80
    longest = server.service.engine.max_length
    assert {model.max_model_len for model in server.client.models.list()} == {longest}
    assert server.client.models.retrieve("alpha@prod").max_model_len == longest
