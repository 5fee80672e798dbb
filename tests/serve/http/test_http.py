"""The server over the loopback, through the official client and plain HTTP."""

import asyncio
import dataclasses
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from adapterhub_local.base.bases import read_record
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_chat(server: Server) -> None:
    """A chat answer has text, a finish reason, token counts, and names the version and content that made it."""
    answer = server.client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=10, temperature=0)
    version = server.registry.resolve("alpha")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 10
    assert answer.model == "alpha"
    assert answer.adapter == {"name": "alpha", "version": 1, "digest": version.content_digest}
    assert answer.system_fingerprint


def test_streamed_chat_equals_whole(server: Server) -> None:
    """The chunks of a stream join to the answer that is not streamed; usage comes last if asked for."""
    ask = {"model": "beta", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = server.client.chat.completions.create(**ask)
    chunks = list(server.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(server: Server) -> None:
    """Texts, lists of texts and token ids are continued; equal prompts get equal answers."""
    create = server.client.completions.create
    tokens = server.service.base.tokenizer.encode("Hello")
    one = create(model="alpha", prompt="Hello", max_tokens=6, temperature=0)
    many = create(model="alpha", prompt=["Hello", "Good morning"], max_tokens=6, temperature=0)
    ids = create(model="alpha", prompt=tokens, max_tokens=6, temperature=0)
    id_lists = create(model="alpha", prompt=[tokens, tokens], max_tokens=6, temperature=0)
    assert one.choices[0].text == many.choices[0].text == ids.choices[0].text == id_lists.choices[1].text
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.usage.prompt_tokens == one.usage.prompt_tokens + len("Good morning")
    streamed = create(model="alpha", prompt="Hello", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_default_lengths(server: Server) -> None:
    """A completion has 16 tokens unless asked for more; a chat goes on to the end of the context."""
    completion = server.complete(model="tiny", prompt="Hello", max_tokens=None, ignore_eos=True).json()
    assert completion["usage"]["completion_tokens"] == 16
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "ignore_eos": True}
    chat = server.http.post("/v1/chat/completions", json=body).json()
    assert chat["usage"]["total_tokens"] == server.service.engine.max_length


def test_every_spelling_of_a_model(server: Server) -> None:
    """Name, version, alias, digest and `base:` spelling give the same answer; the base gives another."""
    digest = server.registry.resolve("alpha").content_digest
    spellings = [
        "alpha",
        "alpha@1",
        "alpha@prod",
        "alpha@latest",
        f"alpha@{digest[:19]}",
        "tiny:alpha",
        "tiny:alpha@prod",
    ]
    answers = {name: server.complete(model=name, prompt="Hello", max_tokens=12).json() for name in spellings}
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 1
    assert {answer["adapter"]["digest"] for answer in answers.values()} == {digest}
    base = server.complete(model="tiny", prompt="Hello", max_tokens=12).json()
    assert base["choices"][0]["text"] != answers["alpha"]["choices"][0]["text"]
    assert base["adapter"] is None
    assert base["system_fingerprint"] != answers["alpha"]["system_fingerprint"]


def test_models(server: Server) -> None:
    """The list names base, names, versions and aliases with root and parent; each can be fetched alone."""
    models = {model.id: model for model in server.client.models.list()}
    assert {"tiny", "alpha", "alpha@1", "alpha@prod", "beta", "gamma"} <= set(models)
    assert models["tiny"].parent is None
    assert models["tiny"].root == server.service.base.info.fingerprint
    assert models["alpha@prod"].parent == "tiny"
    assert models["alpha@prod"].root == server.registry.resolve("alpha").content_digest
    assert server.client.models.retrieve("alpha@prod").root == models["alpha"].root
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nothing")


@pytest.mark.parametrize(
    "model",
    ["nothing", "alpha@99", "alpha@staging", "other:alpha", "", "../../etc/passwd", "/etc", "alpha@sha256:" + "0" * 12],
)
def test_unknown_model(server: Server, model: str) -> None:
    """What names nothing is 404 model_not_found, and never answered by the base."""
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model=model, messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": None}, "messages"),
        ({"model": None}, "model"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"logit_bias": {"one": 5}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999999]}, "stop_token_ids"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"temprature": 0}, "temprature"),
    ],
)
def test_bad_parameter(server: Server, change: dict, param: str) -> None:
    """A value that is wrong, or would be ignored, is 400 and named."""
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 4, **change}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_neutral_parameters_are_accepted(server: Server) -> None:
    """Parameters that ask for nothing, as clients send them by default, are accepted."""
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 2, "frequency_penalty": 0.0, "presence_penalty": 0}
    body |= {"logit_bias": None, "tools": [], "response_format": {"type": "text"}, "user": "someone", "n": 1}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'"text"', b'{"model": NaN}', b"\xff\xfe", b"[" * 20_000])
