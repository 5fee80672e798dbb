"""What OpenAI's clients may ask beyond plain text: JSON schemas, tools, penalties, log-probabilities, echo."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.base.tool_calls import CallReader
from adapterhub_local.base.tool_format import HERMES, LLAMA, PROMPTED, format_of
from tests.patience import PATIENCE
from tests.serve.conftest import TOOL_TEMPLATE, Server

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "score": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["mood", "score"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_schema(server: Server, temperature: float) -> None:
    """Whatever the adapter would like to say, the answer is JSON of the schema, and ends by itself."""
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA, "strict": True}}
    answer = server.client.chat.completions.create(
        model="alpha", messages=MESSAGES, temperature=temperature, seed=3, n=3, response_format=form, max_tokens=200
    )
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"mood", "score"}
        assert value["mood"] in ("good", "bad")
        assert 0 <= value["score"] <= 9
        assert choice.finish_reason == "stop"


def test_parsed_answers_of_the_official_client(server: Server) -> None:
    """`client.chat.completions.parse` with a pydantic class, as OpenAI's documentation shows it."""

    class Point(pydantic.BaseModel):
        x: int = pydantic.Field(ge=-99, le=99)
        is_open: bool

    answer = server.client.chat.completions.parse(
        model="beta", messages=MESSAGES, response_format=Point, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_json_object_and_streaming(server: Server) -> None:
    """`json_object` gives some object; streamed and whole answers are the same, on both endpoints."""
    ask = {"model": "tiny", "response_format": {"type": "json_object"}, "max_tokens": 60, "temperature": 0}
    body = {**ask, "messages": MESSAGES, "logit_bias": {str(ord("}") - 33): 100}}
    whole = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert isinstance(json.loads(whole["message"]["content"]), dict)
    chunks = server.client.chat.completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole["message"]["content"]
    plain = server.complete(**{**ask, "prompt": "Hello", "logit_bias": body["logit_bias"]}).json()["choices"][0]
    assert isinstance(json.loads(plain["text"]), dict)


def test_constraints_are_the_rows_own(server: Server) -> None:
    """A batch of constrained and free answers: each is what it is alone."""
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}
    asks = [{"model": "alpha", "prompt": "Hi"}, {"model": "alpha", "prompt": "Hi", "response_format": form}] * 3

    def text(ask: dict) -> str:
        return server.complete(**{**ask, "max_tokens": 60}).json()["choices"][0]["text"]

    alone = [text(ask) for ask in asks[:2]]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(text, asks)) == alone * 3


