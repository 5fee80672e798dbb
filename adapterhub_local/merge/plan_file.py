"""Read a merge plan from TOML strictly: every mistake at once, each with file, line, key and the nearest known key.

[merge]                       method, its parameters, space, rank | energy | max_error | max_size, dtype, compact, force
[[adapter]]                   one table each: reference (a file, PEFT folder or version), weight (a number, or a list
                              with one for each group of layers), alpha
[output]                      name and alias, or path
[evaluate], [tune]            limit, batch_size, max_length, and a table `data`: held-out chats of each task;
                              evaluate.require are bounds on scores, [tune] says how the merge is searched
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadRecipe, NotFound, QhubError
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight, in_group, num_groups
from adapterhub_local.merge.methods import parameters
from adapterhub_local.merge.rank_rule import parse_rule
from adapterhub_local.merge.tuning import Scored, Tuning
from adapterhub_local.recipe.reader import all_problems, nearest
from adapterhub_local.recipe.toml import MAX_PROBLEMS, Places, read_toml, short
from adapterhub_local.refs import check_alias, check_name
from adapterhub_local.visible import visible_line

_TABLES = ("merge", "adapter", "output", "evaluate", "tune")
_TEXT, _NUMBER, _FLAG, _COUNT = "text", "a finite number", "true or false", "a whole number from 1"
_TEXTS, _FILES, _RANK = "a list of texts", "a table of tasks and their files", "a number or a word"
_SEED = "a whole number from 0"
_WEIGHT = "a finite number, or a list of them, one for each group of layers"
_PARAMETERS = {name: _TEXT if next(iter(rows.values())).choices else _NUMBER for name, rows in parameters().items()}
_SCORED = {"data": _FILES, "limit": _COUNT, "batch_size": _COUNT, "max_length": _COUNT}
_KINDS: dict[str, dict[str, str]] = {  # table -> key -> what its value must be
    "merge": {
        **_PARAMETERS,
        "method": _TEXT,
        "space": _TEXT,
        "rank": _RANK,
        "energy": _NUMBER,
        "max_error": _NUMBER,
        "max_size": _TEXT,
        "dtype": _TEXT,
        "compact": _FLAG,
        "force": _FLAG,
        "with_base": _TEXT,
        "dora_rank": _COUNT,
    },
    "adapter": {"reference": _TEXT, "weight": _WEIGHT, "alpha": _NUMBER},
    "output": {"name": _TEXT, "alias": _TEXT, "path": _TEXT},
    "evaluate": {**_SCORED, "require": _TEXTS},
    "tune": {
        **_SCORED,
        "metric": _TEXT,
        "low": _NUMBER,
        "high": _NUMBER,
        "evaluations": _COUNT,
        "search": _TEXT,
        "groups": _COUNT,
        "methods": _TEXTS,
        "pareto": _FLAG,
        "early_stop": _FLAG,
        "seed": _SEED,
        "minutes": _NUMBER,
    },
}


@dataclass(frozen=True)
class WrittenPlan:
    """A merge as a file says it: labels as they can be opened, weights and alphas in order, formula and output."""

    labels: tuple[str, ...]
    weights: tuple[Weight, ...]
    alphas: tuple[float | None, ...]
    formula: Formula
    force: bool = False
    name: str | None = None
    alias: str | None = None
    path: Path | None = None
    with_base: str | None = None
    dora_rank: int | None = None
    evaluate: Scored | None = None
    tune: Tuning | None = None


def load_plan(path: Path) -> WrittenPlan:
    """The merge in the TOML file at `path`; files it names are relative to it.

    Raises NotFound if there is no file, BadRecipe with one line for each thing that is wrong.
    """
    try:
        text, tables = read_toml(path)
    except FileNotFoundError:
        raise NotFound(f"there is no merge plan {path}") from None
    except OSError as error:
        raise BadRecipe(f"{path} cannot be read as text: {error.strerror or error}") from None
    except ValueError as error:
        raise BadRecipe(f"{path}: not TOML: {error}") from None
    reading = _Reading(path, text)
    for name in tables:
        if name not in _TABLES:
            reading.problem(name, None, f"unknown table [{short(name)}]{reading.nearest(name, _TABLES)}")
    merge = reading.table("merge", tables.get("merge", {}))
    output = reading.table("output", tables.get("output", {}))
    evaluate, tune = (reading.table(name, tables[name]) if name in tables else None for name in ("evaluate", "tune"))
    for name, table in (("evaluate", evaluate), ("tune", tune)):
        if table is not None and not table.get("data") and not reading.problems:
            reading.problem(name, "data", f"[{name}] needs held-out chats: write [{name}.data] with task = file lines")
    listed = tables.get("adapter")
    if not isinstance(listed, list) or not listed:
        reading.problem("adapter", None, "there are no adapters: write [[adapter]] with reference and weight for each")
        listed = []
    adapters = [reading.table("adapter", entry, index) for index, entry in enumerate(listed)]
    for index, entry in enumerate(listed):
        for key in ("reference", "weight"):
            if isinstance(entry, Mapping) and key not in entry:
                reading.problem("adapter", None, f"[[adapter]] {index + 1} needs '{key}'", index)
    rule = reading.attempt(
        "merge", "rank", lambda: parse_rule(*(merge.get(k) for k in ("rank", "energy", "max_error", "max_size")))
    )
    if "path" in output and "name" in output:
        reading.problem("output", "path", "name and path exclude each other: give one")
    if "alias" in output and "name" not in output:
        reading.problem("output", "alias", "alias needs name: only a registered version can have one")
    for key, check in (("name", check_name), ("alias", check_alias)):
        if key in output:
            reading.attempt("output", key, lambda key=key, check=check: check(output[key]))  # type: ignore[misc]
    if not reading.problems:
        assert rule is not None, "without a problem there is a rule"
        given = {key: value for key, value in merge.items() if key in _PARAMETERS}
        formula = Formula(
            merge.get("method", "weighted_sum"), given, merge.get("space"), rule, merge.get("dtype", "auto"),
            merge.get("compact", False),
        )  # fmt: skip
        weights = tuple(_weight(entry["weight"]) for entry in adapters)
        count = reading.attempt("adapter", "weight", lambda: num_groups(weights)) or 0
        for group in range(count):
            if not reading.problems:
                reading.attempt("merge", "method", lambda group=group: formula.check(in_group(weights, group)))  # type: ignore[misc]
        if tune is not None and count:
            for key, message, index in _tuning(path.parent, tune).problems(weights, formula.method):
                reading.problem("adapter" if key == "weight" else "tune", _line(key, tune), message, index)
    if reading.problems:
        raise BadRecipe(all_problems(reading.problems))
    return WrittenPlan(
        tuple(_label(path.parent, entry["reference"]) for entry in adapters),
        weights,
        tuple(entry.get("alpha") for entry in adapters),
        formula,
        merge.get("force", False),
        output.get("name"),
        output.get("alias"),
        path.parent / Path(output["path"]).expanduser() if "path" in output else None,
        merge.get("with_base"),
        merge.get("dora_rank"),
        _scored(path.parent, evaluate) if evaluate is not None else None,
        _tuning(path.parent, tune) if tune is not None else None,
    )


def _scored(folder: Path, table: Mapping[str, Any]) -> Scored:
    data = {task: folder / Path(file).expanduser() for task, file in table["data"].items()}
    sizes = {key: table[key] for key in ("limit", "batch_size", "max_length") if key in table}
    return Scored(data, require=tuple(table.get("require", ())), **sizes)


def _tuning(folder: Path, table: Mapping[str, Any]) -> Tuning:
    settings = {key: value for key, value in table.items() if key not in _SCORED}
    if "methods" in settings:
        settings["methods"] = tuple(settings["methods"])
    return Tuning(_scored(folder, table), **settings)


def _line(key: str, table: Mapping[str, Any]) -> str:
    """The key at whose line a problem is reported: of bounds that do not fit, the one that is written."""
    return "high" if key == "low" and "low" not in table else key


class _Reading:
    """One pass over a plan: every problem with its line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.places = path, Places.of(text.split("\n"))
        self.problems: list[str] = []

    def problem(self, table: str, key: str | None, message: str, index: int = 0) -> None:
        headers = self.places.tables.get(table, [])
        line = self.places.own.get((table, index, key or "")) or (headers[index] if index < len(headers) else None)
        self.problems.append(visible_line(f"{self.path}{f':{line}' if line else ''}: {message}"))

    def nearest(self, name: str, known: Iterable[str]) -> str:
        """The end of a message about an unknown name; a search for each of thousands would take minutes."""
        return nearest(name, dict.fromkeys(sorted(known))) if len(self.problems) < MAX_PROBLEMS else ""

    def attempt(self, table: str, key: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; its error becomes a problem at this key."""
        try:
            return work()
        except QhubError as error:
            self.problem(table, key, str(error))
            return None

    def table(self, name: str, given: Any, index: int = 0) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            self.problem(name, None, f"'{name}' must be a table: write [{name}]", index)
            return {}
        values, kinds = {}, _KINDS[name]
        for key, value in given.items():
            if key not in kinds:
                self.problem(name, key, f"unknown key '{short(key)}' in [{name}]{self.nearest(key, kinds)}", index)
            elif not _is(kinds[key], value):
                self.problem(name, key, f"{name}.{key} must be {kinds[key]}, not {short(repr(value))}", index)
            else:
                values[key] = value
        return values


def _is(kind: str, value: Any) -> bool:
    if kind == _TEXT:
        return isinstance(value, str) and bool(value)
    if kind == _FLAG:
        return isinstance(value, bool)
    if kind == _NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if kind == _WEIGHT:
        return _is(_NUMBER, value) or (isinstance(value, list) and bool(value) and all(_is(_NUMBER, v) for v in value))
    if kind in (_COUNT, _SEED):
        return isinstance(value, int) and not isinstance(value, bool) and (0 if kind == _SEED else 1) <= value < 2**31
    if kind == _TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == _FILES:
        return isinstance(value, Mapping) and all(isinstance(file, str) and file for file in value.values())
    return True  # rank is a number or a word: its rule checks it


def _weight(value: Any) -> Weight:
    return tuple(float(one) for one in value) if isinstance(value, list) else float(value)


def _label(folder: Path, reference: str) -> str:
    """A file or folder beside the plan if there is one, else what was written."""
    beside = folder / Path(reference).expanduser()
    is_path = reference.endswith(".safetensors") or reference.startswith((".", "/", "~"))
    return str(beside) if is_path or beside.exists() else reference
