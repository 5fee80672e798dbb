"""Objectives over pairs: dpo, ipo, simpo and orpo share rows, reference and metrics, and differ in one function."""

from collections.abc import Sequence

import torch

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import examples_a_row
from adapterhub_local.recipe.objectives import OBJECTIVES, beta_of
from adapterhub_local.rows.judged import Judged
from adapterhub_local.train.objectives.judged_rows import Cutter, JudgedRow
from adapterhub_local.train.objectives.losses import PAIRED, Pairs
from adapterhub_local.train.objectives.objective import Sum
from adapterhub_local.train.objectives.reference import Reference

Step = tuple[int, int]  # pairs of a step, and tokens of their chosen answers


class Paired:
    """The mean of a loss over the pairs of a step, and the likelihood of chosen answers where that is asked for.

    Rewards are beta times the log-probability, less that of the reference where the loss has one; of losses a token
    (simpo, orpo) a token's.
    """

    metrics = ("rewards_chosen", "rewards_rejected", "reward_accuracy", "reward_margin")
    may_rest = False
    notes: tuple[str, ...] = ()

    def __init__(self, model: AdaptedModel, items: Sequence[Judged], recipe: Recipe, world_size: int = 1) -> None:
        self.model, self.given = model, recipe.preference
        self.name, self.kind = recipe.train.objective, OBJECTIVES[recipe.train.objective]
        self.function, self.beta = PAIRED[self.name], beta_of(self.name, self.given)
        self.sft_weight = 1.0 if self.name == "orpo" else self.given.sft_weight
        size = examples_a_row(recipe.train, world_size)
        self.cutter = Cutter(model, items, 2, recipe.train.packed_tokens, size)
        trains_on = recipe.adapter.from_ is not None and self.given.reference == "start"
        self.reference = Reference(model, starts_elsewhere=trains_on) if self.kind.has_reference else None

    def rows(self, batch: Sequence[Judged]) -> list[JudgedRow]:
        return self.cutter.cut(batch)

    def begin(self, rows: Sequence[JudgedRow], own: Sequence[JudgedRow], total: Sum) -> Step:
        items = [item for row in rows for item in row.items]
        return len(items), sum(item.parts[0].num_labels for item in items)

    def loss(self, row: JudgedRow, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        reference = self._reference(row, "train")  # first: its activations are gone before those of the pass below
        pairs = Pairs(self.cutter.log_probs(row.packs, 2), self._lengths(row), reference)
        losses = self.function(pairs, self.beta, self.given).sum() / step[0]
        if self.sft_weight:
            losses = losses - self.sft_weight * pairs.log_probs[:, 0].sum() / step[1]
        return losses, self._measured(pairs) / step[0]

    def held_out(self, items: Sequence[Judged], batch_size: int) -> dict[str, float]:
        self.model.eval()
        rows = [row for at in range(0, len(items), batch_size) for row in self.cutter.cut(items[at : at + batch_size])]
        loss, metrics = torch.zeros(()), torch.zeros(len(self.metrics))
        labels = sum(item.parts[0].num_labels for item in items)
        for row in rows:
            reference = self._reference(row, "test")
            with torch.inference_mode():
                pairs = Pairs(self.cutter.log_probs(row.packs, 2), self._lengths(row), reference)
                loss += (self.function(pairs, self.beta, self.given).sum() / len(items)).cpu()
                loss -= (self.sft_weight * pairs.log_probs[:, 0].sum() / labels).cpu()
                metrics += (self._measured(pairs) / len(items)).cpu()
        return {
            "eval_loss": float(loss),
            **dict(zip((f"eval_{name}" for name in self.metrics), metrics.tolist(), strict=True)),
        }

    def _reference(self, row: JudgedRow, kind: str) -> torch.Tensor | None:
        if self.reference is None:
            return None
        return self.reference.of(row.numbers, kind, lambda: self.cutter.log_probs(row.packs, 2))

    def _lengths(self, row: JudgedRow) -> torch.Tensor:
        lengths = [[part.num_labels for part in item.parts] for item in row.items]
        return torch.tensor(lengths, device=self.model.device)

    def _measured(self, pairs: Pairs) -> torch.Tensor:
        """Sums of the metrics over the pairs of a row."""
        rewards = self.beta * (pairs.log_ratios if pairs.reference is not None else pairs.means).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        return torch.stack([rewards[:, 0].sum(), rewards[:, 1].sum(), (margins > 0).sum(), margins.sum()])
