"""/api as Ollama's own client speaks it: chats, texts, lines of JSON, tools, models and mistakes."""

import json
from collections.abc import Iterator

import ollama
import pytest

from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hello"}
SHORT = {"num_predict": 12, "temperature": 0}
PLACE = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ollama.Client]:
    """The official client, pointed here."""
    found = ollama.Client(host=server.url, trust_env=False)
    yield found
    found._client.close()


def test_chats(server: Server, client: ollama.Client) -> None:
    """A chat says what /v1/chat/completions says, whole and in lines, and what it cost."""
    body = {"model": "alpha", "messages": [USER], "max_tokens": 12, "temperature": 0}
    said = server.http.post("/v1/chat/completions", json=body).json()
    whole = client.chat("alpha:latest", [USER], options=SHORT)
    assert whole.message.content == said["choices"][0]["message"]["content"]
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 12)
    assert whole.prompt_eval_count == said["usage"]["prompt_tokens"]
    assert whole.total_duration >= whole.eval_duration > 0
    lines = list(client.chat("alpha", [USER], options=SHORT, stream=True))
    assert "".join(line.message.content for line in lines) == whole.message.content
    assert [line.done for line in lines[-2:]] == [False, True]
    plain = server.http.post("/api/chat", json={"model": "alpha", "messages": [USER], "options": SHORT})
    assert plain.headers["content-type"] == "application/x-ndjson", "Ollama streams unless it is told not to"
    assert json.loads(plain.text.splitlines()[-1])["done"]
    bare = server.http.post("/api/chat", content=b'{"model": "alpha", "messages": [{"role": "user", "content": "Hi"}]}')
    assert bare.status_code == 200, "as Ollama does, it reads a body that is not said to be JSON"


def test_texts(server: Server, client: ollama.Client) -> None:
    """A text is answered behind the template, continued with `raw`, and without one the model is only named."""
    answered = client.generate("alpha", "Hello", options=SHORT)
    assert answered.response == client.chat("alpha", [USER], options=SHORT).message.content
    raw = client.generate("alpha", "Hello", raw=True, options=SHORT)
    assert raw.response == server.complete(model="alpha", prompt="Hello", max_tokens=12).json()["choices"][0]["text"]
    assert client.generate("alpha").done_reason == "load"
    lines = list(client.generate("alpha", "Hello", options=SHORT, stream=True))
    assert "".join(line.response for line in lines) == answered.response


def test_tools_and_forms(client: ollama.Client) -> None:
    """Tools are taken with their calls and results; `format` is followed."""
    forced = client.chat("alpha", [USER], format={"enum": ["yes", "no"]}, options={"num_predict": 30})
    assert json.loads(forced.message.content) in ("yes", "no")
    call = {"function": {"name": "weather", "arguments": {"place": "Rome"}}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_name": "weather", "content": "sunny"})
    assert client.chat("alpha", turns, tools=[WEATHER], options=SHORT).eval_count == 12


def test_what_there_is(server: Server, client: ollama.Client) -> None:
    """Models are listed with their content's digest; one of them says what it can do; the version is the server's."""
    models = {model.model: model for model in client.list().models}
    assert {"tiny", "alpha", "alpha@1", "alpha@prod"} <= set(models)
    assert models["alpha"].digest == server.registry.resolve("alpha").content_digest.removeprefix("sha256:")
    assert models["alpha"].details.quantization_level == "NF4"
    shown = client.show("alpha")
    assert {"completion", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["llama.context_length"] == server.service.engine.max_length
    client.generate("alpha", "Hi", options=SHORT)
    assert "alpha@1" in {model.model for model in client.ps().models}
    assert server.http.get("/api/version").json() == server.http.get("/version").json()
    with pytest.raises(ollama.ResponseError) as caught:
        client.show("nothing")
    assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"options": {"repeat_penalty": 1.3}}, "options", "repetition_penalty"),
        ({"options": {"mirostat": 2}}, "options", "mirostat"),
        ({"options": {"temperature": 9}}, "options", "temperature"),
        ({"options": {"num_predict": 0}}, "options", "at least 1"),
        ({"messages": [{**USER, "images": ["aGk="]}]}, "messages", "images"),
        ({"template": "{{ .Prompt }}"}, "template", "not supported"),
        ({"think": "high"}, "think", "no thoughts"),
        ({"model": "nothing"}, "model", "no adapter"),
        ({"messages": "Hello"}, "messages", "list"),
    ],
    ids=str,
)
def test_mistakes(server: Server, change: dict, param: str, says: str) -> None:
    """What is wrong or not supported is reported as Ollama does, a text, with the parameter beside it."""
    for stream in (True, False):
        body = {"model": "alpha", "messages": [USER], "stream": stream, **change}
        response = server.http.post("/api/chat", json=body)
        assert response.status_code in (400, 404)
        assert response.json()["param"] == param
        assert says in response.json()["error"]


def test_options_that_say_nothing(client: ollama.Client) -> None:
    """What only says how a machine is used, and samplers that are turned off, are taken."""
    options = {"num_ctx": 2048, "num_gpu": 1, "mirostat": 0, "mirostat_tau": 5.0, "repeat_penalty": 1.0, "tfs_z": 1.0}
    said = client.chat("alpha", [USER], options={**options, **SHORT}, think=False, keep_alive="5m")
    assert said.message.content == client.chat("alpha", [USER], options=SHORT).message.content
