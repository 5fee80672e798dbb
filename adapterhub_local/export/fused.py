"""A base with an adapter inside it, as a 16-bit transformers folder: no adapter code is needed to load it.

What `fusion` gives is rounded once to 16 bits. Rounding to 4 bits again swallows most of a small delta, so it is done
on request only, and measured (`requantise`).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.bases import RECORD, BaseInfo, check_base_name
from adapterhub_local.base.mixtures import checkpoint_name
from adapterhub_local.base.source import INDEX, SINGLE, Source
from adapterhub_local.durable import check_absent, place_folder, staging
from adapterhub_local.errors import InUse
from adapterhub_local.export.divergence import Divergence, measure
from adapterhub_local.export.formats import Request, Written
from adapterhub_local.export.fusion import Fusion
from adapterhub_local.export.opening import open_request, size_text
from adapterhub_local.hub.model import open_model
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.lora.write import write_safetensors

SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Fused:
    """What rounding to 16 bits did: |W' - (W + D)| / |D| over the adapted modules, Frobenius norms; bytes written;
    how far the model is from base and adapter, if that was checked.
    """

    relative_rounding: float
    num_modules: int
    size: int
    divergence: Divergence | None = None


def export(request: Request) -> Written:
    """The version and its base as one folder, and as a new 4-bit base if that is asked for; see `write_fused`."""
    if request.requantise is not None and (request.home.bases / check_base_name(request.requantise)).exists():
        raise InUse(f"base '{request.requantise}' exists already: choose another name for --requantise")
    adapter, base = open_request(request)
    source = open_model(request.onto) if request.onto is not None else None
    fused = write_fused(base, adapter, request.target, request.progress, onto=source, check=request.check)
    report: dict[str, Any] = {"base": base.name, "size": fused.size, "relative_rounding": fused.relative_rounding}
    text = f"{size_text(fused.size)}, 16 bits; rounding is {fused.relative_rounding:.1%} of the adapter's size"
    if fused.divergence is not None:
        report["kl"] = vars(fused.divergence)
        text += f"; {fused.divergence}"
    if request.requantise is not None:
        from adapterhub_local.export.requantise import add_requantised

        name = f"{request.version} fused"
        new, loss = add_requantised(request.requantise, request.target, base, adapter, request.home, source_name=name)
        report["requantised"] = {"base": new.name, **vars(loss)}
        text += f"\nbase {new.name}: in 4 bits {loss}"
        if request.check:
            found = measure(base, request.version.path, new)
            report["requantised"]["kl"] = vars(found)
            text += f"; {found}"
    return Written(report, text)


def write_fused(
    base: BaseInfo,
    adapter: AdapterFile | None,
    target: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    onto: Source | None = None,
    check: bool = False,
) -> Fused:
    """Write `base` with `adapter` added (or alone) to the folder `target`, one tensor at a time.

    `onto` is the 16-bit model that the base was made from, to add to instead of the dequantised base. With `check` the
    folder is loaded and held against base and adapter before it appears. Raises InUse if `target` exists, Incompatible
    if the adapter's modules are not the base's or the model is another one, and QhubError if the check fails.
    """
    check_absent(target)
    fusion = Fusion(base, adapter, onto)
    config = json.loads((base.folder / "config.json").read_bytes())
    config.pop("quantization_config")
    dtype = torch.float16 if config.get("dtype") == "float16" else torch.bfloat16
    config["dtype"] = str(dtype).removeprefix("torch.")
    if fusion.unties:
        config["tie_word_embeddings"] = False
    squares = {"delta": 0.0, "lost": 0.0}

    def fuse(name: str) -> torch.Tensor:
        wanted, change = fusion.read(name, dtype)
        if change is None:
            return wanted.to(dtype) if wanted.is_floating_point() else wanted
        stored = wanted.to(dtype)
        squares["delta"] += float(change.double().square().sum())
        squares["lost"] += float((stored.double() - wanted.double()).square().sum())
        return stored

    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        folder = stage / "model"
        folder.mkdir()
        report = progress or (lambda done, total: None)
        kind = str(config.get("model_type"))
        _write_shards(folder, ((checkpoint_name(name, kind), fuse(name)) for name in counted(fusion.names, report)))
        fusion.check_complete()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in base.folder.iterdir():
            if file.suffix != ".safetensors" and file.name not in ("config.json", RECORD, INDEX):
                shutil.copyfile(file, folder / file.name)
        size = sum(file.stat().st_size for file in folder.iterdir())
        divergence = None
        if check and adapter is not None:
            divergence = measure(base, adapter.path.parent, folder, onto=onto)
            divergence.check()
        place_folder(folder, target)
    rounding = (squares["lost"] / squares["delta"]) ** 0.5 if squares["delta"] else 0.0
    return Fused(rounding, len(adapter.shapes) if adapter else 0, size, divergence)


def counted(names: list[str], report: Callable[[int, int], None]) -> Iterator[str]:
    """The names one after another, each reported as it is begun."""
    for done, name in enumerate(names):
        report(done, len(names))
        yield name
    report(len(names), len(names))


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Files of at most a shard's bytes each, under the names that transformers looks for."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
        write_safetensors(folder / f"shard-{len(shards)}", shapes, held.items(), {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
