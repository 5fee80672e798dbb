"""Merged rows of embeddings: the base's row plus the weighted sum of what each adapter changed it by.

Only a weighted sum is defined for them, as rows are not low-rank deltas: `row = base + sum_i w_i (row_i - base)` over
all tokens that one of the adapters has a row of, exact, in float32. An adapter without a row of a token has the base's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import Incompatible, InputError

if TYPE_CHECKING:
    from adapterhub_local.merge.parent import Parent
    from adapterhub_local.merge.plan import MergePlan

METHOD = "weighted_sum"
LEAST = 1e-9  # of the base's row, below which its share is rounding of weights that sum to 1


def fit_parents(parents: Sequence["Parent"], info: BaseInfo | None, method: str) -> tuple["Parent", ...]:
    """The parents with the base's names of what they have rows of, where the base is here.

    Raises Incompatible for a method other than a weighted sum, and for rows that the base does not have.
    """
    having = [parent for parent in parents if parent.adapter.tokens]
    if not having:
        return tuple(parents)
    first = having[0]
    if method != METHOD:
        raise Incompatible(
            f"{first.label} has rows of the embeddings for {len(first.adapter.token_ids)} tokens, for which {method} "
            f"is not defined: merge with --method {METHOD}"
        )
    if info is None:
        if len(parents) > 1 and any(parent.adapter.tokens.keys() != first.adapter.tokens.keys() for parent in parents):
            raise _without_base(first)
        return tuple(parents)
    from adapterhub_local.base.vocabulary import Vocabulary, fit_rows

    vocabulary, done = Vocabulary.of_base(info), []
    for parent in parents:
        try:
            adapter = fit_rows(parent.adapter, vocabulary, info.name)
        except Incompatible as error:
            raise Incompatible(str(error).replace(str(parent.adapter.path), parent.label)) from None
        if vocabulary.is_tied and vocabulary.head in adapter.tokens and len(parents) > 1:
            raise Incompatible(
                f"{parent.label} has rows of {vocabulary.head} apart from those of the embeddings, which base "
                f"'{info.name}' shares with it: it cannot be merged with others. Train it with rows of the embeddings"
            )
        done.append(replace(parent, adapter=adapter))
    return tuple(done)


def merged_ids(parents: Sequence["Parent"], weights: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, ...]]:
    """Module -> the tokens that the result has rows of, ascending; `weights` are those of all parents by module."""
    found: dict[str, set[int]] = {}
    for module, own in weights.items():
        for parent, weight in zip(parents, own, strict=True):
            if weight and module in parent.adapter.tokens:
                found.setdefault(module, set()).update(parent.adapter.tokens[module].ids)
    return {module: tuple(sorted(ids)) for module, ids in sorted(found.items())}


def merged_rows(plan: "MergePlan") -> Iterator[tuple[str, torch.Tensor]]:
    """(module, rows (tokens, hidden) in float32) of the result.

    Raises Incompatible if a part of the base's rows is in them and the base is not here or is another; InputError if
    the sum overflows.
    """
    for module, ids in plan.tokens.items():
        known = torch.tensor(ids)
        mine = [(parent, weight) for parent, weight in zip(plan.parents, plan.weights(module), strict=True)
                if weight and module in parent.adapter.tokens]  # fmt: skip
        hidden = {parent.adapter.tokens[module].hidden for parent, _ in mine}
        if len(hidden) > 1:
            raise Incompatible(f"{module} has rows of {' and '.join(map(str, sorted(hidden)))} numbers: they were made "
                               "for different models")  # fmt: skip
        total, left = torch.zeros(len(ids), hidden.pop(), dtype=torch.float64), torch.ones(len(ids), 1).double()
        for parent, weight in mine:
            places = torch.searchsorted(known, torch.tensor(parent.adapter.tokens[module].ids))
            total[places] += weight * parent.adapter.rows(module).double()
            left[places] -= weight
        if bool((left.abs() > LEAST).any()):
            if plan.info is None:
                raise _without_base(mine[0][0])
            from adapterhub_local.base.weights import BaseWeights

            total += left * BaseWeights(plan.info).of(module)[0][known].double()
        rows = total.float()
        if not torch.isfinite(rows).all():
            raise InputError(f"the merged rows of {module} are too large for float32: give smaller weights")
        yield module, rows


def _without_base(parent: "Parent") -> Incompatible:
    return Incompatible(
        f"{parent.label} has rows of the embeddings, and a merge keeps a part of the base's own, which is not here: "
        "`qhub base add` it, and `qhub add` the adapter for it"
    )
