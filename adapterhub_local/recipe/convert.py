"""Other tools' settings as a recipe: axolotl, LLaMA-Factory, TRL, PEFT, Unsloth. What has no place here is named."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.recipe.elsewhere import NEW_TOKENS, SPELLED, WHOLE_MODULES, WITHOUT
from adapterhub_local.recipe.foreign import Computed
from adapterhub_local.recipe.kinds import KEYS, convert, kinds_of
from adapterhub_local.recipe.objectives import OBJECTIVES
from adapterhub_local.recipe.source import PREFIX, data_suffix

BASES = ("base_model", "model_name_or_path", "model_name", "base_model_name_or_path", "model_id")
DATA = ("datasets", "dataset", "dataset_name")
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw_32bit"),
}
SCHEDULES = {
    **dict.fromkeys(("cosine", "cosine_with_min_lr"), "cosine"),
    "linear": "linear",
    **dict.fromkeys(("constant", "constant_with_warmup"), "constant"),
    "warmup_stable_decay": "wsd",
}
FORMATS = {  # axolotl's types and LLaMA-Factory's formattings
    "chat_template": "messages",
    "openai": "messages",
    "sharegpt": "sharegpt",
    "alpaca": "alpaca",
    "completion": "text",
}
TEMPLATES = ("chatml", "llama3", "gemma", "zephyr", "alpaca")
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
    **dict.fromkeys(("template", "chat_template_jinja"), "the base's own chat template is used; data.chat_template "
                    "names another one or a .jinja file"),
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


@dataclass
class Imported:
    """`given`: table.key -> value of the recipe. `dropped`: their key -> why it has no place. `notes` for people."""

    base: str | None
    given: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert_settings(settings: Mapping[str, Any], base_name: Callable[[str], str | None]) -> Imported:
    """The recipe that these settings come to; `base_name` knows the local base of a model's id, if there is one.

    Raises InputError for a run that is not the training of an adapter.
    """
    left = {key: value for key, value in settings.items() if value not in (None, "", [], {}, "none")}
    found = Imported(_model(left))
    found.given["base.name"] = (found.base and base_name(found.base)) or _slug(found.base or "base")
    _kind(left, found)
    _data(left, found)
    _batches(left, found)
    _course(left, found)
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


def _data(left: dict[str, Any], found: Imported) -> None:
    sources: list[str] = []
    for key in DATA:
        given = left.pop(key, None)
        for entry in given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]:
            if isinstance(entry, str):
                sources.append(_source(entry.strip()))
            elif isinstance(entry, Mapping):
                sources += _entry(entry, found, key)
            elif entry is not None:
                found.dropped[key] = "it is computed: write the file or Hub dataset as data.train"
    found.given["data.train"] = sources[0] if len(sources) == 1 else sources or "train.jsonl"
    if not sources:
        found.notes.append("it names no data: write a file or a Hub dataset as data.train")
    if (split := left.pop("dataset_split", "train")) != "train":
        found.dropped["split"] = f"the split is {getattr(split, 'source', split)!r}: name its file in data.train"
    tests = [source for key in ("test_datasets", "eval_dataset") for entry in _listed(left.pop(key, None))
             for source in ([_source(entry)] if isinstance(entry, str) else _entry(entry, found, key))]  # fmt: skip
    if tests:
        found.given["data.test"] = tests[0] if len(tests) == 1 else tests
    share = next((left.pop(key) for key in ("val_set_size", "val_size") if key in left), None)
    if isinstance(share, int | float) and not isinstance(share, bool) and share < 1:
        found.given["data.test_share"] = float(share)
    elif share is not None:
        found.dropped["val_set_size"] = "it is a number of examples: data.test_share is a share"
    if left.pop("train_on_inputs", False) is True or left.pop("train_on_prompt", False) is True:
        found.given["data.loss_on"] = "all"
    if left.pop("mask_history", False) is True:
        found.given["data.loss_on"] = "last_answer"
    for key in ("completion_only_loss", "assistant_only_loss"):
        left.pop(key, None)  # the default here
    template = left.pop("chat_template", None)
    if template in TEMPLATES:
        found.given["data.chat_template"] = template
    elif template is not None and template != "tokenizer_default":
        found.dropped["chat_template"] = REASONS["template"]


def _entry(entry: Mapping[str, Any], found: Imported, key: str) -> list[str]:
    """axolotl's description of one data set."""
    known = {name: value for name, value in entry.items() if value not in (None, "", [], {})}
    path, files = str(known.pop("path", "")), _listed(known.pop("data_files", None))
    kind = str(known.pop("type", "")).partition(".")[0]
    if kind in FORMATS:
        found.given["data.format"] = FORMATS[kind]
    elif kind:
        found.dropped[f"{key}.type"] = f"'{kind[:60]}' is not a format here: auto recognises most (data.format)"
    known.pop("ds_type", None)
    mapped = known.pop("message_property_mappings", None)
    columns = {"messages": known.pop("field_messages", None)} | (
        {name: mapped.get(name) for name in ("role", "content")} if isinstance(mapped, Mapping) else {}
    )
    if columns := {name: value for name, value in columns.items() if isinstance(value, str) and value != name}:
        found.given["data.columns"] = columns
    if isinstance(roles := known.pop("roles", None), Mapping):
        names = {str(name): str(ours) for ours, theirs in roles.items() for name in _listed(theirs)}
        found.given["data.roles"] = names
    if (split := known.pop("split", "train")) != "train":
        found.dropped[f"{key}.split"] = f"the split is '{str(split)[:60]}': name its file in data.train"
    for name in known:
        found.dropped[f"{key}.{name}"] = "there is nothing like it here"
    if files:
        return [
            str(file) if path in ("json", "csv", "parquet", "text") else f"{_source(path)}/{file}" for file in files
        ]
    return [_source(path)] if path else []


