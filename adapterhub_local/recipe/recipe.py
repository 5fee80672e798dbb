"""The recipe as a whole: its checked tables, where each value is written, and its runs if it is a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.objectives import Preference
from adapterhub_local.recipe.reward import Reward
from adapterhub_local.recipe.schema import TABLES, Adapter, Base, Data, Eval, Output, Train
from adapterhub_local.recipe.source import Source, shown

RENAMED = {("adapter", "from_version"): "from"}  # table and key as recipes had it -> what it is called now
# keys that say the same in two ways: the later of two files, or the command line, decides
INSTEAD = {("train", "max_steps"): "epochs", ("train", "epochs"): "max_steps"}


def as_called_now(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A resolved recipe that a version keeps, with its keys called what they are called now."""
    return {
        table: {RENAMED.get((table, name), name): value for name, value in values.items()}
        for table, values in tables.items()
    }


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, each the overrides that make it (`train.seed=1`), and how the best is chosen and named."""

    runs: tuple[tuple[str, ...], ...]
    metric: str = "loss"
    alias: str = "best"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `text` is what was written, with what it extends, `path` where; neither decides equality.

    `origins` says for each key that was given where it is written: `train.seed` -> `recipe.toml:12`. `overrides` are
    those it was loaded with.
    """

    base: Base
    data: Data
    adapter: Adapter
    train: Train
    eval: Eval
    output: Output
    text: str = field(compare=False, repr=False)
    path: Path = field(compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    sweep: Sweep | None = field(default=None, compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)
    preference: Preference = Preference()
    reward: Reward = Reward()

    @property
    def task(self) -> str:
        return self.output.task or self.output.name

    def to_json(self) -> dict[str, Any]:
        """All tables with all values, defaults included; data files by name, not by path."""
        tables = {name: getattr(self, name) for name in TABLES}
        return {
            name: {key: _plain(getattr(table, item.name)) for key, item in keys(table).items()}
            for name, table in tables.items()
        }

    def place(self, key: str) -> str:
        """What a message about a key such as `train.seed` begins with: where it is written, and its name."""
        origin = self.origins.get(key, "")
        if origin.rpartition(":")[2].isdigit():
            return f"{origin}: {key}"
        return f"{self.path}: {origin}: {key}" if origin else f"{self.path}: {key}"


def _plain(value: Any) -> Any:
    """A value as JSON has it; a single source as text."""
    if not isinstance(value, tuple):
        return value
    items = [item if isinstance(item, str | int | float) else shown(item) for item in value]
    return items[0] if len(items) == 1 and isinstance(value[0], Source) else items
