"""What a recipe's data are as tokens: how many, how long, how many are learned."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.bases import BaseInfo, find_base
from adapterhub_local.base.chat_template import stop_tokens
from adapterhub_local.data.dataset import Dataset
from adapterhub_local.errors import BadData, InputError
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import data_within
from adapterhub_local.recipe.objectives import OBJECTIVES
from adapterhub_local.rows.example import Item, Tokenised, num_labels, num_tokens, parts_of
from adapterhub_local.rows.judged import tokenise_items
from adapterhub_local.settings import Home
from adapterhub_local.train.check import Runs, data_of, gathering, raise_all
from adapterhub_local.train.tokens import check_seen, embedding_rows, ids_of, load_tokenizer


def describe_data(recipe: Recipe, dataset: Dataset, home: Home) -> dict[str, dict[str, Any]]:
    """`train` and `test` -> statistics, without loading the base. Raises what tokenising raises."""
    info = find_base(recipe.base.name, home)
    tokenizer = load_tokenizer(info)
    train, test = tokenised(recipe, dataset, info, tokenizer)
    rows = embedding_rows(info)
    for part in (train, test):
        if part is not None and rows is not None:
            check_ids(part.items, tokenizer, rows)
    if recipe.adapter.train_tokens:
        check_seen(recipe, ids_of(recipe.adapter.train_tokens, tokenizer, rows, info.name), train.items)
    parts = {"train": train, **({"test": test} if test else {})}
    return {role: {**statistics(part), "notes": part.notes()} for role, part in parts.items()}


def tokenised(
    recipe: Recipe, dataset: Dataset, info: BaseInfo, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokenised, Tokenised | None]:
    """The data of a recipe as what its objective is about."""
    shape, stops = OBJECTIVES[recipe.train.objective].shape, stop_tokens(info.folder, tokenizer)
    data = data_within(recipe.data, info.max_length)
    return tokenise_items(dataset, tokenizer, data, shape, recipe.train.batch_size, stops)


def describe_runs(runs: Runs, datasets: Mapping[Any, Dataset], home: Home) -> dict[str, dict[str, Any]]:
    """`describe_data` of the first run, when all have been tokenised. Raises InputError with what is wrong in any."""
    described: list[dict[str, dict[str, Any]]] = []
    problems: list[InputError] = []
    different = {(run.base.name, data_of(run)): run for _, run in reversed(runs)}
    for run in reversed(different.values()):
        with gathering(problems):
            described.append(describe_data(run, datasets[data_of(run)], home))
    raise_all(problems)
    return described[0]


def check_ids(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise BadData for a token without a row in the embeddings: on a GPU that is an assertion of the device."""
    highest = max((max(part.ids) for part in parts_of(items)), default=0)
    if highest >= rows:
        name = tokenizer.convert_ids_to_tokens(highest)
        raise BadData(
            f"{name} (id {highest}) has no row in the base's embeddings ({rows}): leave out the examples that hold it, "
            "or use a base whose embeddings fit its tokenizer"
        )


def statistics(found: Tokenised) -> dict[str, Any]:
    """Counts of examples, tokens and labels, and lengths in tokens: least, median, 95th percentile, most."""
    lengths = sorted(map(num_tokens, found.items))
    return {
        "examples": len(lengths),
        "tokens": sum(lengths),
        "labels": sum(map(num_labels, found.items)),
        **{name: _quantile(lengths, share) for name, share in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))},
        **found.counts,
    }


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The value below which this share of the sorted values lies (nearest rank)."""
    return ordered[round(share * (len(ordered) - 1))]
