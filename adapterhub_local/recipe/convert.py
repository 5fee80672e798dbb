"""Other tools' settings as a recipe: axolotl, LLaMA-Factory, TRL, PEFT, Unsloth. What has no place here is named."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.recipe.convert_data import OWN_TEMPLATE, convert_data
from adapterhub_local.recipe.convert_training import convert_batches, convert_course
from adapterhub_local.recipe.elsewhere import NEW_TOKENS, SPELLED, WHOLE_MODULES, WITHOUT
from adapterhub_local.recipe.foreign import Computed, Imported
from adapterhub_local.recipe.kinds import KEYS, convert, kinds_of
from adapterhub_local.recipe.objectives import OBJECTIVES

BASES = ("base_model", "model_name_or_path", "model_name", "base_model_name_or_path", "model_id")
ONE_EACH = {  # names with the same values here -> the key
    **dict.fromkeys(("sequence_len", "cutoff_len", "max_seq_length", "max_length", "max_seq_len"), "data.max_length"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "data.limit"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "adapter.rank"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    **dict.fromkeys(("use_rslora", "lora_use_rslora", "peft_use_rslora"), "adapter.rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), "adapter.dora"),
    "rank_pattern": "adapter.rank_pattern",
    "alpha_pattern": "adapter.alpha_pattern",
    **dict.fromkeys(("learning_rate", "lr"), "train.learning_rate"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), "train.epochs"),
    **dict.fromkeys(("loraplus_lr_ratio", "lr_ratio"), "train.loraplus_ratio"),
    **dict.fromkeys(("warmup_ratio",), "train.warmup"),
    "cosine_min_lr_ratio": "train.min_rate",
    "weight_decay": "train.weight_decay",
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), "train.max_grad_norm"),
    **dict.fromkeys(("seed", "random_state"), "train.seed"),
    "early_stopping_patience": "train.patience",
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "eval.batch_size"),
    **dict.fromkeys(("beta", "pref_beta", "rl_beta", "dpo_beta"), "preference.beta"),
    "label_smoothing": "preference.label_smoothing",
}
REASONS = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"), "bases are 4 bits already"),
    **dict.fromkeys(("template", "chat_template_jinja"), OWN_TEMPLATE),
    **dict.fromkeys(("use_peft", "adapter", "bias", "task_type", "peft_type"), "adapters are LoRA without biases"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "`qhub train --nproc` shares a run between processes, and "
                    "--shard-base the base"),
    **dict.fromkeys(WHOLE_MODULES, WITHOUT[WHOLE_MODULES[0]]),
    **dict.fromkeys(NEW_TOKENS, SPELLED),
    **dict.fromkeys(("trainable_tokens", "trainable_token_indices"), "adapter.train_tokens names them as the "
                    "vocabulary spells them, not by their ids"),
    **dict.fromkeys(("do_train", "do_eval", "overwrite_output_dir", "dataset_prepared_path"), "a run always does what "
                    "its recipe says, in a folder of its own"),
    **dict.fromkeys(("wandb_project", "wandb_entity", "report_to", "logging_steps"), "every step is logged"),
}  # fmt: skip


def convert_settings(settings: Mapping[str, Any], base_name: Callable[[str], str | None]) -> Imported:
    """The recipe that these settings come to; `base_name` knows the local base of a model's id, if there is one.

    Raises InputError for a run that is not the training of an adapter.
    """
    left = {key: value for key, value in settings.items() if value not in (None, "", [], {}, "none")}
    found = Imported(_model(left))
    found.given["base.name"] = (found.base and base_name(found.base)) or _slug(found.base or "base")
    _kind(left, found)
    convert_data(left, found)
    convert_batches(left, found)
    convert_course(left, found)
    _targets(left, found)
    _rest(left, found)
    name = next((left.pop(key) for key in ("output_dir", "run_name", "hub_model_id") if key in left), None)
    found.given["output.name"] = _slug(str(name)) if isinstance(name, str) else "imported"
    for key, value in left.items():
        if value is False:  # what is off there is not there here
            continue
        plain = key.lower().replace("-", "_")
        found.dropped[key] = REASONS.get(plain) or WITHOUT.get(plain) or "there is nothing like it here"
    _check(found)
    return found


def _model(left: dict[str, Any]) -> str | None:
    values = [left.pop(key) for key in BASES if key in left]
    return next((value for value in values if isinstance(value, str)), None)


def _kind(left: dict[str, Any], found: Imported) -> None:
    """What is minimised."""
    tuned = left.pop("finetuning_type", "lora")
    if tuned not in ("lora", "qlora"):
        raise InputError(f"finetuning_type is {tuned}: only adapters (lora) are trained here")
    stage, loss = str(left.pop("stage", left.pop("rl", "sft"))).lower(), str(left.pop("pref_loss", "sigmoid"))
    if stage == "pt":
        found.given["data.loss_on"] = "all"
        return
    if stage == "dpo" and loss in ("orpo", "simpo", "ipo"):
        stage = loss
    if stage not in OBJECTIVES:
        raise InputError(f"it trains by '{stage[:40]}': here there is {', '.join(OBJECTIVES)}")
    if stage != "sft":
        found.given["train.objective"] = stage


def _targets(left: dict[str, Any], found: Imported) -> None:
    whole = left.pop("lora_target_linear", None)
    named = next(
        (left.pop(key) for key in ("lora_target_modules", "lora_target", "target_modules") if key in left), None
    )
    if whole or named in ("all", "all-linear"):
        found.given["adapter.target_modules"] = "all-linear"
    elif isinstance(named, str | list | tuple):
        parts = named.split(",") if isinstance(named, str) else named
        found.given["adapter.target_modules"] = [str(part).strip() for part in parts]
    elif named is not None:
        found.dropped["target_modules"] = "it is computed: write the names as adapter.target_modules"


def _rest(left: dict[str, Any], found: Imported) -> None:
    for key in [key for key in left if key in ONE_EACH]:
        value = left.pop(key)
        if isinstance(value, str) and ONE_EACH[key].startswith(("train.", "adapter.")):  # YAML 1.1 reads 2e-4 as text
            try:
                value = float(value)
            except ValueError:
                found.dropped[key] = f"it is not a number: {value[:40]}"
                continue
        if value is False and KEYS[ONE_EACH[key].partition(".")[0]][ONE_EACH[key].partition(".")[2]].default is False:
            continue
        found.given[ONE_EACH[key]] = value


def _check(found: Imported) -> None:
    """What the recipe would refuse is dropped with the recipe's own reason."""
    for place, value in list(found.given.items()):
        table, _, key = place.partition(".")
        item = KEYS[table][key]
        reason: str | None = None
        if isinstance(value, Computed):
            reason = f"it is computed ({value.source})"
        elif isinstance(value, float) and not math.isfinite(value):
            reason = "it is not a number"
        else:
            whole = int(value) if isinstance(value, float) and value.is_integer() else value
            taken = convert(value, kinds_of(table, key))
            taken = convert(whole, kinds_of(table, key)) if taken is None else taken
            if taken is None:
                reason = f"{place} cannot be {str(value)[:60]}"
            elif (check := item.metadata["check"]) is not None:
                reason = check(taken)
            if reason is None and whole != value:
                found.given[place] = whole
        if reason is not None:
            if place in ("base.name", "data.train", "output.name"):
                raise InputError(f"{place} = {str(value)[:60]}: {reason}")
            del found.given[place]
            found.dropped[place] = reason


def _slug(text: str) -> str:
    """A name for the registry made of a path or an id."""
    last = next((part for part in reversed(re.split(r"[/\\]", text)) if part.strip(". ")), "")
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:60] or "imported"
