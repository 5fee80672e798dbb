"""Large bodies: read apart, they mean what small ones mean, and what they may hold is counted before it is made."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import BaseModel

from adapterhub_local.errors import InputError
from serve.http.bodies import LARGE, MAX_VALUES, check_values, num_values
from serve.registry_api.answers import Answer
from tests.serve.conftest import Server

USER = {"role": "user", "content": "x"}
TEXTS = some.text(max_size=12) | some.sampled_from(["", ":", '":', '\\":', "\\", '\\"', "[{:", '{"a": [1]}', '\\\\":'])
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | TEXTS,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=30,
)
BODIES: dict[str, tuple[str, Any]] = {
    "a chat": ("/v1/chat/completions", {"model": "alpha", "messages": [USER], "max_tokens": 4, "temperature": 0}),
    "texts": ("/v1/completions", {"model": "beta", "prompt": ["a", "b"], "max_tokens": 4, "temperature": 0}),
    "a message": ("/v1/messages", {"model": "alpha", "messages": [USER], "max_tokens": 4, "temperature": 0}),
    "a count": ("/v1/messages/count_tokens", {"model": "alpha", "messages": [USER]}),
    "an Ollama chat": ("/api/chat", {"model": "alpha", "messages": [USER], "stream": False, "options": {
        "temperature": 0, "num_predict": 4}}),
    "an embedding": ("/v1/embeddings", {"model": "alpha", "input": "x"}),
    "tokens": ("/tokenize", {"prompt": "x y"}),
    "a field that is missing": ("/v1/chat/completions", {"model": "alpha"}),
    "a wrong field": ("/v1/chat/completions", {"model": "alpha", "messages": [USER, {"role": "user", "content": 7}]}),
    "a parameter that is none": ("/v1/completions", {"model": "alpha", "prompt": "a", "temprature": 1}),
    "a wrong turn": ("/v1/messages", {"model": "alpha", "messages": [{"role": "x", "content": "a"}], "max_tokens": 1}),
    "what contradicts itself": ("/v1/messages", {"model": "alpha", "messages": [USER], "max_tokens": 1, "top_k": 1.5}),
    "a translated mistake": ("/api/chat", {"model": "alpha", "messages": [USER], "options": {"temperature": 9}}),
    "a list": ("/v1/chat/completions", [1]),
    "a model that is not there": ("/v1/responses", {"model": "nobody", "input": "x"}),
}  # fmt: skip
VARIABLE = ("id", "created", "created_at", "total_duration", "eval_duration", "prompt_eval_duration", "load_duration")


def post(server: Server, path: str, content: bytes, kind: str = "application/json") -> tuple[int, Any]:
    """Status and body, without what no two answers have in common."""
    answer = server.http.post(path, content=content, headers={"Content-Type": kind})
    body = answer.json()
    kept = {name: value for name, value in body.items() if name not in VARIABLE}
    if isinstance(kept.get("usage"), dict):  # the second time more is known of the prompt
        kept["usage"] = {name: value for name, value in kept["usage"].items() if "cache" not in name}
        kept["usage"].pop("prompt_tokens_details", None)
    return answer.status_code, kept


@pytest.mark.parametrize("name", BODIES)
def test_size_changes_nothing(server: Server, name: str) -> None:
    """With blanks around it that make it large a body gets the same answer, or the same error in the same words."""
    path, value = BODIES[name]
    small = json.dumps(value).encode()
    post(server, path, small)  # what of it is kept for the next one is part of some answers
    assert post(server, path, small) == post(server, path, small + b" " * LARGE)


@pytest.mark.parametrize(
    "content", [b"{", b'{"model": }', b"\xff", b"[" * 5000, b'{"a":' * 50_000, b'{"model": NaN}', b'"text"', b"7"]
)
def test_what_is_not_a_body(server: Server, content: bytes) -> None:
    """A body that is not JSON, or is nested too deeply, gets the same answer whatever its size."""
    found = [post(server, "/v1/chat/completions", content + blanks) for blanks in (b"", b"\n" * LARGE)]
    assert found[0] == found[1]
    assert found[0][0] == 400


def test_a_large_body_of_another_type(server: Server) -> None:
    """What is not declared as JSON is not read as JSON."""
    status, body = post(server, "/v1/completions", b'{"model": "alpha", "prompt": "a"}' + b" " * LARGE, "text/plain")
    assert status == 400
    assert "'Content-Type: application/json'" in body["error"]["message"]


def test_endpoints_still_say_what_they_take(server: Server) -> None:
    """The description of the API has the body of each endpoint."""
    paths = server.http.get("/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}


def found_in(value: Any) -> int:
    """Lists, objects and keys of a value."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(found_in, value.values()))
    return 1 + sum(map(found_in, value)) if isinstance(value, list) else 0


@settings(max_examples=300)
@given(VALUES, some.booleans())
def test_no_value_is_overlooked(value: Any, is_compact: bool) -> None:
    """Whatever texts and keys hold, there are no more lists, objects and keys than are counted."""
    body = json.dumps(value, separators=(",", ":") if is_compact else None, ensure_ascii=is_compact)
    assert num_values(body.encode("utf-8", "surrogatepass")) >= found_in(value)


def lists_in(schema: Any) -> Iterator[bool]:
    """Of each list whose items are looked at: whether that ends with the first wrong one."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "set", "tuple") and schema.get("items_schema", {}).get("type") != "any":
            yield bool(schema.get("fail_fast"))
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from lists_in(part)


def models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """All models of the server that read something."""
    for each in model.__subclasses__():
        if each.__module__.startswith("serve.") and not issubclass(each, Answer):
            yield each
        yield from models_below(each)


def test_lists_end_at_their_first_mistake() -> None:
    """No list of any body makes an error of each of its items: 4 MB hold two million wrong ones."""
    found = {model.__qualname__: list(lists_in(model.__pydantic_core_schema__)) for model in models_below(BaseModel)}
    assert len(found) > 50
    assert sum(map(len, found.values())) > 50
    assert [name for name, ends in found.items() if not all(ends)] == []


def test_json_in_a_text_has_no_keys() -> None:
    """A document of JSON as the text of a message is not counted as if it were the body's own."""
    document = json.dumps({f"key{number}": number for number in range(1000)})
    assert num_values(json.dumps({"content": document}).encode()) == 3  # the body, its key, and the text's own brace


def test_too_many_fields(server: Server) -> None:
    """An object with more fields than anybody writes is refused before each of them is an error of its own."""
    body = {"model": "alpha", "messages": [USER], "max_tokens": 1}
    for count, status in ((9_000, 200), (10_001, 400)):
        notes = {f"{number}": "a note" for number in range(count)}
        found = post(server, "/v1/chat/completions", json.dumps({**body, "metadata": notes}).encode())
        assert found[0] == status
    assert found[1]["error"]["message"] == "an object may have 10,000 fields, one in this body has 10,001"


def test_too_many_values() -> None:
    """Just as many as there may be pass, one more does not; a small body is not counted."""
    most = b"[" + b"{}," * (MAX_VALUES - 2) + b"{}]"
    check_values(most)
    with pytest.raises(InputError, match="200,000 lists, objects and keys"):
        check_values(most[:-1] + b",{}]")
