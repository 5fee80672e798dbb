"""POST /v1/responses as the official client speaks it: texts, events, forms, calls, and what is refused."""

import json

import openai
import pytest
from pydantic import BaseModel

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.options import HttpOptions
from tests.serve.conftest import Server

MESSAGES = [{"role": "user", "content": "Hello"}]
ASK = {"model": "alpha", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
PLACE = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
WEATHER = {"type": "function", "name": "weather", "description": "Says it", "parameters": PLACE, "strict": False}


class Mood(BaseModel):
    mood: bool


def test_a_text(server: Server) -> None:
    """A response says what a chat says, why it ended, what it cost, and which weights made it."""
    response = server.client.responses.create(**ASK)
    chat = server.client.chat.completions.create(model="alpha", messages=MESSAGES, max_tokens=12, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert response.adapter == {
        "name": "alpha",
        "version": 1,
        "digest": server.registry.resolve("alpha").content_digest,
    }
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert usage.total_tokens == usage.input_tokens + 12
    end = server.service.base.tokenizer.eos_token_id
    done = server.client.responses.create(**ASK, extra_body={"logit_bias": {str(end): 100}})
    assert (done.status, done.output_text, done.output[0].status) == ("completed", "", "completed")


def test_conversations(server: Server) -> None:
    """Instructions, messages in parts and answers that come back are the prompt that a chat makes of them."""
    first = server.client.responses.create(**ASK)
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]}]
    turns += [item.model_dump() for item in first.output]
    turns += [{"role": "user", "content": "More", "type": "message"}]
    said = server.client.responses.create(**{**ASK, "input": turns}, instructions="Be brief")
    messages = [{"role": "system", "content": "Be brief"}, *MESSAGES]
    messages += [{"role": "assistant", "content": first.output_text}, {"role": "user", "content": "More"}]
    chat = server.client.chat.completions.create(model="alpha", messages=messages, max_tokens=12, temperature=0)
    assert said.output_text == chat.choices[0].message.content
    assert said.usage.input_tokens == chat.usage.prompt_tokens


def test_events(server: Server) -> None:
    """The events of a stream are those of the official client, numbered, and add up to the whole answer."""
    whole = server.client.responses.create(**ASK)
    events = list(server.client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-4].text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 12
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    with server.client.responses.stream(**ASK, extra_body=choice) as stream:
        assert stream.get_final_response().output_text in ("yes", "no")


def test_forms_and_logprobs(server: Server) -> None:
    """`text_format` is parsed as the client's documentation shows, streamed or not; log-probabilities on request."""
    parsed = server.client.responses.parse(
        model="beta", input="Hello", text_format=Mood, max_output_tokens=60, temperature=0
    )
    assert isinstance(parsed.output_parsed, Mood)
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert server.client.responses.create(model="beta", input="Hi", extra_body=choice).output_text in ("yes", "no")
    said = server.client.responses.create(**ASK, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = said.output[0].content[0].logprobs
    assert len(logprobs) == 12
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in logprobs)


def test_calls(tool_server: Server) -> None:
    """A call is an item, streamed or whole; with its result the conversation goes on."""
    create = tool_server.client.responses.create
    ask = {"model": "alpha", "tools": [WEATHER], "temperature": 0, "max_output_tokens": 120}
    first = create(**ask, input="Hello", tool_choice={"type": "function", "name": "weather"})
    (call,) = first.output
    assert (first.status, call.type, call.name) == ("completed", "function_call", "weather")
    assert json.loads(call.arguments)["place"] in ("Rome", "Oslo")
    events = list(create(**ask, input="Hello", tool_choice="required", parallel_tool_calls=False, stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments]
    assert events[-1].response.output[0].name == "weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns = [{"role": "user", "content": "Hello"}, *[item.model_dump() for item in first.output], result]
    went_on = create(**{**ask, "max_output_tokens": 4}, input=turns, tool_choice="none")
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
    ]
    function = {"name": "weather", "arguments": call.arguments}
    messages.insert(
        1, {"role": "assistant", "content": None, "tool_calls": [{"id": call.call_id, "function": function}]}
    )
    chat = tool_server.http.post("/tokenize", json={"messages": messages})
    assert went_on.usage.input_tokens == chat.json()["count"]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no answer 'resp_1' is stored"),
        ({"conversation": "conv_1"}, "conversation", "conversations are not stored"),
        ({"background": True}, "background", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_text"),
        ({"text": {"format": {"type": "xml"}}}, "text", "json_schema"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_output_tokens": 10**6}, "input", "the context is"),
        ({"messages": MESSAGES}, "messages", "it is called input here"),
        ({"max_tokens": 5}, "max_tokens", "it is called max_output_tokens here"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"n": 2}, "n", "not supported"),
        ({"model": "nothing"}, "model", "no adapter"),
    ],
    ids=str,
)
def test_what_is_refused(server: Server, change: dict, param: str, says: str) -> None:
    """What is wrong, or is not stored, is refused in this endpoint's own names."""
    response = server.http.post("/v1/responses", json={**ASK, **change})
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param, error
    assert says in error["message"], error


def test_what_says_nothing_is_taken(server: Server) -> None:
    """Parameters at values that ask for nothing are accepted."""
    neutral = {"metadata": {"a": "b"}, "truncation": "disabled", "background": False, "user": "u"}
    neutral |= {"reasoning": {"effort": None, "summary": None}, "previous_response_id": None, "service_tier": "auto"}
    response = server.client.responses.create(**{**ASK, **neutral})
    assert response.metadata == {"a": "b"}


def test_an_error_after_the_beginning_is_an_event(
    built_base, served_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that cannot go on ends with an error event, which the official client raises."""
    running = Server(load_base(read_record(built_base), device="cpu"), served_registry, http=HttpOptions(timeout=0.5))
    running.slow_down(monkeypatch)
    try:
        ask = {"model": "tiny", "input": "Hello", "extra_body": {"ignore_eos": True}}
        stream = running.client.responses.create(**ask, stream=True)
        assert next(iter(stream)).type == "response.created"
        with pytest.raises(openai.APIError, match="was not ready in the time"):
            list(stream)
    finally:
        running.stop()
