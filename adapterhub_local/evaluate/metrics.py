"""Loss and exact match of a model on held-out examples, from one forward pass over each.

Greedy decoding writes exactly the reference answer and stops if and only if every token of it,
end of turn included, is the most likely one after the tokens before it. So no text is generated.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.train.examples import Example
from adapterhub_local.train.packing import forward, is_exact, pack


@dataclass(frozen=True)
class Score:
    """`loss`: mean negative log-likelihood in nats per answer token. `exact_match`: share of answers, 0 to 1."""

    rows: int
    loss: float
    exact_match: float

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def evaluate(
    model: Any, examples: Sequence[Example], batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Score:
    """Score a model in evaluation mode; examples are packed in batches where that is exact for the model."""
    batch_size = batch_size if is_exact(model, examples) else 1
    losses, wrong = 0.0, set()
    # alike lengths together: rows of about the same size, whatever order the file has
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].ids), index))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logits, targets, owner = forward(model, pack([examples[index] for index in batch]))
            losses += cross_entropy(logits.float(), targets, reduction="sum").item()
            missed = (logits.argmax(-1) != targets).cpu()
            wrong |= {batch[number] for number in owner[missed].tolist()}
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
    num_labels = sum(example.num_labels for example in examples)
    return Score(len(examples), losses / num_labels, 1 - len(wrong) / len(examples))
