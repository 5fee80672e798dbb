"""Calls of tools in a row, held against the tools that it offers: what the server could never have answered."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.data.chat import Chat, Message, is_learned
from adapterhub_local.errors import BadData

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def check_called(chat: Chat) -> None:
    """Raise BadData for an answer to learn that calls what the row does not offer: the server would take it for text.

    Rows that offer no tools may call any: logs often leave them out, and so they are learned as text.
    """
    offered = [str(tool["function"]["name"]) for tool in chat.tools]
    for name in (call["function"]["name"] for call in _learned(chat.messages) if offered):
        if name not in offered:
            raise BadData(
                f"{chat.where}: the answer calls '{name[:40]}', which is not among the tools of the row: "
                f"{', '.join(offered)[:200]}"
            )


def misfit(chat: Chat) -> str | None:
    """The first thing that an answer to learn gives a tool and its schema does not allow; None if there is none.

    Looked at are required arguments, unknown ones, and the type and choices of each, not what is in them.
    """
    schemas = {str(tool["function"]["name"]): tool["function"].get("parameters") for tool in chat.tools}
    for function in (call["function"] for call in _learned(chat.messages)):
        schema, arguments = schemas.get(function["name"]), function["arguments"]
        if wrong := _wrong(arguments, schema) if isinstance(schema, Mapping) else None:
            return f"{function['name']}: {wrong}"
    return None


def _learned(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    return [call for message in messages if is_learned(message) for call in message.get("tool_calls") or ()]


def _wrong(arguments: Any, schema: Mapping[str, Any]) -> str | None:
    if not isinstance(arguments, Mapping):
        return "the arguments are not a JSON object"
    known, needed = schema.get("properties"), schema.get("required")
    known = known if isinstance(known, Mapping) else {}
    for name in needed if isinstance(needed, list) else ():
        if name not in arguments:
            return f"'{name}' is missing"
    for name, value in arguments.items():
        if name not in known:
            if known and not schema.get("additionalProperties"):
                return f"there is no argument '{name}'"
            continue
        kind = known[name] if isinstance(known[name], Mapping) else {}
        wanted = kind.get("type")
        if isinstance(wanted, str) and wanted in TYPES and not _is(value, wanted):
            return f"'{name}' is not {'an' if wanted[0] in 'aeiou' else 'a'} {wanted}"
        if isinstance(kind.get("enum"), list) and value not in kind["enum"]:
            return f"'{name}' is none of its choices"
    return None


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool):
        return wanted == "boolean"
    return isinstance(value, TYPES[wanted]) or (wanted == "integer" and isinstance(value, float) and value.is_integer())
