"""Rows that judge answers: one chosen over another to the same prompt, or an answer judged good or bad.

All forms that TRL and LLaMA-Factory take: with the prompt in a column or only in both answers, as texts or messages.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterhub_local.counts import counted
from adapterhub_local.data.chat import TOOLS, Chat, check_chat, earlier_turns, tools_of
from adapterhub_local.data.json_text import parsed
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.schema import Data

SYSTEM = ("system", "system_prompt")
JUDGED = ("label", "kto_tag")
PROMPTS = ("prompt", "question", "query", "messages", "conversations")
SIDES = ("chosen", "rejected")
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")  # how Anthropic's hh-rlhf writes turns in one text
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
Turns = list[dict[str, Any]]


def is_preference(row: Any) -> bool:
    """Whether a row has an answer that was chosen and one that was not."""
    return isinstance(row, Mapping) and all(side in row for side in SIDES)


def is_judged(row: Any) -> bool:
    """Whether a row says of its answer that it is good or bad."""
    return isinstance(row, Mapping) and any(isinstance(row.get(name), bool) for name in JUDGED)


def used_columns(row: Mapping[str, Any]) -> set[str]:
    """The columns of a preference that its chat holds."""
    return {*SIDES, *TOOLS, *SYSTEM, "instruction", "input", "history", *PROMPTS} & set(row)


def read_preference(row: Mapping[str, Any], where: str, data: Data | None) -> Chat:
    """The chat with the chosen answer; its `rejected` is the other. Raises BadData where the prompts differ."""
    roles = (data.roles if data else None) or {}
    prompt = _prompt(row, where)
    sides = [parsed(row[side]) for side in SIDES]
    is_pair = False
    if all(isinstance(side, str) for side in sides):
        prompt, sides, is_pair = _texts(prompt, sides, where)
    turns = [_turns(side, where, name) for side, name in zip(sides, SIDES, strict=True)]
    shared = _shared(turns)
    if shared and prompt and not _begins_with(turns[0][:shared], prompt):
        raise BadData(f"{where}: chosen and rejected begin with other messages than the prompt")
    asked = turns[0][:shared] if shared else prompt
    if not asked:
        raise BadData(f"{where}: chosen and rejected begin with nothing in common, and there is no column prompt")
    system = [] if asked[0].get("role") == "system" else _system(row, where)
    chats = []
    for side, name in zip(turns, SIDES, strict=True):
        if len(side) - shared != 1:
            raise BadData(
                f"{where}: {name} has {counted(len(side) - shared, 'message')} after what both begin with: chosen and "
                "rejected must be the same conversation up to one last answer"
            )
        chats.append(check_chat([*system, *asked, *side[shared:]], f"{where}: {name}", roles, tools_of(row)))
    good, bad = chats
    if good.messages[-1] == bad.messages[-1]:
        raise BadData(f"{where}: chosen and rejected are the same answer")
    return replace(good, where=where, rejected=bad.messages[-1], is_pair=is_pair and len(good.messages) == 2)


def judged(row: Mapping[str, Any], where: str) -> bool:
    """Whether the answer of a row is judged good. Raises BadData where it is not judged."""
    for name in JUDGED:
        value = row.get(name)
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        if name in row:
            raise BadData(f"{where}: the column {name} must be true (a good answer) or false, not {value!r:.40}")
    raise BadData(f"{where}: the answer is not judged: kto needs a column label, true or false")


def _prompt(row: Mapping[str, Any], where: str) -> Turns:
    """The messages before the answers that a row has a column for, none if the answers hold them."""
    if "instruction" in row:
        parts = [row.get("instruction"), row.get("input")]
        if not all(part is None or isinstance(part, str) for part in parts):
            raise BadData(f"{where}: instruction and input must be text")
        return [*earlier_turns(row, where), {"role": "user", "content": "\n\n".join(part for part in parts if part)}]
    name = next((name for name in PROMPTS if row.get(name)), None)
    return _turns(parsed(row[name]), where, name, role="user") if name else []


def _turns(value: Any, where: str, name: str, role: str = "assistant") -> Turns:
    """Messages: a list of them, one, or the text of one."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    given = [value] if isinstance(value, Mapping) else value
    if not isinstance(given, list) or not given or not all(isinstance(turn, Mapping) for turn in given):
        raise BadData(f"{where}: {name} must be text, a message or a list of messages")
    turns = []
    for turn in given:
        named = {{"from": "role", "value": "content"}.get(key, key): part for key, part in turn.items()}
        turns.append({key: part for key, part in named.items() if part is not None})
    return turns


def _texts(prompt: Turns, sides: Sequence[str], where: str) -> tuple[Turns, list[Any], bool]:
    """Answers that are texts: with their prompt, or as whole conversations that begin alike."""
    if prompt:
        return prompt, list(sides), True
    if all(_HH_TURN.match(side) for side in sides):
        return [], [_hh_turns(side) for side in sides], False
    at = len(os.path.commonprefix(list(sides)))
    at = sides[0].rfind(" ", 0, at) if sides[0][:at] and not sides[0][:at][-1].isspace() else at  # whole words
    if at < 1:
        raise BadData(f"{where}: chosen and rejected begin with nothing in common, and there is no column prompt")
    return [{"role": "user", "content": sides[0][:at].rstrip()}], [side[at:].lstrip() for side in sides], True


def _hh_turns(text: str) -> Turns:
    _, *parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _shared(turns: Sequence[Turns]) -> int:
    """How many messages both begin with; never the last of either."""
    most = min(len(side) for side in turns) - 1
    return next((at for at in range(most) if turns[0][at] != turns[1][at]), max(0, most))


def _begins_with(asked: Turns, prompt: Turns) -> bool:
    """Whether the messages before the answers are those of the prompt column, a system message before them apart."""
    given = [(turn.get("role"), turn.get("content")) for turn in asked if turn.get("role") != "system"]
    wanted = [(turn.get("role"), turn.get("content")) for turn in prompt if turn.get("role") != "system"]
    return given == wanted or [content for _, content in given] == [content for _, content in wanted]


def _system(row: Mapping[str, Any], where: str) -> Turns:
    texts = [row[name] for name in SYSTEM if row.get(name)]
    if len(texts) > 1 or not all(isinstance(text, str) for text in texts):
        raise BadData(f"{where}: the column system must be one text")
    return [{"role": "system", "content": text} for text in texts]
