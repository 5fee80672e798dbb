"""Merge adapters, one module at a time, in the portable normal form, every loss measured.

The result has one rank in every module, alpha = rank and no rsLoRA, so PEFT, vLLM and GGUF readers
agree on its delta. It is a file, a PEFT folder or a registered version, whole or not at all.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.durable import check_absent, place_file, place_folder, staging
from adapterhub_local.lora.config import WEIGHTS, AdapterConfig
from adapterhub_local.lora.names import rows_name
from adapterhub_local.lora.write import Shapes, tensor_name, write_adapter
from adapterhub_local.merge.combine import Combined, Stored, Term, combine, store
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.report import MergeReport, Tally
from adapterhub_local.merge.storage import Layout, choose_layout, known_layout
from adapterhub_local.merge.threads import in_order, one_thread
from adapterhub_local.merge.token_rows import merged_rows
from adapterhub_local.registry import Registry, Version

Judge = Callable[[Path], Mapping[str, Any]]


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
    with one_thread():
        layout, modules = _merge(plan)
        tally = Tally(plan)
        for stored in modules:
            tally.add(stored)
        rows = dict(merged_rows(plan))
    return _report(plan, layout, tally, rows)


def _write(plan: MergePlan, folder: Path, note: dict[str, Any] | None) -> tuple[dict[str, Path | bytes], MergeReport]:
    """Write the merged adapter into `folder`."""
    tally = Tally(plan)

    def tensors(modules: Iterable[Stored]) -> Iterator[tuple[str, torch.Tensor]]:
        for stored in modules:
            tally.add(stored)
            yield tensor_name(stored.module, "A"), stored.delta.A
            yield tensor_name(stored.module, "B"), stored.delta.B
        yield from ((rows_name(module), each) for module, each in rows.items())

    extra = {"merge": json.dumps(note, sort_keys=True)} if note else {}
    rows = dict(merged_rows(plan))  # few, and first: what is wrong with them is known at once
    with one_thread():
        layout, modules = _merge(plan)
        shapes, config = _shapes(plan, layout, rows), _config(plan, layout)
        files = write_adapter(folder, config, shapes, tensors(modules), plan.base.get("fingerprint"), extra, plan.known)
    return files, _report(plan, layout, tally, rows)


def _merge(plan: MergePlan) -> tuple[Layout, Iterator[Stored]]:
    """The algorithm: combine each module, choose ranks and dtype, store each module.

    Where ranks and dtype follow from the plan alone the modules are streamed; else the merged factors are
    kept until all are seen.
    """
    formula = plan.formula
    limit = int(formula.rule.value) if formula.rule.kind == "rank" and not formula.compact else None
    if limit is None and formula.space == "full" and formula.rule.kind == "exact":
        limit = plan.rank  # a whole merged matrix has full rank: as much is kept as its parents have

    def make(module: str, terms: list[Term]) -> Combined:
        return combine(module, terms, plan.weights(module), formula, limit)

    layout = known_layout(plan, limit)
    if layout is not None:

        def finish(module: str, terms: list[Term]) -> Stored:
            return store(make(module, terms), layout.ranks[module], layout.padded[module], layout.dtype)

        return layout, in_order(lambda entry: finish(*entry), each_module(plan))
    combined = list(in_order(lambda entry: make(*entry), each_module(plan)))
    chosen = choose_layout(plan, combined, limit)

    def keep(one: Combined) -> Stored:
        return store(one, chosen.ranks[one.module], chosen.padded[one.module], chosen.dtype)

    return chosen, in_order(keep, combined)


def each_module(plan: MergePlan) -> Iterator[tuple[str, list[Term]]]:
    """Each module with the deltas of the parents that have it, read as they are needed."""
    readers = []
    owners = {
        module: [i for i, one in enumerate(plan.parents) if module in one.adapter.shapes and plan.weights(module)[i]]
        for module in plan.shapes
    }
    for index, parent in enumerate(plan.parents):
        mine = tuple(module for module in plan.shapes if index in owners[module])
        readers.append(parent.adapter.deltas(mine))
    digests = [parent.digest if "seed" in plan.formula.parameters else "" for parent in plan.parents]
    for module in plan.shapes:
        yield module, [Term(i, digests[i], next(readers[i])[1]) for i in owners[module]]


def _shapes(plan: MergePlan, layout: Layout, rows: Mapping[str, torch.Tensor]) -> Shapes:
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module, shape in plan.shapes.items():
        shapes[tensor_name(module, "A")] = (layout.dtype, (layout.padded[module], shape.in_features))
        shapes[tensor_name(module, "B")] = (layout.dtype, (shape.out_features, layout.padded[module]))
    return shapes | {rows_name(module): (each.dtype, tuple(each.shape)) for module, each in rows.items()}


def _config(plan: MergePlan, layout: Layout) -> AdapterConfig:
    """Normal form. Where all parents adapt the same modules their short list of targets says so, else full names."""
    modules = set(plan.shapes)
    configs = [parent.adapter.config for parent in plan.parents]
    targets = {config.target_modules for config in configs if config.narrowing is None}
    same = all(config.narrowing is None for config in configs)
    same = same and all(set(parent.adapter.shapes) == modules for parent in plan.parents)
    common = targets.pop() if same and len(targets) == 1 else None
    other = {re.escape(module): rank for module, rank in layout.padded.items() if rank != layout.rank}
    return AdapterConfig(
        rank=layout.rank,
        alpha=layout.rank,
        target_modules=common if isinstance(common, tuple) else tuple(sorted(modules)),
        rank_pattern=other,
        alpha_pattern=dict(other),
        base_model=plan.base.get("hub_id"),
        tokens=plan.tokens,
    )


def _report(plan: MergePlan, layout: Layout, tally: Tally, rows: Mapping[str, torch.Tensor]) -> MergeReport:
    sizes = (layout.padded[module] * (s.in_features + s.out_features) for module, s in plan.shapes.items())
    count = sum(sizes) + sum(each.numel() for each in rows.values())
    return tally.report(list(layout.padded.values()), count, layout.dtype)


def _lineage(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    tasks = {parent.version.lineage.get("task") for parent in plan.parents if parent.version is not None}
    return {
        "kind": "merge",
        "task": "+".join(sorted(task for task in tasks if task)) or None,
        "base": plan.base,
        "adapter": {
            "rank": report.rank,
            "alpha": report.rank,
            **({"tokens": plan.num_tokens} if plan.tokens else {}),
            "num_modules": report.num_modules,
            "num_parameters": report.num_parameters,
        },
        "parents": plan.lineage(),
        "merge": {**report.summary(), **({"forced": True} if plan.forced else {})},
        "merge_report": report.details(),
    }
