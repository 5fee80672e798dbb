"""Supervised fine-tuning: the mean negative log-likelihood of all answer tokens of a step."""

import logging
from collections.abc import Sequence

import torch

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import examples_a_row
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import Packed, is_exact, pack, pack_rows
from adapterhub_local.train.loss import answer_loss, output_head
from adapterhub_local.train.objectives.objective import Sum

logger = logging.getLogger(__name__)


class Sft:
    """Examples packed into rows, and with a shared prefix, only where that is exact.

    One dropout mask for a shared prefix would not be what was asked for, so dropout shares nothing.
    """

    metrics: tuple[str, ...] = ()
    may_rest = False
    notes: tuple[str, ...] = ()

    def __init__(self, model: AdaptedModel, examples: Sequence[Example], recipe: Recipe, world_size: int = 1) -> None:
        self.model, self.packed_tokens = model, recipe.train.packed_tokens
        self.size = examples_a_row(recipe.train, world_size)
        self.share = not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        if self.size > 1 and not is_exact(model.eval(), examples, share=self.share):
            self.size = 1
            logger.warning(
                "examples are computed one by one, more slowly: this model gives other logits for several in one row"
            )
        self.head = output_head(model.eval(), examples[0])

    def rows(self, batch: Sequence[Example]) -> list[Packed]:
        cut = pack_rows(batch, self.packed_tokens, self.size, share=self.share)
        return [pack(row, share=self.share) for row in cut]

    def begin(self, rows: Sequence[Packed], own: Sequence[Packed], total: Sum) -> int:
        """The labels of the whole step, over which the mean is taken (transformers#34191)."""
        return sum(row.num_labels for row in rows)

    def loss(self, row: Packed, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return answer_loss(self.model, row, self.head) / step, torch.zeros(0)

    def held_out(self, items: Sequence[Example], batch_size: int) -> dict[str, float]:
        self.model.eval()
        score = evaluate(self.model, items, batch_size)
        return {"eval_loss": score.loss, "eval_exact_match": score.exact_match}
