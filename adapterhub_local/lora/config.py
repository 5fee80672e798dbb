"""AdapterConfig: the part of PEFT's `adapter_config.json` that decides a LoRA delta; the rest is refused."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.header import no_duplicates
from adapterhub_local.lora.pattern import MAX_WORK, PatternTable, compile_pattern, matches_whole

WEIGHTS = "adapter_model.safetensors"  # PEFT's names of an adapter's two files
CONFIG = "adapter_config.json"
CONFIG_KEY = "adapter_config"  # in the weights' metadata, so that one file says all about itself
BASE_KEY = "base_fingerprint"
LARGEST = 3.4028234663852886e38  # of float32, in which every reader computes a scale
TOKENS_KEY = "trainable_token_indices"  # the tokens whose rows of the embeddings an adapter has of its own
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be

# Settings that change nothing about the delta of a trained adapter.
_HARMLESS = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
    ]
)
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_READ = frozenset(
    ["peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern", *_NARROWING]
)
_FUSE = "Fuse it into its model (PEFT: merge_and_unload) and `qhub base add` that"
# Settings that make the result something else than W x + scaling * B A x on a frozen base.
_REFUSED = {
    "use_dora": "DoRA rescales base weights (`qhub merge FOLDER --weights 1 --with-base NAME` makes a LoRA of it)",
    "modules_to_save": f"it replaces whole modules of the shared base. {_FUSE}",
    "lora_bias": "its B factors have a bias",
    TOKENS_KEY: "it has rows of the embeddings of its own, which are not treated here; `qhub add`, `eval`, `serve` and "
    "a linear `qhub merge` do",
    "target_parameters": "it adapts parameters that are not linear layers, such as the experts of a mixture in one "
    f'tensor. Trained here (`target_modules = "mlp"`) every expert has layers of its own. {_FUSE}',
    "layer_replication": "it changes the layers of the shared base",
    "fan_in_fan_out": "its base keeps weights transposed, as GPT-2 does, and no base here does",
    "alora_invocation_tokens": "it is active on a part of the text only (aLoRA)",
}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)


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

    @classmethod
    def parse(cls, text: str | bytes, where: str, *, dora: bool = False, tokens: bool = False) -> "AdapterConfig":
        """The config in `text`, PEFT's JSON; with `dora`, also one of DoRA, and with `tokens` one with rows of the
        embeddings, whose factors alone are not all that it changes.

        Raises BadFile naming `where` and the setting that is wrong or refused.
        """
        try:
            fields = json.loads(text, object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{where} is not JSON that all read alike: {error}") from None
        if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
            raise BadFile(f"{where} is not the config of a LoRA adapter (peft_type must be LORA)")
        taken = {"use_dora": dora, TOKENS_KEY: tokens}
        _refuse_unsupported({key: value for key, value in fields.items() if not taken.get(key)}, where)
        try:
            config = cls(
                rank=_positive_int(fields["r"]),
                alpha=_finite(fields["lora_alpha"]),
                target_modules=_targets(fields.get("target_modules")),
                use_rslora=_flag(fields, "use_rslora"),
                use_dora=_flag(fields, "use_dora"),
                rank_pattern={key: _positive_int(rank) for key, rank in (fields.get("rank_pattern") or {}).items()},
                alpha_pattern={key: _finite(alpha) for key, alpha in (fields.get("alpha_pattern") or {}).items()},
                base_model=_base_model(fields.get("base_model_name_or_path")),
                narrowing=_narrowing(fields),
                tokens=_tokens(fields.get(TOKENS_KEY)),
            )
            config.check_size(1)  # which reads every pattern
            if isinstance(config.target_modules, str):
                compile_pattern(config.target_modules)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is not there" if isinstance(error, KeyError) else error
            raise BadFile(f"{where} has a wrong or missing setting: {reason}") from None
        return config


def _refuse_unsupported(fields: Mapping[str, Any], where: str) -> None:
    for key, value in fields.items():
        if key in _HARMLESS or key in _READ:
            continue
        if key == "bias":
            if value not in ("none", None):
                raise BadFile(f"{where} sets bias = {value!r}: it changes biases of the shared base, not supported")
        elif key == "init_lora_weights":
            # https://arxiv.org/abs/2404.02948 (PiSSA), 2406.01775 (OLoRA) move the base they start from
            if value not in _PLAIN_INITS:
                raise BadFile(
                    f"{where} sets init_lora_weights = {value!r}: the adapter belongs to a changed base. Convert it to "
                    "a plain LoRA first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))"
                )
        elif value not in (None, False, {}, [], "", 0):
            reason = _REFUSED.get(key, "qhub does not know this setting")
            shown = key if key.isprintable() and len(key) <= 60 else repr(key[:60])
            raise BadFile(f"{where} sets {shown} = {json.dumps(value)[:60]}, not supported: {reason}")


def _ends_with_any(module: str, names: frozenset[str]) -> bool:
    """Whether the module is one of `names` or ends with one of them, after a dot."""
    return module in names or any(module[at + 1 :] in names for at, letter in enumerate(module) if letter == ".")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _narrowing(fields: Mapping[str, Any]) -> Narrowing | None:
    exclude, layers, patterns = (fields.get(key) for key in _NARROWING)
    if isinstance(exclude, str):
        compile_pattern(exclude)
    else:
        exclude = frozenset(exclude or ())
    layers = (layers,) if type(layers) is int else tuple(layers or ())
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    if not all(isinstance(name, str) for name in (*exclude, *patterns)) or not all(type(n) is int for n in layers):
        raise ValueError("exclude_modules, layers_to_transform or layers_pattern is not a list of names or numbers")
    if len(patterns) > 16:
        raise ValueError(f"layers_pattern has {len(patterns):,} patterns")
    for pattern in patterns:
        compile_pattern(rf"(?:^|.*?\.)(?:{pattern})\.(?P<idx>[0-9]+)\.")
    return Narrowing(exclude, layers, patterns) if exclude or layers else None


def _targets(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("target_modules is neither a list of names nor a pattern")
    return tuple(sorted(value))


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    tables = value if isinstance(value, dict) else {"": value} if value else {}
    for ids in tables.values():
        if not isinstance(ids, list) or not ids or any(type(each) is not int or each < 0 for each in ids):
            raise ValueError(f"{TOKENS_KEY} is neither a list of tokens' ids nor a table of such lists")
        if len(set(ids)) < len(ids):
            twice, _ = Counter(ids).most_common(1)[0]
            raise ValueError(f"{TOKENS_KEY} names token {twice} twice")
    return {name: tuple(ids) for name, ids in tables.items()}


def _positive_int(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a rank")
    return value


def _finite(value: Any) -> float:
    # compared, not converted: an int of JSON may be too large for a float
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        is_long = isinstance(value, int) and abs(value) > 1e20
        raise ValueError(f"{f'{str(value)[:20]}...' if is_long else value} is not a finite alpha in float32")
    return value


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value not in (True, False, None):
        raise ValueError(f"{key} is {value!r}, neither true nor false")
    return bool(value)


def _base_model(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"base_model_name_or_path is {value!r}, not a name")
    return value or None