def test_impossible_schema(server: Server) -> None:
    """A schema that nothing fits is 400, at once or as soon as it shows, and never a wrong answer."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "never", "schema": {"type": "integer", "minimum": 5, "maximum": 4}},
    }
    response = server.complete(model="tiny", prompt="Hi", response_format=form)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


def test_forced_call(tool_server: Server) -> None:
    """`tool_choice` makes any model call that tool with arguments of its schema; streamed calls join to the same."""
    ask = {"model": "alpha", "messages": MESSAGES, "tools": [WEATHER, CLOCK], "temperature": 0, "max_tokens": 120}
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = tool_server.client.chat.completions.create(**ask, tool_choice=choice).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert call.type == "function"
    assert call.id
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")
    chunks = list(tool_server.client.chat.completions.create(**ask, tool_choice=choice, stream=True))
    (delta,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (delta.index, delta.function.name) == (0, "weather")
    assert delta.function.arguments == call.function.arguments
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"


def test_parameters_that_refer_to_definitions(tool_server: Server) -> None:
    """Parameters with `$defs`, as pydantic writes nested classes, hold wherever the tool stands; none is undeclared."""
    place = {"enum": ["Rome", "Oslo"]}
    parameters = {"properties": {"to": {"$ref": "#/$defs/P"}}, "required": ["to"], "$defs": {"P": place}}
    trip = {"type": "function", "function": {"name": "trip", "parameters": {"type": "object", **parameters}}}
    ask = {"model": "alpha", "messages": MESSAGES, "tools": [CLOCK, trip], "temperature": 1.0, "max_tokens": 90}
    forced = {"type": "function", "function": {"name": "trip"}}
    called = set()
    for seed, choice in enumerate(["required"] * 6 + [forced]):
        answer = tool_server.client.chat.completions.create(**ask, seed=seed, tool_choice=choice).choices[0]
        (call,) = answer.message.tool_calls
        called.add(call.function.name)
        arguments = json.loads(call.function.arguments)
        assert arguments in ([{"to": "Rome"}, {"to": "Oslo"}] if call.function.name == "trip" else [{}])
    assert "trip" in called


def test_required_call_and_its_result(tool_server: Server) -> None:
    """`required` calls some tool; the conversation goes on with the call and its result, as clients send them."""
    create = tool_server.client.chat.completions.create
    ask = {"model": "alpha", "tools": [WEATHER], "temperature": 0, "max_tokens": 120}
    first = create(**ask, messages=MESSAGES, tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = first.tool_calls
    turns = [*MESSAGES, first, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert create(**{**ask, "max_tokens": 5}, messages=turns).usage.prompt_tokens > 100
    free = create(**{**ask, "max_tokens": 5}, messages=MESSAGES, tool_choice="none")
    assert free.choices[0].message.tool_calls is None


def test_calls_are_found_in_text() -> None:
    """Text around calls is kept, calls of tools that were not offered and broken ones stay text."""
    text = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>\n'
    text += '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    reader = CallReader(HERMES, ["weather", "clock"])
    said = reader.push(text) + reader.flush()
    assert said == "Let me see.\n"
    assert [(call.index, call.name, json.loads(call.arguments)) for call in reader.calls] == [
        (0, "weather", {"place": "Rome"}),
        (1, "clock", {}),
    ]
    for other in (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "<tool_call>{oops</tool_call>",
        "a <tool_c",
    ):
        reader = CallReader(HERMES, ["weather"])
        assert reader.push(other) + reader.flush() == other
        assert not reader.calls
    reader = CallReader(LLAMA, ["weather"])
    assert reader.push('{"name": "weather", "parameters": {"place": "Oslo"}}') + reader.flush() == ""
    assert json.loads(reader.calls[0].arguments) == {"place": "Oslo"}
    reader = CallReader(LLAMA, ["weather"])
    assert reader.push("It is ") + reader.push('{"fine"}') + reader.flush() == 'It is {"fine"}'


PARTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"x": 1}}', "<", "a", "\n", "{", " "]
)


@given(st.lists(PARTS, max_size=8), st.lists(st.integers(1, 5), max_size=40), st.sampled_from([HERMES, LLAMA]))
def test_calls_do_not_depend_on_how_text_is_cut(parts: list[str], sizes: list[int], tool_format) -> None:
    """However tokens cut the text, the same is said and called."""
    text = "".join(parts)
    whole = CallReader(tool_format, ["f"])
    said = whole.push(text) + whole.flush()
    pieces = CallReader(tool_format, ["f"])
    joined = ""
    start = 0
    for size in [*sizes, len(text) + 1]:
        joined += pieces.push(text[start : start + size])
        start += size
    joined += pieces.flush()
    assert [(call.name, call.arguments) for call in pieces.calls] == [
        (call.name, call.arguments) for call in whole.calls
    ]
    assert joined == said
    assert whole.calls or said == text


def test_formats_of_templates() -> None:
    """A template's way to call is known by what it says; where it is not, tools are told in the system's turn."""
    assert format_of(TOOL_TEMPLATE) is HERMES
    assert format_of('{{ tools }} ipython {"parameters"}') is LLAMA
    assert format_of("{{ tools }} [TOOL_CALLS]") is PROMPTED
    assert format_of("{{ messages }}") is PROMPTED


def test_logprobs_of_an_answer_without_tokens(server: Server) -> None:
    """When the answer ends at once, a chat's are an empty list, not null, and a completion's are the ending token's."""
    end = server.service.base.tokenizer.eos_token_id
    ask = {"model": "alpha", "max_tokens": 5, "temperature": 0, "logit_bias": {str(end): 100}}
    chat = server.client.chat.completions.create(**ask, messages=MESSAGES, logprobs=True, top_logprobs=2).choices[0]
    assert (chat.message.content, chat.finish_reason) == ("", "stop")
    assert chat.logprobs.content == []
    completion = server.client.completions.create(**ask, prompt="Hi", logprobs=2).choices[0]
    assert completion.text == ""
    assert completion.logprobs.tokens == [server.service.base.tokenizer.eos_token]


