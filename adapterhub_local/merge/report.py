"""What a merge made and lost: measured error, retained energy, rank, rounding, interference of the parents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterhub_local.lora.config import SERVER_RANKS
from adapterhub_local.merge.combine import Stored
from adapterhub_local.merge.layers import flat
from adapterhub_local.merge.plan import MergePlan

CANCELLED = 1e-6  # a sum this much smaller than its terms is rounding error


@dataclass
class MergeReport:
    """The losses of a merge; norms are Frobenius norms over all modules.

    `relative_error` is |stored - exact| / |exact|, measured, of which `truncation_error` was predicted from the
    singular values and `rounding_error` is the storage dtype. `retained_energy` is 1 - relative_error^2. `kept`
    is |merged| / sum |w_i| |D_i|: near 0 the parents cancel each other out, and the error is given relative to
    what went in. `conversions` are the parents that were made plain adapters before, with the loss of that, which
    the errors here are not about. `interference` are the pairwise cosines of the parents' deltas; `modules` the
    same per module; `notes` are what a person should know of the parents. `num_tokens` have rows of their own, which
    are summed exactly and in none of the norms.
    """

    formula: dict[str, Any]
    rank: int
    exact_rank: int
    num_modules: int
    num_parameters: int
    dtype: str
    norm: float = 0.0
    kept: float = 0.0
    relative_error: float = 0.0
    truncation_error: float = 0.0
    rounding_error: float = 0.0
    retained_energy: float = 1.0
    conversions: list[dict[str, Any]] = field(default_factory=list)
    interference: list[dict[str, Any]] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def server_rank(self) -> int | None:
        """The --max-lora-rank that vLLM needs to load it, None if it takes no adapter of this rank, or with rows."""
        return None if self.num_tokens else next((rank for rank in SERVER_RANKS if rank >= self.rank), None)

    def summary(self) -> dict[str, Any]:
        """The numbers over all modules: what the lineage keeps under `merge`."""
        besides = {"formula", "interference", "modules", "notes"}
        besides |= {name for name in ("conversions", "num_tokens") if not getattr(self, name)}
        values = {key: value for key, value in vars(self).items() if key not in besides}
        return {**self.formula, **values}

    def details(self) -> dict[str, Any]:
        """Interference and the table of modules."""
        return {"interference": self.interference, "modules": self.modules}

    def to_json(self) -> dict[str, Any]:
        return {**self.summary(), "max_lora_rank": self.server_rank, **self.details(), "notes": self.notes}


class Tally:
    """Sums the modules of a merge, in order, into its report."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.products = torch.zeros(len(plan.parents), len(plan.parents), dtype=torch.float64)
        self.total = self.input = self.error = self.truncated = self.rounded = 0.0
        self.modules: list[dict[str, Any]] = []

    def add(self, stored: Stored) -> None:
        """Count one module."""
        into = went_in(self.plan.weights(stored.module), stored.products)
        self.products += stored.products
        self.total += stored.total
        self.input += into
        self.error += stored.error
        self.truncated += stored.truncated
        self.rounded += stored.rounded
        error = relative(stored.error, stored.total, into)
        self.modules.append(
            {
                "module": stored.module,
                "rank": stored.rank,
                "norm": math.sqrt(stored.total),
                "relative_error": error,
                "retained_energy": max(0.0, 1 - error**2),
                "cosine": _cosines(stored.products),
            }
        )

    def report(self, ranks: Sequence[int], num_parameters: int, dtype: torch.dtype) -> MergeReport:
        """The report, once every module is counted; `ranks` are those stored."""
        error = relative(self.error, self.total, self.input)
        names = [parent.name for parent in self.plan.parents]
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
        return MergeReport(
            formula=self.plan.formula.to_json(),
            rank=max(ranks),
            exact_rank=self.plan.rank,
            num_modules=len(ranks),
            num_parameters=num_parameters,
            dtype=str(dtype).removeprefix("torch."),
            norm=math.sqrt(self.total),
            kept=math.sqrt(self.total / self.input) if self.input else 0.0,
            relative_error=error,
            truncation_error=relative(self.truncated, self.total, self.input),
            rounding_error=relative(self.rounded, self.total, self.input),
            retained_energy=max(0.0, 1 - error**2),
            conversions=[
                {"parent": parent.name, **parent.converted} for parent in self.plan.parents if parent.converted
            ],
            interference=[
                {"pair": [names[i], names[j]], "cosine": cosine}
                for (i, j), cosine in zip(pairs, _cosines(self.products), strict=True)
            ],
            modules=self.modules,
            notes=[*self.plan.notes, *self._rows(), *self._untrained(names)],
            num_tokens=self.plan.num_tokens,
        )

    def _rows(self) -> list[str]:
        """What became of rows of embeddings, if there are some: nothing of them is lost."""
        count = self.plan.num_tokens
        if not count:
            return []
        return [f"rows of the embeddings for {count} tokens are summed exactly, beside the factors reported here"]

    def _untrained(self, names: Sequence[str]) -> list[str]:
        """Of the parents that change nothing."""
        given = zip(names, self.products.diagonal().tolist(), self.plan.parents, strict=True)
        idle = [
            name
            for name, size, parent in given
            if any(flat([parent.weight])) and not size and not parent.adapter.tokens
        ]
        return [
            f"{name} changes nothing: its scale or a factor of each module is zero. Was it trained?" for name in idle
        ]


def went_in(weights: Sequence[float], products: torch.Tensor) -> float:
    """The square of what the parents of a module would come to if they had one direction."""
    sizes = products.diagonal().clamp(min=0).sqrt()
    return float((torch.tensor(list(weights), dtype=torch.float64).abs() * sizes).sum()) ** 2


def relative(squared: float, total: float, into: float) -> float:
    """A squared loss as an error relative to the norm of the merge; of what cancels out, to what went in."""
    scale = max(total, CANCELLED**2 * into)
    return math.sqrt(max(0.0, squared) / scale) if scale else 0.0


def _cosines(products: torch.Tensor) -> list[float | None]:
    """Of each pair i < j, None where one of the two has no delta."""
    sizes = products.diagonal().clamp(min=0).sqrt().tolist()
    found: list[float | None] = []
    for i in range(len(sizes)):
        for j in range(i + 1, len(sizes)):
            size = sizes[i] * sizes[j]
            found.append(max(-1.0, min(1.0, float(products[i, j]) / size)) if size else None)
    return found
