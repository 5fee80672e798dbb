"""AdapterConfig: the part of PEFT's `adapter_config.json` that decides a LoRA delta. `config_reader.py` reads it."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adapterhub_local.lora.pattern import MAX_WORK, PatternTable, compile_pattern, matches_whole

WEIGHTS = "adapter_model.safetensors"  # PEFT's names of an adapter's two files
CONFIG = "adapter_config.json"
CONFIG_KEY = "adapter_config"  # in the weights' metadata, so that one file says all about itself
BASE_KEY = "base_fingerprint"
TOKENS_KEY = "trainable_token_indices"  # the tokens whose rows of the embeddings an adapter has of its own
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
# what people call the folders that they train into; as the first part of a name they are no organisation
_FOLDERS = frozenset(
    [
        "output",
        "outputs",
        "checkpoint",
        "checkpoints",
        "ckpt",
        "ckpts",
        "models",
        "model",
        "results",
        "runs",
        "saves",
        "out",
    ]
)
_CHECKPOINT = re.compile(r"(checkpoint|ckpt|epoch|step)[-_]?[0-9]+", re.ASCII)


def is_hub_id(name: str | None) -> bool:
    """Whether a base's name is an id on the Hub (`org/model`), not a folder of some machine."""
    if not name or not _HUB_ID.fullmatch(name):
        return False
    first, last = name.split("/")
    return first.lower() not in _FOLDERS and not _CHECKPOINT.fullmatch(last)


@dataclass(frozen=True)
class Narrowing:
    """What takes modules away from those that `target_modules` names, as PEFT reads it.

    `layers` counts for lists of names only; `patterns` are what stands before a layer's number.
    """

    exclude: frozenset[str] | str = frozenset()
    layers: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    def excludes(self, module: str) -> bool:
        if isinstance(self.exclude, str):
            return bool(self.exclude) and matches_whole(self.exclude, module)
        return _ends_with_any(module, self.exclude)

    def has_layer(self, module: str) -> bool:
        """Whether the module is in one of the layers, if some are named."""
        if not self.layers:
            return True
        if not self.patterns:  # the first number after two names, as in model.layers.0.
            parts = module.split(".")
            index = next((part for part in parts[2:-1] if _is_number(part)), None)
            return index is not None and int(index) in self.layers
        for pattern in self.patterns:
            if found := compile_pattern(rf"(?:^|.*?\.)(?:{pattern})\.(?P<idx>[0-9]+)\.").match(module):
                return int(found["idx"]) in self.layers
        return False


@dataclass(frozen=True)
class AdapterConfig:
    """How factors A (rank x in) and B (out x rank) make a delta: `scaling * B @ A`.

    scaling = alpha / rank, or alpha / sqrt(rank) with rsLoRA (https://arxiv.org/abs/2312.03732).
    The patterns give other ranks and alphas to the modules their regular expressions match, as in PEFT.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model: str | None = None
    use_dora: bool = False  # https://arxiv.org/abs/2402.09353; read only where it was asked for
    narrowing: Narrowing | None = None  # read, never written: what is written names each module then
    # embeddings, or head -> ids of the tokens whose rows the adapter has; PEFT's list, for whatever the model's input
    # embeddings are, has the name ""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """`base_model` if it is a Hub id, None for what may be a path of some machine."""
        return self.base_model if is_hub_id(self.base_model) else None

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.target_modules)

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable[float]:
        return PatternTable(self.alpha_pattern)

    def rank_of(self, module: str) -> int:
        return self._ranks.get(module, self.rank)

    def alpha_of(self, module: str) -> float:
        return self._alphas.get(module, self.alpha)

    def targets(self, module: str) -> bool:
        """Whether the config names the module, as PEFT reads it: by the ends of names, or one pattern."""
        named, narrowing = self.target_modules, self.narrowing
        if narrowing is not None and narrowing.excludes(module):
            return False
        if isinstance(named, str):
            return named == "all-linear" or matches_whole(named, module)
        if module in self._names:
            return True
        return _ends_with_any(module, self._names) and (narrowing is None or narrowing.has_layer(module))

    def scaling(self, module: str) -> float:
        """The factor before B @ A in `module`."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_size(self, num_modules: int) -> None:
        """Raises ValueError if there are more patterns than can be looked up in that many modules."""
        if num_modules * (self._ranks.work + self._alphas.work) > MAX_WORK:
            count = len(self.rank_pattern) + len(self.alpha_pattern)
            raise ValueError(f"{count:,} patterns for {num_modules:,} modules are more than an adapter needs")

    def pinned(self, names: Mapping[str, str]) -> "AdapterConfig":
        """The same settings for each module by its full name: `names` are module -> how this config calls it."""
        ranks = {module: self.rank_of(name) for module, name in names.items()}
        alphas = {module: self.alpha_of(name) for module, name in names.items()}
        return replace(
            self,
            target_modules=tuple(sorted(names)),
            rank_pattern={re.escape(module): rank for module, rank in ranks.items() if rank != self.rank},
            alpha_pattern={re.escape(module): alpha for module, alpha in alphas.items() if alpha != self.alpha},
            narrowing=None,
        )

    def for_modules(self, modules: Iterable[str], known: Iterable[str] = ()) -> "AdapterConfig":
        """The config to write beside factors of just these modules; `known` are the linear modules of the base.

        PEFT makes factors for whatever a config names: where a short list names more of the base than there is, each
        module is named in full, and so it is where a pattern is not a plain name, or the order of patterns counts.
        """
        mine = set(modules)
        named = self.target_modules
        short = not isinstance(named, str) and self.narrowing is None
        short = short and not any(self.targets(module) for module in known if module not in mine)
        ordered = replace(
            self,
            rank_pattern=dict(sorted(self.rank_pattern.items())),
            alpha_pattern=dict(sorted(self.alpha_pattern.items())),
        )
        plain = self._ranks.is_literal and self._alphas.is_literal
        if short and plain and all(self._settings(module) == ordered._settings(module) for module in mine):
            return ordered
        exact = self.pinned({module: module for module in mine})
        return replace(exact, target_modules=named) if short and not isinstance(named, str) else exact

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The ids of the rows of `module`, embeddings or head, as PEFT reads it: by the ends of names, or a list."""
        return next((ids for name, ids in self.tokens.items() if not name or f".{module}".endswith(f".{name}")), None)

    def _settings(self, module: str) -> tuple[int, float]:
        return self.rank_of(module), self.alpha_of(module)

    def to_json(self) -> dict[str, Any]:
        """PEFT's `adapter_config.json`, without paths of this machine; equal configs give equal files."""
        targets = self.target_modules
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": 0.0,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "use_rslora": self.use_rslora,
            **({"use_dora": True} if self.use_dora else {}),
            "rank_pattern": dict(sorted(self.rank_pattern.items())),
            "alpha_pattern": dict(sorted(self.alpha_pattern.items())),
            "bias": "none",
            **({TOKENS_KEY: {name: list(ids) for name, ids in sorted(self.tokens.items())}} if self.tokens else {}),
        }

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode()


def _ends_with_any(module: str, names: frozenset[str]) -> bool:
    """Whether the module is one of `names` or ends with one of them, after a dot."""
    return module in names or any(module[at + 1 :] in names for at, letter in enumerate(module) if letter == ".")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
