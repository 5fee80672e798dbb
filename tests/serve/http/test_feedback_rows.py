"""What training reads in rows that were made from a request log is what the server had."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.data.answer_log import new_name
from adapterhub_local.data.chat import is_learned
from adapterhub_local.data.dataset import read_parts
from adapterhub_local.data.from_log import FORMS, Wanted, rows_of_log
from adapterhub_local.data.logged import Asked
from serve.requests.generation import ChatRequest
from tests.serve.logging_server import CHAT, WEATHER, Logging

TURN = {"role": "user", "content": "Hi"}
ARGUMENTS = (
    '{"place": "Rome"}',
    '{"place": null, "when": {"day": null, "hours": [null, 1]}}',
    "{}",
    "[1]",
    "7",
    '{"a": ',
)
SCHEMA = {"type": "object", "properties": {"place": {"enum": ["Rome", None], "default": None, "items": [{"a": None}]}}}
FUNCTIONS = ({"name": "weather"}, {"name": "weather", "description": "", "parameters": {}, "strict": False},
             {"name": "weather", "parameters": SCHEMA})  # fmt: skip


def called(arguments: str) -> list[dict]:
    """A conversation in which a tool was called."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [TURN, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}]  # fmt: skip


CONVERSATIONS = {
    "developer": {"messages": [{"role": "developer", "content": "Be brief"}, TURN]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": a} for a in ("1", "\u2028", " 2")]}]},
    "other parts": {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
    "named": {"messages": [{"role": "user", "name": "eve", "content": "Hi"}]},
    "turns": {"messages": [TURN, {"role": "assistant", "content": "Yes?"}, TURN]},
    "refused": {"messages": [TURN, {"role": "assistant", "refusal": "No", "content": None}, TURN]},
    "thoughts": {"messages": [TURN, {"role": "assistant", "content": "Yes", "reasoning": "Hm"}, TURN]},
    "said in JSON": {"messages": [{"role": "user", "content": '[{"role": "system", "content": null}]'}]},
    "control tokens": {"messages": [{"role": "user", "content": "<|im_end|>\n\x00\x85\r\n>>"}]},
    "goes on": {"messages": [TURN, {"role": "assistant", "content": "It is "}], "continue_final_message": True},
    "prefix": {"messages": [TURN, {"role": "assistant", "content": "It is ", "prefix": True}]},
    **{f"called with {arguments}": {"messages": called(arguments)} for arguments in ARGUMENTS},
    **{f"offered {n}": {"messages": [TURN], "tools": [{"type": "function", "function": function}]}
       for n, function in enumerate(FUNCTIONS)},
    "offered in vain": {"messages": [TURN], "tools": [WEATHER], "tool_choice": "none"},
    "must call": {"messages": [TURN], "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200},
}  # fmt: skip
NOT_TRAINED = ("called with [1]",)  # a list is not what arguments are, and training would read it as one


@pytest.fixture(scope="module")
def logging(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    """One that logs what asks for it."""
    running = Logging(built_base, tmp_path_factory.mktemp("rows"))
    yield running
    running.server.stop()


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("form", ["messages", "preference", "judged"])
def test_training_reads_what_the_server_saw(name: str, form: str, logging: Logging, tmp_path: Path) -> None:
    """Every kind of conversation comes back as the messages and tools that were written into the prompt, by each form,
    or is left out with its reason."""
    asked = CHAT | {"store": True, "stop": ["x"]} | CONVERSATIONS[name]
    answer = {"structured_outputs": {"choice": ["sunny"]}, "max_tokens": 20} if name != "must call" else {}
    if "tools" in asked and name not in ("must call", "offered in vain"):
        answer = {"max_tokens": 240, "tool_choice": "required"}
    response = logging.post("/v1/chat/completions", asked | answer)
    assert response.status_code == 200, response.text
    logging.rate(response.json()["id"], rating=1, correction="Better" if form == "preference" else None)
    (tmp_path / "log").mkdir()
    lines = [json.dumps(record, separators=(",", ":")) for record in logging.records()
             if record["id"] == response.json()["id"]]  # fmt: skip
    (tmp_path / "log" / new_name()).write_text("\n".join(lines))

    rows = rows_of_log(tmp_path / "log", Asked(), Wanted(form))
    body = ChatRequest.model_validate(asked | answer)
    if name in NOT_TRAINED:
        assert not rows.lines
        assert "training would read something else in it than the server had" in rows.left_out
        return
    assert len(rows.lines) == 1, rows.left_out
    (tmp_path / "rows.jsonl").write_bytes(b"".join(rows.lines))
    ((chat,),) = (part.chats for part in read_parts([tmp_path / "rows.jsonl"], "train", shape=FORMS[form]))
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in chat.messages]
    assert messages[:-1] == [message.for_template() for message in body.messages][: -1 if body.continues else None]
    assert list(chat.tools) == [tool.model_dump(exclude_none=True) for tool in body.callable_tools]
    given = response.json()["choices"][0]["message"]
    answered = chat.rejected if form == "preference" else messages[-1]
    assert answered["content"] == ("It is " if body.continues else "") + (given["content"] or "")
    assert bool(answered.get("tool_calls")) == bool(given.get("tool_calls"))
    assert [is_learned(message) for message in chat.messages].count(True) == 1
