"""The course of a training in other tools' settings, as a recipe's [train]: batches, steps, optimizer, schedule."""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.recipe.foreign import Computed, Imported

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


def convert_batches(left: dict[str, Any], found: Imported) -> None:
    """Take what says how examples are computed, in which rows and numbers, out of `left`."""
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


def convert_course(left: dict[str, Any], found: Imported) -> None:
    """Take how long it trains, and by which learning rates, out of `left`."""
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