def _source(name: str) -> str:
    """A data set's name as data.train has it: a Hub id with its address, so that it is never taken for a file."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and data_suffix(name) is None
    return PREFIX + name if is_id else name


def _batches(left: dict[str, Any], found: Imported) -> None:
    each = next((left.pop(key) for key in ("micro_batch_size", "per_device_train_batch_size") if key in left), None)
    parts = left.pop("gradient_accumulation_steps", 1)
    if type(each) is int and type(parts) is int and each > 0 < parts:
        found.given["train.batch_size"] = each * parts
        found.given |= {"train.micro_batch_size": each} if parts > 1 else {}
    elif each is not None or parts != 1:
        found.dropped["per_device_train_batch_size"] = "it is not a number: say train.batch_size, of a whole step"
    packing = [left.pop(key) for key in ("sample_packing", "packing", "neat_packing") if key in left]
    if packing and not any(packing):
        found.given["train.packed_tokens"] = 0
    saving = left.pop("gradient_checkpointing", left.pop("use_gradient_checkpointing", None))
    if saving is not None:
        found.given["train.activation_checkpointing"] = "offload" if saving == "offload" else bool(saving)
    wide, narrow = left.pop("bf16", None), left.pop("fp16", None)
    if wide is True:
        found.given["train.compute"] = "bfloat16"
    if narrow is True:
        found.dropped["fp16"] = "gradients of float16 would need scaling: train.compute is float32 or bfloat16"
    for key, value in (("bf16", wide), ("fp16", narrow)):
        if isinstance(value, Computed):
            found.dropped[key] = f"it is computed ({value.source}): train.compute = 'auto' asks the hardware as well"


def _course(left: dict[str, Any], found: Imported) -> None:
    """How long it trains, and the learning rate on the way."""
    steps = left.pop("max_steps", -1)
    if type(steps) is int and steps > 0:
        found.given["train.max_steps"] = steps
        if epochs := [key for key in ("num_epochs", "num_train_epochs") if left.pop(key, None) is not None]:
            found.dropped[epochs[0]] = f"max_steps = {steps} says how long it trains, there as well"
    optim = next((left.pop(key) for key in ("optimizer", "optim") if key in left), None)
    if optim in OPTIMIZERS:
        found.given["train.optimizer"] = OPTIMIZERS[optim]
    elif optim is not None:
        found.dropped["optim"] = f"there is no {getattr(optim, 'source', optim)}: train.optimizer is AdamW"
    schedule = next((left.pop(key) for key in ("lr_scheduler_type", "lr_scheduler") if key in left), None)
    kwargs = left.pop("lr_scheduler_kwargs", {})
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    if schedule in SCHEDULES:
        found.given["train.schedule"] = SCHEDULES[schedule]
        least = kwargs.get("min_lr_rate", kwargs.get("min_lr_ratio"))
        found.given |= {"train.min_rate": least} if least else {}
        decay = kwargs.get("num_decay_steps")
        if schedule == "warmup_stable_decay" and type(decay) is int and type(steps) is int and steps > 0:
            found.given["train.decay"] = round(decay / steps, 6)
    elif schedule is not None:
        found.dropped["lr_scheduler_type"] = f"there is no schedule {getattr(schedule, 'source', schedule)}"
    for key in kwargs.keys() - {"min_lr_rate", "min_lr_ratio", "num_decay_steps"}:
        found.dropped[f"lr_scheduler_kwargs.{key}"] = "there is nothing like it here"
    warmup = left.pop("warmup_steps", None)
    if type(warmup) is int and type(steps) is int and steps > 0:
        found.given["train.warmup"] = round(min(1.0, warmup / steps), 6)
    elif isinstance(warmup, float) and warmup < 1:
        found.given["train.warmup"] = warmup
    elif warmup:
        found.dropped["warmup_steps"] = "train.warmup is a share of the steps, whose number is not known here"
    for theirs, ours in (("eval_steps", "train.eval_every"), ("save_steps", "train.save_every")):
        every = left.pop(theirs, None)
        if type(every) is int and every > 0:
            found.given[ours] = every
        elif every is not None:
            found.dropped[theirs] = f"it is a share of the run: {ours} is a number of steps"
    for key in ("eval_strategy", "save_strategy", "evaluation_strategy", "early_stopping"):
        left.pop(key, None)  # the number of steps has it


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


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _slug(text: str) -> str:
    """A name for the registry made of a path or an id."""
    last = next((part for part in reversed(re.split(r"[/\\]", text)) if part.strip(". ")), "")
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:60] or "imported"
