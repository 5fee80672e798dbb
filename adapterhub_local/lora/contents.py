"""What an adapter's files hold, read strictly from header and config, without torch and without reading tensors.

Three spellings of the same thing are read: a PEFT folder, a single self-describing `.safetensors`
file, and a single foreign file that says its scale elsewhere, or whose alpha the caller gives.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadFile, NotFound
from adapterhub_local.lora.config import BASE_KEY, CONFIG, TOKENS_KEY, WEIGHTS, AdapterConfig
from adapterhub_local.lora.config_reader import parse_config
from adapterhub_local.lora.header import Header, read_header
from adapterhub_local.lora.names import tensor_name
from adapterhub_local.lora.scale import ask, check_given, config_beside, read_config, settings_in_header
from adapterhub_local.lora.tensors import FLOATS, Tensors


@dataclass(frozen=True)
class Shape:
    """The size of one module's delta."""

    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True)
class TokenRows:
    """The rows that an adapter has of one module, embeddings or head: `key` is a tensor (tokens, hidden)."""

    ids: tuple[int, ...]  # no two the same
    key: str
    hidden: int


@dataclass(frozen=True)
class Layout:
    """A weights file, its config, and the shapes of its modules; `dtype` is the widest, as safetensors spells it.

    `copies` are tensors beside the factors that only a base can recognise as its own: name -> the base's name of it.
    """

    path: Path
    header: Header
    config: AdapterConfig
    base_fingerprint: str | None
    shapes: Mapping[str, Shape]
    keys: Mapping[tuple[str, str], str]  # (module, "A" or "B") -> name of the tensor in the file
    dtype: str
    magnitudes: Mapping[str, str] = field(default_factory=dict)  # module -> name of its lengths, DoRA only
    copies: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)  # module -> its rows


def read_layout(
    path: Path, *, alpha: float | None = None, dora: bool = False, copies: bool = False, tokens: bool = False
) -> Layout:
    """The layout of a PEFT folder or a single file.

    `alpha` is for a single file that does not say its scale; its rank is read off the shapes. With `dora` an
    adapter with DoRA's magnitudes is read too, whose deltas say nothing without them; with `copies` one that has
    tensors of its base along, which the caller compares; with `tokens` one that has rows of the embeddings.
    Raises NotFound, or BadFile naming the file and what is wrong, the config's reason first: unknown names, a factor
    without its partner, modules the config does not name, shapes that do not fit together or the config,
    dtypes that are not floats. Raises AlphaKnown for an alpha that is given for what says another.
    """
    weights = find_weights(path)
    header = read_header(weights)
    config = read_config(weights, header.metadata, dora=dora, tokens=tokens)
    found = Tensors.of(weights, header)
    if found.magnitudes and not dora:
        raise BadFile(
            f"{weights} has DoRA ({min(found.magnitudes.values())}), which rescales the base's own weights: "
            "`qhub merge FOLDER --weights 1 --with-base NAME` makes a LoRA of it"
        )
    if found.copies and not copies:
        entry = header.tensors[first := min(found.copies)]
        raise BadFile(
            f"{weights}: {first!r} {list(entry.shape)} {entry.dtype} is not a LoRA factor of a linear layer. If it is "
            "the base's own weight, saved along, `qhub add` and `qhub pull` with its base leave it out"
        )
    shapes = _shapes(weights, header, found.keys)
    if config is not None:
        check_given(alpha, config.alpha, str(weights.parent / CONFIG if config_beside(weights) else weights))
    else:
        config = _made(weights, header, shapes, alpha, bool(found.magnitudes))
    config = _renamed(weights, config, found.spelled)
    _check(weights, header, config, shapes, found)
    rows = _token_rows(weights, header, config, found.tokens)
    config = replace(config, tokens={module: each.ids for module, each in rows.items()})
    dtypes = {header.tensors[key].dtype for key in found.keys.values()}
    dtype = next(name for name in FLOATS if name in dtypes)
    fingerprint = header.metadata.get(BASE_KEY)
    return Layout(weights, header, config, fingerprint, shapes, found.keys, dtype, found.magnitudes, found.copies, rows)


def find_weights(path: Path) -> Path:
    """The weights file of the adapter at `path`, a folder or the file itself.

    Raises NotFound naming the adapters that lie in folders below, BadFile for a pickle or for what is not a file.
    """
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise BadFile(f"{path} is not a file: adapters are read from files and folders only")
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if pickled := sorted(path.glob("adapter_model*.bin")):
        raise BadFile(f"{pickled[0]} is a pickle, which can run code: save the adapter as safetensors with PEFT")
    if sharded := sorted(path.glob("adapter_model-*.safetensors")):
        raise BadFile(f"{path} is sharded ({sharded[0].name}, ...): save it as one file (PEFT: save_pretrained)")
    below = sorted({str(file.parent.relative_to(path)) for file in _below(path)})
    if below:
        shown = ", ".join(below[:8]) + (f" and {len(below) - 8} more" if len(below) > 8 else "")
        raise NotFound(f"{path} has no {WEIGHTS}, but there are adapters in its folders: {shown}. Name one of them")
    raise NotFound(f"{path} is not an adapter folder: it has no {WEIGHTS}")


