"""What is to be merged, and every reason why it may not be, before a tensor is read."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.modules import linear_modules
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.durable import digest_file
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.lora.adapter import AdapterFile, open_adapter
from adapterhub_local.lora.config import SERVER_RANKS, WEIGHTS
from adapterhub_local.lora.contents import Shape, read_layout
from adapterhub_local.lora.scale import AlphaKnown
from adapterhub_local.merge.align import align, base_here, remarks, without_copies
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight, check_weights, groups, in_group, mean, num_groups
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.merge.token_rows import fit_parents, merged_ids
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter
from adapterhub_local.sizes import write_size

Opener = Callable[[Path, float | None], tuple[AdapterFile, dict[str, Any] | None]]


@dataclass(frozen=True)
class Parent:
    """One adapter of a merge: how it was named, its opened file, its weight, its version if it is registered."""

    label: str
    adapter: AdapterFile
    weight: Weight
    version: Version | None = None
    converted: Mapping[str, Any] | None = None  # from what, and with which loss; `adapter` is the converted one
    left_out: tuple[str, ...] = ()  # tensors of its file that are the base's own

    @property
    def base(self) -> dict[str, Any]:
        """What is known of its base."""
        if self.version is not None:
            return dict(self.version.lineage.get("base", {}))
        return {"fingerprint": self.adapter.base_fingerprint, "hub_id": self.adapter.config.hub_id}

    @property
    def name(self) -> str:
        """What people read: the version, or the name of the file without its folder."""
        return str(self.version) if self.version is not None else Path(self.label).name

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of the weights file, the same whether it is named as a file or as a version."""
        files = self.version.files if self.version is not None else ()
        known = next((file.digest for file in files if file.path == WEIGHTS), None)
        if known is None and self.converted is not None:
            path = Path(os.path.expanduser(self.label))
            return digest_file(path / WEIGHTS if path.is_dir() else path)
        return known or digest_file(self.adapter.path)

    def lineage(self) -> dict[str, Any]:
        """How the merged version names this parent; files by name and digest, not by path."""
        converted = {"converted": dict(self.converted)} if self.converted is not None else {}
        weights = {"weights": list(self.weight)} if isinstance(self.weight, tuple) else {}
        fields = {"weight": mean(self.weight), **weights, **converted}
        if self.version is None:
            return {"reference": self.name, "digest": self.digest, **fields}
        return {
            "reference": str(self.version),
            "manifest_digest": self.version.manifest_digest,
            "content_digest": self.version.content_digest,
            **fields,
            **({"pulled_from": origin} if (origin := self.version.lineage.get("pulled_from")) else {}),
        }


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
    opened = zip(labels, weights, _needed(labels, alphas, registry), strict=True)
    parents = tuple(_open(label, weight, registry, one, opener) for label, weight, one in opened)
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


def is_path(label: str) -> bool:
    """Whether a label names a file or folder, rather than a version."""
    is_there = Path(os.path.expanduser(label)).exists()
    return is_there or label.endswith(".safetensors") or label.startswith((".", "/", "~"))


def _open(label: str, weight: Weight, registry: Registry, alpha: float | None, opener: Opener | None) -> Parent:
    version = None if is_path(label) else check_adapter(registry.resolve(label))
    path, given = (Path(os.path.expanduser(label)), alpha) if version is None else (version.path, None)
    left_out: tuple[str, ...] = ()
    try:
        if opener is not None:
            adapter, converted = opener(path, given)
        else:
            adapter, converted = open_adapter(path, alpha=given, copies=True, tokens=True), None
            adapter, left_out = without_copies(adapter, Origin.of_adapter(adapter), registry)
    except InputError as error:
        if version is None:
            raise
        raise type(error)(str(error).replace(str(path), label)) from None  # nobody knows the folders of versions
    return Parent(label, adapter, weight, version, converted, left_out)


def _needed(labels: Sequence[str], alphas: Sequence[float | None], registry: Registry) -> list[float | None]:
    """The alpha for each label: one that is given for all is for those only that do not say theirs.

    Raises AlphaKnown if all of them say another.
    """
    if len(labels) < 2 or alphas[0] is None or len(set(alphas)) > 1:
        return list(alphas)
    needed: list[float | None] = []
    refused = None
    for label, one in zip(labels, alphas, strict=True):
        try:
            if is_path(label):
                read_layout(Path(os.path.expanduser(label)), alpha=one, dora=True, copies=True, tokens=True)
            needed.append(one)
        except AlphaKnown as error:
            refused = error
            needed.append(None)
    if refused is not None and all(
        one is None or not is_path(label) for label, one in zip(labels, needed, strict=True)
    ):
        raise refused
    return needed


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
