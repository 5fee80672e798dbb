"""Chats as token ids with what is to be learned marked; knows nothing of files and batches.

What the assistant wrote is found by prefix difference of the model's own chat template: what it adds for a
turn after the generation prompt. This needs no marks in the template (`{% generation %}`).
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.data.chat import Chat, is_learned
from adapterhub_local.data.load import Dataset, read_parts
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe.schema import Data
from adapterhub_local.recipe.source import Source

CHUNK = 1000  # examples tokenised in one call: all cores of the tokenizer at work, little memory
Span = tuple[int, int]


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


def choose_template(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, wanted: str) -> str:
    """`chat` or `plain`; what `auto` means for this base and these chats. Raises InputError if it cannot be."""
    if all(chat.text is not None for chat in chats):
        return "plain"
    if wanted == "chat" or (wanted == "auto" and tokenizer.chat_template is not None):
        if tokenizer.chat_template is None:
            raise InputError("data.template = 'chat': the base has no chat template: use an instruction-tuned base")
        return "chat"
    talk = next((chat for chat in chats if not (chat.is_pair or chat.text is not None)), None)
    if wanted == "auto" and talk is not None:
        raise InputError(
            f"{talk.where} is a chat, and the base has no chat template: use an instruction-tuned base, or set "
            "data.template = 'plain' if every example is one prompt with one answer"
        )
    longer = next((chat for chat in chats if len(chat.messages) not in (0, 2)), None)
    if longer is not None:
        raise InputError(
            f"{longer.where}: data.template = 'plain' has no way to write several turns or a system message: every "
            "example must be one prompt with one answer; or use an instruction-tuned base and data.template = 'chat'"
        )
    return "plain"


def template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, add_generation_prompt: bool
) -> list[int]:
    """The token ids of a chat in the model's own template."""
    render: Any = tokenizer.apply_chat_template
    return list(render(list(messages), add_generation_prompt=add_generation_prompt, return_dict=False))


def _encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, template: str, loss_on: str
) -> Iterator[Example]:
    """Every chat rendered as text with the spans of characters that are learned, then as tokens, by their offsets."""
    if not tokenizer.is_fast:
        raise InputError("the base's tokenizer does not tell which token stands for which characters: it is a slow one")
    for start in range(0, len(chats), CHUNK):
        part = chats[start : start + CHUNK]
        rendered = [_render(chat, tokenizer, template, loss_on) for chat in part]
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


def _render(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, template: str, loss_on: str
) -> tuple[str, list[Span] | None]:
    """The text of a chat, and the [start, end) spans of characters that are learned; None for all of them."""
    if template == "plain":
        if tokenizer.eos_token is None:
            raise InputError("the base has no end-of-text token, with which plain text ends: use another base")
        if chat.text is not None:
            return chat.text + tokenizer.eos_token, None
        prompt, answer = (message["content"] for message in chat.messages)
        text = prompt + answer + tokenizer.eos_token
        return text, None if loss_on == "all" else [(len(prompt), len(text))]
    if chat.text is not None:
        raise BadData(f"{chat.where}: plain text among chats: train on one or the other")
    messages = [{"role": message["role"], "content": message["content"]} for message in chat.messages]
    whole = _apply(tokenizer, messages, chat.where, prompt=False)
    if loss_on == "all":
        return whole, None
    turns = [turn for turn, message in enumerate(chat.messages) if is_learned(message)]
    spans = []
    for turn in turns[-1:] if loss_on == "last_answer" else turns:
        before = _apply(tokenizer, messages[:turn], chat.where, prompt=True)
        if not whole.startswith(before):
            raise BadData(
                f"{chat.where}: the base's chat template rewrites earlier turns, so answers cannot be found in it"
            )
        is_last = turn == len(messages) - 1
        after = whole if is_last else _apply(tokenizer, messages[: turn + 1], chat.where, prompt=False)
        end = len(after) if whole.startswith(after) else _rewritten_end(whole, len(before), tokenizer, chat.where)
        spans.append((len(before), end))
    return whole, spans


def _rewritten_end(whole: str, start: int, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The end of an answer that the template writes otherwise once more turns follow, as Qwen3's does with thoughts."""
    end = whole.find(tokenizer.eos_token, start) if tokenizer.eos_token else -1
    if end < 0:
        raise BadData(f"{where}: the base's chat template rewrites earlier turns, so answers cannot be found in it")
    return end + len(tokenizer.eos_token)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str, *, prompt: bool) -> str:
    render: Any = tokenizer.apply_chat_template
    try:
        return render(messages, add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # a template is a program, and may raise whatever it likes
        if not messages:
            raise BadData(
                f"{where}: the chat begins with an answer, which the base's chat template cannot tell"
            ) from None
        raise BadData(f"{where}: the base's chat template refuses this chat: {error}") from None


def _cut(example: Example, max_length: int) -> Example | None:
    """The first `max_length` tokens; None if nothing in them is learned."""
    spans = tuple((start, min(end, max_length)) for start, end in example.spans if start < max_length)
    return Example(example.ids[:max_length], spans) if spans else None


def _end_of_turn(ids: Sequence[int], start: int, end: int, eos: int | None) -> int:
    """The end of a turn after its last end-of-turn token; what a template writes after it is not learned."""
    stops = [position for position in range(start, end) if ids[position] == eos]
    return stops[-1] + 1 if stops else end
