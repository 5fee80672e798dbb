"""Gemini's rows, `contents` of `parts`, as rows of messages: of its fine-tuning, its preferences and its batches."""

import json
from collections.abc import Mapping
from typing import Any

from adapterhub_local.data.json_text import parsed
from adapterhub_local.errors import BadData

SYSTEM = ("systemInstruction", "system_instruction")
DECLARED = ("functionDeclarations", "function_declarations")
CALL, RESULT = ("functionCall", "function_call"), ("functionResponse", "function_response")
_BESIDE = {"thoughtSignature", "thought_signature"}  # of the service's own, not part of a message
_CUT = ("MAX_TOKENS", "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MALFORMED_FUNCTION_CALL")


def is_gemini(row: Any) -> bool:
    """Whether a row, or a request in it, has `contents` of `parts`."""
    if not isinstance(row, Mapping) or "messages" in row:
        return False
    contents = parsed(row.get("contents"))
    return isinstance(contents, list) and bool(contents) and all(_is_turn(turn) for turn in contents)


def gemini_row(row: Mapping[str, Any], where: str, answer: Any = None) -> dict[str, Any]:
    """The row of messages that a row of `contents` says, `answer` (a content) behind them. Raises BadData."""
    turns = [*parsed(row["contents"]), *([answer] if answer is not None else [])]
    system = next((row[name] for name in SYSTEM if row.get(name)), None)
    if isinstance(system, str):
        system = {"parts": [{"text": system}]}
    messages = [{**message, "role": "system"} for message in (_read(system, where) if system else [])]
    messages += [message for turn in turns for message in _read(turn, where)]
    rest = {key: value for key, value in row.items() if key not in ("contents", "tools", "completions", *SYSTEM)}
    tools = _tools(row.get("tools"), where)
    made = {**rest, **({"tools": tools} if tools else {})}
    if "completions" not in row:
        return {**made, "messages": messages}
    return {**made, "prompt": messages, **_judged(row["completions"], where)}


def candidate_of(body: Mapping[str, Any], where: str) -> Any:
    """The content of the one candidate of a response. Raises BadData for none, several or a cut one."""
    candidates = body.get("candidates")
    if not isinstance(candidates, list) or not candidates or not _is_turn(_content(candidates[0])):
        raise BadData(f"{where}: the response holds no candidate with a content: leave the row out")
    if len(candidates) > 1:
        raise BadData(f"{where}: the request got {len(candidates)} candidates: give each a row of its own, or keep one")
    reason = candidates[0].get("finishReason", candidates[0].get("finish_reason"))
    if reason in _CUT:
        raise BadData(
            f"{where}: the answer is not whole (it ended by '{reason}'), and would be learned with an end: leave it out"
        )
    return {"role": "model", **_content(candidates[0])}


def _content(candidate: Any) -> Any:
    return candidate.get("content") if isinstance(candidate, Mapping) else None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("parts"), list)


def _judged(completions: Any, where: str) -> dict[str, Any]:
    """The two answers of a preference, by their scores."""
    answers = parsed(completions)
    scores = (
        [one.get("score") if isinstance(one, Mapping) else None for one in answers] if isinstance(answers, list) else []
    )
    if len(scores) != 2 or not all(isinstance(score, int | float) for score in scores) or scores[0] == scores[1]:
        raise BadData(f"{where}: completions must be two answers with different scores")
    bad, good = sorted(answers, key=lambda one: float(one["score"]))
    sides = [_read(one.get("completion"), where) for one in (good, bad)]
    return dict(zip(("chosen", "rejected"), sides, strict=True))


def _read(turn: Any, where: str) -> list[dict[str, Any]]:
    """The messages of one content: results of functions come first, each a message of its own."""
    if not _is_turn(turn):
        raise BadData(f'{where}: a content is {{"role": "user", "parts": [{{"text": ...}}]}}')
    texts: list[str] = []
    thoughts: list[str] = []
    calls, results = [], []
    for part in turn["parts"]:
        fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
        call, result = (next((fields[name] for name in names if name in fields), None) for names in (CALL, RESULT))
        if unread := sorted(fields.keys() - {"text", "thought", *CALL, *RESULT, *_BESIDE}) or (
            not fields and ["nothing"]
        ):
            raise BadData(f"{where}: a part of contents holds {unread[0]}: only text, calls and results are supported")
        if not isinstance(fields.get("text", ""), str) or any(
            one is not None and not isinstance(one, Mapping) for one in (call, result)
        ):
            raise BadData(f"{where}: a part of contents must be text, or a functionCall or functionResponse as a table")
        if "text" in fields:
            (thoughts if fields.get("thought") else texts).append(fields["text"])
        if call is not None:
            extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
            calls.append({**extra, "function": {"name": call.get("name"), "arguments": call.get("args") or {}}})
        if result is not None:
            extra = {"tool_call_id": result["id"]} if isinstance(result.get("id"), str) else {}
            content = json.dumps(result.get("response"), ensure_ascii=False)
            results.append({"role": "tool", "name": result.get("name"), **extra, "content": content})
    if results and not texts:
        return results
    message: dict[str, Any] = {"role": turn.get("role") or "user", "content": "".join(texts)}
    message |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return [*results, {**message, **({"tool_calls": calls} if calls else {})}]


def _tools(tools: Any, where: str) -> list[Any]:
    """Declared functions as schemas of tools. Raises BadData for tools that only the service runs."""
    given = parsed(tools) or []
    schemas = []
    for tool in given if isinstance(given, list) else [given]:
        found = dict(tool) if isinstance(tool, Mapping) else {}
        declared: Any = next((found.pop(name) for name in DECLARED if name in found), None)
        if others := [name for name, value in found.items() if value is not None]:
            raise BadData(f"{where}: tools has {others[0][:40]}, which only Gemini runs: leave it out")
        if not isinstance(declared, list):
            raise BadData(f'{where}: tools must be [{{"functionDeclarations": [...]}}]')
        for function in declared:
            if not isinstance(function, Mapping):
                raise BadData(f'{where}: a function is {{"name": ..., "description": ..., "parameters": ...}}')
            names = ("parameters", "parametersJsonSchema", "parameters_json_schema")
            schema = next((function[name] for name in names if function.get(name)), None)
            kept = {key: value for key, value in function.items() if key in ("name", "description")}
            schemas.append({**kept, **({"parameters": _lowered(schema)} if schema else {})})
    return schemas


def _lowered(schema: Any) -> Any:
    """A schema with its types as JSON Schema spells them: Gemini writes STRING."""
    if isinstance(schema, Mapping):
        return {
            key: value.lower() if key == "type" and isinstance(value, str) else _lowered(value)
            for key, value in schema.items()
        }
    return [_lowered(part) for part in schema] if isinstance(schema, list) else schema
