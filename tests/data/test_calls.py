"""Rows with calls of tools: a call the server could never answer is refused, what its schema forbids is reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.data.calls import misfit
from adapterhub_local.data.chat import check_chat
from adapterhub_local.data.dataset import read_parts
from adapterhub_local.errors import BadData

PARAMETERS = {
    "type": "object",
    "properties": {"room": {"type": "string"}, "percent": {"type": "integer"}, "how": {"enum": ["fast", "slow"]}},
    "required": ["room"],
}


def row(name: str, arguments: Any, *, weight: int = 1, parameters: Any = PARAMETERS, offers: bool = True) -> dict:
    function = {"name": name, "arguments": arguments}
    messages = [
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}], "weight": weight},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "It is on."},
    ]
    tool = {"type": "function", "function": {"name": "lamp", "parameters": parameters}}
    return {"messages": messages, **({"tools": [tool]} if offers else {})}


@pytest.mark.parametrize(
    ("arguments", "parameters", "told"),
    [
        ({"room": "hall", "percent": 5, "how": "fast"}, PARAMETERS, None),
        ('{"room": "hall"}', PARAMETERS, None),
        ({"room": "hall", "percent": 5.0}, PARAMETERS, None),  # a whole number to JSON Schema
        ({"percent": 5}, PARAMETERS, "lamp: 'room' is missing"),
        ({"room": 3}, PARAMETERS, "lamp: 'room' is not a string"),
        ({"room": "hall", "percent": "5"}, PARAMETERS, "lamp: 'percent' is not an integer"),
        ({"room": "hall", "percent": True}, PARAMETERS, "lamp: 'percent' is not an integer"),
        ({"room": "hall", "how": "so"}, PARAMETERS, "lamp: 'how' is none of its choices"),
        ({"room": "hall", "colour": "red"}, PARAMETERS, "lamp: there is no argument 'colour'"),
        ({"room": "hall", "colour": "red"}, {**PARAMETERS, "additionalProperties": True}, None),
        ("hall", PARAMETERS, "lamp: the arguments are not a JSON object"),
        ({"anything": 1}, None, None),
        ({"anything": 1}, {"type": "object"}, None),
        ({"room": 3}, {"properties": {"room": {"type": ["string", "integer"]}}}, None),  # not looked into
        ({"room": 3}, {"properties": {"room": {"type": "odd"}}, "required": "room"}, None),
    ],
)
def test_arguments_and_schemas(arguments: Any, parameters: Any, told: str | None) -> None:
    """What a schema plainly does not allow is found; what it only might not is not."""
    given = row("lamp", arguments, parameters=parameters)
    assert misfit(check_chat(given["messages"], "x:1", tools=given["tools"])) == told


def read(folder: Path, *rows: dict) -> Any:
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (part,) = read_parts([folder / "train.jsonl"], "train")
    return part


def test_a_call_of_what_is_not_offered(tmp_path: Path) -> None:
    """It is refused where it would be learned, and with it every other such row is counted."""
    good = row("lamp", {"room": "hall"})
    with pytest.raises(BadData, match=r"jsonl:2: the answer calls 'oven', .* lamp \(2 of 3 examples"):
        read(tmp_path, good, row("oven", {}), row("oven", {}))
    part = read(tmp_path, row("oven", {}, weight=0), row("oven", {}, offers=False))

    assert len(part.chats) == 2


def test_misfits_are_told_once(tmp_path: Path) -> None:
    """They are learned, and a note counts them and names the first."""
    part = read(tmp_path, row("lamp", {"room": "hall"}), row("lamp", {}), row("lamp", {"room": 1}))
    (note,) = part.remarks

    assert "2 of 3 examples" in note
    assert note.endswith("train.jsonl:2: lamp: 'room' is missing")