def test_malformed_body(server: Server, body: bytes) -> None:
    """What is not a JSON object is 400 with an OpenAI error body."""
    response = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_wrong_path_and_method(server: Server) -> None:
    """Unknown paths and methods have OpenAI error bodies, too."""
    assert server.http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert server.http.get("/v1/chat/completions").status_code == 405


def test_out_of_range_tokens(server: Server) -> None:
    """Token ids that the base does not have, and prompts of nothing, are refused."""
    assert server.complete(model="tiny", prompt=[1_000_000]).json()["error"]["param"] == "prompt"
    assert server.complete(model="tiny", prompt="").json()["error"]["param"] == "prompt"


def test_context_length(server: Server) -> None:
    """A prompt, or a prompt and its answer, that exceeds the context is 400 context_length_exceeded."""
    long = server.complete(model="alpha", prompt="x" * 600)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    greedy = server.complete(model="alpha", prompt="x", max_tokens=512)
    assert (greedy.status_code, greedy.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert server.complete(model="alpha", prompt="x" * 500, max_tokens=12).status_code == 200


def test_stop_strings(server: Server) -> None:
    """An answer ends before the first stop string, wherever the tokens' borders are."""
    whole = server.complete(model="alpha", prompt="Hello", max_tokens=40, ignore_eos=True).json()["choices"][0]["text"]
    stop = whole[10:13]
    answer = server.complete(model="alpha", prompt="Hello", max_tokens=40, stop=[stop, "never"], ignore_eos=True).json()
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 40
    server.wait_until_idle()


def test_seed_and_choices(server: Server) -> None:
    """The same seed gives the same choices, other seeds others; the choices of one request differ."""
    ask = {"model": "gamma", "prompt": "Hello", "max_tokens": 16, "temperature": 1.0, "n": 3}
    first, again, other = (
        [choice["text"] for choice in server.complete(**ask, seed=seed).json()["choices"]] for seed in (5, 5, 99)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 3


def test_logprobs(server: Server) -> None:
    """Log-probabilities come with as many alternatives as asked for; the greedy token is the likeliest."""
    chat = server.client.chat.completions.create(
        model="alpha", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    completion = server.client.completions.create(model="alpha", prompt="Hi", max_tokens=4, temperature=0, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 4
    plain = server.client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=4, temperature=0)
    assert plain.choices[0].logprobs is None


def test_different_adapters_share_a_batch(server: Server) -> None:
    """Requests that come together run together although they name different adapters, each as if alone."""
    names = ["tiny", "alpha", "beta", "gamma"] * 2

    def ask(name: str) -> str:
        return server.complete(model=name, prompt="Once upon", max_tokens=60, ignore_eos=True).json()["choices"][0][
            "text"
        ]

    alone = {name: ask(name) for name in set(names)}
    server.wait_until_idle()
    stats = server.service.engine.stats
    stats.max_adapters = stats.max_rows = 0
    with ThreadPoolExecutor(len(names)) as threads:
        together = list(threads.map(ask, names))
    assert together == [alone[name] for name in names]
    assert stats.max_adapters == 3
    assert stats.max_rows >= 4


def test_published_while_running(server: Server) -> None:
    """A new adapter is served by the next request, and a new version takes over its name."""
    base = server.service.base.info
    assert server.complete(model="fresh", prompt="Hello").status_code == 404
    publish(server.registry, "fresh", base, seed=10)
    first = server.complete(model="fresh", prompt="Hello").json()
    publish(server.registry, "fresh", base, seed=11)
    second = server.complete(model="fresh", prompt="Hello").json()
    assert (first["adapter"]["version"], second["adapter"]["version"]) == (1, 2)
    assert first["choices"][0]["text"] != second["choices"][0]["text"]
    assert server.complete(model="fresh@1", prompt="Hello").json()["choices"] == first["choices"]


def test_moved_alias(server: Server) -> None:
    """Moving an alias switches the next request; one that runs finishes on the version it started with."""
    base = server.service.base.info
    publish(server.registry, "moving", base, seed=20, alias="prod")
    publish(server.registry, "moving", base, seed=21)
    ask = {"model": "moving@prod", "prompt": "Hello", "max_tokens": 200, "temperature": 0, "stream": True}
    running = iter(server.client.completions.create(**ask, extra_body={"ignore_eos": True}))
    chunks = [next(running)]
    server.registry.set_alias("moving", "prod", 2)
    after = server.complete(model="moving@prod", prompt="Hello").json()
    chunks += running
    assert {chunk.adapter["version"] for chunk in chunks} == {1}
    assert after["adapter"]["version"] == 2
    expected = server.complete(model="moving@1", prompt="Hello", max_tokens=200, ignore_eos=True).json()
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected["choices"][0]["text"]


def test_adapter_of_another_base(server: Server) -> None:
    """An adapter made for another base is refused with both names, not listed, and not answered by the base."""
    other = dataclasses.replace(server.service.base.info, name="other", fingerprint="sha256:" + "0" * 64)
    publish(server.registry, "foreign", other, seed=30)
    response = server.complete(model="foreign", prompt="Hello")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "adapter_incompatible"
    assert "'other'" in response.json()["error"]["message"]
    assert "foreign" not in {model.id for model in server.client.models.list()}


def test_disconnect_frees_the_row(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves in the middle of a stream, or while it waits, gives its row and its adapter back."""
    ask = {"model": "alpha", "prompt": "Hello", "max_tokens": 480, "temperature": 0, "ignore_eos": True}
    server.slow_down(monkeypatch, 0.01)
    with server.http.stream("POST", "/v1/completions", json={**ask, "stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=ask, timeout=0.05)
    before = server.service.engine.stats.num_sampled
    server.wait_until_idle()
    assert server.service.engine.stats.num_sampled - before < 400, "the answers were computed to the end"
    assert not any(server.service.engine.pool.users().values())


def test_queue_limit(server: Server) -> None:
    """When the queue is full a request is 429 at once, and those that were admitted are answered."""
    limit = server.service.engine.options.queue_limit

    async def flood() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            body = {"model": "tiny", "prompt": "Hi", "max_tokens": 40, "ignore_eos": True, "n": 10}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(10)))
        return [answer.status_code for answer in answers]

    codes = asyncio.run(flood())
    assert set(codes) == {200, 429}
    too_many = server.complete(model="tiny", prompt="Hi", n=limit + 1)
    assert too_many.status_code == 429
    assert too_many.headers["Retry-After"]
    server.wait_until_idle()


def test_health(server: Server) -> None:
    """/health names the base and counts what the engine does."""
    body = server.http.get("/health").json()
    assert body["status"] == "ok"
    assert body["base"]["name"] == "tiny"
    assert server.complete(model="tiny", prompt="Hi").status_code == 200
    after = server.http.get("/health").json()["engine"]
    assert after["num_steps"] > body["engine"]["num_steps"]
    assert after["num_failed_steps"] == body["engine"]["num_failed_steps"]  # other tests let steps fail


def test_curl(server: Server) -> None:
    """The command of the documentation works as it stands."""
    body = json.dumps({"model": "alpha@prod", "messages": MESSAGES, "max_tokens": 5, "stream": True})
    command = ["curl", "-sN", "--noproxy", "*", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"


def test_base_is_unchanged_by_serving(server: Server, built_base) -> None:
    """After all this the files of the base are those it was loaded from."""
    assert read_record(built_base).fingerprint == server.service.base.info.fingerprint
