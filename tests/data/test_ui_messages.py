"""Messages that the Vercel AI SDK keeps for a page are trained as what its convertToModelMessages sends to a model."""

from typing import Any

import pytest

from adapterhub_local.data.chat import check_chat
from adapterhub_local.errors import BadData


def part(kind: str, **given: Any) -> dict[str, Any]:
    return {"type": kind, **given}


STEP = part("step-start")
USER = {"role": "user", "parts": [part("text", text="Rain in Oslo?")]}
ASKED = part("tool-weather", toolCallId="1", state="output-available", input={"city": "Oslo"}, output={"rain": True})
FAILED = part("tool-weather", toolCallId="1", state="output-error", input={"city": "Oslo"}, errorText="no network")
DYNAMIC = part("dynamic-tool", toolName="weather", toolCallId="1", state="output-available", input={}, output="wet")
OLD = part(
    "tool-invocation",
    toolInvocation={"state": "result", "toolCallId": "1", "toolName": "weather", "args": {"city": "Oslo"}, "result": 3},
)
OPEN = part("tool-weather", toolCallId="1", state="input-available", input={"city": "Oslo"})
TEXT = part("text", text="Yes.", state="done")
CALL = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}

# parts of the assistant -> role, content, thought and calls of each message
KINDS: dict[str, tuple[list[Any], list[tuple[Any, ...]]]] = {
    "text": ([TEXT], [("assistant", "Yes.", None, None)]),
    "two steps": (
        [STEP, part("reasoning", text="hm"), ASKED, STEP, TEXT],
        [("assistant", "", "hm", "1"), ("tool", '{"rain": true}', None, None), ("assistant", "Yes.", None, None)],
    ),
    "a failed call": (
        [STEP, FAILED, STEP, TEXT],
        [("assistant", "", None, "1"), ("tool", "The call failed: no network", None, None),
         ("assistant", "Yes.", None, None)],
    ),
    "a tool without a type": (
        [DYNAMIC, STEP, TEXT],
        [("assistant", "", None, "1"), ("tool", "wet", None, None), ("assistant", "Yes.", None, None)],
    ),
    "version 4": (
        [STEP, part("reasoning", reasoning="hm"), OLD, STEP, TEXT],
        [("assistant", "", "hm", "1"), ("tool", "3", None, None), ("assistant", "Yes.", None, None)],
    ),
    "a call at the end": ([part("text", text="Look"), OPEN], [("assistant", "Look", None, "1")]),
    "what the page shows": (
        [STEP, part("source-url", url="https://example.org"), part("data-chart", data=[1]), TEXT],
        [("assistant", "Yes.", None, None)],
    ),
    "a list as output": (
        [{**ASKED, "output": [{"type": "text", "text": "as it is"}]}, STEP, TEXT],
        [("assistant", "", None, "1"), ("tool", '[{"type": "text", "text": "as it is"}]', None, None),
         ("assistant", "Yes.", None, None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_steps(name: str) -> None:
    """Each step is a message, the results of its calls behind it."""
    parts, wanted = KINDS[name]
    chat = check_chat([USER, {"id": "m", "role": "assistant", "parts": parts, "weight": 1}], "here")
    found = [
        (each["role"], each["content"], each.get("reasoning_content"),
         next((call["id"] for call in each.get("tool_calls", ())), None))
        for each in chat.messages[1:]
    ]  # fmt: skip
    assert found == wanted
    assert chat.messages[0] == {"role": "user", "content": "Rain in Oslo?"}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["Yes."], 'a part of a message is {"type": "text", "text": ...}'),
        ([STEP], "has no part that a model reads"),
        ([part("file", url="data:,x", mediaType="image/png")], "a content has a part 'file': only text"),
        ([{**ASKED, "state": "input-streaming"}], "the call of weather in a part has the state 'input-streaming'"),
        ([{**ASKED, "toolCallId": None}], "only whole calls are learned"),
        ([part("tool-invocation"), TEXT], "only whole calls are learned"),
        ([{**ASKED, "input": None}, STEP, TEXT], "has no table of arguments"),
        ([part("tool-w", toolCallId="1", state="output-available", input={}), STEP, TEXT], "has no output"),
        ([ASKED, TEXT], "has text behind a call"),
    ],
)
def test_refused(parts: list[Any], reason: str) -> None:
    """A part that cannot be learned is refused by what is amiss."""
    with pytest.raises(BadData, match="here") as caught:
        check_chat([USER, {"role": "assistant", "parts": parts}], "here")
    assert reason in str(caught.value)


def test_calls_without_parts() -> None:
    """Calls that stand beside the text are not left out in silence."""
    with pytest.raises(BadData, match="toolInvocations without its parts"):
        check_chat([USER, {"role": "assistant", "content": "a", "toolInvocations": [OLD]}], "here")
