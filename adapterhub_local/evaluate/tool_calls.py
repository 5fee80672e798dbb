"""Calls of tools in what a model writes, read as the server reads them, beside those of the reference answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_settings import ChatSettings
from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.base.tool_calls import CallReader
from adapterhub_local.base.tool_format import ToolFormat, format_of
from adapterhub_local.data.chat import Chat, split_thought
from adapterhub_local.errors import InputError

VALID, TOOL, EXACT = "valid_calls", "right_tools", "exact_calls"


@dataclass(frozen=True)
class Offer:
    """The names of the tools that one example offers, and how its chat template has them called."""

    tool_format: ToolFormat
    names: tuple[str, ...]


@dataclass(frozen=True)
class CallsRead:
    """What the server makes of an answer: its calls, each a name and canonical JSON of its arguments, in order.

    `is_valid`: no call is broken, or of a tool that is not offered, and all arguments are objects.
    """

    calls: tuple[tuple[str, str], ...]
    is_valid: bool

    @property
    def names(self) -> list[str]:
        return sorted(name for name, _ in self.calls)


def offers_of(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> list[Offer | None]:
    """What each chat offers; None for one without tools. Raises InputError if none has any."""
    writer = ChatWriter(tokenizer, settings)
    offers: list[Offer | None] = []
    for chat in chats:
        names = tuple(str(tool["function"]["name"]) for tool in chat.tools)
        offers.append(Offer(format_of(writer.template(chat.tools)), names) if names else None)
    if not any(offers):
        raise InputError(
            "tool calls are scored where tools are offered, and no held-out example has the column 'tools'"
        )
    return offers


def read_calls(text: str, offer: Offer) -> CallsRead:
    """What the server makes of an answer under this offer. Thoughts call nothing."""
    _, reply = split_thought({"content": text})
    reader = CallReader(offer.tool_format, offer.names)
    rest = reader.push(reply) + reader.flush()
    values = [(call.name, json.loads(call.arguments)) for call in reader.calls]
    calls = tuple((name, json.dumps(value, sort_keys=True)) for name, value in values)
    are_objects = all(isinstance(value, Mapping) for _, value in values)
    return CallsRead(calls, are_objects and not _is_broken(rest, offer.tool_format))


def call_hits(
    written: Sequence[str], references: Sequence[str], offers: Sequence[Offer | None]
) -> dict[str, tuple[bool, ...]]:
    """Of each example that offers tools: whether its answer has the form, calls the tools, and calls them as asked.

    `valid_calls`: it calls where the reference does, and is `CallsRead.is_valid`; where the reference calls nothing it
    does not either. `right_tools`: the same tools as well, as often, in any order. `exact_calls`: the same arguments
    too.
    """
    hits: dict[str, list[bool]] = {VALID: [], TOOL: [], EXACT: []}
    for ours, theirs, offer in zip(written, references, offers, strict=True):
        if offer is None:
            continue
        made, wanted = read_calls(ours, offer), read_calls(theirs, offer)
        is_valid = made.is_valid and bool(made.calls) == bool(wanted.calls)
        hits[VALID].append(is_valid)
        hits[TOOL].append(is_valid and made.names == wanted.names)
        hits[EXACT].append(is_valid and sorted(made.calls) == sorted(wanted.calls))
    return {name: tuple(found) for name, found in hits.items()}


def _is_broken(rest: str, tool_format: ToolFormat) -> bool:
    """Whether what is left beside the calls was to be one: a mark, or for a form without marks a JSON object."""
    mark = tool_format.begin.strip()
    return mark in rest if mark else rest.lstrip().startswith("{")
