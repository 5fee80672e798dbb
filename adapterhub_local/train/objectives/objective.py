"""The seam between the trainer and what it minimises: how a step is cut, its loss, and the metrics beside it.

The trainer knows optimizers, steps, processes and checkpoints. An objective knows examples, rows and a loss; it knows
nothing of optimizers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from adapterhub_local.rows.example import Item

Sum = Callable[[torch.Tensor], torch.Tensor]  # over all processes


class Objective(Protocol):
    """What a run minimises, for one model and its training data.

    `metrics` names what `loss` returns beside the loss, in its order; each is a share of the step's mean.
    """

    metrics: tuple[str, ...]
    may_rest: bool  # whether a step can have nothing to learn, and no gradient
    notes: tuple[str, ...]  # what the user should know of how it computes

    def rows(self, batch: Sequence[Item]) -> list[Any]:
        """The items of one optimizer step, cut into what is computed at once."""
        ...

    def begin(self, rows: Sequence[Any], own: Sequence[Any], total: Sum) -> Any:
        """What the loss of each row must know of the whole step; `own` are the rows that this process computes."""
        ...

    def loss(self, row: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's part of the step's loss, a scalar with gradients, and of its metrics, (metrics,) without.

        Summed over all rows of the step they are the step's loss and metrics.
        """
        ...

    def held_out(self, items: Sequence[Item], batch_size: int) -> dict[str, float]:
        """`eval_loss`, the same loss on held-out items in evaluation mode, and other scores, for the log."""
        ...
