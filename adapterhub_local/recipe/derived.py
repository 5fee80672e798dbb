"""What a recipe's settings come to on a device: optimizer, compute dtype, steps, row size.

The plan and the run read them from here, so neither can foretell what the other does not do. No torch.
"""

import math
from dataclasses import replace
from pathlib import Path

from adapterhub_local import settings
from adapterhub_local.recipe.schema import Adapter, Data, Train

CPUINFO = Path("/proc/cpuinfo")


def optimizer_on(wanted: str, device: str) -> str:
    """The optimizer that `auto` means on a device (`cpu` or `cuda`): a step of 8-bit AdamW is ten times slower on a
    CPU."""
    if wanted != "auto":
        return wanted
    return "adamw" if device == "cpu" else "paged_adamw_8bit"


def compute_on(wanted: str, device: str, *, has_bfloat16: bool) -> str:
    """The dtype of activations; `auto` is what QHUB_COMPUTE says, else bfloat16 where the hardware has matrix units.

    `has_bfloat16` describes a GPU; a CPU is asked itself. Not float16 on older GPUs: gradients need its range
    scaled, and a base of bfloat16 weights can overflow it.
    """
    wanted = settings.compute() if wanted == "auto" else wanted
    if wanted != "auto":
        return wanted
    has_units = has_bfloat16 if device == "cuda" else has_amx()
    return "bfloat16" if has_units else "float32"


def has_amx() -> bool:
    """Whether this machine's CPU multiplies matrices of bfloat16 in units of its own."""
    return CPUINFO.exists() and " amx_bf16" in CPUINFO.read_text(errors="replace")


def num_steps(num_examples: int, train: Train) -> int:
    """Optimizer steps of a run."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, round(math.ceil(num_examples / train.batch_size) * train.epochs))


def num_epochs(num_examples: int, train: Train) -> float:
    """Passes over the examples that a run makes."""
    if train.max_steps is None:
        return train.epochs
    return train.max_steps / math.ceil(num_examples / train.batch_size)


def learning_rate(step: int, steps: int, train: Train) -> float:
    """The share of the peak learning rate in optimizer step `step` of `steps`, counted from 1; above 0 in each.

    It rises to 1 over `warmup`, and falls to `min_rate` one step behind the last: as half a cosine, in a line, or (wsd,
    https://arxiv.org/abs/2404.06395) in a line over the last share `decay` of the steps.
    """
    warmup = math.ceil(train.warmup * steps)
    if step <= warmup:
        return step / warmup if warmup else 1.0
    end = steps + 1
    if train.schedule == "constant":
        return 1.0
    begin = max(warmup, end - math.ceil(train.decay * steps)) if train.schedule == "wsd" else warmup
    if step <= begin:
        return 1.0
    passed = (step - begin) / max(1, end - begin)
    left = (1 + math.cos(math.pi * passed)) / 2 if train.schedule == "cosine" else (end - step) / max(1, end - begin)
    return train.min_rate + (1 - train.min_rate) * left


def data_within(data: Data, context: int | None) -> Data:
    """What is read of examples on a base that takes texts of `context` tokens, None if it does not state them.

    A `max_length` that the recipe gives is held against the base first (`train.check`): only the default gives way.
    """
    return replace(data, max_length=min(data.max_length, context or data.max_length))


def examples_a_row(train: Train, world_size: int = 1) -> int:
    """The most examples that are packed into one row, of a batch that `world_size` processes divide."""
    if train.packed_tokens == 0:
        return 1
    return min(train.micro_batch_size or train.batch_size, math.ceil(train.batch_size / world_size))


def shares_prefixes(adapter: Adapter) -> bool:
    """Whether examples of a row share the tokens they begin with: not with dropout, whose mask would be one for all."""
    return adapter.dropout == 0
