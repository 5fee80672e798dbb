"""Adapter files opened strictly and read one module at a time.

Three spellings of the same thing are read: a PEFT folder, a single self-describing `.safetensors`
file, and a single foreign file whose alpha the caller gives.
"""

import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapterhub_local.errors import BadFile, InputError, NotFound
from adapterhub_local.lora.config import BASE_KEY, CONFIG, CONFIG_KEY, WEIGHTS, AdapterConfig
from adapterhub_local.lora.header import Header, read_header
from adapterhub_local.lora.write import tensor_name

_KEY = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight", re.ASCII)
_MAGNITUDE = re.compile(
    r"base_model\.model\.(?P<module>[\w.-]+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", re.ASCII
)
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Delta:
    """One module's low-rank change of weight: `scaling * B @ A`, kept factored.

    A has shape (rank, in_features), B (out_features, rank), both of the same floating dtype.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self) -> torch.Tensor:
        """The delta as a matrix (out_features, in_features), in float32 or wider."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scaling * (self.B.to(wide) @ self.A.to(wide))


@dataclass(frozen=True)
class Shape:
    """The size of one module's delta."""

    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True)
class AdapterFile:
    """An opened adapter: config, shapes of its modules, and their deltas read on demand."""

    path: Path
    config: AdapterConfig
    base_fingerprint: str | None
    shapes: Mapping[str, Shape]
    keys: Mapping[tuple[str, str], str]  # (module, "A" or "B") -> name of the tensor in the file
    dtype: torch.dtype
    magnitudes: Mapping[str, str] = field(default_factory=dict)  # module -> name of its lengths, DoRA only

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def num_parameters(self) -> int:
        return sum(shape.rank * (shape.in_features + shape.out_features) for shape in self.shapes.values())

    def magnitude(self, module: str) -> torch.Tensor:
        """DoRA's lengths of the rows of a module, (out_features). Raises BadFile if one is NaN or infinity."""
        with safe_open(self.path, framework="pt") as file:
            lengths = file.get_tensor(self.magnitudes[module]).flatten()
        if not torch.isfinite(lengths).all():
            raise BadFile(f"{self.path} has NaN or infinity in {self.magnitudes[module]}: it was not trained soundly")
        return lengths

    def delta(self, module: str) -> Delta:
        """The delta of one module. Raises BadFile if a factor has NaN or infinity in it."""
        return next(self.deltas((module,)))[1]

    def deltas(self, modules: tuple[str, ...] | None = None) -> Iterator[tuple[str, Delta]]:
        """(module, delta) one at a time, in the order of `modules`."""
        try:
            file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:  # changed since its header was read
            raise BadFile(f"{self.path} cannot be read: {error}") from None
        with file:
            for module in self.modules if modules is None else modules:
                factors = {key: file.get_tensor(self.keys[module, key]) for key in "AB"}
                for key, factor in factors.items():
                    # least and largest entry are NaN if any is; several times faster than looking at each
                    if not torch.isfinite(torch.stack(torch.aminmax(factor))).all():
                        raise BadFile(
                            f"{self.path} has NaN or infinity in {self.keys[module, key]}: it was not trained soundly"
                        )
                yield module, Delta(factors["A"], factors["B"], self.config.scaling(module))


def open_adapter(path: Path, *, alpha: float | None = None, dora: bool = False) -> AdapterFile:
    """Open a PEFT folder or a single file, without reading tensors.

    `alpha` is for a single file that does not carry its config; its rank is read off the shapes. With `dora` an
    adapter with DoRA's magnitudes is opened too, whose deltas say nothing without them.
    Raises NotFound, or BadFile naming the file and the tensors that are wrong: unknown names, a factor
    without its partner, shapes that do not fit together or the config, dtypes that are not floats.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    if path.is_dir() and not weights.is_file():
        pickled = sorted(path.glob("adapter_model.bin"))
        if pickled:
            raise BadFile(f"{pickled[0]} is a pickle, which can run code: save the adapter as safetensors with PEFT")
        raise NotFound(f"{path} is not an adapter folder: it has no {WEIGHTS}")
    header = read_header(weights)
    magnitudes = _magnitudes(header) if dora else {}
    keys = _keys(weights, header, set(magnitudes.values()))
    shapes = _shapes(weights, header, keys)
    config = _config(weights, header, shapes, alpha, dora)
    for module, name in magnitudes.items():
        if module not in shapes or math.prod(header.tensors[name].shape) != shapes[module].out_features:
            raise BadFile(f"{weights}: {name} {list(header.tensors[name].shape)} does not fit the factors of {module}")
    for module, shape in shapes.items():
        if shape.rank != config.rank_of(module):
            raise BadFile(f"{weights}: {module} has rank {shape.rank}, its config says {config.rank_of(module)}")
    dtypes = {header.tensors[key].dtype for key in keys.values()}
    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    widest = next(dtype[name] for name in ("F64", "F32", "F16", "BF16") if name in dtypes)
    return AdapterFile(weights, config, header.metadata.get(BASE_KEY), shapes, keys, widest, magnitudes)


def _magnitudes(header: Header) -> dict[str, str]:
    names = ((name, _MAGNITUDE.fullmatch(name)) for name, entry in header.tensors.items() if entry.dtype in _FLOATS)
    return {match["module"]: name for name, match in names if match}


def _keys(path: Path, header: Header, besides: Set[str]) -> dict[tuple[str, str], str]:
    keys: dict[tuple[str, str], str] = {}
    for name, entry in header.tensors.items():
        if name in besides:
            continue
        if _MAGNITUDE.fullmatch(name):
            raise BadFile(
                f"{path} has DoRA ({name}), which rescales the base's own weights: "
                "`qhub merge FOLDER --with-base NAME` makes a LoRA of it"
            )
        match = _KEY.fullmatch(name)
        if not match or len(entry.shape) != 2 or entry.dtype not in _FLOATS:
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
    weights: Path, header: Header, shapes: Mapping[str, Shape], alpha: float | None, dora: bool
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
    return AdapterConfig(rank, alpha, tuple(shapes), rank_pattern=patterns)
