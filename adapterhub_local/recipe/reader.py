"""Read a recipe strictly: every mistake at once, each with file, line, key and the nearest known key."""

import difflib
import sys
import types
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, Field, replace
from pathlib import Path
from typing import Any

from adapterhub_local.counts import counted
from adapterhub_local.errors import BadRecipe, InputError
from adapterhub_local.recipe.elsewhere import hint
from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.layers import EXTENDS, Layer, overriding, read_layers
from adapterhub_local.recipe.objectives import check_objective
from adapterhub_local.recipe.recipe import INSTEAD, RENAMED, Recipe
from adapterhub_local.recipe.reward import code_problem
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.source import HubFiles, Source, local_problem, read_source
from adapterhub_local.recipe.sweep import SWEEP, read_sweep
from adapterhub_local.recipe.template_file import names_code, names_file, read_template
from adapterhub_local.recipe.toml import MAX_NAME, MAX_PROBLEMS, short
from adapterhub_local.visible import visible_line

KEYS = {name: keys(table) for name, table in TABLES.items()}
_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Source: "a file name or Hub dataset",
}
_PLURALS = {str: "non-empty texts", int: "whole numbers", float: "numbers", Source: "them"}


def load_recipe(path: Path, overrides: Sequence[str] = (), *, run: tuple[str, Sequence[str]] | None = None) -> Recipe:
    """The recipe in the TOML file at `path`, with what it extends, and `overrides` such as `train.seed=1` applied.

    `run` is one of a sweep: what messages call it, and what it changes.

    Raises NotFound if there is no file, BadRecipe with one line for each thing that is wrong: not
    TOML, unknown tables or keys, wrong types, values out of range, missing data files.
    """
    files = read_layers(path)
    layers = [*files, overriding(overrides, path)]
    if run is not None:
        layers.append(overriding(run[1], path, run[0]))
    reading = _Reading(layers)
    values = {name: reading.table(name) for name in TABLES}
    reading.check_together(values)
    sweep = read_sweep(layers, reading.problems)
    if reading.problems:
        raise BadRecipe(all_problems(reading.problems))
    text = _whole_text(files)
    return Recipe(**values, text=text, path=path, origins=reading.origins, sweep=sweep, overrides=tuple(overrides))


def load_runs(recipe: Recipe) -> list[tuple[tuple[str, ...], Recipe]]:
    """Every run of a recipe's sweep as (what it changes, its recipe); of one without a sweep, itself.

    The recipe's own alias is left out: it goes to the best. Raises BadRecipe with what is wrong with any of them.
    """
    if recipe.sweep is None:
        return [((), recipe)]
    loaded, problems = [], []
    for number, changes in enumerate(recipe.sweep.runs, 1):
        try:
            run = load_recipe(recipe.path, recipe.overrides, run=(f"run {number} of [sweep]", changes))
        except BadRecipe as error:
            problems += str(error).splitlines()
            continue
        loaded.append((changes, replace(run, sweep=None, output=replace(run.output, alias=None))))
    if problems:
        raise BadRecipe(all_problems(problems))
    return loaded


def all_problems(problems: Sequence[str]) -> str:
    """A line for each, no more of them than anybody reads."""
    every = list(dict.fromkeys(problems))
    hidden = len(every) - MAX_PROBLEMS
    return "\n".join([*every[:MAX_PROBLEMS], *([f"and {counted(hidden, 'more mistake')}"] if hidden > 0 else [])])


def _whole_text(files: Sequence[Layer]) -> str:
    """The recipe as written, and behind it those it extends, so that a version keeps all that it was made from."""
    own, *others = reversed(files)
    return own.text + "".join(f"\n# {layer.path.name}, which is extended\n{layer.text}" for layer in others)


