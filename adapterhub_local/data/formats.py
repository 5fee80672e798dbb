"""What a row says: messages, ShareGPT, Alpaca, prompt and completion, plain text, or columns as a recipe joins them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from adapterhub_local.data.chat import Chat, check_chat
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.schema import Data

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")),
    ("input", "output"),
)
TURN = ("user", "assistant")
_COLUMN = re.compile(r"\{([^{}]+)\}")


def recognise(row: Any, where: str) -> str:
    """The format of a row, from the names of its columns. Raises BadData if it is none of them."""
    columns = row.keys() if isinstance(row, Mapping) else ()
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns and {"output", "response"} & set(columns):
        return "alpaca"
    if any({left, right} <= set(columns) for left, right in PAIRS):
        return "prompt-completion"
    if "text" in columns and not {"label", "labels"} & set(columns):
        return "text"
    if "chosen" in columns and "rejected" in columns:
        raise BadData(
            f"{where}: these are preferences (chosen, rejected), which are not trained on: to learn the chosen answers "
            "set data.prompt = '{prompt}' and data.answer = '{chosen}'"
        )
    has = f"has the columns {', '.join(map(str, columns))}" if columns else "is no table"
    raise BadData(
        f"{where}: no known format, the example {has}: "
        'write {"messages": [{"role": "user", "content": ...}, ...]}, '
        "or say with data.prompt and data.answer how columns make an example"
    )


def read_chat(row: Any, where: str, format: str, data: Data | None = None) -> Chat:  # noqa: A002 - as in the recipe
    """The chat that a row says in this format. Raises BadData with what is missing."""
    if not isinstance(row, Mapping):
        raise BadData(f"{where}: an example must be a table of columns, not {type(row).__name__}")
    if format == "columns":
        assert data is not None, "the templates are the recipe's"
        return _columns(row, where, data)
    return _READERS[format](row, where)


def _messages(row: Mapping[str, Any], where: str) -> Chat:
    if row.get("tools"):
        raise BadData(f"{where}: tools are not supported: leave the column out")
    return check_chat(row.get("messages"), where)


def _sharegpt(row: Mapping[str, Any], where: str) -> Chat:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadData(f'{where}: write {{"conversations": [{{"from": "human", "value": ...}}, ...]}}')
    messages = []
    for turn in turns:
        told = turn if isinstance(turn, dict) else {}
        speaker, said = told.get("from", told.get("role")), told.get("value", told.get("content"))
        if not isinstance(speaker, str) or not isinstance(said, str):
            raise BadData(f"{where}: every turn of conversations needs 'from' and 'value', both text")
        if speaker not in SHAREGPT_ROLES:
            raise BadData(f"{where}: a turn is from '{speaker[:40]}', known are {', '.join(SHAREGPT_ROLES)}")
        weight = {key: told[key] for key in ("weight", "train", "training") if key in told}
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": said, **weight})
    return check_chat([*_system(row), *messages], where)


def _alpaca(row: Mapping[str, Any], where: str) -> Chat:
    """Stanford's columns, Dolly's names for two of them, and the earlier turns that LLaMA-Factory adds."""
    beside, answer = "input" if "input" in row else "context", "output" if "output" in row else "response"
    parts = [_text(row, "instruction", where), _text(row, beside, where, optional=True)]
    chat = _pair("\n\n".join(part for part in parts if part), _text(row, answer, where), where, row)
    earlier = row.get("history") or ()
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn)
               for turn in earlier):  # fmt: skip
        raise BadData(f"{where}: history must be a list of [question, answer], all text")
    turns = [{"role": role, "content": said} for turn in earlier for role, said in zip(TURN, turn, strict=True)]
    system, own = chat.messages[:-2], chat.messages[-2:]
    return check_chat([*system, *turns, *own], where) if turns else chat


def _prompt_completion(row: Mapping[str, Any], where: str) -> Chat:
    pair = next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)
    if pair is None:
        raise BadData(f"{where}: needs the columns prompt and completion")
    prompt, completion = row[pair[0]], row[pair[1]]
    if isinstance(prompt, list) and isinstance(completion, list):
        return check_chat([*prompt, *completion], where)
    return _pair(_text(row, pair[0], where), _text(row, pair[1], where), where, row)


def _plain_text(row: Mapping[str, Any], where: str) -> Chat:
    text = _text(row, "text", where)
    if not text.strip():
        raise BadData(f"{where}: the text is empty")
    return Chat(where, text=text)


def _columns(row: Mapping[str, Any], where: str, data: Data) -> Chat:
    def filled(template: str) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] not in row:
                raise BadData(f"{where}: there is no column '{match[1]}', the columns are {', '.join(map(str, row))}")
            found = row[match[1]]
            if found is None or isinstance(found, list | dict):
                what = "is empty" if found is None else "holds several values"
                raise BadData(f"{where}: the column '{match[1]}' {what}: it must be text or a number")
            return str(found)

        return _COLUMN.sub(value, template)

    assert data.prompt is not None and data.answer is not None, "checked with the recipe"  # noqa: PT018
    system = {"system": filled(data.system)} if data.system is not None else {}
    return _pair(filled(data.prompt), filled(data.answer), where, system)


def _pair(prompt: str, answer: str, where: str, row: Mapping[str, Any]) -> Chat:
    if not answer.strip():
        raise BadData(f"{where}: the answer is empty")
    asked, answered = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    return replace(check_chat([*_system(row), asked, answered], where), is_pair=True)


def _system(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The system message of a row that has a column for it."""
    text = row.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _text(row: Mapping[str, Any], column: str, where: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        if column not in row:
            raise BadData(f"{where}: there is no column '{column}', the columns are {', '.join(map(str, row))}")
        what = "is empty" if value is None else f"must be text, not {type(value).__name__}"
        hint = "; data.prompt and data.answer make text of numbers" if isinstance(value, int | float) else ""
        raise BadData(f"{where}: the column '{column}' {what}{hint}")
    return value


_READERS: dict[str, Callable[[Mapping[str, Any], str], Chat]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}
