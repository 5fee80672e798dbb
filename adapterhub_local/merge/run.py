"""Merge adapters, one module at a time, in the portable normal form, every loss measured.

The result has one rank in every module, alpha = rank and no rsLoRA, so PEFT, vLLM and GGUF readers
agree on its delta. It is a file, a PEFT folder or a registered version, whole or not at all.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapterhub_local.durable import check_absent, place_file, place_folder, staging
from adapterhub_local.lora.config import WEIGHTS, AdapterConfig
from adapterhub_local.lora.write import Shapes, tensor_name, write_adapter
from adapterhub_local.merge.combine import Combined, Stored, Term, combine, rounding_loss, store
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.rank import check_kept, pooled_ranks, uniform_rank
from adapterhub_local.merge.report import MergeReport, Tally
from adapterhub_local.registry import Registry, Version

WORKERS = min(4, os.cpu_count() or 1)
FINE = 1e-3  # float16 rounds to 3e-4 where its range is wide enough
NARROW = (torch.float16, torch.bfloat16)
In = TypeVar("In")
Out = TypeVar("Out")
Judge = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Layout:
    """What is stored: the rank of each module, the rank it is padded to, and the dtype."""

    ranks: Mapping[str, int]
    padded: Mapping[str, int]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return max(self.padded.values())


def merge_to_registry(
    plan: MergePlan,
    registry: Registry,
    name: str,
    *,
    alias: str | None = None,
    judge: Judge | None = None,
    note: Mapping[str, Any] | None = None,
) -> tuple[Version, MergeReport]:
    """Merge and register the result as the next version of `name`.

    `judge` sees the folder of the merged adapter first: what it returns are the version's metrics, what it raises
    keeps the version from being registered. `note` is added to the lineage.
    """
    with staging(registry.home.tmp) as folder:
        files, report = _write(plan, folder, note=None)
        metrics = judge(folder) if judge else {}
        lineage = {**_lineage(plan, report), **({"metrics": metrics} if metrics else {}), **(note or {})}
        return registry.publish(name, files, lineage, alias=alias), report


def merge_to_path(plan: MergePlan, target: Path, *, judge: Judge | None = None) -> MergeReport:
    """Merge into one `.safetensors` file that carries its config, or else a PEFT folder. Raises InUse if it exists.

    `judge` sees the folder of the merged adapter first and keeps it from being written by raising.
    """
    check_absent(target)
    # staged beside the target: a rename is atomic on one filesystem only
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        folder = stage / "merged"
        folder.mkdir()
        note = {**plan.formula.to_json(), "parents": plan.lineage()}
        _, report = _write(plan, folder, note)
        if judge:
            judge(folder)
        if target.suffix == ".safetensors":
            place_file(folder / WEIGHTS, target)
        else:
            place_folder(folder, target)
    return report


def dry_run(plan: MergePlan) -> MergeReport:
    """The report of the merge, computed in full, with nothing written."""
    with _one_thread():
        layout, modules = _merge(plan)
        tally = Tally(plan)
        for stored in modules:
            tally.add(stored)
    return _report(plan, layout, tally)


def _write(plan: MergePlan, folder: Path, note: dict[str, Any] | None) -> tuple[dict[str, Path | bytes], MergeReport]:
    """Write the merged adapter into `folder`."""
    tally = Tally(plan)

    def tensors(modules: Iterable[Stored]) -> Iterator[tuple[str, torch.Tensor]]:
        for stored in modules:
            tally.add(stored)
            yield tensor_name(stored.module, "A"), stored.delta.A
            yield tensor_name(stored.module, "B"), stored.delta.B

    extra = {"merge": json.dumps(note, sort_keys=True)} if note else {}
    with _one_thread():
        layout, modules = _merge(plan)
        shapes, config = _shapes(plan, layout), _config(plan, layout)
        files = write_adapter(folder, config, shapes, tensors(modules), plan.base.get("fingerprint"), extra)
    return files, _report(plan, layout, tally)


def _merge(plan: MergePlan) -> tuple[Layout, Iterator[Stored]]:
    """The algorithm: combine each module, choose ranks and dtype, store each module.

    Where ranks and dtype follow from the plan alone the modules are streamed; else the merged factors are
    kept until all are seen.
    """
    weights = [parent.weight for parent in plan.parents]
    formula = plan.formula
    limit = int(formula.rule.value) if formula.rule.kind == "rank" and not formula.compact else None
    if limit is None and formula.space == "full" and formula.rule.kind == "exact":
        limit = plan.rank  # a whole merged matrix has full rank: as much is kept as its parents have

    def make(module: str, terms: list[Term]) -> Combined:
        return combine(module, terms, weights, formula, limit)

    layout = _known_layout(plan, limit)
    if layout is not None:

        def finish(module: str, terms: list[Term]) -> Stored:
            return store(make(module, terms), layout.ranks[module], layout.padded[module], layout.dtype)

        return layout, _in_order(lambda entry: finish(*entry), _terms(plan))
    combined = list(_in_order(lambda entry: make(*entry), _terms(plan)))
    chosen = _choose_layout(plan, combined, limit)

    def keep(one: Combined) -> Stored:
        return store(one, chosen.ranks[one.module], chosen.padded[one.module], chosen.dtype)

    return chosen, _in_order(keep, combined)


def _terms(plan: MergePlan) -> Iterator[tuple[str, list[Term]]]:
    """Each module with the deltas of the parents that have it, read as they are needed."""
    readers = []
    for parent in plan.parents:
        mine = tuple(module for module in plan.shapes if module in parent.adapter.shapes and parent.weight)
        readers.append(parent.adapter.deltas(mine))
    digests = [parent.digest if "seed" in plan.formula.parameters else "" for parent in plan.parents]
    for module in plan.shapes:
        owners = [i for i, one in enumerate(plan.parents) if module in one.adapter.shapes and one.weight]
        yield module, [Term(i, digests[i], next(readers[i])[1]) for i in owners]


def _known_layout(plan: MergePlan, limit: int | None) -> Layout | None:
    """The layout, if it follows from the plan."""
    dtype = _known_dtype(plan)
    if dtype is None:
        return None
    if limit is not None:
        rank = min(limit, plan.largest_rank)
        return Layout(dict.fromkeys(plan.shapes, rank), dict.fromkeys(plan.shapes, rank), dtype)
    if plan.formula.rule.kind == "exact" and plan.formula.row.linear is not None:
        own = {module: shape.rank for module, shape in plan.shapes.items()}
        return Layout(own, own if plan.formula.compact else dict.fromkeys(own, plan.rank), dtype)
    return None


def _known_dtype(plan: MergePlan) -> torch.dtype | None:
    """float32 for what is exact, or where a parent is wider than 16 bits; None if it is to be measured."""
    if plan.formula.dtype != "auto":
        return getattr(torch, plan.formula.dtype)
    is_exact = plan.formula.rule.kind in ("exact", "lossless") and plan.formula.space != "full"
    if is_exact or any(parent.adapter.dtype not in NARROW for parent in plan.parents):
        return torch.float32
    return None


def _choose_layout(plan: MergePlan, combined: list[Combined], limit: int | None) -> Layout:
    rule, compact = plan.formula.rule, plan.formula.compact
    if rule.kind == "exact" and limit is None:
        ranks = {one.module: one.width for one in combined}
    else:
        values = {one.module: one.spectrum.values for one in combined if one.spectrum is not None}
        totals = [one.total for one in combined]
        costs = {module: shape.in_features + shape.out_features for module, shape in plan.shapes.items()}
        if compact:
            ranks = pooled_ranks(rule, values, totals, costs)
        else:
            ranks = dict.fromkeys(values, limit or uniform_rank(rule, list(values.values()), totals))
    widest = max(min(ranks[one.module], one.width) for one in combined)
    own = {one.module: min(ranks[one.module], one.width) for one in combined}
    padded = own if compact else dict.fromkeys(own, widest)
    lost = sum(one.spectrum.lost(own[one.module]) for one in combined if one.spectrum is not None)
    check_kept(rule, lost, sum(one.total for one in combined), max(own.values()))
    dtype = _known_dtype(plan) or _measured_dtype(combined, own)
    return Layout(own, padded, dtype)


def _measured_dtype(combined: list[Combined], ranks: Mapping[str, int]) -> torch.dtype:
    """float16 if its rounding is as small as it can be, else the 16-bit dtype that rounds less."""
    total = sum(one.total for one in combined)
    losses = {}
    for dtype in NARROW:
        work = partial(_loss, ranks=ranks, dtype=dtype)
        losses[dtype] = sum(_in_order(work, combined))
        if losses[dtype] <= FINE**2 * total:
            return dtype
    best = min(losses, key=lambda dtype: losses[dtype])
    return best if math.isfinite(losses[best]) else torch.float32


def _loss(one: Combined, ranks: Mapping[str, int], dtype: torch.dtype) -> float:
    return rounding_loss(one, ranks[one.module], dtype)


def _in_order(work: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`map` on a few threads, at most one item a thread ahead; results come in the order of the items."""
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > WORKERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Each product on one thread: its sums are in one order, so the bytes do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shapes(plan: MergePlan, layout: Layout) -> Shapes:
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module, shape in plan.shapes.items():
        shapes[tensor_name(module, "A")] = (layout.dtype, (layout.padded[module], shape.in_features))
        shapes[tensor_name(module, "B")] = (layout.dtype, (shape.out_features, layout.padded[module]))
    return shapes


