"""Contents of blocks that hold calls, results and thoughts beside text, as messages that have places for them.

Anthropic's (`tool_use`, `tool_result`, `thinking`) and the Vercel AI SDK's (`tool-call`, `tool-result`, `reasoning`).
What `/v1/messages` makes of them is what is trained: results stand before what the user says with them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from adapterhub_local.data.json_text import parsed
from adapterhub_local.data.ui_messages import spread
from adapterhub_local.errors import BadData

CALL, RESULT = ("tool_use", "tool-call"), ("tool_result", "tool-result")
THOUGHT = {"thinking": "thinking", "reasoning": "text"}  # block -> where its text is
HIDDEN = "redacted_thinking"
FAILED = "The call failed: "  # before the result of a call that failed


def unfold(messages: Sequence[Any], where: str) -> list[Any]:
    """The messages, those with such blocks as one or several that have none. Raises BadData for a block amiss."""
    called: set[str] = set()
    found = []
    for message in messages:
        for each in (each for one in spread(parsed(message), where) for each in _unfold(one, where, called)):
            calls = each.get("tool_calls") if isinstance(each, Mapping) else None
            ids = [call.get("id") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
            called.update(id_ for id_ in ids if isinstance(id_, str))
            found.append(each)
    return found


def _unfold(message: Any, where: str, called: Set[str]) -> Iterator[Any]:
    content = parsed(message.get("content")) if isinstance(message, Mapping) else None
    kinds = [_kind(block, where) for block in content] if isinstance(content, list) else []
    if not isinstance(content, list) or not any(kinds):
        yield message
        return
    if "result" in kinds and {"call", "thought"} & set(kinds):
        raise BadData(f"{where}: a content holds the result of a call beside calls or thoughts: write it into the next")
    if "call" in kinds and None in kinds[kinds.index("call") :]:
        raise BadData(f"{where}: a content has text behind a call, which would be written before it: split the message")
    by_kind: dict[str | None, list[Any]] = {}
    for kind, block in zip(kinds, content, strict=True):
        by_kind.setdefault(kind, []).append(block)
    for block in by_kind.get("result", ()):
        yield _result(block, where, called)
    rest = {key: value for key, value in message.items() if key != "content"}
    for kind, column in (("call", "tool_calls"), ("thought", "reasoning_content")):
        if kind in kinds and rest.get(column):
            raise BadData(f"{where}: a message has {column}, and a {kind} in its content too: write all in one place")
    if calls := [_call(block, where) for block in by_kind.get("call", ())]:
        rest["tool_calls"] = calls
    if thoughts := [block.get(THOUGHT[block["type"]]) for block in by_kind.get("thought", ())]:
        if not all(isinstance(thought, str) for thought in thoughts):
            raise BadData(f"{where}: a thought in a content has no text")
        rest["reasoning_content"] = "".join(thoughts)
    texts = by_kind.get(None, [])
    if texts or "result" not in kinds:
        yield {**rest, "content": texts or ""}


def _kind(block: Any, where: str) -> str | None:
    """call, result or thought; None for text, and for what is refused elsewhere."""
    type_ = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(type_, str):
        return None
    if type_ == HIDDEN:
        raise BadData(f"{where}: a thought is encrypted ({HIDDEN}), and only its service can read it: leave it out")
    kinds = (("call", CALL), ("result", RESULT), ("thought", THOUGHT))
    return next((kind for kind, types in kinds if type_ in types), None)


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    name, key = block.get("name", block.get("toolName")), block.get("id", block.get("toolCallId"))
    if not isinstance(name, str) or not name:
        raise BadData(f"{where}: a call in a content ({block['type']}) has no name")
    given: Any = next((parsed(block[each]) for each in ("input", "args") if block.get(each) is not None), None)
    if not isinstance(given, Mapping):
        raise BadData(f"{where}: the call of {name[:40]} in a content has no table of arguments as its input")
    return {**({"id": key} if isinstance(key, str) else {}), "function": {"name": name, "arguments": given}}


def _result(block: Mapping[str, Any], where: str, called: Set[str]) -> dict[str, Any]:
    """A message of the tool. What it gave may be text, blocks of text, or JSON."""
    places = ("content", "output", "result")
    given: Any = next((block[each] for each in places if block.get(each) is not None), "")
    is_failed = bool(block.get("is_error", block.get("isError")))
    if isinstance(given, Mapping) and "value" in given and isinstance(given.get("type"), str):  # Vercel's
        is_failed = is_failed or given["type"].startswith("error")
        is_json, given = given["type"].endswith("json"), given["value"]
        given = json.dumps(given, ensure_ascii=False) if is_json else given
    if isinstance(given, list) and given and all(isinstance(each, Mapping) and "type" in each for each in given):
        texts = [each.get("text") if each["type"] == "text" else None for each in given]
        if others := [each["type"] for each, text in zip(given, texts, strict=True) if not isinstance(text, str)]:
            raise BadData(f"{where}: the result of a call has a part '{others[0]!s:.40}': only text is supported")
        given = "".join(map(str, texts))
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    name, key = block.get("toolName"), block.get("tool_use_id", block.get("toolCallId"))
    if isinstance(key, str) and key not in called:
        raise BadData(f"{where}: a content has the result of the call '{key[:40]}', and no call before it has that id")
    if not {*places} & block.keys() and block["type"] == "tool-result":
        raise BadData(f"{where}: the result of the call '{key!s:.40}' in a content has no output")
    return {
        "role": "tool",
        **({"tool_call_id": key} if isinstance(key, str) else {}),
        **({"name": name} if isinstance(name, str) else {}),
        "content": f"{FAILED}{text}" if is_failed else text,
    }
