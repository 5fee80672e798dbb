"""PEFT's `adapter_config.json` read strictly: what decides a LoRA delta is taken, the rest refused with a reason."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.config import TOKENS_KEY, AdapterConfig, Narrowing
from adapterhub_local.lora.header import no_duplicates
from adapterhub_local.lora.pattern import compile_pattern

LARGEST = 3.4028234663852886e38  # of float32, in which every reader computes a scale
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


def parse_config(text: str | bytes, where: str, *, dora: bool = False, tokens: bool = False) -> AdapterConfig:
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
        config = AdapterConfig(
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
