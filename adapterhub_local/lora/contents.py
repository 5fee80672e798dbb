"""What an adapter's files hold, told strictly from header and config, without torch and without reading tensors.

Three spellings of the same thing are read: a PEFT folder, a single self-describing `.safetensors`
file, and a single foreign file whose alpha the caller gives.
"""

import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_local.errors import BadFile, InputError, NotFound
from adapterhub_local.lora.config import BASE_KEY, CONFIG, CONFIG_KEY, WEIGHTS, AdapterConfig
from adapterhub_local.lora.header import Header, read_header

_KEY = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight", re.ASCII)
_MAGNITUDE = re.compile(
    r"base_model\.model\.(?P<module>[\w.-]+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", re.ASCII
)
FLOATS = ("F64", "F32", "F16", "BF16")  # from wide to narrow


@dataclass(frozen=True)
class Shape:
    """The size of one module's delta."""

    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True)
class Layout:
    """A weights file, its config, and the shapes of its modules; `dtype` is the widest, as safetensors spells it."""

    path: Path
    header: Header
    config: AdapterConfig
    base_fingerprint: str | None
    shapes: Mapping[str, Shape]
    keys: Mapping[tuple[str, str], str]  # (module, "A" or "B") -> name of the tensor in the file
    dtype: str
    magnitudes: Mapping[str, str] = field(default_factory=dict)  # module -> name of its lengths, DoRA only


def read_layout(path: Path, *, alpha: float | None = None, dora: bool = False) -> Layout:
    """The layout of a PEFT folder or a single file.

    `alpha` is for a single file that does not carry its config; its rank is read off the shapes. With `dora` an
    adapter with DoRA's magnitudes is read too, whose deltas say nothing without them.
    Raises NotFound, or BadFile naming the file and the tensors that are wrong: unknown names, a factor
    without its partner, modules the config does not name, shapes that do not fit together or the config,
    dtypes that are not floats.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    if path.is_dir() and not weights.is_file():
        pickled = sorted(path.glob("adapter_model.bin"))
        if pickled:
            raise BadFile(f"{pickled[0]} is a pickle, which can run code: save the adapter as safetensors with PEFT")
        raise NotFound(f"{path} is not an adapter folder: it has no {WEIGHTS}")
    header = read_header(weights)
    magnitudes = _magnitudes(weights, header) if dora else {}
    keys = _keys(weights, header, set(magnitudes.values()))
    shapes = _shapes(weights, header, keys)
    config = _config(weights, header, shapes, alpha, dora, bool(magnitudes))
    if bool(magnitudes) != config.use_dora:
        said = "sets use_dora, but there are no magnitudes" if config.use_dora else "does not set use_dora"
        raise BadFile(f"{weights}: its config {said}" + (f" as {min(magnitudes.values())} is" if magnitudes else ""))
    if magnitudes and (plain := sorted(shapes.keys() - magnitudes.keys())):
        raise BadFile(f"{weights}: {plain[0]} has no lora_magnitude_vector, as the others have: DoRA is all or nothing")
    for module, name in magnitudes.items():
        if module not in shapes or math.prod(header.tensors[name].shape) != shapes[module].out_features:
            raise BadFile(f"{weights}: {name} {list(header.tensors[name].shape)} does not fit the factors of {module}")
    for module, shape in shapes.items():
        if shape.rank != config.rank_of(module):
            raise BadFile(f"{weights}: {module} has rank {shape.rank}, its config says {config.rank_of(module)}")
        if not config.targets(module):
            raise BadFile(f"{weights} has factors for {module}, which target_modules of its config does not name")
    dtypes = {header.tensors[key].dtype for key in keys.values()}
    dtype = next(name for name in FLOATS if name in dtypes)
    return Layout(weights, header, config, header.metadata.get(BASE_KEY), shapes, keys, dtype, magnitudes)


def tensor_name(module: str, factor: str) -> str:
    """PEFT's name for factor "A" or "B" of a module."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def magnitude_name(module: str) -> str:
    """PEFT's name for DoRA's lengths of a module."""
    return f"base_model.model.{module}.lora_magnitude_vector"


def _magnitudes(path: Path, header: Header) -> dict[str, str]:
    names = ((name, _MAGNITUDE.fullmatch(name)) for name, entry in header.tensors.items() if entry.dtype in FLOATS)
    found: dict[str, str] = {}
    for name, match in names:
        if match and found.setdefault(match["module"], name) != name:
            raise BadFile(f"{path}: {name} is there twice, with and without '.default'")
    return found


def _keys(path: Path, header: Header, besides: Set[str]) -> dict[tuple[str, str], str]:
    keys: dict[tuple[str, str], str] = {}
    for name, entry in header.tensors.items():
        if name in besides:
            continue
        if _MAGNITUDE.fullmatch(name):
            raise BadFile(
                f"{path} has DoRA ({name}), which rescales the base's own weights: "
                "`qhub merge FOLDER --weights 1 --with-base NAME` makes a LoRA of it"
            )
        match = _KEY.fullmatch(name)
        if not match or len(entry.shape) != 2 or entry.dtype not in FLOATS:
            raise BadFile(f"{path}: {name!r} {list(entry.shape)} {entry.dtype} is not a LoRA factor of a linear layer")
        if keys.setdefault((match["module"], match["factor"]), name) != name:
            raise BadFile(f"{path}: {name} is there twice, with and without '.default'")
    if not keys:
        raise BadFile(f"{path} holds no LoRA factors")
    return keys


def _shapes(path: Path, header: Header, keys: Mapping[tuple[str, str], str]) -> dict[str, Shape]:
    shapes = {}
    for module in sorted({module for module, _ in keys}):
        pair = [keys.get((module, factor)) for factor in "AB"]
        if pair[0] is None or pair[1] is None:
            missing = "A" if pair[0] is None else "B"
            raise BadFile(f"{path}: {module} has no {tensor_name(module, missing)}")
        (rank, in_features), (out_features, rank_of_b) = (header.tensors[key].shape for key in pair if key)
        if rank != rank_of_b or 0 in (rank, in_features, out_features):
            raise BadFile(f"{path}: {module} has factors of rank {rank} and {rank_of_b} that cannot be multiplied")
        shapes[module] = Shape(in_features, out_features, rank)
    return shapes


def _config(
    weights: Path, header: Header, shapes: Mapping[str, Shape], alpha: float | None, dora: bool, has_dora: bool
) -> AdapterConfig:
    # a PEFT folder, also when its weights file is what was named
    beside = weights.parent / CONFIG
    if weights.name == WEIGHTS and beside.is_file():
        return AdapterConfig.parse(beside.read_bytes(), str(beside), dora=dora)
    if CONFIG_KEY in header.metadata:
        return AdapterConfig.parse(header.metadata[CONFIG_KEY], f"{weights} (its header)", dora=dora)
    if alpha is None:
        raise BadFile(
            f"{weights} does not carry its config: put its {CONFIG} beside it and name the folder, or give --alpha"
        )
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}: give the finite number the adapter was trained with")
    ranks = {module: shape.rank for module, shape in shapes.items()}
    rank = max(ranks.values())
    patterns = {re.escape(module): value for module, value in ranks.items() if value != rank}
    return AdapterConfig(rank, alpha, tuple(shapes), rank_pattern=patterns, use_dora=has_dora)
