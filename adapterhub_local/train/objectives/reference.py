"""The model that preferences are compared with: the base under the adapter, or the version that is trained on.

Neither is a second model: the adapter is switched off, or its factors are those of the start for a moment. What an
item's log-probabilities are there is computed once, when its first step comes; in every step where the base is divided
between processes, which all take part in each pass and do not know which items the others know.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.train.adapter import factors_of
from adapterhub_local.train.shards import shards_of


class Reference:
    """Log-probabilities under the reference, by the number of an item and which of its rows they are of.

    starts_elsewhere: whether the start is the factors that the model has now, and not the base.
    """

    def __init__(self, model: AdaptedModel, *, starts_elsewhere: bool) -> None:
        self.model = model
        self.start = (
            {name: factor.detach().clone() for name, factor in factors_of(model).items()} if starts_elsewhere else None
        )
        self.keeps = shards_of(model) is None
        self.known: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, numbers: Sequence[int], kind: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """(n, ...) of the items with these numbers; `compute` gives it for all of them with the model as it is."""
        keys = [(kind, number) for number in numbers]
        if any(key not in self.known for key in keys):
            with self._in_place(), torch.no_grad():
                values = compute()
            if self.keeps:
                self.known.update(zip(keys, values.cpu(), strict=True))
            return values
        return torch.stack([self.known[key] for key in keys]).to(self.model.device)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The model as the reference, in evaluation mode, for as long as the block."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self.start is None:
                with self.model.disable_adapter():
                    yield
                return
            factors = factors_of(self.model)
            now = {name: factor.detach().clone() for name, factor in factors.items()}
            try:
                self._set(factors, self.start)
                yield
            finally:
                self._set(factors, now)
        finally:
            self.model.train(was_training)

    @staticmethod
    def _set(factors: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, factor in factors.items():
                factor.copy_(values[name])
