"""A conversation in blocks is trained as /v1/messages serves it."""

from typing import Any

import pytest

from adapterhub_local.data.chat import check_chat
from adapterhub_local.errors import BadData
from serve.requests.anthropic import CountRequest

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def block(kind: str, **parts: Any) -> dict[str, Any]:
    return {"type": kind, **parts}


CALLS = [
    block("thinking", thinking="hm", signature="s"),
    block("text", text="two at once"),
    block("tool_use", id="1", name="f", input={"a": 1}),
    block("tool_use", id="2", name="f", input={}),
]
RESULTS = [
    block("text", text="and then?"),
    block("tool_result", tool_use_id="1", content=[block("text", text="one"), block("text", text="more")]),
    block("tool_result", tool_use_id="2", content="two", is_error=True),
]
TALKS = {
    "calls and results": [("user", "q"), ("assistant", CALLS), ("user", RESULTS), ("assistant", "a")],
    "results alone": [("user", "q"), ("assistant", CALLS[2:3]), ("user", RESULTS[1:2]), ("assistant", "a")],
    "text alone": [("user", [block("text", text="q")]), ("assistant", [block("text", text="a")])],
    "a call at the end": [("user", "q"), ("assistant", CALLS)],
}


@pytest.mark.parametrize("name", TALKS)
def test_trained_as_served(name: str) -> None:
    """The messages of a row are those that the server makes of the same request."""
    messages = [{"role": role, "content": content} for role, content in TALKS[name]]
    chat = check_chat(messages, "here", tools=[TOOL])
    request = CountRequest.model_validate({"model": "m", "messages": messages, "tools": [TOOL]}).chat()
    served = [turn.model_dump(exclude_none=True, exclude={"prefix"}) for turn in request.messages]
    again = check_chat(served, "here", tools=[tool.model_dump(exclude_none=True) for tool in request.tools or ()])
    assert chat.messages == again.messages
    assert [tool["function"]["parameters"] for tool in chat.tools] == [TOOL["input_schema"]]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": CALLS, "tool_calls": [{"function": {"name": "g"}}]}, "has tool_calls, and a call in its content"),
        ({"content": CALLS, "reasoning_content": "no"}, "has reasoning_content, and a thought in its content"),
        ({"content": [block("tool_use", id="1", input={})]}, "a call in a content (tool_use) has no name"),
        ({"content": [block("thinking", thinking=None)]}, "a thought in a content has no text"),
        ({"role": "user", "content": CALLS}, "only the assistant calls tools"),
        ({"content": [*CALLS, block("text", text="and more")]}, "has text behind a call"),
        ({"content": [block("tool_use", id="1", name="f")]}, "the call of f in a content has no table of arguments"),
        ({"content": [block("tool_use", id="1", name="f", input="a")]}, "has no table of arguments as its input"),
        (
            {"role": "user", "content": [block("tool_result", tool_use_id="9", content="r")]},
            "no call before it has that",
        ),
        (
            {"role": "tool", "content": [block("tool-result", toolCallId="0", toolName="g")]},
            "the result of the call '0' in a content has no output",
        ),
    ],
)
def test_what_would_be_lost_is_refused(message: dict[str, Any], reason: str) -> None:
    """Calls or thoughts in two places, and blocks without what they are for."""
    called = {"role": "assistant", "content": [block("tool-call", toolCallId="0", toolName="g", input={})]}
    with pytest.raises(BadData) as caught:
        check_chat([{"role": "user", "content": "q"}, called, {"role": "assistant", **message}], "here")
    assert reason in str(caught.value)
