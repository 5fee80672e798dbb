"""Tools on any base: told in the system's turn where the template has none, called by grammar, never leaking markup."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.base.prompted_tools import HEAD, describe_tools
from adapterhub_local.base.tool_calls import CallReader
from adapterhub_local.base.tool_format import HERMES, PROMPTED
from tests.serve.conftest import Server

USER = {"role": "user", "content": "Hello"}
PLACE = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
TURNS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": "mild"},
    {"role": "user", "content": "So?"},
]
# in the manner of Gemma, which has no system's turn and wants the others in turn
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn!') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"


def prompt(server: Server, messages: list, tools: list) -> str:
    """The text of a prompt."""
    tokens = server.http.post("/tokenize", json={"messages": messages, "tools": tools}).json()["tokens"]
    return server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


@pytest.mark.parametrize("template", [None, STRICT, SILENT], ids=["plain", "strict", "silent"])
def test_any_template_tells_tools(server: Server, monkeypatch: pytest.MonkeyPatch, template: str | None) -> None:
    """The model reads of each tool, its calls and their results, whatever the template does with a system turn."""
    if template:
        monkeypatch.setattr(server.service.base.tokenizer, "chat_template", template)
        monkeypatch.setattr(server.service.reader.prompts, "_writers", type(server.service.reader.prompts._writers)())
    text = prompt(server, TURNS, [WEATHER])
    assert text.count(HEAD) == 1
    for part in ('"name": "weather"', '"enum": ["Rome", "Oslo"]', "sunny", "mild", "So?"):
        assert part in text
    assert text.count('{"name": "weather", "arguments": {"place": "Rome"}}') == 2
    assert HEAD not in prompt(server, TURNS, [])
    assert HEAD not in prompt(server, [USER], [])


def test_turns_stay_in_turn() -> None:
    """Results and what the user adds are one turn of the user's; a system's turn that is there is kept."""
    turns = [{"role": "system", "content": "Be brief"}, *TURNS]
    turns[2] = {**turns[2], "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    told = describe_tools(turns, [WEATHER])
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief\n\n")
    assert told[3]["content"].splitlines()[-1] == "So?"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_forced_calls_on_a_base_without_tools(server: Server, choice) -> None:
    """A call that is asked for comes with arguments of its schema, once, and ends the answer; streamed the same."""
    body = {"model": "alpha", "messages": [USER], "tools": [WEATHER], "tool_choice": choice, "max_tokens": 90}
    for temperature in (0, 1.5):
        answer = server.client.chat.completions.create(**body, temperature=temperature).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls"
        assert json.loads(call.function.arguments)["place"] in ("Rome", "Oslo")
    many = server.http.post("/v1/chat/completions", json={**body, "parallel_tool_calls": True, "max_tokens": -1})
    assert 1 <= len(many.json()["choices"][0]["message"]["tool_calls"]) <= 8
    chunks = server.client.chat.completions.create(**body, temperature=0, stream=True)
    assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chunks) == 1


@pytest.mark.parametrize("length", range(1, 50, 7))
def test_a_cut_call_leaks_nothing(server: Server, length: int) -> None:
    """Wherever an answer that had to call is cut, no markup is told as its text, whole or streamed."""
    body = {"model": "alpha", "messages": [USER], "tools": [WEATHER], "tool_choice": "required", "max_tokens": length}
    answer = server.client.chat.completions.create(**body, temperature=0).choices[0]
    assert (answer.message.content or "", answer.finish_reason) == ("", "length")
    chunks = list(server.client.chat.completions.create(**body, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


@given(st.integers(0, 70), st.sampled_from([HERMES, PROMPTED]))
def test_no_cut_leaks(size: int, form) -> None:
    """A call that is cut anywhere gives nothing of its markup; what was said before it is kept."""
    text = 'Let me see.<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    reader = CallReader(form, ["f"])
    said = reader.push(text[: 11 + size]) + reader.flush(is_cut=True)
    assert said.removeprefix("Let me see.") in ("", *("<tool_call>"[:n] for n in range(1, 6)))
    assert len(reader.calls) == (11 + size >= len(text))
