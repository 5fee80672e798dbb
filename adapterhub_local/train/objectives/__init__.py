"""What a run minimises: one file an objective, behind the seam of `objective.py`."""

from collections.abc import Sequence
from typing import Any

from adapterhub_local.recipe import Recipe
from adapterhub_local.rows.example import Item
from adapterhub_local.train.objectives.kto import Kto
from adapterhub_local.train.objectives.losses import PAIRED
from adapterhub_local.train.objectives.objective import Objective
from adapterhub_local.train.objectives.pairs import Paired
from adapterhub_local.train.objectives.sft import Sft

CLASSES: dict[str, Any] = {"sft": Sft, "kto": Kto, **dict.fromkeys(PAIRED, Paired)}


def make_objective(model: Any, items: Sequence[Item], recipe: Recipe, world_size: int = 1) -> Objective:
    """The objective that a recipe names, for a PEFT model at its start and its training data."""
    objective: Objective = CLASSES[recipe.train.objective](model, items, recipe, world_size)
    return objective
