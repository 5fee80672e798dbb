"""What a run minimises: one file an objective, behind the seam of `objective.py`."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.recipe import Recipe
from adapterhub_local.rows.example import Item
from adapterhub_local.train.objectives.kto import Kto
from adapterhub_local.train.objectives.losses import PAIRED
from adapterhub_local.train.objectives.objective import Objective
from adapterhub_local.train.objectives.pairs import Paired
from adapterhub_local.train.objectives.sft import Sft

CLASSES: dict[str, Any] = {"sft": Sft, "kto": Kto, **dict.fromkeys(PAIRED, Paired)}


def make_objective(
    model: AdaptedModel,
    items: Sequence[Item],
    recipe: Recipe,
    world_size: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    info: BaseInfo | None = None,
) -> Objective:
    """The objective that a recipe names, for a PEFT model at its start and its training data.

    tokenizer: what objectives that read answers read them by; info: of the base, for the engine that draws answers.
    """
    made: Any
    if recipe.train.objective == "grpo":
        from adapterhub_local.train.objectives.grpo import Grpo  # with the engine, which no other objective needs

        assert tokenizer is not None, "answers are read"
        made = Grpo(model, items, recipe, world_size, tokenizer, info)  # type: ignore[arg-type]  # of examples
    else:
        made = CLASSES[recipe.train.objective](model, items, recipe, world_size)
    objective: Objective = made
    return objective
