"""Chats as token ids with what is to be learned marked; knows nothing of files and batches."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.data.chat import Chat
from adapterhub_local.data.dataset import Dataset, read_parts
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.schema import Data
from adapterhub_local.recipe.source import Source
from adapterhub_local.rows.template import Span, choose_template, render

CHUNK = 1000  # examples tokenised in one call: all cores of the tokenizer at work, little memory


@dataclass(frozen=True)
class Example:
    """One tokenised chat: `ids`, and the [start, end) spans of ids that are learned, never the first id.

    The span of an answer ends with the end-of-turn token, so that the model learns to stop.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def num_labels(self) -> int:
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True)
class Tokenised:
    """The examples in the order of their chats, and what was done to longer ones."""

    examples: list[Example]
    template: str  # chat or plain
    longest: int = 0
    cut: list[str] = field(default_factory=list)  # where they stand
    skipped: list[str] = field(default_factory=list)  # the same, of those left out
    num_pieces: int = 0  # of plain texts that were cut
    special: list[str] = field(default_factory=list)  # where a text holds what is a control token of the model

    @property
    def counts(self) -> dict[str, Any]:
        """What a lineage keeps: the template, and how many examples are not whole."""
        return {"template": self.template, "examples_cut": len(self.cut), "examples_left_out": len(self.skipped)}

    def notes(self, max_length: int) -> list[str]:
        """What a person must know about longer examples, a sentence each."""
        told = []
        if self.cut:
            told.append(
                f"{len(self.cut):,} examples were cut to {max_length:,} tokens, the longest has {self.longest:,}"
            )
        if self.skipped:
            told.append(
                f"{len(self.skipped):,} examples were left out: longer than {max_length:,} tokens (data.too_long), "
                f"the first is {self.skipped[0]}"
            )
        if self.num_pieces:
            told.append(f"plain texts were cut into {self.num_pieces:,} pieces of {max_length:,} tokens or less")
        if self.special:
            told.append(
                f"{len(self.special):,} examples have control tokens of the model, such as its end of turn, in what is "
                f"said, the first is {self.special[0]}"
            )
        return told


def tokenise_data(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[Tokenised, Tokenised | None]:
    """The training and the held-out examples of a recipe, which are scored on answers, whatever is learned."""
    train = tokenise_all(
        dataset.train, tokenizer, data.max_length,
        loss_on=data.loss_on, template=data.template, too_long=data.too_long,
    )  # fmt: skip
    if not dataset.test:
        return train, None
    return train, tokenise_all(
        dataset.test, tokenizer, data.max_length, loss_on=scored_on(data), template=train.template,
        too_long=data.too_long,
    )  # fmt: skip


def scored_on(data: Data) -> str:
    """What of an example is scored: answers, even where every token is learned."""
    return "last_answer" if data.loss_on == "last_answer" else "answer"


def read_chats(source: Path | Sequence[Source], limit: int | None = None) -> list[Chat]:
    """The chats of data files in any format, see `data.formats`. Raises BadData with file and line."""
    sources = [source] if isinstance(source, Path) else source
    return [chat for part in read_parts(sources, "train", None, limit) for chat in part.chats]


def tokenise(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Chats as the model's own chat template spells them, answers learned. Raises BadData for one that is too long."""
    return tokenise_all(chats, tokenizer, max_length).examples


def tokenise_all(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    loss_on: str = "answer",
    template: str = "auto",
    too_long: str = "error",
) -> Tokenised:
    """Tokenise chats as a recipe's [data] table says; an example that stays has at least one label.

    Raises BadData for examples longer than `max_length` tokens (if `too_long` is "error"), for those the template
    refuses, and if none is left; InputError for a base that has no chat template where one is needed.
    """
    template = choose_template(chats, tokenizer, template)
    examples: list[Example] = []
    cut: list[str] = []
    skipped: list[str] = []
    over: list[tuple[str, int]] = []
    num_pieces = 0
    for chat, example in zip(chats, _encode(chats, tokenizer, template, loss_on), strict=True):
        if len(example.ids) <= max_length:
            examples.append(example)
        elif chat.text is not None:
            pieces = [example.ids[at : at + max_length] for at in range(0, len(example.ids), max_length)]
            whole = [Example(ids, ((1, len(ids)),)) for ids in pieces if len(ids) > 1]
            examples += whole
            num_pieces += len(whole)
        else:
            over.append((chat.where, len(example.ids)))
            short = _cut(example, max_length) if too_long == "truncate" else None
            examples += [short] if short else []
            (cut if short else skipped).append(chat.where)
    longest = max((length for _, length in over), default=0)
    if over and too_long == "error":
        where, length = over[0]
        count = f" ({len(over):,} of {len(chats):,} examples are too long, the longest has {longest:,})"
        raise BadData(
            f"{where} has {length:,} tokens, data.max_length is {max_length}{count if len(over) > 1 else ''}: "
            "raise it, or set data.too_long to truncate or skip"
        )
    if not examples:
        shortest = min(length for _, length in over)
        raise BadData(
            f"none of {len(chats):,} examples has something to learn within data.max_length = {max_length} tokens, "
            f"the shortest has {shortest:,}: raise it"
        )
    control = re.compile(
        "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))) or "(?!)"
    )
    special = [chat.where for chat in chats if any(control.search(said) for said in chat.texts)]
    return Tokenised(examples, template, longest, cut, skipped, num_pieces, special)


def _encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, template: str, loss_on: str
) -> Iterator[Example]:
    """Every chat rendered as text with the spans of characters that are learned, then as tokens, by their offsets."""
    if not tokenizer.is_fast:
        raise InputError("the base's tokenizer does not tell which token stands for which characters: it is a slow one")
    for start in range(0, len(chats), CHUNK):
        part = chats[start : start + CHUNK]
        rendered = [render(chat, tokenizer, template, loss_on) for chat in part]
        # a chat template writes the beginning-of-text token itself
        encoded = tokenizer(
            [text for text, _ in rendered], add_special_tokens=template == "plain", return_offsets_mapping=True
        )
        for chat, (_, spans), ids, offsets in zip(
            part, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield _example(chat, spans, ids, offsets, tokenizer.eos_token_id)


def _example(chat: Chat, spans: list[Span] | None, ids: list[int], offsets: list[Span], eos: int | None) -> Example:
    if len(ids) < 2:
        raise BadData(f"{chat.where}: the example has no token to learn")
    if spans is None:
        return Example(tuple(ids), ((1, len(ids)),))
    while len(ids) > 1 and offsets[-1] == (0, 0):  # an end of text that the tokenizer adds after ours
        ids, offsets = ids[:-1], offsets[:-1]
    ends = [end for _, end in offsets]
    learned = []
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_right(ends, end)
        if first < 1 or last <= first:
            raise BadData(f"{chat.where}: an answer has no token to learn")
        learned.append((first, _end_of_turn(ids, first, last, eos)))
    return Example(tuple(ids), tuple(learned))


def _cut(example: Example, max_length: int) -> Example | None:
    """The first `max_length` tokens; None if nothing in them is learned."""
    spans = tuple((start, min(end, max_length)) for start, end in example.spans if start < max_length)
    return Example(example.ids[:max_length], spans) if spans else None


def _end_of_turn(ids: Sequence[int], start: int, end: int, eos: int | None) -> int:
    """The end of a turn after its last end-of-turn token; what a template writes after it is not learned."""
    stops = [position for position in range(start, end) if ids[position] == eos]
    return stops[-1] + 1 if stops else end
