"""The files of adapters that other tools write: GGUF, MLX-LM's, and safetensors with kohya's or diffusers' names."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import linear_shapes
from adapterhub_local.errors import BadFile, Incompatible, NotFound
from adapterhub_local.export.families import GgufLayout
from adapterhub_local.export.gguf import FINGERPRINT
from adapterhub_local.lora.config import CONFIG, is_hub_id
from adapterhub_local.lora.header import no_duplicates, read_header
from adapterhub_local.lora.names import fitted, parse_name
from adapterhub_local.lora.scale import MAX_CONFIG_BYTES, read_config, settings_in_header
from adapterhub_local.regular import read_regular

# <prefix><module><factor>: lora_te_model_layers_0_mlp_up_proj.lora_down.weight, transformer.layers.0.mlp.up_proj.lora_A
KOHYA = re.compile(
    r"(?:lora_te\d?_|lora_unet_|lora_|transformer\.|diffusion_model\.|text_encoder\.)?"
    r"(?P<module>.+?)\.(?:lora_|lora\.|lora_linear_layer\.)?"
    r"(?P<kind>down|up|A|B|alpha)(?:\.default)?(?:\.weight)?"
)
MLX_WEIGHTS = "adapters.safetensors"  # MLX-LM's name, beside an adapter_config.json of its own
_BASE_URL = "general.base_model.0.repo_url"
_FACTOR = {"down": "A", "A": "A", "up": "B", "B": "B", "alpha": "alpha"}


@dataclass
class Layer:
    """What a file has of one module."""

    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    alpha: float | None = None


def read_gguf(path: Path, base: BaseInfo) -> tuple[dict[str, Layer], str | None, str | None]:
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
    _refuse_unread(path, reader)
    if (kind, what) != ("adapter", "lora"):
        raise BadFile(f"{path} is a GGUF {kind} ({what}), not a LoRA adapter: give a base model to `qhub base add`")
    layout = GgufLayout(base)
    if architecture != gguf.MODEL_ARCH_NAMES[layout.architecture]:
        raise Incompatible(f"{path} is for a {architecture} model, base '{base.name}' is {base.architecture}")
    modules = {layout.tensor_name(f"{module}.weight"): module for module in linear_shapes(base)}
    layers: dict[str, Layer] = {}
    for tensor in reader.tensors:
        name, _, factor = tensor.name.rpartition(".lora_")
        if name not in modules or factor not in ("a", "b"):
            raise Incompatible(f"{path}: {tensor.name} is not a factor of a linear layer of base '{base.name}'")
        module = modules[name]
        layer = layers.setdefault(module, Layer())
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is mapped read-only
        if factor == "b":
            values = layout.from_gguf(module, values)
        setattr(layer, factor.upper(), values)
        # a reader scales by alpha / rank, and by 1 where alpha is 0
        layer.alpha = alpha or float(values.shape[0] if factor == "a" else values.shape[1])
    return layers, fingerprint, (url or "").partition("huggingface.co/")[2] or None


# keys of an adapter that say no more than is read or may be left out; any other changes what the adapter does
_READ = frozenset(["adapter.type", "adapter.lora.alpha", "adapter.lora.task_name"])


def _refuse_unread(path: Path, reader: Any) -> None:
    """Raise BadFile for a setting that makes the adapter something else than W x + scaling * B A x, always."""
    for key, field in reader.fields.items():
        if not key.startswith("adapter.") or key in _READ:
            continue
        if not field.data or not field.contents():  # empty, so it is not set
            continue
        shown = key if key.isprintable() else repr(key)
        reason = (
            "it is active on a part of the text only (aLoRA)" if "invocation" in key
            else "it belongs to a prompt that starts with this text, which nobody would write here" if "prompt" in key
            else "qhub does not know this setting"
        )  # fmt: skip
        raise BadFile(f"{path} sets {shown[:80]}, not supported: {reason}")


def read_kohya(path: Path, base: BaseInfo) -> tuple[dict[str, Layer], str | None]:
    """The layers, and the base that a config beside the file names."""
    flat = {module.replace(".", "_"): module for module in linear_shapes(base)}
    layers: dict[str, Layer] = {}
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        for name in header.tensors:
            match = KOHYA.fullmatch(name)
            module = _find(flat, match["module"].replace(".", "_")) if match else None
            if match is None or module is None:
                raise Incompatible(
                    f"{path}: {name!r} is not a factor of a linear layer of base '{base.name}' ({base.architecture}); "
                    "adapters of image models are not taken"
                )
            layer, value = layers.setdefault(module, Layer()), file.get_tensor(name)
            kind = _FACTOR[match["kind"]]
            if kind == "alpha":
                if value.numel() != 1:
                    raise BadFile(f"{path}: {name!r} is not a single number")
                layer.alpha = float(value)
            elif getattr(layer, kind) is not None:
                raise BadFile(f"{path}: {module} has two factors {kind}, one of them {name!r}")
            else:
                setattr(layer, kind, value)
    config = read_config(path, header.metadata, dora=False, tokens=False)
    settings = settings_in_header(header.metadata, f"{path} (its header)") if config is None else {}
    for module, layer in layers.items():
        if layer.alpha is None and config is not None and layer.A is not None:
            layer.alpha = config.scaling(module) * layer.A.shape[0]
        elif layer.alpha is None and "lora_alpha" in settings:
            layer.alpha = settings["lora_alpha"]
    return layers, config.hub_id if config is not None else None


def read_mlx(path: Path, base: BaseInfo) -> tuple[dict[str, Layer], str | None]:
    """The layers of an MLX-LM adapter, lora_a (in, r) and lora_b (r, out), and the base that its config names.

    It computes `W x + scale (x A) B` (https://github.com/ml-explore/mlx-lm): its scale is our alpha / rank.
    """
    weights = path / MLX_WEIGHTS if path.is_dir() else path
    beside = weights.parent / CONFIG
    scale, hub_id = _mlx_scale(beside) if beside.is_file() else (None, None)
    header = read_header(weights)
    linears = linear_shapes(base)
    names = fitted({parse_name(name).module for name in header.tensors}, linears)
    layers: dict[str, Layer] = {}
    with safe_open(weights, framework="pt") as file:
        for name in header.tensors:
            parts = parse_name(name)
            if parts.kind != "mlx" or names[parts.module] not in linears:
                why = "DoRA of MLX-LM, which has no plain factors" if name.endswith(".m") else (
                    f"is not a factor of a linear layer of base '{base.name}' ({base.architecture})"
                )  # fmt: skip
                raise Incompatible(f"{weights}: {name!r} {'is ' if name.endswith('.m') else ''}{why}")
            layer = layers.setdefault(names[parts.module], Layer())
            factor = file.get_tensor(name)
            if factor.dim() != 2:
                raise BadFile(f"{weights}: {name!r} {list(factor.shape)} is not a factor of one linear layer")
            if name.endswith("lora_a"):
                layer.A = factor.T.contiguous()
            else:
                layer.B = factor.T.contiguous()
    if not layers:
        raise BadFile(f"{weights} holds no LoRA factors")
    for layer in layers.values():
        if scale is not None and layer.A is not None:
            layer.alpha = scale * layer.A.shape[0]
    return layers, hub_id


def _mlx_scale(config: Path) -> tuple[float | None, str | None]:
    try:
        fields = json.loads(read_regular(config, MAX_CONFIG_BYTES), object_pairs_hook=no_duplicates)
        if not isinstance(fields, dict):
            raise ValueError("it is not a table")
        if fields.get("fine_tune_type", "lora") != "lora":
            raise BadFile(
                f"{config} sets fine_tune_type = {str(fields['fine_tune_type'])[:20]!r}, not supported: only lora is"
            )
        settings = fields.get("lora_parameters") or {}
        scale = settings.get("scale") if isinstance(settings, dict) else None
        if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
            raise ValueError(f"its scale is {str(scale)[:20]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{config} is not a config of MLX-LM: {str(error)[:100]}") from None
    model = fields.get("model")
    return scale, model if isinstance(model, str) and is_hub_id(model) else None


def _find(flat: Mapping[str, str], name: str) -> str | None:
    """The module of that flattened name; tools leave out what comes before the layers."""
    if name in flat:
        return flat[name]
    ending = [module for key, module in flat.items() if key.endswith(f"_{name}")]
    return ending[0] if len(ending) == 1 else None