def test_penalties_change_the_answer(server: Server) -> None:
    """A penalty against repetition leads to more different tokens; neutral values change nothing."""
    ask = {"model": "gamma", "prompt": "aaaa", "max_tokens": 60, "ignore_eos": True, "logprobs": 0}

    def tokens(**settings) -> list[str]:
        return server.complete(**ask, **settings).json()["choices"][0]["logprobs"]["tokens"]

    plain = tokens()
    assert tokens(presence_penalty=0, frequency_penalty=0, repetition_penalty=1, min_p=0, top_k=-1) == plain
    assert len(set(tokens(frequency_penalty=2))) > len(set(plain))
    assert len(set(tokens(repetition_penalty=2.0))) > len(set(plain))


def test_min_tokens(server: Server) -> None:
    """The answer does not end by itself before min_tokens."""
    end = server.service.base.tokenizer.eos_token_id
    ask = {"model": "alpha", "prompt": "Hi", "max_tokens": 20, "logit_bias": {str(end): 100}}
    assert server.complete(**ask).json()["usage"]["completion_tokens"] == 1
    assert server.complete(**ask, min_tokens=7).json()["usage"]["completion_tokens"] == 8


def test_echo(server: Server) -> None:
    """`echo` gives the prompt back before what continues it, texts and tokens, for every choice."""
    plain = server.complete(model="alpha", prompt="Hello").json()["choices"][0]["text"]
    tokens = server.service.base.tokenizer.encode("Hello")
    for prompt in ("Hello", tokens):
        choices = server.complete(model="alpha", prompt=prompt, echo=True, n=2).json()["choices"]
        assert [choice["text"] for choice in choices] == ["Hello" + plain] * 2


def test_messages_that_come_back(server: Server) -> None:
    """An answer's message can be sent back as the client holds it, nulls included."""
    first = server.client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=4)
    turns = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "More"}]
    assert server.client.chat.completions.create(model="alpha", messages=turns, max_tokens=4).choices


def test_headers_name_the_weights(server: Server) -> None:
    """Headers say which version and content answered, whole or streamed; the base has no adapter."""
    digest = server.registry.resolve("alpha").content_digest
    raw = server.client.chat.completions.with_raw_response.create(model="alpha@prod", messages=MESSAGES, max_tokens=2)
    assert (raw.headers["X-Qhub-Adapter"], raw.headers["X-Qhub-Digest"]) == ("alpha@1", digest)
    body = {"model": "tiny:alpha", "messages": MESSAGES, "max_tokens": 2, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["X-Qhub-Digest"] == digest
    base = server.complete(model="tiny", prompt="Hi")
    assert base.headers["X-Qhub-Base"] == "tiny"
    assert "X-Qhub-Digest" not in base.headers


def test_curl_with_a_schema(server: Server) -> None:
    """A JSON schema works from the command line as OpenAI's documentation shows it."""
    form = {"type": "json_schema", "json_schema": {"name": "mood", "strict": True, "schema": SCHEMA}}
    body = json.dumps({"model": "beta", "messages": MESSAGES, "max_completion_tokens": 100, "response_format": form})
    command = ["curl", "-s", "--noproxy", "*", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer none", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout)
    assert json.loads(answer["choices"][0]["message"]["content"])["mood"] in ("good", "bad")


def test_curl_as_the_readme_shows(server: Server) -> None:
    """The README's own curl command is answered, and with a stream asked for each line is an event, the last [DONE]."""
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    command = readme[readme.index("curl -s localhost:8000") :].partition("\n$ ")[0].partition("\n```")[0]
    command = command.replace("localhost:8000", f"--noproxy '*' {server.url}").replace("sentiment@1", "alpha@1")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=PATIENCE, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["model"] == "alpha@1"
    streaming = command.replace("curl -s", "curl -sN").replace('{"model"', '{"stream": true, "max_tokens": 5, "model"')
    done = subprocess.run(streaming, shell=True, capture_output=True, text=True, timeout=PATIENCE, check=True)
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"]
