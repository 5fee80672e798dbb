"""Settings of a run as other tools have them in files: YAML and JSON configs, notebooks and scripts. Nothing is run.

What becomes of them here is `Imported`.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adapterhub_local.errors import InputError
from adapterhub_local.regular import read_regular

MAX_BYTES = 16 << 20  # notebooks hold pictures
CALLS = {  # calls in a notebook whose keywords are settings -> what to do with a first argument without one
    "from_pretrained": "model_name",
    "get_peft_model": None,
    "LoraConfig": None,
    "SFTConfig": None,
    "DPOConfig": None,
    "KTOConfig": None,
    "ORPOConfig": None,
    "TrainingArguments": None,
    "UnslothTrainingArguments": None,
    "SFTTrainer": None,
    "DPOTrainer": None,
    "KTOTrainer": None,
    "ORPOTrainer": None,
    "UnslothTrainer": None,
    "Trainer": None,
    "get_chat_template": None,
    "load_dataset": "dataset_name",
}
OBJECTS = frozenset(  # keywords that hand over what was made before, not a setting
    [
        "model",
        "tokenizer",
        "processing_class",
        "train_dataset",
        "eval_dataset",
        "args",
        "data_collator",
        "callbacks",
        "peft_config",
        "ref_model",
        "formatting_func",
        "dataset_text_field",
        "token",
        "dtype",
        "dataset_num_proc",
    ]
)


@dataclass
class Imported:
    """`given`: table.key -> value of the recipe. `dropped`: their key -> why it has no place. `notes` for people."""

    base: str | None
    given: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON config, an .ipynb notebook or a Python script, by their own names.

    Of code only what is written out counts: numbers, texts, lists, and names that were given such a value once. What
    is computed has the value `Computed`. Raises InputError for a file that is none of these.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    suffix = path.suffix.lower()
    try:
        if suffix == ".ipynb":
            found: Any = _of_code(_cells(json.loads(text)))
        elif suffix == ".py":
            found = _of_code(text)
        else:
            found = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path} has no settings: give a config of axolotl, LLaMA-Factory, TRL or PEFT, or a notebook")
    if not found:
        raise InputError(f"{path} has no call that sets up a training run, such as SFTTrainer or get_peft_model")
    return found


class Computed:
    """Stands for a value that code computes."""

    def __init__(self, source: str) -> None:
        self.source = source


def _cells(notebook: Any) -> str:
    """The code of a notebook, without the lines that are for the shell or IPython."""
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError("it is not a notebook")
    parts = []
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", "")
            lines = ("".join(source) if isinstance(source, list) else str(source)).splitlines()
            code = "\n".join("pass" if line.strip().startswith(("!", "%")) else line for line in lines)
            try:
                ast.parse(code)
            except SyntaxError:  # of another language, or a fragment
                continue
            parts.append(code)
    return "\n".join(parts)


def _of_code(code: str) -> dict[str, Any]:
    tree = ast.parse(code)
    known = dict(_constants(tree))
    settings: dict[str, Any] = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in CALLS:
            continue
        if name.endswith(("Trainer", "Config")) and name[:3] in ("DPO", "KTO", "ORP"):
            settings.setdefault("rl", name[: 4 if name[0] == "O" else 3].lower())
        if name == "from_pretrained" and isinstance(call.func, ast.Attribute):
            owner = getattr(call.func.value, "id", "")
            if not owner.startswith(("Fast", "AutoModel")):
                continue  # a tokenizer's, or a trained adapter's
        first = CALLS[name]
        if first and call.args:
            settings.setdefault(first, _value(call.args[0], known))
        for keyword in call.keywords:
            if keyword.arg and keyword.arg not in OBJECTS:
                key = "dataset_split" if (name, keyword.arg) == ("load_dataset", "split") else keyword.arg
                settings.setdefault(key, _value(keyword.value, known))
    return settings


def _constants(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """Names that are given a written-out value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                yield node.targets[0].id, ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Computed(ast.unparse(node)[:60])
