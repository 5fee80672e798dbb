"""What is to be merged, and every reason why it may not be, before a tensor is read."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.modules import linear_modules
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.lora.config import SERVER_RANKS
from adapterhub_local.lora.contents import Shape
from adapterhub_local.merge.align import align, base_here, remarks
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight, check_weights, groups, in_group, num_groups
from adapterhub_local.merge.parent import Opener, Parent, needed_alphas, open_parent
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.merge.token_rows import fit_parents, merged_ids
from adapterhub_local.registry import Registry
from adapterhub_local.sizes import write_size


@dataclass(frozen=True)
class MergePlan:
    """Parents that fit together, the formula that makes them one, and the shape of every module of the exact sum."""

    parents: tuple[Parent, ...]
    shapes: dict[str, Shape]
    base: dict[str, Any]
    forced: bool = False
    formula: Formula = Formula()
    known: frozenset[str] = frozenset()  # the linear modules of the base, if it is here
    notes: tuple[str, ...] = ()  # what a person should know
    group: Mapping[str, int] = field(default_factory=dict)  # of layers, by module, where weights differ by it
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # embeddings or head -> ids of its rows
    info: BaseInfo | None = None  # the base, if it is here

    def lineage(self) -> list[dict[str, Any]]:
        """What the result records of its parents; files are hashed side by side."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(Parent.lineage, self.parents))

    def weights(self, module: str) -> list[float]:
        """The weight of each parent in a module."""
        return in_group([parent.weight for parent in self.parents], self.group.get(module, 0))

    @property
    def num_tokens(self) -> int:
        """How many tokens the result has rows of its own for, in embeddings or head."""
        return len(set[int]().union(*self.tokens.values()))

    @property
    def rank(self) -> int:
        """The rank of the exact sum: the largest sum of the parents' ranks in a module."""
        return max(shape.rank for shape in self.shapes.values())

    @property
    def largest_rank(self) -> int:
        """The rank above which no module of the result has anything left to keep."""
        whole = self.formula.space == "full"
        limits = (min(s.in_features, s.out_features, *(() if whole else (s.rank,))) for s in self.shapes.values())
        return max(limits)


def make_plan(
    labels: Sequence[str],
    weights: Sequence[Weight],
    registry: Registry,
    *,
    alpha: float | Sequence[float | None] | None = None,
    force: bool = False,
    formula: Formula | None = None,
    opener: Opener | None = None,
) -> MergePlan:
    """Open the adapters named by `labels` (files, PEFT folders or references) and check that they can be merged.

    A weight is a number, or one for each group of layers (see `layers.groups`), as many for every adapter that has more
    than one. `alpha` is for files that do not say their scale: one for all, or one for each label. `opener` opens files
    and folders, as `dora.through_base` does for those that must be converted first. Raises InputError if weights
    and adapters do not match in number, or a weight is not finite, or all are zero, or the formula does not fit;
    Incompatible for different bases (unless `force`) or shapes; what opening a file raises.
    """
    formula = formula or Formula()
    if len(labels) != len(weights):
        raise InputError(f"{len(labels)} adapters and {len(weights)} weights: give one weight for each, in order")
    check_weights(weights)
    count = num_groups(weights)
    for group in range(count):
        formula.check(in_group(weights, group))
    formula = formula.normal()
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha] * len(labels)
    opened = zip(labels, weights, needed_alphas(labels, alphas, registry), strict=True)
    parents = tuple(open_parent(label, weight, registry, one, opener) for label, weight, one in opened)
    base = _common_base(parents, force)
    info = base_here(Origin.of_lineage(base), registry)
    parents = fit_parents(align(parents, info), info, formula.method)
    left_out = [f"{one.name}: left out, as its base's own: {name}" for one in parents for name in one.left_out]
    known = frozenset(linear_modules(info)) if info is not None else frozenset()
    notes = (*remarks(parents), *left_out)
    every = {module for parent in parents for module in parent.adapter.shapes}
    with_rows = {module for parent in parents for module in parent.adapter.tokens}
    group_of = groups(every | with_rows, count) if count > 1 else {}
    plan = MergePlan(parents, _common_shapes(parents, group_of), base, force, formula, known, notes, group_of)
    tokens = merged_ids(parents, {module: plan.weights(module) for module in with_rows})
    plan = _within_budget(replace(plan, tokens=tokens, info=info))
    if formula.rule.kind == "rank" and formula.rule.value > plan.largest_rank:
        raise InputError(
            f"rank {formula.rule.value:g} is more than this merge has: its modules have rank {plan.largest_rank} "
            "at most. Leave --rank out to keep all of it"
        )
    return plan