def _config(plan: MergePlan, layout: Layout) -> AdapterConfig:
    """Normal form. Where all parents adapt the same modules their short list of targets says so, else full names."""
    modules = set(plan.shapes)
    targets = {parent.adapter.config.target_modules for parent in plan.parents}
    same = all(set(parent.adapter.shapes) == modules for parent in plan.parents)
    common = targets.pop() if same and len(targets) == 1 else None
    other = {re.escape(module): rank for module, rank in layout.padded.items() if rank != layout.rank}
    return AdapterConfig(
        rank=layout.rank,
        alpha=layout.rank,
        target_modules=common if isinstance(common, tuple) else tuple(sorted(modules)),
        rank_pattern=other,
        alpha_pattern=dict(other),
        base_model=plan.base.get("hub_id"),
    )


def _report(plan: MergePlan, layout: Layout, tally: Tally) -> MergeReport:
    sizes = (layout.padded[module] * (s.in_features + s.out_features) for module, s in plan.shapes.items())
    return tally.report(list(layout.padded.values()), sum(sizes), layout.dtype)


def _lineage(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    tasks = {parent.version.lineage.get("task") for parent in plan.parents if parent.version is not None}
    return {
        "kind": "merge",
        "task": "+".join(sorted(task for task in tasks if task)) or None,
        "base": plan.base,
        "adapter": {
            "rank": report.rank,
            "alpha": report.rank,
            "num_modules": report.num_modules,
            "num_parameters": report.num_parameters,
        },
        "parents": plan.lineage(),
        "merge": {**report.summary(), **({"forced": True} if plan.forced else {})},
        "merge_report": report.details(),
    }
