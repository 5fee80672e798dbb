"""AdapterConfig: the part of PEFT's `adapter_config.json` that decides a LoRA delta; the rest is refused."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapterhub_local.errors import BadFile

WEIGHTS = "adapter_model.safetensors"  # PEFT's names of an adapter's two files
CONFIG = "adapter_config.json"
CONFIG_KEY = "adapter_config"  # in the weights' metadata, so that one file says all about itself
BASE_KEY = "base_fingerprint"
Number = TypeVar("Number", int, float)
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
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
    ]
)
_READ = frozenset(["peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"])
# Settings that make the result something else than W x + scaling * B A x on a frozen base.
_REFUSED = {
    "use_dora": "DoRA rescales base weights (`qhub merge FOLDER --weights 1 --with-base NAME` makes a LoRA of it)",
    "modules_to_save": "it replaces whole modules of the shared base",
    "lora_bias": "its B factors have a bias",
    "trainable_token_indices": "it changes rows of the shared base's embeddings",
    "target_parameters": "it adapts parameters that are not linear layers",
    "layer_replication": "it changes the layers of the shared base",
    "fan_in_fan_out": "its factors are transposed",
    "alora_invocation_tokens": "it is active on a part of the text only (aLoRA)",
}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)


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

    @property
    def hub_id(self) -> str | None:
        """`base_model` if it is a Hub id, None for what may be a path of some machine."""
        name = self.base_model
        return name if name and name.count("/") == 1 and not name.startswith(("/", ".", "~")) else None

    def rank_of(self, module: str) -> int:
        return _match(self.rank_pattern, module, self.rank)

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names the module, as PEFT reads it: by the ends of names, or one pattern."""
        named = self.target_modules
        if isinstance(named, str):
            return named == "all-linear" or re.fullmatch(named, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in named)

    def scaling(self, module: str) -> float:
        """The factor before B @ A in `module`."""
        rank = self.rank_of(module)
        return _match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

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
        }

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode()

    @classmethod
    def parse(cls, text: str | bytes, where: str, *, dora: bool = False) -> "AdapterConfig":
        """The config in `text`, PEFT's JSON; with `dora`, also one of DoRA, whose factors alone are not its delta.

        Raises BadFile naming `where` and the setting that is wrong or refused.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{where} is not JSON: {error}") from None
        if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
            raise BadFile(f"{where} is not the config of a LoRA adapter (peft_type must be LORA)")
        _refuse_unsupported({key: value for key, value in fields.items() if not (dora and key == "use_dora")}, where)
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
            )
            own = [config.target_modules] if isinstance(config.target_modules, str) else []
            for pattern in (*config.rank_pattern, *config.alpha_pattern, *own):
                re.compile(pattern)
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise BadFile(f"{where} has a wrong or missing setting: {error}") from None
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
            reason = _REFUSED.get(key, "this setting is not known here")
            raise BadFile(f"{where} sets {key} = {json.dumps(value)[:60]}, not supported: {reason}")


def _match(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that matches the module's name or its end (PEFT's `get_pattern_key`)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _targets(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("target_modules is neither a list of names nor a pattern")
    return tuple(sorted(value))


def _positive_int(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a rank")
    return value


def _finite(value: Any) -> float:
    # compared, not converted: an int of JSON may be too large for a float
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{str(value)[:20]} is not a finite alpha")
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
