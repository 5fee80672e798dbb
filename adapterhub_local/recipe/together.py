"""What keys of one table, each allowed by itself, may not say together."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from adapterhub_local.recipe.kinds import KEYS
from adapterhub_local.recipe.source import HubFiles


def excluding(values: Mapping[str, Any], given: Container[str]) -> list[tuple[str, str, str]]:
    """(table, key, message) for each key that another one excludes, or that needs what is not there.

    values: the tables of a recipe, None for one with mistakes; given: `table.key` of all that it says itself.
    """
    checks = (("adapter", _check_adapter), ("train", _check_train), ("data", _check_data))
    return [
        (table, *found) for table, check in checks if values[table] for found in check(values[table], values, given)
    ]


def _check_adapter(adapter: Any, values: Mapping[str, Any], given: Container[str]) -> list[tuple[str, str]]:
    if adapter.init != "eva" or not adapter.train_tokens:
        return []
    # PEFT (0.21) takes the embeddings for a layer that is adapted, whose inputs are no vectors
    return [("train_tokens", "adapter.train_tokens cannot begin with init = 'eva': use default or gaussian")]


def _check_train(train: Any, values: Mapping[str, Any], given: Container[str]) -> list[tuple[str, str]]:
    problems = []
    if train.micro_batch_size and train.batch_size % train.micro_batch_size:
        problems.append(("micro_batch_size", f"micro_batch_size must divide batch_size ({train.batch_size})"))
    if train.eval_every and values["data"] and values["data"].test is None and not values["data"].test_share:
        problems.append(("eval_every", "train.eval_every needs data.test: held-out chats to evaluate on"))
    if train.max_steps and "train.epochs" in given:
        problems.append(("max_steps", "train.max_steps and train.epochs both say how long: leave one out"))
    if train.schedule != "wsd" and train.decay != KEYS["train"]["decay"].default:
        problems.append(("decay", "train.decay is for train.schedule = 'wsd'"))
    if train.schedule == "constant" and train.min_rate:
        problems.append(("min_rate", "train.min_rate is for schedules that fall: cosine, linear or wsd"))
    if train.schedule == "wsd" and train.warmup + train.decay > 1:
        problems.append(("decay", "train.warmup and train.decay are shares of one run: together 1 at most"))
    if train.patience and not train.eval_every:
        problems.append(("patience", "train.patience needs train.eval_every: how often to evaluate"))
    return problems


def _check_data(data: Any, values: Mapping[str, Any], given: Container[str]) -> list[tuple[str, str]]:
    problems = []
    files = [
        {item.resolve() if isinstance(item, Path) else item for item in part or ()} for part in (data.train, data.test)
    ]
    if files[0] & files[1] and not all(isinstance(item, HubFiles) and not item.path for item in files[0] & files[1]):
        problems.append(("test", "data.test is data.train: hold out other examples to evaluate on"))
    if data.weights is not None and len(data.weights) != len(data.train):
        problems.append(
            ("weights", f"data.weights has {len(data.weights)} numbers for {len(data.train)} files of train")
        )
    if (data.prompt is None) != (data.answer is None):
        given, missing = ("prompt", "answer") if data.answer is None else ("answer", "prompt")
        problems.append((given, f"data.{given} needs data.{missing}: both are made of columns"))
    for key in ("columns", "format") if data.prompt is not None else ():
        if getattr(data, key) not in (None, "auto"):
            problems.append((key, f"data.{key} and data.prompt exclude each other: data.prompt names columns itself"))
    if data.template == "plain" and (data.chat_template is not None or data.template_args):
        given = "chat_template" if data.chat_template is not None else "template_args"
        problems.append((given, f"data.{given} is for data.template = 'chat', not 'plain'"))
    if data.system is not None and data.prompt is None:
        problems.append(("system", "data.system needs data.prompt and data.answer"))
    return problems
