"""Preference accuracy of a model on held-out pairs: which of two answers it finds likelier, token for token.

Scores need no reference, so base and adapter are scored alike; rewards, which compare the two, are the objective's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.model import CausalModel
from adapterhub_local.evaluate.metrics import LOSS, Score, evaluate
from adapterhub_local.intervals import Interval, bootstrap, wilson
from adapterhub_local.rows.judged import Judged
from adapterhub_local.rows.packing import forward, is_exact, pack

MARGIN = "margin"


@dataclass(frozen=True)
class PreferenceScore:
    """`loss`: mean negative log-likelihood of good answers in nats a token. `accuracy`: share of pairs whose chosen
    answer has the higher log-probability a token; `margin`: by how much, in nats a token. Without pairs neither.

    losses, labels: of each good answer, in the order of the items; margins: of each pair.
    """

    rows: int
    losses: tuple[float, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    margins: tuple[float, ...] = field(default=(), repr=False)

    @property
    def loss(self) -> float:
        return sum(self.losses) / sum(self.labels) if self.labels else 0.0

    @property
    def perplexity(self) -> float:
        """exp(loss); 1e300 where that is too large a number."""
        return math.exp(min(self.loss, 690.0))

    @property
    def hits(self) -> Mapping[str, tuple[bool, ...]]:
        return {"accuracy": tuple(margin > 0 for margin in self.margins)} if self.margins else {}

    @property
    def shares(self) -> dict[str, float]:
        """Every metric that is a share of the pairs."""
        return {name: sum(hits) / len(hits) for name, hits in self.hits.items()}

    def to_json(self) -> dict[str, Any]:
        """What a run keeps of it."""
        means = {MARGIN: round(sum(self.margins) / len(self.margins), 6)} if self.margins else {}
        shares = {name: round(share, 6) for name, share in self.shares.items()}
        return {"rows": self.rows, "loss": round(self.loss, 6), **shares, **means}

    def to_json_with_intervals(self) -> dict[str, Any]:
        """All metrics, and `intervals`: metric -> [low, high] at 95 %."""
        intervals = {name: [round(value, 6) for value in interval] for name, interval in self.intervals().items()}
        return {**self.to_json(), "intervals": intervals}

    def intervals(self) -> dict[str, Interval]:
        """Wilson's interval of accuracy, the bootstrap's of loss and margin."""
        found = {LOSS: bootstrap(self.losses, self.labels)} if self.labels else {}
        if self.margins:
            found[MARGIN] = bootstrap(self.margins, [1.0] * len(self.margins))
        return found | {name: wilson(sum(hits), len(hits)) for name, hits in self.hits.items()}

    def differences(self, other: "PreferenceScore") -> dict[str, dict[str, Any]]:
        """Metric -> this score less the other on the same items, with its interval, and whether 0 lies outside."""
        ones = [1.0] * len(self.margins)
        parts: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = {
            **({LOSS: (self.losses, self.labels, other.losses)} if self.labels else {}),
            **({MARGIN: (self.margins, ones, other.margins)} if ones else {}),
            **{name: (hits, ones, other.hits[name]) for name, hits in self.hits.items()},
        }
        found = {}
        for name, (values, weights, others) in sorted(parts.items()):
            low, high = bootstrap(values, weights, others)
            value = round((sum(values) - sum(others)) / sum(weights), 6)
            found[name] = {
                "value": value,
                "interval": [round(low, 6), round(high, 6)],
                "is_clear": not low <= 0 <= high,
            }
        return found

    def wins(self, other: "PreferenceScore") -> dict[str, Any]:
        """The share of pairs in which this model prefers the chosen answer more than the other does, with its interval:
        the accuracy of its rewards with the other as reference."""
        won = sum(mine > theirs for mine, theirs in zip(self.margins, other.margins, strict=True))
        low, high = wilson(won, len(self.margins))
        return {"value": round(won / len(self.margins), 6), "interval": [round(low, 6), round(high, 6)]}


AnyScore = Score | PreferenceScore


def evaluate_judged(
    model: CausalModel, items: Sequence[Judged], batch_size: int, progress: Callable[[int, int], None] | None = None
) -> PreferenceScore:
    """Score a model in evaluation mode on pairs, or on answers judged good or bad; see `PreferenceScore`."""
    is_paired = not any(item.is_single for item in items)
    groups = [list(item.parts) if is_paired else [item.parts[0]] for item in items]
    shares = is_exact(model, groups[0]) if is_paired else False
    sums: list[list[float]] = []
    with torch.inference_mode():
        for number, group in enumerate(groups, 1):
            packs = [pack(group)] if shares else [pack([example]) for example in group]
            group_sums: list[float] = []
            for one in packs:
                logits, targets, owner = forward(model, one)
                losses = cross_entropy(logits.float(), targets, reduction="none")
                found = torch.zeros(int(owner.max()) + 1, device=losses.device)
                group_sums += found.index_add(0, owner.to(losses.device), losses).tolist()
            sums.append(group_sums)
            if progress and (number % batch_size == 0 or number == len(groups)):
                progress(number, len(groups))
    good = [index for index, item in enumerate(items) if item.is_good]
    labels = tuple(items[index].parts[0].num_labels for index in good)
    margins: tuple[float, ...] = ()
    if is_paired:
        lengths = [[part.num_labels for part in item.parts] for item in items]
        margins = tuple(
            sum_of[1] / length[1] - sum_of[0] / length[0] for sum_of, length in zip(sums, lengths, strict=True)
        )
    return PreferenceScore(len(items), tuple(sums[index][0] for index in good), labels, margins)


def score_items(
    model: CausalModel, items: Sequence[Any], batch_size: int, progress: Callable[[int, int], None] | None = None
) -> AnyScore:
    """Score a model in evaluation mode on items of one kind: examples, pairs, or judged answers."""
    if isinstance(items[0], Judged):
        return evaluate_judged(model, items, batch_size, progress)
    return evaluate(model, items, batch_size, progress)
