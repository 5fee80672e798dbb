"""KTO: single answers judged good or bad, against how far the model has moved on the whole (arXiv 2402.01306)."""

from collections.abc import Sequence

import torch

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import examples_a_row
from adapterhub_local.recipe.objectives import beta_of
from adapterhub_local.rows.judged import Judged
from adapterhub_local.train.objectives.judged_rows import Cutter, JudgedRow
from adapterhub_local.train.objectives.losses import kto
from adapterhub_local.train.objectives.objective import Sum
from adapterhub_local.train.objectives.reference import Reference

Step = tuple[int, int, int, torch.Tensor]  # answers of a step, good ones, bad ones, and the divergence


class Kto:
    """The mean of the loss over the answers of a step.

    The divergence of a step is estimated by answers behind other prompts than their own, one an item, without gradient.
    """

    metrics = ("rewards_chosen", "rewards_rejected", "reward_accuracy", "divergence")
    may_rest = False
    notes: tuple[str, ...] = ()

    def __init__(self, model: AdaptedModel, items: Sequence[Judged], recipe: Recipe, world_size: int = 1) -> None:
        self.model, self.given = model, recipe.preference
        self.beta = beta_of("kto", self.given)
        self.cutter = Cutter(model, items, 1, recipe.train.packed_tokens, examples_a_row(recipe.train, world_size))
        trains_on = recipe.adapter.from_ is not None and self.given.reference == "start"
        self.reference = Reference(model, starts_elsewhere=trains_on)

    def rows(self, batch: Sequence[Judged]) -> list[JudgedRow]:
        return self.cutter.cut(batch)

    def begin(self, rows: Sequence[JudgedRow], own: Sequence[JudgedRow], total: Sum) -> Step:
        return self._begin(rows, own, total, "train")

    def loss(self, row: JudgedRow, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return self._loss(row, step, "train")

    def held_out(self, items: Sequence[Judged], batch_size: int) -> dict[str, float]:
        self.model.eval()
        rows = [row for at in range(0, len(items), batch_size) for row in self.cutter.cut(items[at : at + batch_size])]
        step = self._begin(rows, rows, lambda tensor: tensor, "test")
        loss, metrics = torch.zeros(()), torch.zeros(len(self.metrics))
        with torch.no_grad():
            for row in rows:
                part, more = self._loss(row, step, "test")
                loss, metrics = loss + part.cpu(), metrics + more.cpu()
        return {
            "eval_loss": float(loss),
            **dict(zip((f"eval_{name}" for name in self.metrics), metrics.tolist(), strict=True)),
        }

    def _begin(self, rows: Sequence[JudgedRow], own: Sequence[JudgedRow], total: Sum, kind: str) -> Step:
        items = [item for row in rows for item in row.items]
        moved = torch.zeros((), device=self.model.device)
        for row in own:
            before = self.reference.of(row.numbers, f"{kind} others", lambda row=row: self._others(row))  # type: ignore[misc]
            with torch.no_grad():
                moved += (self._others(row) - before).sum()
        good = sum(item.is_good for item in items)
        divergence = (total(moved) / len(items)).clamp(min=0)
        return len(items), good, len(items) - good, divergence

    def _loss(self, row: JudgedRow, step: Step, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        count, good, bad, divergence = step
        before = self.reference.of(row.numbers, kind, lambda: self.cutter.log_probs(row.packs, 1))
        ratios = (self.cutter.log_probs(row.packs, 1) - before)[:, 0]
        is_good = torch.tensor([item.is_good for item in row.items], device=ratios.device)
        losses = kto(ratios, is_good, divergence, self.beta, self.given)
        rewards = self.beta * ratios.detach()
        right = ((rewards > 0) == is_good).sum() / count
        share = divergence * len(row.items) / count
        metrics = [rewards[is_good].sum() / max(1, good), rewards[~is_good].sum() / max(1, bad), right, share]
        return losses.sum() / count, torch.stack(metrics)

    def _others(self, row: JudgedRow) -> torch.Tensor:
        return self.cutter.log_probs(row.others, 1)
