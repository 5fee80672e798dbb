"""POST /v1/messages as Anthropic's own client speaks it: texts, events, tools, thoughts, counts and mistakes."""

import json
from collections.abc import Iterator

import anthropic
import httpx2
import pytest
from anthropic.types import Message

from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hello"}
BODY = {"model": "alpha", "max_tokens": 12, "messages": [USER], "temperature": 0}
ASK = {"model": "alpha", "max_tokens": 12, "messages": [USER], "extra_body": {"temperature": 0}}
PLACE = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
WEATHER = {"name": "weather", "input_schema": PLACE}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    """The official client, pointed here."""
    plain = httpx2.Client(trust_env=False)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, http_client=plain) as found:
        yield found


def chat(server: Server, messages: list, **more) -> dict:
    """What a chat says to the same."""
    body = {"model": "alpha", "max_tokens": 12, "temperature": 0, "messages": messages, **more}
    return server.http.post("/v1/chat/completions", json=body).json()


def test_a_text(server: Server, client: anthropic.Anthropic) -> None:
    """A message says what a chat says, why it ended, what it cost and which weights made it, by the client's types."""
    said = chat(server, [{"role": "system", "content": "Be brief"}, USER])
    for system in ("Be brief", [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]):
        message = client.messages.create(**ASK, system=system)
        assert message.content[0].text == said["choices"][0]["message"]["content"]
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 12)
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == said["usage"]["prompt_tokens"]
    assert message.adapter["version"] == 1
    raw = server.http.post("/v1/messages", json=BODY, headers={"x-api-key": "none"}).json()
    Message.model_validate(raw, strict=True)


def test_events(server: Server, client: anthropic.Anthropic) -> None:
    """The events of a stream add up to the whole message, by the client's own accumulator."""
    whole = client.messages.create(**ASK)
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    kinds = [event.type for event in client.messages.create(**ASK, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_where_it_stops(client: anthropic.Anthropic) -> None:
    """A stop sequence is named; an answer longer than there is room for is as long as there is room."""
    text = client.messages.create(**ASK).content[0].text
    stopped = client.messages.create(**ASK, stop_sequences=["", text[3], "never"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[3])
    assert client.messages.create(**{**ASK, "max_tokens": 20_000}).content, (
        "clients have to say a bound, and say a large one"
    )


def test_tools(server: Server, client: anthropic.Anthropic) -> None:
    """A call, whole and streamed, and the conversation with its result: the prompt is that of the same chat."""
    forced = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 100}
    message = client.messages.create(**{**ASK, **forced})
    (call,) = message.content
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "weather")
    assert call.input["place"] in ("Rome", "Oslo")
    with client.messages.stream(**{**ASK, **forced, "tool_choice": {"type": "any"}}) as stream:
        (again,) = stream.get_final_message().content
    assert again.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    turns = [USER, {"role": "assistant", "content": message.content}]
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "So?"}]})
    function = {"name": "weather", "arguments": json.dumps(call.input)}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": call.id, "function": function}]}]
    messages += [{"role": "tool", "content": "sunny"}, {"role": "user", "content": "So?"}]
    expected = server.http.post("/tokenize", json={"messages": messages}).json()["count"]
    assert client.messages.count_tokens(model="alpha", messages=turns).input_tokens == expected
    assert client.messages.create(**{**ASK, "messages": turns, "max_tokens": 2}).content


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"model": "nothing"}, anthropic.NotFoundError, "no adapter"),
        ({"messages": []}, anthropic.BadRequestError, "at least 1"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError, "temperature"),
        ({"extra_body": {"temprature": 1}}, anthropic.BadRequestError, "did you mean temperature?"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, anthropic.BadRequestError, "mcp_servers"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError, "custom"),
        ({"output_config": {"effort": "high"}}, anthropic.BadRequestError, "no thoughts"),
        ({"output_config": {"format": {"type": "xml"}}}, anthropic.BadRequestError, "json_schema"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError,
            "messages.0.content.0",
        ),
    ],
    ids=str,
)
def test_mistakes(client: anthropic.Anthropic, change: dict, kind: type, says: str) -> None:
    """What is wrong or not supported is an error of Anthropic's form, in the request's own names; streamed too."""
    for is_streamed in (False, True):
        with pytest.raises(kind) as caught:
            client.messages.create(**{**ASK, **change}, stream=is_streamed)
        assert caught.value.body["type"] == "error"
        assert says in caught.value.body["error"]["message"]


def test_forms_and_what_says_nothing(client: anthropic.Anthropic) -> None:
    """A JSON schema is followed; parameters and blocks that change nothing are taken."""
    form = {"format": {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}}
    said = client.messages.create(**{**ASK, "max_tokens": 30}, output_config=form)
    assert json.loads(said.content[0].text) in ("yes", "no")
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    turns = [USER, {"role": "assistant", "content": [thought, {"type": "text", "text": "Hi"}]}, USER]
    plain = [USER, {"role": "assistant", "content": "Hi"}, USER]
    counts = [client.messages.count_tokens(model="alpha", messages=each).input_tokens for each in (turns, plain)]
    assert counts[0] == counts[1]
    nothing = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 99},
    }
    assert client.messages.create(**{**ASK, "messages": turns, **nothing}).content
