"""`[sweep]`: one recipe, many runs. Every combination of `grid`, with every row of `paired`.

[sweep]
alias = "best"
[sweep.grid]                        # each with each
train.learning_rate = [1e-4, 1e-3]
[sweep.paired]                      # the first with the first, the second with the second
adapter.rank = [8, 16]
adapter.alpha = [16, 32]
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_local.errors import BadReference
from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.layers import Layer, nested_keys
from adapterhub_local.recipe.recipe import Sweep
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.toml import short
from adapterhub_local.refs import check_alias

SWEEP = "sweep"
KEYS = ("grid", "paired", "metric", "alias", "max_runs")
METRICS = {"loss": min, "exact_match": max}  # -> which of two is the better


def read_sweep(layers: Sequence[Layer], problems: list[str]) -> Sweep | None:
    """The sweep that the layers describe together, None if none does; what is wrong is added to `problems`."""
    holders = [layer for layer in layers if isinstance(layer.tables.get(SWEEP), Mapping)]
    if not holders:
        return None
    table: dict[str, Any] = {}
    for layer in holders:
        for key, value in layer.tables[SWEEP].items():
            kind, _, varied = key.partition(".")  # as `--set sweep.grid.train.seed=[1,2]` has it
            given = {varied: value} if varied else value
            both = isinstance(given, Mapping) and isinstance(table.get(kind), Mapping)
            table[kind] = {**table[kind], **given} if both else given

    def wrong(key: str | None, message: str) -> None:
        first = (key or "").partition(".")[0]
        named = [layer for layer in holders if any(given.partition(".")[0] == first for given in layer.tables[SWEEP])]
        problems.append(f"{(named or holders)[-1].place(SWEEP, key)}: {message}")

    before = len(problems)
    for key in table:
        if key not in KEYS:
            wrong(key, f"unknown key '{short(key)}' in [sweep]: known are {', '.join(KEYS)}")
    parts = {}
    for kind in ("grid", "paired"):
        part = table.get(kind, {})
        if not isinstance(part, Mapping):
            wrong(kind, f"sweep.{kind} must be a table of lists: write [sweep.{kind}]")
            part = {}
        parts[kind] = dict(nested_keys(part))
        for key, values in parts[kind].items():
            _check_key(f"{kind}.{key}", key, values, wrong)
    for key in parts["grid"].keys() & parts["paired"].keys():
        wrong(f"paired.{key}", f"{key} is in sweep.grid and in sweep.paired: leave one out")
    lengths = {key: len(values) for key, values in parts["paired"].items() if isinstance(values, list)}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} {length}" for key, length in lengths.items())
        wrong("paired", f"the lists of sweep.paired must be equally long: {shown}")
    if not parts["grid"] and not parts["paired"]:
        wrong(None, "[sweep] has nothing to vary: write lists in [sweep.grid] or [sweep.paired]")
    metric, alias = table.get("metric", "loss"), table.get("alias", "best")
    if metric not in METRICS:
        wrong("metric", f"sweep.metric = {metric!r}: must be one of {', '.join(METRICS)}")
    try:
        check_alias(alias if isinstance(alias, str) else "")
    except BadReference as error:
        wrong("alias", f"sweep.alias = {alias!r}: {error}")
    if len(problems) > before:
        return None
    limit = table.get("max_runs", 64)
    count = math.prod(map(len, parts["grid"].values())) * max(lengths.values(), default=1)
    if type(limit) is not int or count > limit:  # counted before any is made
        wrong("max_runs", f"these are {count} runs, sweep.max_runs is {limit!r}: raise it if that is meant")
        return None
    return Sweep(_runs(parts["grid"], parts["paired"]), metric, alias)


def _runs(grid: Mapping[str, list[Any]], paired: Mapping[str, list[Any]]) -> tuple[tuple[str, ...], ...]:
    """Each combination as overrides; JSON spells these values as TOML does."""
    rows = list(zip(*paired.values(), strict=True)) if paired else [()]
    combinations = itertools.product(rows, itertools.product(*grid.values()))
    return tuple(
        tuple(
            f"{key}={json.dumps(value, default=str)}"
            for key, value in zip((*paired, *grid), (*row, *values), strict=True)
        )
        for row, values in combinations
    )


def _check_key(where: str, key: str, values: Any, wrong: Any) -> None:
    table, _, name = key.partition(".")
    known = keys(TABLES[table]) if table in TABLES else {}
    if name not in known or key == "output.name":
        wrong(where, f"'{key}' is not a key that can be varied: write table.key, such as train.learning_rate")
    elif not isinstance(values, list) or not values:
        wrong(where, f"sweep.{where} must be a list of values")
