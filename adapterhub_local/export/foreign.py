"""Adapters that other tools wrote, brought into PEFT's form: GGUF adapters, and kohya's or diffusers' tensor names.

Only adapters of language models: each name must be that of a linear layer of the base, else it is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.errors import BadFile, Incompatible, NotFound
from adapterhub_local.export.families import GgufLayout
from adapterhub_local.export.gguf import FINGERPRINT
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.write import tensor_name, write_adapter

# <prefix><module><factor>: lora_te_model_layers_0_mlp_up_proj.lora_down.weight, transformer.layers.0.mlp.up_proj.lora_A
_KOHYA = re.compile(
    r"(?:lora_te\d?_|lora_unet_|lora_|transformer\.|diffusion_model\.|text_encoder\.)?"
    r"(?P<module>.+?)\.(?:lora_|lora\.|lora_linear_layer\.)?"
    r"(?P<kind>down|up|A|B|alpha)(?:\.default)?(?:\.weight)?"
)
_PEFT = "base_model.model."
_BASE_URL = "general.base_model.0.repo_url"
_FACTOR = {"down": "A", "A": "A", "up": "B", "B": "B", "alpha": "alpha"}


@dataclass
class _Layer:
    """What a file has of one module."""

    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    alpha: float | None = None


def is_foreign(path: Path) -> bool:
    """Whether the file is a GGUF, or safetensors whose tensors have other names than PEFT's."""
    if path.suffix == ".gguf":
        return True
    if path.is_dir() or path.suffix != ".safetensors":
        return False
    names = read_header(path).tensors
    return bool(names) and all(not name.startswith(_PEFT) and _KOHYA.fullmatch(name) for name in names)


def convert(path: Path, base: BaseInfo, folder: Path, *, alpha: float | None = None) -> Path:
    """Write the foreign adapter at `path`, made for `base`, into `folder` as PEFT would, and return the folder.

    `alpha` is for kohya's files without one; the rank is the default there, so that the scale is 1. What a GGUF says
    of its base is kept: the fingerprint that our export notes, or the base's repository. Raises BadFile
    for what is no adapter or is damaged, Incompatible for modules that the base does not have.
    """
    fingerprint, hub_id = None, base.hub_id
    if path.suffix == ".gguf":
        layers, fingerprint, hub_id = _read_gguf(path, base)
    else:
        layers = _read_kohya(path, base)
    linears = linear_shapes(base)
    ranks, alphas = {}, {}
    for module, layer in layers.items():
        if layer.A is None or layer.B is None or layer.A.dim() != 2 or layer.B.dim() != 2:
            raise BadFile(f"{path}: {module} has not both factors of a LoRA, as matrices")
        if layer.A.shape[0] != layer.B.shape[1]:
            raise BadFile(f"{path}: {module} has factors of rank {layer.A.shape[0]} and {layer.B.shape[1]}")
        if (layer.B.shape[0], layer.A.shape[1]) != linears[module]:
            raise Incompatible(
                f"{path}: {module} is {layer.B.shape[0]} x {layer.A.shape[1]}, in base '{base.name}' it is "
                f"{linears[module][0]} x {linears[module][1]}"
            )
        ranks[module] = layer.A.shape[0]
        given = layer.alpha if layer.alpha is not None else alpha
        alphas[module] = given if given is not None else float(ranks[module])
    rank, scale = max(ranks.values()), max(set(alphas.values()), key=list(alphas.values()).count)
    config = AdapterConfig(
        rank, scale, tuple(sorted(layers)),
        rank_pattern={re.escape(module): value for module, value in ranks.items() if value != rank},
        alpha_pattern={re.escape(module): value for module, value in alphas.items() if value != scale},
        base_model=hub_id or base.hub_id,
    )  # fmt: skip
    factors = {tensor_name(module, f): getattr(layers[module], f) for module in sorted(layers) for f in "AB"}
    shapes = {name: (factor.dtype, tuple(factor.shape)) for name, factor in factors.items()}
    folder.mkdir()
    write_adapter(folder, config, shapes, factors.items(), fingerprint)
    return folder


def _read_gguf(path: Path, base: BaseInfo) -> tuple[dict[str, _Layer], str | None, str | None]:
    """The layers, and the base that the file names: by fingerprint and by Hub id, each if it does."""
    import gguf

    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
        kind, what = (str(reader.fields[key].contents()) for key in ("general.type", "adapter.type"))
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        architecture = str(reader.fields["general.architecture"].contents())
        fingerprint, url = (
            str(reader.fields[key].contents()) if key in reader.fields else None for key in (FINGERPRINT, _BASE_URL)
        )
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise BadFile(f"{path} is not a GGUF adapter, or is damaged: {error}") from None
    if (kind, what) != ("adapter", "lora"):
        raise BadFile(f"{path} is a GGUF {kind} ({what}), not a LoRA adapter: give a base model to `qhub base add`")
    layout = GgufLayout(base)
    if architecture != gguf.MODEL_ARCH_NAMES[layout.architecture]:
        raise Incompatible(f"{path} is for a {architecture} model, base '{base.name}' is {base.architecture}")
    modules = {layout.tensor_name(f"{module}.weight"): module for module in linear_shapes(base)}
    layers: dict[str, _Layer] = {}
    for tensor in reader.tensors:
        name, _, factor = tensor.name.rpartition(".lora_")
        if name not in modules or factor not in ("a", "b"):
            raise Incompatible(f"{path}: {tensor.name} is no factor of a linear layer of base '{base.name}'")
        module = modules[name]
        layer = layers.setdefault(module, _Layer())
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is mapped read-only
        if factor == "b":
            values = layout.from_gguf(module, values)
        setattr(layer, factor.upper(), values)
        # a reader scales by alpha / rank, and by 1 where there is no alpha
        layer.alpha = alpha or None
    return layers, fingerprint, (url or "").partition("huggingface.co/")[2] or None


def _read_kohya(path: Path, base: BaseInfo) -> dict[str, _Layer]:
    flat = {module.replace(".", "_"): module for module in linear_shapes(base)}
    layers: dict[str, _Layer] = {}
    with safe_open(path, framework="pt") as file:
        for name in read_header(path).tensors:
            match = _KOHYA.fullmatch(name)
            module = _find(flat, match["module"].replace(".", "_")) if match else None
            if match is None or module is None:
                raise Incompatible(
                    f"{path}: {name} is no factor of a linear layer of base '{base.name}' ({base.architecture}); "
                    "adapters of image models are not taken"
                )
            layer, value = layers.setdefault(module, _Layer()), file.get_tensor(name)
            kind = _FACTOR[match["kind"]]
            if kind == "alpha":
                layer.alpha = float(value)
            elif getattr(layer, kind) is not None:
                raise BadFile(f"{path}: {module} has two factors {kind}, one of them {name}")
            else:
                setattr(layer, kind, value)
    return layers


def _find(flat: Mapping[str, str], name: str) -> str | None:
    """The module of that flattened name; tools leave out what comes before the layers."""
    if name in flat:
        return flat[name]
    ending = [module for key, module in flat.items() if key.endswith(f"_{name}")]
    return ending[0] if len(ending) == 1 else None