def _within_budget(plan: MergePlan) -> MergePlan:
    """The plan with a rank in the place of a budget. Raises InputError if not even rank 1 fits."""
    rule, bytes_a_rank = plan.formula.rule, 0
    if rule.kind == "auto":
        rank, budget = SERVER_RANKS[-1], "servers take no larger one"
    elif rule.kind == "size":
        bytes_a_rank = _bytes_a_number(plan) * sum(s.in_features + s.out_features for s in plan.shapes.values())
        rank = int(rule.value) // bytes_a_rank
        budget = f"a rank takes {bytes_a_rank:,} bytes of {write_size(int(rule.value))}"
    else:
        return plan
    if rank < 1:
        raise InputError(
            f"max_size is {write_size(int(rule.value))}, but rank 1 takes {bytes_a_rank:,} bytes already: give more, "
            "or --dtype float16"
        )
    if rank >= plan.rank:
        return replace(plan, formula=replace(plan.formula, rule=RankRule("exact")))
    kept = min(rank, plan.largest_rank)
    if kept == plan.largest_rank:
        note = f"rank {kept} keeps all of the sum's {plan.rank}: no module has more"
    else:
        note = f"rank {kept} of {plan.rank} is kept: {budget}"
        if rule.kind == "auto":
            note += "; --rank exact keeps all, --rank, --energy, --max-error and --max-size choose otherwise"
    return replace(plan, formula=replace(plan.formula, rule=RankRule("rank", kept)), notes=(*plan.notes, note))


def _bytes_a_number(plan: MergePlan) -> int:
    """Of what is stored: 4 for float32, which a merge is if it is asked for or a parent is wider than 16 bits."""
    if plan.formula.dtype != "auto":
        return 4 if plan.formula.dtype == "float32" else 2
    return 2 if all(parent.adapter.dtype.itemsize == 2 for parent in plan.parents) else 4


def _common_base(parents: Sequence[Parent], force: bool) -> dict[str, Any]:
    """The base all parents were made for. Unknown bases are taken to fit; known ones must agree."""
    for left, right in combinations(parents, 2):
        ours, theirs = (Origin.of_lineage(parent.base) for parent in (left, right))
        if ours.is_known and theirs.is_known and not belongs(ours, theirs) and not force:
            raise Incompatible(
                f"{left.label} and {right.label} were made for different bases ({_short(left)} and "
                f"{_short(right)}): merging them makes no sense. --force merges them anyway"
            )
    bases = [parent.base for parent in parents]
    return next((base for kind in ("fingerprint", "hub_id") for base in bases if base.get(kind)), bases[0])


def _common_shapes(parents: Sequence[Parent], group_of: Mapping[str, int]) -> dict[str, Shape]:
    """The union of the parents' modules; the rank of each is the sum of the ranks that take part."""
    shapes: dict[str, Shape] = {}
    first: dict[str, Parent] = {}
    for parent in parents:
        for module, shape in parent.adapter.shapes.items():
            before = shapes.get(module, Shape(shape.in_features, shape.out_features, 0))
            if (before.in_features, before.out_features) != (shape.in_features, shape.out_features):
                raise Incompatible(
                    f"{module} is {before.out_features} x {before.in_features} in {first[module].label} and "
                    f"{shape.out_features} x {shape.in_features} in {parent.label}: they were made for different models"
                )
            first.setdefault(module, parent)
            (weight,) = in_group([parent.weight], group_of.get(module, 0))
            rank = before.rank + (shape.rank if weight else 0)
            shapes[module] = Shape(shape.in_features, shape.out_features, rank)
    return {module: shape for module, shape in sorted(shapes.items()) if shape.rank}


def _short(parent: Parent) -> str:
    base = parent.base
    name = base.get("name") or base.get("hub_id") or ""
    return f"{name} {(base.get('fingerprint') or '')[:19]}".strip()
