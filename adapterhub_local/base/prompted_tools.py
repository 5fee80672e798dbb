"""Tools for a base whose chat template has none: described in the system's turn, called and answered in plain text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.base.tool_format import PROMPTED

HEAD = "Functions you can call, with the JSON schemas of their arguments:"
HOW = f'To call one, answer only with:\n{PROMPTED.begin}{{"name": "...", "{PROMPTED.key}": {{...}}}}{PROMPTED.end}'


def describe_tools(turns: Sequence[Mapping[str, Any]], schemas: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation without anything that only templates with tools know."""
    written: list[dict[str, Any]] = []
    is_result = False  # what stands last is the result of a call, which the user hands over
    for turn in turns:
        if turn["role"] == "tool":
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
        elif calls := turn.get("tool_calls"):
            texts = [turn["content"]] if turn["content"] else []
            text = "\n".join([*texts, *(_call(call["function"]) for call in calls)])
        else:
            text = turn["content"]
        role = "user" if turn["role"] == "tool" else turn["role"]
        if written and is_result and role == "user":  # templates want the user and the assistant in turn
            written[-1]["content"] += f"\n{text}"
        else:
            kept = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id")}
            written.append({**kept, "role": role, "content": text})
        is_result = turn["role"] == "tool"
    if not schemas:
        return written
    text = "\n".join([HEAD, *(json.dumps(each["function"], ensure_ascii=False) for each in schemas), HOW])
    if written[0]["role"] != "system":
        return [{"role": "system", "content": text}, *written]
    return [{**written[0], "content": f"{written[0]['content']}\n\n{text}"}, *written[1:]]


def _call(function: Mapping[str, Any]) -> str:
    value = {"name": function["name"], PROMPTED.key: function["arguments"]}
    return f"{PROMPTED.begin}{json.dumps(value, ensure_ascii=False)}{PROMPTED.end}"