class _Reading:
    """One pass over a recipe's layers: the values, where each was written, and every problem with its line."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.problems: list[str] = []
        self.origins: dict[str, str] = {}
        known = {**TABLES, SWEEP: None, EXTENDS: None}
        for layer in layers:
            for name, given in layer.tables.items():
                if name not in known and not isinstance(given, Mapping) and (suggestion := hint(name, None, KEYS)):
                    self.problem(layer, name, None, f"unknown key '{short(name)}'{suggestion}")
                elif name not in known:
                    self.problem(layer, name, None, f"unknown table [{short(name)}]{self.nearest(name, known)}")
                elif name != EXTENDS and not isinstance(given, Mapping):
                    self.problem(layer, name, None, f"'{name}' must be a table: write [{name}]")

    def problem(self, layer: Layer, table: str, key: str | None, message: str) -> None:
        place = layer.place(table, key)
        if not layer.is_file:
            place = f"{layer.path}: {place}"
        self.problems.append(visible_line(f"{place}: {message}"))

    def nearest(self, name: str, known: Mapping[str, Any]) -> str:
        """The end of a message about an unknown name; a search for each of thousands would take minutes."""
        return nearest(name, known) if len(self.problems) < MAX_PROBLEMS else ""

    def table(self, name: str) -> Any:
        """The table of this name, None if something in it is wrong."""
        before = len(self.problems)
        known = keys(TABLES[name])
        given: dict[str, tuple[Layer, Any]] = {}
        holders = [layer for layer in self.layers if isinstance(layer.tables.get(name), Mapping)]
        for layer in holders:
            for key, value in layer.tables[name].items():
                if (name, key) in RENAMED:
                    self.problem(layer, name, key, f"'{key}' in [{name}] is called '{RENAMED[name, key]}' now")
                elif key not in known:
                    is_searched = len(self.problems) < MAX_PROBLEMS
                    suggestion = hint(key, name, KEYS) if is_searched and not _near(key, known) else None
                    end = suggestion or self.nearest(key, known)
                    self.problem(layer, name, key, f"unknown key '{short(key)}' in [{name}]{end}")
                given[key] = (layer, value)
                other = INSTEAD.get((name, key))
                if other in given and given[other][0] is not layer:  # what extends or overrides a recipe decides
                    del given[other]
        hints = typing.get_type_hints(TABLES[name])
        values = {}
        for key, item in known.items():
            if key in given:
                layer, value = given[key]
                self.origins[f"{name}.{key}"] = layer.place(name, key)
                values[item.name] = self._value(layer, name, key, item, hints[item.name], value)
            elif item.default is MISSING:
                files = [layer for layer in (*self.layers, *holders) if layer.is_file]
                self.problem(files[-1], name, None, f"[{name}] needs '{key}': {item.metadata['meaning']}")
        return TABLES[name](**values) if len(self.problems) == before else None

    def _value(self, layer: Layer, table: str, key: str, item: Field[Any], hint: Any, value: Any) -> Any:
        allowed = _kinds(hint)
        converted = convert(value, allowed)
        if converted is None:
            wanted = " or ".join(dict.fromkeys(_type_name(kind) for kind in allowed if kind is not types.NoneType))
            self.problem(layer, table, key, f"{table}.{key} must be {wanted}, not {short(repr(value))}")
            return None
        if any(_item_type(kind) is Source for kind in allowed):
            converted = tuple(read_source(text, layer.path.parent) for text in converted)
            for source in converted:
                if not isinstance(source, HubFiles) and (wrong := local_problem(source)):
                    self.problem(layer, table, key, f"{table}.{key}: {wrong}")
            return converted
        check = item.metadata["check"]
        if check is not None and (wrong := check(converted)):
            self.problem(layer, table, key, f"{table}.{key} = {short(repr(value))}: {wrong}")
        if (table, key) == ("data", "chat_template"):
            return self._template(layer, converted)
        if (table, key) == ("reward", "python") and names_code(converted):
            return self._code(layer, converted)
        return converted

    def _template(self, layer: Layer, text: str) -> str:
        """A chat template: what a file beside the recipe holds, which is kept with the version; or a name."""
        try:
            return read_template(text, layer.path.parent) if names_file(text) else text
        except InputError as error:
            self.problem(layer, "data", "chat_template", f"data.chat_template: {error}")
            return text

    def _code(self, layer: Layer, text: str) -> str:
        """What a Python file beside the recipe holds, which is kept with the version."""
        try:
            source = read_template(text, layer.path.parent).rstrip() + "\n"
        except InputError as error:
            self.problem(layer, "reward", "python", f"reward.python: {error}")
            return text
        if wrong := code_problem(source):
            self.problem(layer, "reward", "python", f"reward.python = {short(repr(text))}: {wrong}")
        return source

    def check_together(self, values: Mapping[str, Any]) -> None:
        """What concerns several keys, as far as each table is valid in itself."""
        for table, check in (("adapter", _check_adapter), ("train", _check_train), ("data", _check_data)):
            for key, message in check(values[table], values, self.origins) if values[table] else ():
                self.problem(self.holder(table, key), table, key, message)
        for table, key, message in check_objective(dict(values), set(self.origins)):
            self.problem(self.holder(table, key), table, key, message)

    def holder(self, table: str, key: str) -> Layer:
        """The layer that gives a key its value."""
        return next(layer for layer in reversed(self.layers) if key in layer.tables.get(table, {}))


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


def check_data_settings(given: Mapping[str, str | None]) -> None:
    """Values for keys of [data] that were given as options. Raises BadRecipe for one that is not allowed."""
    checks = {key: item.metadata["check"] for key, item in keys(TABLES["data"]).items()}
    for name, value in given.items():
        if value is not None and checks[name] is not None and (wrong := checks[name](value)):
            raise BadRecipe(f"--{name} {value}: {wrong}")


def kinds_of(table: str, key: str) -> tuple[Any, ...]:
    """The types that a key of a recipe takes."""
    return _kinds(typing.get_type_hints(TABLES[table])[KEYS[table][key].name])


def _kinds(hint: Any) -> tuple[Any, ...]:
    return _alternatives(hint) if hint != Source else (hint,)


def convert(value: Any, allowed: Sequence[Any]) -> Any:
    """`value` as the first of the types that takes it, or None."""
    for kind in allowed:
        item = _item_type(kind)
        if item is Source and isinstance(value, str) and value.strip():
            return (value,)
        if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if kind in (str, int, bool) and type(value) is kind:
            return value
        if item is not None and typing.get_origin(kind) is tuple and isinstance(value, list) and value is not None:
            parts = [convert(part, (str if item is Source else item,)) for part in value]
            if all(part is not None and part != "" for part in parts) and (parts or item is not Source):
                return tuple(parts)
        if item is not None and typing.get_origin(kind) is dict and isinstance(value, Mapping):
            table = {str(key): convert(part, _alternatives(item)) for key, part in value.items()}
            if all(part is not None for part in table.values()):
                return table
    return None


def _item_type(kind: Any) -> Any:
    """What a list or table type holds; None for other types."""
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0]
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _type_name(kind: Any) -> str:
    item = _item_type(kind)
    if item is not None and item is not Source and item != Source and len(_alternatives(item)) > 1:
        kinds = [part for part in _alternatives(item) if part in _TYPE_NAMES]
        return f"a table of {' or '.join(_TYPE_NAMES[part] for part in kinds) if kinds else 'lists or tables of names'}"
    if item is Source:
        return f"{_TYPE_NAMES[Source]}, or a list of {_PLURALS[Source]}"
    if item is not None:
        return f"a {'table' if typing.get_origin(kind) is dict else 'list'} of {_PLURALS[item]}"
    return _TYPE_NAMES[kind]


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The end of a message about an unknown name."""
    near = _near(name, known, 0.5)
    return f": did you mean '{near[0]}'?" if near else f": known are {', '.join(known)}"


def _near(name: str, known: Mapping[str, Any], cutoff: float = 0.8) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff) if len(name) <= MAX_NAME else []
