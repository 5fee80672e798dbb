"""Read a recipe strictly: every mistake at once, each with file, line, key and the nearest known key."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, replace
from pathlib import Path
from typing import Any

from adapterhub_local.counts import counted
from adapterhub_local.errors import BadRecipe, InputError
from adapterhub_local.recipe.elsewhere import hint
from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.kinds import KEYS, convert, item_type, kinds_in, type_name
from adapterhub_local.recipe.layers import EXTENDS, Layer, overriding, read_layers
from adapterhub_local.recipe.objectives import check_objective
from adapterhub_local.recipe.recipe import INSTEAD, RENAMED, Recipe
from adapterhub_local.recipe.reward import code_problem
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.source import HubFiles, Source, local_problem, read_source
from adapterhub_local.recipe.sweep import SWEEP, read_sweep
from adapterhub_local.recipe.template_file import names_code, names_file, read_template
from adapterhub_local.recipe.together import excluding
from adapterhub_local.recipe.toml import MAX_NAME, MAX_PROBLEMS, short
from adapterhub_local.visible import visible_line


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
        allowed = kinds_in(hint)
        converted = convert(value, allowed)
        if converted is None:
            wanted = " or ".join(dict.fromkeys(type_name(kind) for kind in allowed if kind is not types.NoneType))
            self.problem(layer, table, key, f"{table}.{key} must be {wanted}, not {short(repr(value))}")
            return None
        if any(item_type(kind) is Source for kind in allowed):
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
        given = set(self.origins)
        for table, key, message in (*excluding(values, given), *check_objective(dict(values), given)):
            self.problem(self.holder(table, key), table, key, message)

    def holder(self, table: str, key: str) -> Layer:
        """The layer that gives a key its value."""
        return next(layer for layer in reversed(self.layers) if key in layer.tables.get(table, {}))


def check_data_settings(given: Mapping[str, str | None]) -> None:
    """Values for keys of [data] that were given as options. Raises BadRecipe for one that is not allowed."""
    checks = {key: item.metadata["check"] for key, item in keys(TABLES["data"]).items()}
    for name, value in given.items():
        if value is not None and checks[name] is not None and (wrong := checks[name](value)):
            raise BadRecipe(f"--{name} {value}: {wrong}")


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The end of a message about an unknown name."""
    near = _near(name, known, 0.5)
    return f": did you mean '{near[0]}'?" if near else f": known are {', '.join(known)}"


def _near(name: str, known: Mapping[str, Any], cutoff: float = 0.8) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff) if len(name) <= MAX_NAME else []
