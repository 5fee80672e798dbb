"""DoRA through its base: the change of weight it really makes, reduced to a rank, as a plain adapter.

DoRA (https://arxiv.org/abs/2402.09353) scales each row of the changed weight to a length m it has learned:
W' = m (W + s B A) / |W + s B A|. Its delta W' - W has full rank, so a plain adapter holds it with an error.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.fit import check_copies, renamed_for
from adapterhub_local.base.modules import linear_modules
from adapterhub_local.base.origin import Origin, belongs
from adapterhub_local.base.vocabulary import Vocabulary, fit_rows
from adapterhub_local.base.weights import BaseWeights
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.lora.adapter import AdapterFile, Delta, open_adapter
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.names import rows_name
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.merge.parent import Opener
from adapterhub_local.merge.space import leading

ROWS = 1024  # of a weight, looked at at a time
Converted = tuple[AdapterFile, dict[str, Any] | None]
WeightOf = Callable[[str], tuple[torch.Tensor, torch.dtype]]  # module -> weight, and the dtype it was made from


def row_scales(weight: torch.Tensor, delta: Delta, magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`m / |W + D|` (out) in float32 on the weight's device, |.| the norm of each row, m (out).

    PEFT, which learned m, takes the norms with W rounded to the base's 16-bit `dtype`. At no time is there more in
    float32 than some rows of the weight.
    """
    A, B, lengths = (each.to(weight.device, torch.float32) for each in (delta.A, delta.B, magnitude))
    scales = torch.empty_like(lengths)
    for start in range(0, len(scales), ROWS):
        part = slice(start, start + ROWS)
        changed = torch.addmm(weight[part].to(dtype).float(), B[part], A, alpha=delta.scaling)
        norms = torch.linalg.vector_norm(changed, dim=1)
        scales[part] = lengths[part] / norms.clamp(min=torch.finfo(torch.float32).tiny)
    return scales


def dora_delta(weight: torch.Tensor, delta: Delta, magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`diag(m / |W + D|) (W + D) - W` (out x in) in float32; m and `dtype` as in `row_scales`."""
    changed = weight + delta.dense().float()
    return changed * row_scales(weight, delta, magnitude, dtype)[:, None] - weight


def weight_change(adapter: AdapterFile, module: str, weight_of: WeightOf | None) -> torch.Tensor:
    """What `adapter` adds to a module's weight, as a matrix (out x in) in float32 or wider, DoRA's lengths included.

    `weight_of` gives the module's weight in float32 and the base's 16-bit dtype; only DoRA needs it. Raises
    Incompatible if the weight has another shape.
    """
    delta = adapter.delta(module)
    if module not in adapter.magnitudes:
        return delta.dense()
    assert weight_of is not None, "DoRA is opened with its base at hand"
    weight, dtype = weight_of(module)
    if weight.shape != (delta.B.shape[0], delta.A.shape[1]):
        raise Incompatible(
            f"{adapter.path}: {module} is {delta.B.shape[0]} x {delta.A.shape[1]}, in its base it is "
            f"{weight.shape[0]} x {weight.shape[1]}"
        )
    return dora_delta(weight, delta, adapter.magnitude(module), dtype)


def through_base(info: BaseInfo, rank: int | None, folder: Path, *, force: bool = False) -> Opener:
    """A way to open adapters that converts those with DoRA, into `folder`, and leaves others as they are.

    `rank` is that of the converted adapters, twice their own if None. The second thing returned says what was
    converted and lost. Raises Incompatible if an adapter is of another base (unless `force`) or has modules that
    the base does not have in this shape.
    """

    made: dict[Path, Converted] = {}

    def opened(path: Path, alpha: float | None) -> Converted:
        if path in made:
            return made[path]
        adapter = open_adapter(path, alpha=alpha, dora=True, copies=True, tokens=True)
        check_copies(adapter, info)
        adapter = replace(renamed_for(adapter, dict.fromkeys(linear_modules(info))), copies={})
        if adapter.tokens:
            adapter = fit_rows(adapter, Vocabulary.of_base(info), info.name)
        if not adapter.magnitudes:
            return adapter, None
        answer = belongs(Origin.of_adapter(adapter), info)
        if not answer and not force:
            raise Incompatible(f"{path} was {answer.reason}: --force converts anyway")
        target = folder / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:12]
        target.mkdir(parents=True)
        made[path] = _convert(adapter, info, rank or 2 * adapter.config.rank, target)
        return made[path]

    return opened


def _convert(adapter: AdapterFile, info: BaseInfo, rank: int, folder: Path) -> Converted:
    lost = total = 0.0
    ranks = {module: min(rank, s.in_features, s.out_features) for module, s in adapter.shapes.items()}
    widest = max(ranks.values())

    def factors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal lost, total
        weights = BaseWeights(info)
        for module in adapter.modules:
            change = weight_change(adapter, module, weights.of).float()
            draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(module.encode()).digest()[:7], "big"))
            spectrum = leading(change, ranks[module], draw)
            if not math.isfinite(spectrum.total):
                raise InputError(f"{adapter.path}: {module} changed by its magnitudes is not finite")
            kept = spectrum.truncate(ranks[module])
            lost, total = lost + float((change - kept.dense()).double().square().sum()), total + spectrum.total
            yield tensor_name(module, "A"), kept.A.contiguous()
            yield tensor_name(module, "B"), kept.B.contiguous()
        yield from rows.items()

    rows = {rows_name(module): adapter.rows(module) for module in adapter.tokens}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module, shape in adapter.shapes.items():
        shapes[tensor_name(module, "A")] = (torch.float32, (ranks[module], shape.in_features))
        shapes[tensor_name(module, "B")] = (torch.float32, (shape.out_features, ranks[module]))
    shapes |= {name: (each.dtype, tuple(each.shape)) for name, each in rows.items()}
    narrow = {module: own for module, own in ranks.items() if own != widest}
    config = AdapterConfig(
        rank=widest,
        alpha=widest,
        target_modules=adapter.config.for_modules(adapter.modules).target_modules,
        rank_pattern=narrow,
        alpha_pattern=dict(narrow),
        base_model=adapter.config.base_model,
        tokens=adapter.config.tokens,
    )
    write_adapter(folder, config, shapes, factors(), info.fingerprint)
    error = math.sqrt(lost / total) if total else 0.0
    fields = {"method": "dora", "base": info.name, "base_fingerprint": info.fingerprint, "rank": widest}
    return open_adapter(folder, tokens=True), {**fields, "relative_error": error}
