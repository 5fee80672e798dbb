"""Loss and exact match of a model on held-out examples, from one forward pass over each.

Greedy decoding writes exactly the reference answer and stops if and only if every token of it,
end of turn included, is the most likely one after the tokens before it. So no text is generated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.model import CausalModel
from adapterhub_local.intervals import Interval, bootstrap, wilson
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import forward, is_exact, pack

LOSS, REWARD = "loss", "reward"


@dataclass(frozen=True)
class Score:
    """`loss`: mean negative log-likelihood in nats per answer token. `exact_match`: share of answers, 0 to 1.

    losses, labels: sum of the loss and number of answer tokens of each example, in their order; `hits`: for each
    share (exact_match, accuracy, ...) whether the example counts, those of tool calls of examples that offer tools;
    means: for each other metric (reward) the number of each example.
    From these come intervals and comparisons.
    """

    rows: int
    loss: float
    exact_match: float
    losses: tuple[float, ...] = field(default=(), compare=False, repr=False)
    labels: tuple[int, ...] = field(default=(), compare=False, repr=False)
    hits: Mapping[str, tuple[bool, ...]] = field(default_factory=dict, compare=False, repr=False)
    means: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shares(self) -> dict[str, float]:
        """Every metric that is a share of the examples."""
        return {name: sum(hits) / len(hits) for name, hits in self.hits.items()}

    @property
    def perplexity(self) -> float:
        """exp(loss); 1e300 where that is too large a number."""
        return math.exp(min(self.loss, 690.0))

    def to_json(self) -> dict[str, Any]:
        """What a run keeps of it."""
        return {"rows": self.rows, "loss": round(self.loss, 6), "exact_match": round(self.exact_match, 6)}

    def to_json_with_intervals(self) -> dict[str, Any]:
        """All metrics, and `intervals`: metric -> [low, high] at 95 %."""
        shares = {name: round(share, 6) for name, share in self.shares.items()}
        means = {name: round(sum(values) / len(values), 6) for name, values in self.means.items()}
        metrics = {**self.to_json(), "perplexity": round(self.perplexity, 6), **shares, **means}
        return {**metrics, "intervals": {name: _rounded(interval) for name, interval in self.intervals().items()}}

    def intervals(self) -> dict[str, Interval]:
        """Wilson's interval of every share, the bootstrap's of loss, perplexity and means."""
        low, high = bootstrap(self.losses, self.labels)
        means = {name: bootstrap(values, [1.0] * len(values)) for name, values in self.means.items()}
        shares = {name: wilson(sum(hits), len(hits)) for name, hits in self.hits.items()}
        perplexity = (math.exp(min(low, 690.0)), math.exp(min(high, 690.0)))
        return {LOSS: (low, high), "perplexity": perplexity, **shares, **means}

    def differences(self, other: "Score") -> dict[str, dict[str, Any]]:
        """Metric -> this score less the other on the same examples, with its interval, and whether 0 lies outside."""
        parts: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = {
            LOSS: (self.losses, self.labels, other.losses)
        }
        for ours, theirs in ((self.hits, other.hits), (self.means, other.means)):
            for name in ours.keys() & theirs.keys():
                parts[name] = (ours[name], [1.0] * len(ours[name]), theirs[name])
        found = {}
        for name, (values, weights, others) in sorted(parts.items()):
            low, high = bootstrap(values, weights, others)
            value = (sum(values) - sum(others)) / sum(weights)
            found[name] = {
                "value": round(value, 6),
                "interval": _rounded((low, high)),
                "is_clear": not low <= 0 <= high,
            }
        return found


def evaluate(
    model: CausalModel, examples: Sequence[Example], batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Score:
    """Score a model in evaluation mode; examples are packed in batches where that is exact for the model."""
    batch_size = batch_size if is_exact(model, examples) else 1
    losses, exact = [0.0] * len(examples), [True] * len(examples)
    # alike lengths together: rows of about the same size, whatever order the file has
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].ids), index))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logits, targets, owner = forward(model, pack([examples[index] for index in batch]))
            loss = cross_entropy(logits.float(), targets, reduction="none")
            right = logits.argmax(-1) == targets
            for number, part, hit in zip(owner.tolist(), loss.tolist(), right.tolist(), strict=True):
                losses[batch[number]] += part
                exact[batch[number]] &= hit
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
    labels = tuple(example.num_labels for example in examples)
    mean, share = sum(losses) / sum(labels), sum(exact) / len(examples)
    return Score(len(examples), mean, share, tuple(losses), labels, {"exact_match": tuple(exact)})


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 6) for value in interval]
