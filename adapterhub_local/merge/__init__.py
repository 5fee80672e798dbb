"""Merging adapters on their deltas, exactly, with the loss known before anything is written.

From files to a file: `make_plan(labels, weights, registry, formula=Formula(...))`, then `merge_to_path`,
`merge_to_registry` or `dry_run`. On tensors: a `Delta` is `s B A`; `weighted_sum`, `Stack` and `decompose` work on
factors, `merge_in_core`, `merge_aligned` and `merge_whole` on entries, by the functions that `METHODS` lists with
their papers. Each docstring gives formula, shapes and errors. DoRA is in `merge.dora`, which needs a base.
"""

from typing import TYPE_CHECKING, Any

from adapterhub_local.lazy import load

if TYPE_CHECKING:
    from adapterhub_local.lora.adapter import Delta
    from adapterhub_local.merge.algebra import Spectrum, decompose, distance, inner, norm, weighted_sum
    from adapterhub_local.merge.formula import Formula
    from adapterhub_local.merge.merge import dry_run, merge_to_path, merge_to_registry
    from adapterhub_local.merge.methods import METHODS
    from adapterhub_local.merge.plan import MergePlan, make_plan
    from adapterhub_local.merge.rank_rule import RankRule, parse_rule
    from adapterhub_local.merge.report import MergeReport
    from adapterhub_local.merge.space import merge_aligned, merge_in_core, merge_whole
    from adapterhub_local.merge.stack import Stack

__all__ = [
    "METHODS",
    "Delta",
    "Formula",
    "MergePlan",
    "MergeReport",
    "RankRule",
    "Spectrum",
    "Stack",
    "decompose",
    "distance",
    "dry_run",
    "inner",
    "make_plan",
    "merge_aligned",
    "merge_in_core",
    "merge_to_path",
    "merge_to_registry",
    "merge_whole",
    "norm",
    "parse_rule",
    "weighted_sum",
]

_HOMES = {
    "Delta": "adapterhub_local.lora.adapter",
    "Spectrum": "adapterhub_local.merge.algebra",
    "decompose": "adapterhub_local.merge.algebra",
    "distance": "adapterhub_local.merge.algebra",
    "inner": "adapterhub_local.merge.algebra",
    "norm": "adapterhub_local.merge.algebra",
    "weighted_sum": "adapterhub_local.merge.algebra",
    "Formula": "adapterhub_local.merge.formula",
    "dry_run": "adapterhub_local.merge.merge",
    "merge_to_path": "adapterhub_local.merge.merge",
    "merge_to_registry": "adapterhub_local.merge.merge",
    "METHODS": "adapterhub_local.merge.methods",
    "MergePlan": "adapterhub_local.merge.plan",
    "make_plan": "adapterhub_local.merge.plan",
    "RankRule": "adapterhub_local.merge.rank_rule",
    "parse_rule": "adapterhub_local.merge.rank_rule",
    "MergeReport": "adapterhub_local.merge.report",
    "merge_aligned": "adapterhub_local.merge.space",
    "merge_in_core": "adapterhub_local.merge.space",
    "merge_whole": "adapterhub_local.merge.space",
    "Stack": "adapterhub_local.merge.stack",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
