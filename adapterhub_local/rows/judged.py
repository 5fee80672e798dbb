"""Judged answers as token ids: pairs of a chosen and a rejected answer, and single answers judged good or bad."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from adapterhub_local.data.chat import Chat
from adapterhub_local.data.dataset import Dataset
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.objectives import ANSWERS, JUDGED, PAIRS
from adapterhub_local.recipe.schema import Data
from adapterhub_local.rows.example import Example, Tokenised
from adapterhub_local.rows.examples import settings_of, tokenise_all, tokenise_data
from adapterhub_local.rows.packing import common_prefix


@dataclass(frozen=True)
class Judged:
    """Answers that are judged together, each an example with one span, its last answer.

    A pair: `parts` are the chosen answer and the rejected one to the same prompt. A single answer: it, and behind the
    same prompt the answer to another one, by which KTO estimates how far the model has moved; `is_good` judges it.
    `number` identifies the item in its data set.
    """

    number: int
    parts: tuple[Example, ...]
    is_good: bool = True
    is_single: bool = False


def tokenise_items(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    shape: str,
    group: int,
    stops: frozenset[int] | None = None,
) -> tuple[Tokenised, Tokenised | None]:
    """The training and held-out data of a recipe as what its objective is about (`Tokenised.items`).

    shape: see `recipe.objectives`; group: of how many single answers each is also put behind another's prompt.
    """
    if shape == ANSWERS:
        return tokenise_data(dataset, tokenizer, data, stops)
    train = tokenise_judged(dataset.train, tokenizer, data, shape, group, stops)
    return train, tokenise_judged(dataset.test, tokenizer, data, shape, group, stops) if dataset.test else None


def tokenise_judged(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    shape: str,
    group: int = 16,
    stops: frozenset[int] | None = None,
    max_length: int | None = None,
) -> Tokenised:
    """Chats as pairs or single answers, written and cut as those of any other objective.

    Of a pair both answers stay or both are left out. Raises BadData as `tokenise_all`.
    """
    answers = [one for chat in chats for one in _answers(chat)]
    tokenised = tokenise_all(
        answers, tokenizer, max_length or data.max_length, loss_on="last_answer", template=data.template,
        too_long=data.too_long, settings=settings_of(data), stops=stops, left_out=data.left_out,
        bad_rows=data.bad_rows,
    )  # fmt: skip
    whose = dict(zip(map(id, tokenised.chats), tokenised.examples, strict=True))
    items = _judged(chats, [whose.get(id(answer)) for answer in answers], shape, group)
    if not items:
        raise BadData("no pair has two answers within data.max_length: raise it")
    return replace(tokenised, judged=items)


def as_judged(chats: Sequence[Chat], encode: Callable[[Chat], Example], shape: str, group: int) -> list[Judged]:
    """Items of chats that `encode` makes an example of: what a plan counts without a tokenizer."""
    return _judged(chats, [encode(answer) for chat in chats for answer in _answers(chat)], shape, group)


def _judged(chats: Sequence[Chat], examples: Sequence[Example | None], shape: str, group: int) -> list[Judged]:
    """Items of the examples of `_answers` of each chat, in order; None for one that was left out."""
    pairs: list[tuple[Example, ...]] = []
    found: list[tuple[Example, bool]] = []
    given = iter(examples)
    for chat in chats:
        own = [next(given) for _ in range(1 if chat.rejected is None else 2)]
        whole = tuple(example for example in own if example is not None)
        if shape == PAIRS and len(whole) == 2:
            pairs.append(whole)
        elif shape == JUDGED:
            good = [True, False] if chat.rejected is not None else [chat.is_good]
            found += [(example, is_good) for example, is_good in zip(own, good, strict=True) if example is not None]
    if shape == JUDGED:
        return _with_others(found, group)
    return [Judged(number, parts) for number, parts in enumerate(pairs)]


def _answers(chat: Chat) -> list[Chat]:
    """The chat, and the same with the rejected answer."""
    if chat.rejected is None:
        return [chat]
    return [replace(chat, rejected=None), replace(chat, messages=(*chat.prompt, chat.rejected), rejected=None)]


def _with_others(found: Sequence[tuple[Example, bool]], group: int) -> list[Judged]:
    """Each answer with that of the one before it in its group behind its own prompt: mismatched pairs (KTO, 4.1)."""
    items: list[Judged] = []
    for start in range(0, len(found), group):
        part = found[start : start + group]
        for at, (example, is_good) in enumerate(part):
            other = part[at - 1][0]
            begin, end = other.spans[-1]
            prompt = example.ids[: example.spans[-1][0]]
            ids = prompt + other.ids[begin:end]
            mismatched = Example(ids, ((len(prompt), len(ids)),))
            items.append(Judged(len(items), (example, mismatched), is_good, is_single=True))
    return items


def computed_tokens(item: Judged, learned: int, *, share: bool) -> int:
    """Tokens that the first `learned` parts of an item take in a row, behind what they begin with if that is shared."""
    group = item.parts[:learned]
    prefix = common_prefix(group) if share and len(group) > 1 else 0
    return prefix + sum(len(part.ids) - prefix for part in group)


def cut_items(
    batch: Sequence[Judged], max_tokens: int, max_items: int, learned: int, *, share: bool = True
) -> list[list[Judged]]:
    """A batch cut into rows of at most about `max_tokens` tokens and `max_items` items, each into the fullest row that
    has room for it. Rows, and the items in them, keep the order of the batch."""
    rows: list[list[Judged]] = []
    room: list[int] = []
    for item in batch:
        length = computed_tokens(item, learned, share=share)
        fits = [at for at, left in enumerate(room) if length <= left and len(rows[at]) < max_items]
        if fits:
            at = min(fits, key=lambda at: room[at])
            rows[at].append(item)
            room[at] -= length
        else:
            rows.append([item])
            room.append(max_tokens - length)
    return rows
