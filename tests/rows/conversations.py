"""The conversations that every family's template writes, and what becomes of them as training data."""

from typing import Any

from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.data.chat import check_chat
from adapterhub_local.rows.examples import Tokenised, tokenise_all
from tests.rows.family import Family, stops_of, tokenizer_of

U1, A1, U2, A2 = "first question", "first answer", "second question", "second answer"
SYSTEM, SECOND, THOUGHT = "be terse", "now in French", "ten and seven"


Said = dict[str, Any]


def said(role: str, content: str, **more: Any) -> Said:
    return {"role": role, "content": content, **more}


def called(*cities: str) -> list[Said]:
    """A turn that asks a tool for each city, and its results."""
    numbers = [f"call{number:05d}" for number in range(len(cities))]
    calls = [
        {"id": number, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for number, city in zip(numbers, cities, strict=True)
    ]
    return [
        said("assistant", "", tool_calls=calls),
        *(said("tool", f"rain over {city}", tool_call_id=number) for number, city in zip(numbers, cities, strict=True)),
    ]


SINGLE = [said("user", U1), said("assistant", A1)]
TALK = [*SINGLE, said("user", U2), said("assistant", A2)]
KINDS = {
    "single": SINGLE,
    "system": [said("system", SYSTEM), *SINGLE],
    "several turns": TALK,
    "system and several turns": [said("system", SYSTEM), *TALK],
    "second system": [said("system", SYSTEM), *SINGLE, said("system", SECOND), *TALK[2:]],
    "thoughts": [said("user", U1), said("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{A1}")],
    "thoughts of earlier turns": [
        said("user", U1),
        said("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{A1}"),
        *TALK[2:],
    ],
    "two users": [said("user", U1), said("user", U2), said("assistant", A2)],
    "tools": [said("user", U1), *called("Oslo"), said("assistant", A1)],
    "two calls": [said("user", U1), *called("Oslo", "Rome"), said("assistant", A1), *TALK[2:]],
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}]


def has_calls(messages: list[Said]) -> bool:
    return any("tool_calls" in message for message in messages)


def tokenised(family: Family, messages: list[Said], **how: str) -> Tokenised:
    settings = ChatSettings(
        template_args=dict(family.variables), day="2026-01-01", system_role=how.pop("system", "system")
    )
    chat = check_chat(messages, "x:1", tools=TOOLS if has_calls(messages) else None)
    return tokenise_all([chat], tokenizer_of(family), 4096, settings=settings, stops=stops_of(family), **how)


def refuses(family: Family, kind: str) -> str | None:
    """What of such a conversation the family has no way to write."""
    needs = {"thoughts": "thoughts", "thoughts of earlier turns": "thoughts", "system and several turns": "system"}
    wanted = needs.get(kind, kind)
    return wanted if wanted in family.lacks else None
