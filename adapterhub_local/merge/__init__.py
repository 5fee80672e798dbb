"""Merging adapters on their deltas, exactly, with the loss known before anything is written.

From files to a file: `make_plan(labels, weights, registry, formula=Formula(...))`, then `merge_to_path`,
`merge_to_registry` or `dry_run`. On tensors: a `Delta` is `s B A`; `weighted_sum`, `Stack` and `decompose` work on
factors, `merge_in_core`, `merge_aligned` and `merge_whole` on entries, by the functions that `METHODS` lists with
their papers. Each docstring gives formula, shapes and errors. DoRA is in `merge.dora`, which needs a base.
"""

from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import Spectrum, decompose, distance, inner, norm, weighted_sum
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.merge import dry_run, merge_to_path, merge_to_registry
from adapterhub_local.merge.methods import METHODS
from adapterhub_local.merge.plan import MergePlan, make_plan
from adapterhub_local.merge.rank import RankRule, parse_rule
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
