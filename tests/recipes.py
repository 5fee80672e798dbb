"""A smallest recipe, lines that are wrong in one, and what is told of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_local.errors import BadRecipe
from adapterhub_local.recipe import load_recipe

MINIMAL = '[base]\nname = "tiny"\n\n[data]\ntrain = "train.jsonl"\n\n[output]\nname = "sentiment"\n'
Write = Callable[[str], Path]

WRONG = {  # a line of a table -> what is told
    "train: epochs = 0": "must be from 0.001 to 10000",
    "train: epochs = nan": "must be a number",
    "train: epochs = inf": "must be a number",
    f"train: epochs = 1{'0' * 400}": "must be a number",
    "train: epochs = '1'": "must be a number, not '1'",
    "train: batch_size = 0": "must be from 1 to 2147483648",
    "train: batch_size = 1.5": "must be a whole number",
    "train: batch_size = true": "must be a whole number",
    "train: micro_batch_size = 3": "must divide batch_size (16)",
    "train: learning_rate = -1e-3": "must be from 1e-09 to 1",
    "train: learning_rate = 0": "must be from 1e-09 to 1",
    "train: learning_rate = 1e-400": "must be from 1e-09 to 1",
    "train: weight_decay = -0.1": "must be from 0 to 10",
    "train: loraplus_ratio = 0": "must be from 0.001 to 1000",
    "train: packed_tokens = -1": "must be from 0 to 16777216",
    "train: activation_checkpointing = 'on'": "must be true, false or 'offload'",
    "train: activation_checkpointing = 1": "must be true or false or text",
    "train: schedule = 'cosin'": "must be one of cosine, linear, constant",
    "train: max_steps = 0": "must be from 1 to 2147483648",
    "train: decay = 0.1": "is for train.schedule = 'wsd'",
    "train: min_rate = 1.5": "must be from 0 to 1",
    "train: optimizer = 'sgd'": "paged_adamw_8bit, paged_adamw_32bit",
    "train: compute = 'float16'": "must be one of auto, float32, bfloat16",
    "train: warmup = 1.01": "must be from 0 to 1",
    "train: seed = -1": "must be from 0 to 4294967295",
    "train: seed = 4294967296": "must be from 0 to 4294967295",
    "train: max_grad_norm = 0": "must be from 1e-06 to 1000000",
    "adapter: rank = 0": "must be from 1 to 4096",
    "adapter: alpha = 0": "must be from 1e-06 to 1000000",
    "adapter: dropout = 1": "must be from 0 to 0.99",
    "adapter: rslora = 1": "must be true or false",
    "adapter: target_modules = []": "must be 'all-linear' or a list",
    "adapter: target_modules = ''": "must be 'all-linear' or a list",
    "adapter: target_modules = 'q_proj'": "must be 'all-linear' or a list",
    "adapter: target_modules = ['q_proj', 3]": "must be text or a list of non-empty texts",
    "adapter: target_modules = ['']": "must be text or a list of non-empty texts",
    "data: max_length = 7": "must be from 8 to 1048576",
    "data: max_length = 1048577": "must be from 8 to 1048576",
    "data: limit = 0": "must be from 1 to 2147483648",
    "data: test = 'train.jsonl'": "hold out other examples",
    "data: test = 'none.jsonl'": "there is no file",
    "data: test = '~nobody-here/x.jsonl'": "there is no file",
    f"data: test = '{'x' * 5000}'": "there is no file",
    "data: test = ''": "must be a file name",
    "data: test = 3": "must be a file name",
    "eval: limit = -1": "must be from 1 to 2147483648",
    "output: alias = 'latest'": "reserved",
    "output: alias = 'v3'": "reserved",
    "output: alias = 'a/b'": "not an alias",
    "output: task = 3": "must be text",
}


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that this recipe gives, without its path."""
    with pytest.raises(BadRecipe) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(str(path)) for line in str(caught.value).splitlines()]
