"""The rows a run will compute: the recipe's examples, tokenised and packed as the trainer does, in a few random orders.

Without a tokenizer (a base that is not there) four bytes of text are counted as a token, and the result says so.
"""

import random
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.data.chat import Chat
from adapterhub_local.errors import BadData
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import data_within, examples_a_row, shares_prefixes
from adapterhub_local.recipe.objectives import ANSWERS, OBJECTIVES

BYTES_PER_TOKEN = 4
TURN_TOKENS = 4  # what a chat template writes around a message
MAX_BATCHES = 500


@dataclass(frozen=True)
class Rows:
    """Examples and the rows they become. Lengths in tokens; `row_tokens` and `row_labels` are the largest seen.

    epoch_tokens: tokens of all examples; computed: of them, what an epoch computes once prefixes are shared.
    looked_at: tokens of an epoch that are computed without gradients (kto); referred: the same by the reference of
    preferences, once in a run. shared: tokens all examples begin with. is_packed: some row holds several examples.
    is_estimated: no tokenizer.
    """

    examples: int
    mean: int
    longest: int
    shared: int
    epoch_tokens: int
    epoch_labels: int
    computed: int
    rows: int
    row_tokens: int
    row_labels: int
    is_packed: bool
    is_estimated: bool
    looked_at: int = 0
    referred: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def computed_of(examples: Sequence[Any], recipe: Recipe) -> list[Any]:
    """What of the examples is computed: for grpo each prompt with the answers drawn to it, as long as they may be."""
    if recipe.train.objective != "grpo":
        return list(examples)
    from adapterhub_local.rows.examples import Example

    size = recipe.reward.samples * recipe.reward.max_tokens
    prompts = [example.ids[: example.spans[-1][0]] for example in examples]
    return [Example((*prompt, *[0] * size), ((len(prompt), len(prompt) + size),)) for prompt in prompts]


def read_examples(recipe: Recipe, folder: Path | None, context: int | None = None) -> list[Any]:
    """The recipe's training examples, or items that judge several (`rows.judged`).

    By the tokenizer in `folder`, or estimated without one; the base takes texts of `context` tokens. Raises BadData.
    """
    from adapterhub_local.data.dataset import read_data
    from adapterhub_local.rows.examples import Example
    from adapterhub_local.rows.judged import as_judged, tokenise_items

    dataset = read_data(recipe)
    data, shape = data_within(recipe.data, context), OBJECTIVES[recipe.train.objective].shape
    if folder is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return list(tokenise_items(dataset, tokenizer, data, shape, recipe.train.batch_size)[0].items)
    if shape != ANSWERS:
        return as_judged(dataset.train, estimated, shape, recipe.train.batch_size)
    examples = [estimated(chat) for chat in dataset.train]
    short = [example for example in examples if len(example.ids) <= data.max_length]
    if len(short) < len(examples) and data.too_long == "error":
        longest = max(len(example.ids) for example in examples)
        raise BadData(
            f"the data has an example of about {longest:,} tokens, at most {data.max_length:,} are read: raise "
            "data.max_length (up to the base's context), or set data.too_long to truncate or skip"
        )
    if data.too_long == "truncate":
        return [
            Example(example.ids[: data.max_length], clipped(example.spans, data.max_length)) for example in examples
        ]
    if not short:
        raise BadData(
            f"every example has more than {data.max_length:,} tokens: raise data.max_length (up to the base's context)"
        )
    return short


def clipped(spans: Sequence[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """The parts of [start, end) spans below `length`."""
    return tuple((start, min(end, length)) for start, end in spans if start < length)


def estimated(chat: Chat) -> Any:
    """A chat as an example of about as many tokens as a tokenizer would make; equal beginnings stay equal."""
    from adapterhub_local.rows.examples import Example

    ids: list[int] = []
    spans = []
    for message in chat.messages or [{"role": "assistant", "content": chat.text or ""}]:
        text = message["content"].encode()
        pieces = [zlib.crc32(text[at : at + BYTES_PER_TOKEN]) for at in range(0, len(text), BYTES_PER_TOKEN)]
        ids += [0] * TURN_TOKENS
        if message["role"] == "assistant":
            spans.append((len(ids), len(ids) + len(pieces) + 1))
        ids += [*pieces, 1]
    return Example(tuple(ids), tuple(spans))


def pack_examples(examples: Sequence[Any], recipe: Recipe, is_estimated: bool, num_processes: int = 1) -> Rows:
    """How the trainer will cut these examples into rows, over up to MAX_BATCHES batches in random order."""
    from adapterhub_local.rows.example import num_labels, num_tokens
    from adapterhub_local.rows.judged import computed_tokens, cut_items
    from adapterhub_local.rows.packing import common_prefix, pack_rows

    train, kind = recipe.train, OBJECTIVES[recipe.train.objective]
    is_judged = kind.shape != ANSWERS
    size = examples_a_row(train, num_processes)
    share = shares_prefixes(recipe.adapter)
    order = list(examples)
    row_tokens = row_labels = computed = batches = rows = 0
    is_packed = False
    shuffle = random.Random(recipe.train.seed).shuffle  # noqa: S311 - an order, not a secret
    while batches < MAX_BATCHES and (batches == 0 or batches * train.batch_size < 3 * len(order)):
        shuffle(order)
        for start in range(0, len(order), train.batch_size):
            batch = order[start : start + train.batch_size]
            cut: list[list[Any]] = (
                cut_items(batch, train.packed_tokens, size, kind.learned, share=share)
                if is_judged
                else pack_rows(batch, train.packed_tokens, size, share=share)  # type: ignore[assignment]
            )
            for row in cut:
                if is_judged:
                    tokens = sum(computed_tokens(item, kind.learned, share=share) for item in row)
                else:
                    prefix = common_prefix(row) if share and len(row) > 1 else 0
                    tokens = prefix + sum(len(example.ids) - prefix for example in row)
                labels = sum(part.num_labels for item in row for part in item.parts[: kind.learned])
                row_tokens, row_labels = max(row_tokens, tokens), max(row_labels, labels)
                computed, rows = computed + tokens, rows + 1
                is_packed = is_packed or len(row) * kind.learned > 1
            batches += 1
    epochs = batches / -(-len(order) // train.batch_size)
    lengths = [num_tokens(example) for example in examples]
    computed = round(computed / epochs)
    looked_at = sum(len(part.ids) for item in examples for part in item.parts[kind.learned :]) if is_judged else 0
    return Rows(
        examples=len(lengths),
        mean=round(statistics.mean(lengths)),
        longest=max(lengths),
        shared=common_prefix(examples) if not is_judged and share and len(examples) > 1 else 0,
        epoch_tokens=sum(lengths),
        epoch_labels=sum(map(num_labels, examples)),
        computed=computed,
        rows=round(rows / epochs),
        row_tokens=row_tokens,
        row_labels=row_labels,
        is_packed=is_packed,
        is_estimated=is_estimated,
        looked_at=looked_at,
        referred=computed + looked_at if kind.has_reference else 0,
    )
