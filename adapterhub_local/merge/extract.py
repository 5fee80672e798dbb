"""A LoRA from the difference of two full models: the best low-rank delta of each linear layer, and what it leaves out.

What is not a linear layer (embeddings, norms, the output head) cannot be in a LoRA: how much it changed is reported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.source import check_finite
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.lora.adapter import Delta
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.merge.algebra import pad_rank
from adapterhub_local.merge.space import leading

SEED = 0  # of the random projections by which large matrices are decomposed


@dataclass(frozen=True)
class Weights:
    """A full model's tensors by name, read one at a time; `label` is what people call it."""

    label: str
    names: frozenset[str]
    read: Callable[[str], torch.Tensor]


@dataclass
class Extraction:
    """What was kept: `retained_energy` is the share of the squared Frobenius norm of all linear layers' differences."""

    rank: int
    num_modules: int = 0
    num_parameters: int = 0
    retained_energy: float = 0.0
    relative_error: float = 0.0
    modules: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)  # tensor -> relative change, largest first

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def extract(
    before: Weights, after: Weights, linears: Mapping[str, tuple[int, int]], rank: int, folder: Path, *,
    hub_id: str | None = None, fingerprint: str | None = None, progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Path | bytes], Extraction]:  # fmt: skip
    """Write the rank-`rank` LoRA of `after - before` into `folder` and return its files and what it keeps.

    `linears` gives (out_features, in_features) of the layers that may be adapted. Layers that did not change are
    left out. Raises Incompatible if a tensor is missing or has another shape in one of the models, BadFile if one is
    not finite, InputError if nothing changed.
    """
    shared = _check(before, after, linears)
    report = Extraction(rank)
    deltas: dict[str, Delta] = {}
    total = lost = 0.0
    for done, name in enumerate(shared):
        if progress:
            progress(done, len(shared))
        old, new = before.read(name).float(), after.read(name).float()
        if old.shape != new.shape:
            raise Incompatible(
                f"{name} is {tuple(old.shape)} in {before.label} and {tuple(new.shape)} in {after.label}: a LoRA is "
                "the difference of two models of one shape"
            )
        for model, tensor in ((before, old), (after, new)):
            check_finite(name, tensor, model.label)
        change, module = new - old, name.removesuffix(".weight")
        energy = float(change.double().square().sum())
        if energy == 0:
            continue
        if module not in linears or not name.endswith(".weight"):
            report.left_out[name] = math.sqrt(energy) / max(float(old.double().norm()), 1e-30)
            continue
        kept = leading(change, rank, torch.Generator().manual_seed(SEED))
        deltas[module] = kept.truncate(min(rank, len(kept.values)))
        missing = kept.lost(rank)
        total, lost = total + energy, lost + missing
        report.modules.append({"module": module, "norm": math.sqrt(energy), "retained_energy": 1 - missing / energy})
    if not deltas:
        raise InputError(f"{after.label} has the linear layers of {before.label}: there is nothing to extract")
    report.num_modules = len(deltas)
    report.relative_error, report.retained_energy = math.sqrt(lost / total), 1 - lost / total
    report.left_out = dict(sorted(report.left_out.items(), key=lambda item: -item[1]))
    padded = {module: pad_rank(delta, rank) for module, delta in sorted(deltas.items())}
    report.num_parameters = sum(delta.A.numel() + delta.B.numel() for delta in padded.values())
    config = AdapterConfig(rank, rank, tuple(padded), base_model=hub_id)
    factors = {tensor_name(module, f): getattr(delta, f) for module, delta in padded.items() for f in "AB"}
    shapes = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
    return write_adapter(folder, config, shapes, factors.items(), fingerprint), report


def _check(before: Weights, after: Weights, linears: Mapping[str, tuple[int, int]]) -> list[str]:
    """The tensors both models have. Raises Incompatible if a linear layer is missing."""
    for model in (before, after):
        missing = sorted(module for module in linears if f"{module}.weight" not in model.names)
        if missing:
            raise Incompatible(f"{model.label} has no {missing[0]} (and {len(missing) - 1} more): it is another model")
    return sorted(before.names & after.names)
