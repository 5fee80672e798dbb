"""Merge adapters by exact weighted sum, one module at a time, in the portable normal form.

The result has one rank in every module, alpha = rank and no rsLoRA, so PEFT, vLLM and GGUF readers
agree on its delta. It is a file, a PEFT folder or a registered version, whole or not at all.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.durable import check_absent, place_file, place_folder, staging
from adapterhub_local.errors import InputError
from adapterhub_local.lora.adapter import Delta, Shape
from adapterhub_local.lora.config import WEIGHTS, AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.merge.algebra import distance, norm, pad_rank, weighted_sum
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.registry import Registry, Version

DTYPE = torch.float32  # merged factors are stored in it; nothing narrower is exact
CANCELLED = 1e-6  # a sum this much smaller than its terms is rounding error


@dataclass
class MergeReport:
    """What a merge made and lost; norms are Frobenius norms over all modules.

    `relative_error` is |stored - exact| / |exact|. `kept` is |sum w_i D_i| / sum |w_i| |D_i|: near 0 the
    parents cancel each other out, and the error is given relative to what went in.
    """

    rank: int
    num_modules: int
    num_parameters: int
    norm: float = 0.0
    kept: float = 0.0
    relative_error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {"method": "weighted_sum", **vars(self)}


def merge_to_registry(plan: MergePlan, registry: Registry, name: str, *, alias: str | None = None) -> Version:
    """Merge and register the result as the next version of `name`."""
    with staging(registry.home.tmp) as folder:
        files, report = _write(plan, folder, note=None)
        return registry.publish(name, files, _lineage(plan, report), alias=alias)


def merge_to_path(plan: MergePlan, target: Path) -> MergeReport:
    """Merge into one `.safetensors` file that carries its config, or else a PEFT folder. Raises InUse if it exists."""
    check_absent(target)
    # staged beside the target: a rename is atomic on one filesystem only
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        folder = stage / "merged"
        folder.mkdir()
        note = {"method": "weighted_sum", "parents": [parent.lineage() for parent in plan.parents]}
        _, report = _write(plan, folder, note)
        if target.suffix == ".safetensors":
            place_file(folder / WEIGHTS, target)
        else:
            place_folder(folder, target)
    return report


def _write(plan: MergePlan, folder: Path, note: dict[str, Any] | None) -> tuple[dict[str, Path | bytes], MergeReport]:
    """Write the merged adapter into `folder`: the algorithm, module by module."""
    shapes = {}
    for module, shape in plan.shapes.items():
        shapes[tensor_name(module, "A")] = (DTYPE, (plan.rank, shape.in_features))
        shapes[tensor_name(module, "B")] = (DTYPE, (shape.out_features, plan.rank))
    report = MergeReport(plan.rank, len(plan.shapes), sum(_size(shape, plan.rank) for shape in plan.shapes.values()))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        squared_error = squared_norm = squared_input = 0.0
        for module in plan.shapes:
            parents = [parent for parent in plan.parents if module in parent.adapter.shapes and parent.weight]
            deltas = [parent.adapter.delta(module) for parent in parents]
            exact = weighted_sum(deltas, [parent.weight for parent in parents])
            stored = pad_rank(Delta(exact.A.to(DTYPE), exact.B.to(DTYPE), 1.0), plan.rank)
            if not (torch.isfinite(stored.A).all() and torch.isfinite(stored.B).all()):
                raise InputError(f"the weighted sum of {module} is too large for {DTYPE}: give smaller weights")
            yield tensor_name(module, "A"), stored.A
            yield tensor_name(module, "B"), stored.B
            wide = [Delta(delta.A.double(), delta.B.double(), delta.scaling) for delta in deltas]
            truth = weighted_sum(wide, [parent.weight for parent in parents])
            squared_error += distance(stored, truth) ** 2
            squared_norm += norm(truth) ** 2
            squared_input += (
                sum(abs(parent.weight) * norm(delta) for parent, delta in zip(parents, wide, strict=True)) ** 2
            )
        report.norm = math.sqrt(squared_norm)
        report.kept = math.sqrt(squared_norm / squared_input) if squared_input else 0.0
        scale = max(squared_norm, CANCELLED**2 * squared_input)
        report.relative_error = math.sqrt(squared_error / scale) if scale else 0.0

    extra = {"merge": json.dumps(note, sort_keys=True)} if note else {}
    files = write_adapter(folder, _config(plan), shapes, tensors(), plan.base.get("fingerprint"), extra)
    return files, report


def _size(shape: Shape, rank: int) -> int:
    return rank * (shape.in_features + shape.out_features)


def _config(plan: MergePlan) -> AdapterConfig:
    """Normal form. Where all parents adapt the same modules their short list of targets says so, else full names."""
    modules = set(plan.shapes)
    targets = {parent.adapter.config.target_modules for parent in plan.parents}
    same = all(set(parent.adapter.shapes) == modules for parent in plan.parents)
    common = targets.pop() if same and len(targets) == 1 else None
    return AdapterConfig(
        rank=plan.rank,
        alpha=plan.rank,
        target_modules=common if isinstance(common, tuple) else tuple(sorted(modules)),
        base_model=plan.base.get("hub_id"),
    )


def _lineage(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    tasks = {parent.version.lineage.get("task") for parent in plan.parents if parent.version is not None}
    return {
        "kind": "merge",
        "task": "+".join(sorted(task for task in tasks if task)) or None,
        "base": plan.base,
        "adapter": {
            "rank": plan.rank,
            "alpha": plan.rank,
            "num_modules": report.num_modules,
            "num_parameters": report.num_parameters,
        },
        "parents": [parent.lineage() for parent in plan.parents],
        "merge": {**report.to_json(), **({"forced": True} if plan.forced else {})},
    }
