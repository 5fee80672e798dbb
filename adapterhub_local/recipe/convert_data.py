"""The data of other tools' settings, as a recipe's [data]: axolotl's data sets, LLaMA-Factory's, and names alone."""

import re
from collections.abc import Mapping
from typing import Any

from adapterhub_local.recipe.foreign import Imported
from adapterhub_local.recipe.source import PREFIX, data_suffix

DATA = ("datasets", "dataset", "dataset_name")
FORMATS = {  # axolotl's types and LLaMA-Factory's formattings
    "chat_template": "messages",
    "openai": "messages",
    "sharegpt": "sharegpt",
    "alpaca": "alpaca",
    "completion": "text",
}
TEMPLATES = ("chatml", "llama3", "gemma", "zephyr", "alpaca")
OWN_TEMPLATE = "the base's own chat template is used; data.chat_template names another one or a .jinja file"


def convert_data(left: dict[str, Any], found: Imported) -> None:
    """Take what says the data, and how it is read, out of `left`."""
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
        found.dropped["chat_template"] = OWN_TEMPLATE


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


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
