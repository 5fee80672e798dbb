"""What a recipe's data are as tokens: how many, how long, how many are learned."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapterhub_local.base.store import BaseInfo, find_base
from adapterhub_local.data.load import Dataset
from adapterhub_local.errors import Corrupt
from adapterhub_local.recipe import Recipe
from adapterhub_local.settings import Home
from adapterhub_local.train.examples import Tokenised, tokenise_data


def describe_data(recipe: Recipe, dataset: Dataset, home: Home) -> dict[str, dict[str, Any]]:
    """`train` and `test` -> statistics, without loading the base. Raises what tokenising raises."""
    train, test = tokenise_data(dataset, load_tokenizer(find_base(recipe.base.name, home)), recipe.data)
    parts = {"train": train, **({"test": test} if test else {})}
    return {role: {**statistics(part), "notes": part.notes(recipe.data.max_length)} for role, part in parts.items()}


def load_tokenizer(info: BaseInfo) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, without its model. Raises Corrupt."""
    try:
        return AutoTokenizer.from_pretrained(info.folder)
    except (OSError, ValueError) as error:
        raise Corrupt(f"base '{info.name}' has no tokenizer that can be loaded: {str(error).splitlines()[0]}") from None


def statistics(tokenised: Tokenised) -> dict[str, Any]:
    """Counts of examples, tokens and labels, and lengths in tokens: least, median, 95th percentile, most."""
    lengths = sorted(len(example.ids) for example in tokenised.examples)
    return {
        "examples": len(lengths),
        "tokens": sum(lengths),
        "labels": sum(example.num_labels for example in tokenised.examples),
        **{name: _quantile(lengths, share) for name, share in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))},
        **tokenised.counts,
    }


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The value below which this share of the sorted values lies (nearest rank)."""
    return ordered[round(share * (len(ordered) - 1))]
