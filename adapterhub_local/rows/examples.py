"""Chats as token ids with what is to be learned marked; knows nothing of files and batches."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_settings import DAY, ChatSettings
from adapterhub_local.base.chat_template import ChatWriter
from adapterhub_local.counts import counted
from adapterhub_local.data.chat import Chat
from adapterhub_local.data.dataset import Dataset, read_parts
from adapterhub_local.data.trouble import Troubles
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.schema import Data
from adapterhub_local.recipe.source import Source
from adapterhub_local.rows.answers import CHUNK, Findings, encode_chats
from adapterhub_local.rows.example import Example, Tokenised
from adapterhub_local.rows.template import choose_template, write_plain

__all__ = (
    "Example",
    "Tokenised",
    "read_chats",
    "scored_on",
    "settings_of",
    "tokenise",
    "tokenise_all",
    "tokenise_data",
)


def tokenise_data(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: Data, stops: frozenset[int] | None = None
) -> tuple[Tokenised, Tokenised | None]:
    """The training and the held-out examples of a recipe, which are scored on answers, whatever is learned.

    stops: the tokens at which the server ends an answer; the tokenizer's end of text if not given.
    """
    how: dict[str, Any] = {"too_long": data.too_long, "settings": settings_of(data), "stops": stops} | {
        "left_out": data.left_out,
        "bad_rows": data.bad_rows,
    }
    train = tokenise_all(dataset.train, tokenizer, data.max_length, loss_on=data.loss_on, template=data.template, **how)
    if not dataset.test:
        return train, None
    return train, tokenise_all(
        dataset.test, tokenizer, data.max_length, loss_on=scored_on(data), template=train.template, **how
    )


def settings_of(data: Data) -> ChatSettings:
    """How a recipe has its conversations written."""
    return ChatSettings(
        template_args=data.template_args or {},
        chat_template=data.chat_template,
        system_role=data.system_role,
        control_tokens=data.control_tokens,
        day=data.date or DAY,
    )


def scored_on(data: Data) -> str:
    """What of an example is scored: answers, even where every token is learned."""
    return "last_answer" if data.loss_on == "last_answer" else "answer"


def read_chats(source: Path | Sequence[Source], limit: int | None = None) -> list[Chat]:
    """The chats of data files in any format, see `data.formats`. Raises BadData with file and line."""
    sources = [source] if isinstance(source, Path) else source
    return [chat for part in read_parts(sources, "train", None, limit) for chat in part.chats]


def tokenise(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    stops: frozenset[int] | None = None,
) -> list[Example]:
    """Chats as the model's own chat template spells them, answers learned. Raises BadData for one that is too long."""
    return tokenise_all(chats, tokenizer, max_length, stops=stops).examples


def tokenise_all(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    loss_on: str = "answer",
    template: str = "auto",
    too_long: str = "error",
    settings: ChatSettings | None = None,
    stops: frozenset[int] | None = None,
    left_out: str = "error",
    bad_rows: str = "error",
) -> Tokenised:
    """Tokenise chats as a recipe's [data] table says; an example that stays has at least one label.

    Raises BadData for examples longer than `max_length` tokens (if `too_long` is "error"), for those the template
    refuses (if `bad_rows` is), for what it leaves out (if `left_out` is), and if none is left; InputError for a base
    that has no chat template where one is needed.
    """
    writer = ChatWriter(tokenizer, settings or ChatSettings(), stops)
    template = choose_template(chats, writer, template)
    if not tokenizer.is_fast:
        raise InputError(
            "the base has a slow tokenizer (one without tokenizer.json), which does not say which token stands for "
            "which text: use a base that has a tokenizer.json"
        )
    troubles, findings = Troubles("the chat template", total=len(chats)), Findings()
    found = Tokenised([], template, are_tokens=template == "plain" or writer.settings.control_tokens == "tokens")
    over: list[tuple[str, int]] = []
    num_pieces = 0
    encoded = (
        _encode_plain(chats, tokenizer, loss_on)
        if template == "plain"
        else encode_chats(chats, writer, loss_on, troubles, findings)
    )
    for chat, parts in encoded:
        if len(parts) > 1:
            found.divided.append(chat.where)
        for example in parts:
            if len(example.ids) <= max_length:
                found.examples.append(example)
                found.chats.append(chat)
            elif chat.text is not None:
                pieces = [example.ids[at : at + max_length] for at in range(0, len(example.ids), max_length)]
                whole = [Example(ids, ((1, len(ids)),)) for ids in pieces if len(ids) > 1]
                found.examples.extend(whole)
                found.chats.extend([chat] * len(whole))
                num_pieces += len(whole)
            else:
                over.append((chat.where, len(example.ids)))
                short = _cut(example, max_length) if too_long == "truncate" else None
                found.examples.extend([short] if short else [])
                found.chats.extend([chat] if short else [])
                (found.cut if short else found.skipped).append(chat.where)
    troubles.raise_if(bad_rows)
    if findings.lost and left_out == "error":
        _raise_lost(findings, len(chats))
    longest = max((length for _, length in over), default=0)
    if over and too_long == "error":
        where, length = over[0]
        count = f" ({len(over):,} of {len(chats):,} examples are too long, the longest has {longest:,})"
        raise BadData(
            f"{where} has {counted(length, 'token')}, at most {max_length:,} are read"
            f"{count if len(over) > 1 else ''}: raise data.max_length (up to the base's context), or set "
            "data.too_long to truncate or skip"
        )
    if not found.examples:
        shortest = min(length for _, length in over)
        raise BadData(
            f"no example has anything to learn within {max_length:,} tokens, the shortest of {len(chats):,} has "
            f"{shortest:,}: raise data.max_length (up to the base's context)"
        )
    return replace(
        found, max_length=max_length, longest=longest, num_pieces=num_pieces,
        special=_spelling_control(chats, writer, template),
        stops=findings.stops, lost=findings.lost, bad=troubles.notes,
        day=writer.settings.day if template == "chat" and writer.prints_date else None,
        described=_with_described_tools(found.chats, writer) if template == "chat" else [],
    )  # fmt: skip


