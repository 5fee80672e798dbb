"""Adapters that other tools wrote, brought into PEFT's form: GGUF, MLX-LM, and kohya's or diffusers' tensor names.

Only adapters of language models: each name must be that of a linear layer of the base, else it is refused.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.export.foreign_files import KOHYA, MLX_WEIGHTS, Layer, read_gguf, read_kohya, read_mlx
from adapterhub_local.lora.config import WEIGHTS, AdapterConfig
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.names import parse_name
from adapterhub_local.lora.scale import ask, check_given
from adapterhub_local.lora.write import tensor_name, write_adapter


def is_foreign(path: Path) -> bool:
    """Whether the file is a GGUF, of MLX-LM, or safetensors with other words for its factors than PEFT's."""
    if path.suffix == ".gguf":
        return True
    if path.is_dir():
        return not (path / WEIGHTS).is_file() and (path / MLX_WEIGHTS).is_file()
    if path.suffix != ".safetensors":
        return False
    names = read_header(path).tensors
    kinds = {parse_name(name).kind for name in names}
    if "mlx" in kinds:
        return True
    return not kinds & {"A", "B"} and bool(names) and all(KOHYA.fullmatch(name) for name in names)


def convert(path: Path, base: BaseInfo, folder: Path, *, alpha: float | None = None) -> Path:
    """Write the foreign adapter at `path`, made for `base`, into `folder` as PEFT would, and return the folder.

    `alpha` is for modules whose scale nothing in the file says. What a file says of its base is kept: the fingerprint
    that our export notes, the base's repository. Raises BadFile for what is damaged, not an adapter, or has no scale;
    Incompatible for modules that the base does not have; AlphaKnown for an alpha beside one that is there.
    """
    fingerprint: str | None = None
    hub_id: str | None = None
    if path.suffix == ".gguf":
        layers, fingerprint, hub_id = read_gguf(path, base)
    elif path.is_dir() or any(parse_name(name).kind == "mlx" for name in read_header(path).tensors):
        layers, hub_id = read_mlx(path, base)
    else:
        layers, hub_id = read_kohya(path, base)
    linears = linear_shapes(base)
    ranks: dict[str, int] = {}
    for module, layer in layers.items():
        if layer.A is None or layer.B is None or layer.A.dim() != 2 or layer.B.dim() != 2:
            raise BadFile(f"{path}: {module} does not have both factors of a LoRA as matrices")
        if layer.A.shape[0] != layer.B.shape[1]:
            raise BadFile(f"{path}: {module} has factors of rank {layer.A.shape[0]} and {layer.B.shape[1]}")
        if (layer.B.shape[0], layer.A.shape[1]) != linears[module]:
            raise Incompatible(
                f"{path}: {module} is {layer.B.shape[0]} x {layer.A.shape[1]}, in base '{base.name}' it is "
                f"{linears[module][0]} x {linears[module][1]}"
            )
        ranks[module] = layer.A.shape[0]
    alphas = _alphas(path, layers, ranks, alpha)
    rank, scale = max(ranks.values()), max(set(alphas.values()), key=list(alphas.values()).count)
    config = AdapterConfig(
        rank, scale, tuple(sorted(layers)),
        rank_pattern={re.escape(module): value for module, value in ranks.items() if value != rank},
        alpha_pattern={re.escape(module): value for module, value in alphas.items() if value != scale},
        base_model=hub_id,
    )  # fmt: skip
    factors = {tensor_name(module, f): _factor(layers[module], f) for module in sorted(layers) for f in "AB"}
    shapes = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
    folder.mkdir()
    write_adapter(folder, config, shapes, factors.items(), fingerprint)
    return folder


def _factor(layer: Layer, key: str) -> torch.Tensor:
    factor = layer.A if key == "A" else layer.B
    assert factor is not None, "it was looked at before"
    return factor


def _alphas(path: Path, layers: Mapping[str, Layer], ranks: Mapping[str, int], given: float | None) -> dict[str, float]:
    """The alpha of each module: its own, that of the file, or the one that is given. Raises BadFile, AlphaKnown."""
    known = [layer.alpha for layer in layers.values() if layer.alpha is not None]
    for module, layer in layers.items():
        if layer.alpha is not None and not math.isfinite(layer.alpha):
            raise BadFile(f"{path}: the alpha of {module} is {layer.alpha}, not a finite number")
    check_given(given, known[0] if len(known) == len(layers) else None, str(path))
    if len(known) < len(layers) and given is None:
        missing = sorted(module for module, layer in layers.items() if layer.alpha is None)
        if known:
            raise BadFile(
                f"{path} has an alpha for {len(known)} of its {len(layers)} modules, none for {missing[0]}: give "
                "--alpha for those that have none"
            )
        raise ask(str(path), ranks)
    chosen = {module: layer.alpha if layer.alpha is not None else given for module, layer in layers.items()}
    return {module: float(alpha) for module, alpha in chosen.items() if alpha is not None}