def _below(path: Path) -> list[Path]:
    return [file for depth in ("*", "*/*") for file in path.glob(f"{depth}/{WEIGHTS}")]


def _check(path: Path, header: Header, config: AdapterConfig, shapes: Mapping[str, Shape], found: Tensors) -> None:
    magnitudes = found.magnitudes
    if bool(magnitudes) != config.use_dora:
        reason = "sets use_dora, but there are no magnitudes" if config.use_dora else "does not set use_dora"
        raise BadFile(f"{path}: its config {reason}" + (f" as {min(magnitudes.values())} is" if magnitudes else ""))
    if magnitudes and (plain := sorted(shapes.keys() - magnitudes.keys())):
        raise BadFile(f"{path}: {plain[0]} has no lora_magnitude_vector, as the others have: DoRA is all or nothing")
    for module, name in magnitudes.items():
        if module not in shapes or math.prod(header.tensors[name].shape) != shapes[module].out_features:
            raise BadFile(f"{path}: {name} {list(header.tensors[name].shape)} does not fit the factors of {module}")
    for module, shape in shapes.items():
        if shape.rank != config.rank_of(module):
            raise BadFile(f"{path}: {module} has rank {shape.rank}, its config says {config.rank_of(module)}")
        if not config.targets(module):
            raise BadFile(f"{path} has factors for {module}, which target_modules of its config does not name")


def _token_rows(path: Path, header: Header, config: AdapterConfig, found: Mapping[str, str]) -> dict[str, TokenRows]:
    """Module -> its rows, each of a token that the config names."""
    rows = {}
    if len(found) > 1 and "" in config.tokens:
        raise BadFile(f"{path} has rows of {' and '.join(sorted(found))}, and {TOKENS_KEY} of its config is one list")
    for module, key in sorted(found.items()):
        shape, ids = header.tensors[key].shape, config.tokens_of(module)
        if ids is None:
            raise BadFile(f"{path} has rows of {module}, and {TOKENS_KEY} of its config does not say of which tokens")
        if len(shape) != 2 or shape[0] != len(ids):
            raise BadFile(f"{path}: {key!r} is {list(shape)}, and its config names {len(ids)} tokens of {module}")
        rows[module] = TokenRows(ids, key, shape[1])
    held = {each.ids for each in rows.values()}
    for name, ids in config.tokens.items():  # PEFT names a head that is the embeddings too, and saves no rows of it
        if ids not in held:
            raise BadFile(f"{path}: {TOKENS_KEY} of its config names tokens{f' of {name}' if name else ''}, and it has "
                          "no rows for them")  # fmt: skip
    return rows


def _renamed(path: Path, config: AdapterConfig, spelled: Mapping[str, str]) -> AdapterConfig:
    """The config for names without wrappers, where its patterns are about names with them."""
    try:
        config.check_size(len(spelled))
    except ValueError as error:
        raise BadFile(f"{path}: {error}") from None
    if all(name == module for module, name in spelled.items()):
        return config
    names = {module: name if config.targets(name) else module for module, name in spelled.items()}
    for name in names.values():
        if not config.targets(name):
            raise BadFile(f"{path} has factors for {name}, which target_modules of its config does not name")
    return config.pinned(names)


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


def _made(
    weights: Path, header: Header, shapes: Mapping[str, Shape], alpha: float | None, has_dora: bool
) -> AdapterConfig:
    """The config of a file that does not carry one: its ranks are the shapes', its alpha what it or the caller says."""
    ranks = {module: shape.rank for module, shape in shapes.items()}
    settings = settings_in_header(header.metadata, f"{weights} (its header)")
    rank = settings.get("r", max(ranks.values()))
    fields: dict[str, Any] = {"rank_pattern": {re.escape(m): value for m, value in ranks.items() if value != rank}}
    fields |= {"use_dora": has_dora, "peft_type": "LORA", "target_modules": sorted(shapes), "r": rank, **settings}
    check_given(alpha, settings.get("lora_alpha"), f"{weights} (its header)")
    if "lora_alpha" not in settings:
        if alpha is None:
            raise ask(str(weights), ranks)
        fields["lora_alpha"] = alpha
    return parse_config(json.dumps(fields), f"{weights} (its header)", dora=True, tokens=True)