def _with_described_tools(chats: Sequence[Chat], writer: ChatWriter) -> list[str]:
    """Where the chats stand whose tools the template does not know, each once."""
    found = [chat.where for chat in chats if chat.text is None and writer.describes_tools(chat.messages, chat.tools)]
    return list(dict.fromkeys(found))


def _raise_lost(findings: Findings, total: int) -> None:
    parts = "; ".join(
        f"{what} in {len(where):,} of {total:,} examples, the first is {where[0]}"
        for what, where in findings.lost.items()
    )
    ways = ["name another template (data.chat_template)", "set its variables (data.template_args)"]
    if any("system" in what for what in findings.lost):
        ways.insert(0, "set data.system_role = 'user', which puts system messages before the user's text")
    raise BadData(
        f"the base's chat template leaves out {parts}: the model would not learn it, and the server would not send it. "
        f"Ways on: {', '.join(ways)}, or accept it with data.left_out = 'accept'"
    )


def _spelling_control(chats: Sequence[Chat], writer: ChatWriter, template: str) -> list[str]:
    """Where texts spell what is a control token of the model."""
    if template == "chat":
        control = writer.control()
        return [chat.where for chat in chats if control.spells(chat.messages)]
    tokens = sorted(writer.tokenizer.all_special_tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
    return [chat.where for chat in chats if any(pattern.search(text) for text in chat.texts)]


def _encode_plain(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, loss_on: str
) -> Iterator[tuple[Chat, list[Example]]]:
    """Texts, and prompts with their answers, as they are; by offsets, as the tokenizer may add tokens of its own."""
    for start in range(0, len(chats), CHUNK):
        part = chats[start : start + CHUNK]
        written = [write_plain(chat, tokenizer) for chat in part]
        encoded = tokenizer([text for text, _ in written], return_offsets_mapping=True)
        for chat, (_, at), ids, offsets in zip(
            part, written, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if len(ids) < 2:
                raise BadData(f"{chat.where}: the example has no token to learn")
            if chat.text is not None or loss_on == "all":
                yield chat, [Example(tuple(ids), ((1, len(ids)),))]
                continue
            while len(ids) > 1 and offsets[-1] == (0, 0):  # an end of text that the tokenizer adds after ours
                ids, offsets = ids[:-1], offsets[:-1]
            first = next((number for number, (_, end) in enumerate(offsets) if end > at), len(ids))
            if first < 1 or first >= len(ids):
                raise BadData(f"{chat.where}: an answer has no token to learn")
            yield chat, [Example(tuple(ids), ((first, len(ids)),))]


def _cut(example: Example, max_length: int) -> Example | None:
    """The first `max_length` tokens; None if nothing in them is learned."""
    spans = tuple((start, min(end, max_length)) for start, end in example.spans if start < max_length)
    return Example(example.ids[:max_length], spans) if spans else None
