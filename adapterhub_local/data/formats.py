"""What a row says: messages, ShareGPT, Alpaca, prompt and completion, plain text, or columns as a recipe joins them.

Every column of a row is used, named as unused (`data.columns`), or refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterhub_local.data.chat import MEDIA, Chat, check_chat, earlier_turns, tools_of
from adapterhub_local.data.columns import (
    COLUMN,
    PAIRS,
    SYSTEM,
    answer_column,
    answer_format,
    beside,
    check_preferences,
    listed,
)
from adapterhub_local.data.hints import check_answered, kind_of
from adapterhub_local.data.json_text import check_json_text, parsed
from adapterhub_local.data.preferences import JUDGED, is_preference, judged, read_preference
from adapterhub_local.data.requests import answer_of
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.schema import Data

_NAME = re.compile(r"[^\W\d][\w .-]*")


def read_chat(
    row: Any,
    where: str,
    format: str,  # noqa: A002 - as in the recipe
    data: Data | None = None,
    labels: Mapping[str, Any] | None = None,
) -> Chat:
    """The chat that a row says in this format. Raises BadData with what is missing, or would be lost.

    labels: the names of columns' numbers, beside those of the recipe.
    """
    if not isinstance(row, Mapping):
        raise BadData(f"{where}: an example must be a table of columns, not {kind_of(row)}")
    media = [key for key in MEDIA if row.get(key) not in (None, [], "", {})]
    if media and format != "columns":
        raise BadData(
            f"{where}: the column {media[0]} is not empty, and only text is supported: leave these examples out"
        )
    if format == "columns":
        assert data is not None, "the templates are the recipe's"
        return _columns(row, where, data, {**(labels or {}), **(data.labels or {})})
    if format == "preference":
        if not is_preference(row):
            raise BadData(f"{where}: needs the columns chosen and rejected")
        return read_preference(row, where, data)
    if format == "judged":
        inner = _READERS[answer_format(row, where)]
        chat = inner(row, where, data)
        if chat.text is not None:
            raise BadData(f"{where}: a plain text has no answer that could be judged")
        return replace(chat, is_good=judged(row, where))
    check_preferences(row, where)
    if bad := [key for key in JUDGED if row.get(key) is False]:
        raise BadData(
            f"{where}: the answer is judged bad ({bad[0]} is false), and would be learned as a good one: "
            "leave such rows out, or learn from both with train.objective = 'kto'"
        )
    return _READERS[format](row, where, data)


def _roles(data: Data | None) -> Mapping[str, str]:
    return (data.roles if data else None) or {}


def _messages(row: Mapping[str, Any], where: str, data: Data | None) -> Chat:
    messages = parsed(row.get("messages"))
    if row.get("choices") and isinstance(messages, list):  # a request with the answer it got
        messages = [*messages, answer_of(row["choices"], where)]
    system = _system(row, where)
    if system and isinstance(messages, list) and messages and _role_of(messages[0], data) == "system":
        raise BadData(f"{where}: a system message in the messages and another one in a column of its own")
    if isinstance(messages, list) and messages and _role_of(messages[-1], data) == "user":
        check_answered(row, where)
    return check_chat([*system, *messages] if isinstance(messages, list) else messages, where, _roles(data),
                      tools_of(row))  # fmt: skip


def _role_of(message: Any, data: Data | None) -> Any:
    role = message.get("role") if isinstance(message, Mapping) else None
    return _roles(data).get(role, role) if isinstance(role, str) else None


def _sharegpt(row: Mapping[str, Any], where: str, data: Data | None) -> Chat:
    turns = parsed(row.get("conversations"))
    check_json_text(turns, "conversations", where)
    if not isinstance(turns, list) or not turns:
        raise BadData(f'{where}: write {{"conversations": [{{"from": "human", "value": ...}}, ...]}}')
    messages: list[Any] = []
    for turn in turns:
        fields = turn if isinstance(turn, dict) else {}
        speaker, content = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
        if not isinstance(speaker, str) or not (
            isinstance(content, str) or (content is None and fields.get("tool_calls"))
        ):
            raise BadData(f"{where}: every turn of conversations needs 'from' and 'value', both text")
        rest = {key: value for key, value in fields.items() if key not in ("from", "role", "value", "content")}
        if speaker == "function_call":  # LLaMA-Factory's: a call, or several, as JSON
            calls = parsed(content)
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **rest})
        else:
            messages.append({"role": speaker, "content": content, **rest})
    return check_chat([*_system(row, where), *messages], where, _roles(data), tools_of(row))


def _alpaca(row: Mapping[str, Any], where: str, data: Data | None) -> Chat:
    """Stanford's columns, Dolly's names for two of them, and the earlier turns that LLaMA-Factory adds."""
    parts = [_text(row, "instruction", where), _text(row, beside(row), where, optional=True)]
    answer = _text(row, answer_column(row), where)
    chat = _pair("\n\n".join(part for part in parts if part), answer, where, row)
    turns = earlier_turns(row, where)
    system, own = chat.messages[:-2], chat.messages[-2:]
    return check_chat([*system, *turns, *own], where, None, tools_of(row)) if turns else chat


def _prompt_completion(row: Mapping[str, Any], where: str, data: Data | None) -> Chat:
    pair = next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)
    if pair is None:
        raise BadData(f"{where}: needs the columns prompt and completion")
    prompt, completion = parsed(row[pair[0]]), parsed(row[pair[1]])
    if isinstance(row[pair[1]], Mapping) and "role" in completion:  # a message, as logs have it
        row = {**row, pair[1]: [completion]}
        completion = row[pair[1]]
    calls = completion if isinstance(completion, list) else [completion]
    if tools_of(row) and all(isinstance(call, Mapping) and "name" in call for call in calls):  # as xLAM has them
        answer: list[Any] = [{"role": "assistant", "content": "", "tool_calls": calls}]
        asked = [{"role": "user", "content": _text(row, pair[0], where)}]
        return check_chat([*_system(row, where), *asked, *answer], where, _roles(data), tools_of(row))
    is_talk = [isinstance(side, list) and all(isinstance(turn, Mapping) for turn in side) and bool(side)
               for side in (prompt, completion)]  # fmt: skip
    if not is_talk[0] and is_talk[1] and isinstance(row[pair[1]], list) and all("role" in turn for turn in completion):
        prompt = [{"role": "user", "content": _text(row, pair[0], where)}]
        is_talk[0] = True
    if is_talk[0]:
        answer = completion if is_talk[1] else [{"role": "assistant", "content": _text(row, pair[1], where)}]
        return check_chat([*_system(row, where), *prompt, *answer], where, _roles(data), tools_of(row))
    return _pair(_text(row, pair[0], where), _text(row, pair[1], where), where, row)


def _plain_text(row: Mapping[str, Any], where: str, data: Data | None) -> Chat:
    text = _text(row, "text", where)
    if not text.strip():
        raise BadData(f"{where}: the text is empty")
    return Chat(where, text=text)


def _columns(row: Mapping[str, Any], where: str, data: Data, labels: Mapping[str, Any]) -> Chat:
    def filled(template: str) -> str:
        def value(match: re.Match[str]) -> str:
            if match[0] in ("{{", "}}"):
                return match[0][0]
            if match[1] not in row:
                if not _NAME.fullmatch(match[1]):  # braces around what cannot be a column's name
                    return match[0]
                raise BadData(
                    f"{where}: there is no column '{match[1]}', the columns are {listed(row)} "
                    "({{ and }} stand for braces)"
                )
            found = row[match[1]]
            if found is None or isinstance(found, list | dict):
                what = "is empty" if found is None else "holds several values"
                raise BadData(f"{where}: the column '{match[1]}' {what}: it must be text or a number")
            return _named(found, match[1], labels[match[1]], where) if match[1] in labels else str(found)

        return COLUMN.sub(value, template)

    assert data.prompt is not None and data.answer is not None, "checked with the recipe"  # noqa: PT018
    system = {"system": filled(data.system)} if data.system is not None else {}
    return _pair(filled(data.prompt), filled(data.answer), where, system)


def _named(value: Any, column: str, names: Sequence[str] | Mapping[str, str], where: str) -> str:
    """The name of a column's value: by its number in a list of names, or as a table has it; a name is itself."""
    known = names if isinstance(names, Mapping) else {str(number): name for number, name in enumerate(names)}
    key = str(int(value)) if isinstance(value, bool | float) and value == int(value) else str(value)
    if key in known:
        return known[key]
    if value in known.values():
        return str(value)
    raise BadData(
        f"{where}: the column '{column}' is {value!r:.40}, the names in data.labels are for {', '.join(known)}"
    )


def _pair(prompt: str, answer: str, where: str, row: Mapping[str, Any]) -> Chat:
    if not answer.strip():
        raise BadData(f"{where}: the answer is empty")
    asked, answered = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    chat = check_chat([*_system(row, where), asked, answered], where, None, tools_of(row))
    return replace(chat, is_pair=True)


def _system(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The system message of a row that has a column for it."""
    texts = [row[key] for key in SYSTEM if row.get(key)]
    if not texts:
        return []
    if len(texts) > 1 or not isinstance(texts[0], str):
        raise BadData(f"{where}: the column system must be one text")
    return [{"role": "system", "content": texts[0]}]


def _text(row: Mapping[str, Any], column: str, where: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        if column not in row:
            raise BadData(f"{where}: there is no column '{column}', the columns are {listed(row)}")
        what = "is empty" if value is None else f"must be text, not {kind_of(value)}"
        is_number = isinstance(value, int | float)
        hint = "; data.prompt and data.answer make text of numbers" if is_number else ""
        raise BadData(f"{where}: the column '{column}' {what}{hint}")
    return value


_READERS: dict[str, Callable[[Mapping[str, Any], str, Data | None], Chat]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}
