"""The error of a merge at every rank that it may be cut to, before one is chosen."""

from dataclasses import replace

import torch

from adapterhub_local.errors import InputError
from adapterhub_local.merge.combine import Combined, Term, combine
from adapterhub_local.merge.merge import each_module
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.merge.report import relative, went_in
from adapterhub_local.merge.threads import in_order, one_thread


def errors_by_rank(plan: MergePlan) -> list[float]:
    """The relative error if every module keeps rank 1, rank 2 and so on, up to the largest rank that there is.

    It is what cutting loses, by the singular values, and nothing of that rank is nearer (Eckart-Young); storing in 16
    bits adds its rounding. What the plan itself keeps plays no part. Raises InputError for a merge of whole matrices,
    whose singular values are not all known.
    """
    if plan.formula.space == "full":
        raise InputError("the error at every rank is known of merges in core space: leave --space full out")
    formula = replace(plan.formula, rule=RankRule("rank", plan.largest_rank), compact=False)

    def values(entry: tuple[str, list[Term]]) -> Combined:
        module, terms = entry
        return combine(module, terms, plan.weights(module), formula, 1)  # all values, and of the vectors the first

    lost = torch.zeros(plan.largest_rank + 1, dtype=torch.float64)
    total = into = 0.0
    with one_thread():
        for one in in_order(values, each_module(plan)):
            assert one.spectrum is not None, "it is to be reduced"
            squares = one.spectrum.values.double().square()
            tails = squares.flip(0).cumsum(0).flip(0)  # of rank k: what the values from k on have
            lost[: len(tails)] += tails[: len(lost)]
            total += one.total
            into += went_in(plan.weights(one.module), one.products)
    return [relative(square, total, into) for square in lost[1:].tolist()]
