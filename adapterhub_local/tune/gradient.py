"""Weights learnt by gradient, each layer's or group's own, on the examples that are to be done well (LoRA Soups).

https://arxiv.org/abs/2410.13025 learns one number for each adapter and layer, and leaves base and adapters as they are.
A layer computes `W x + sum_i w_i s_i B_i (A_i x)`, as the merge will, and only the w are changed.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.model import BaseModel
from adapterhub_local.errors import Incompatible
from adapterhub_local.evaluate.gate import Bench
from adapterhub_local.merge.plan import MergePlan
from adapterhub_local.merge.tuning import Tuning
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import forward, is_exact, pack
from adapterhub_local.tune.candidate import Space
from adapterhub_local.tune.scorer import Scorer

RATE = 0.05  # of Adam, for weights around 1
COST = 3.0  # evaluations that an epoch counts as: a forward pass over all examples, and a backward pass of twice that


def by_gradient(space: Space, scorer: Scorer, plan: MergePlan, bench: Bench, tuning: Tuning) -> None:
    """An epoch over the examples, then its weights scored, again and again until `scorer` raises Spent.

    What is learnt is not kept in the log: a search that was stopped learns it again, to the same weights.
    """
    for parent in plan.parents:
        if parent.adapter.tokens:
            raise Incompatible(
                f"{parent.label} has rows of the embeddings, which search 'gradient' does not learn weights for: "
                "search 'pattern' and 'gp' try merges as they are"
            )
    scorer(space.first())
    group_of = plan.group if space.groups > 1 else {}
    weights = torch.tensor(space.flat(space.start)).view(len(space.start), space.groups)
    weights.requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    draw = random.Random(tuning.seed)  # noqa: S311 (an order, no secret)
    while True:
        scorer.pay(COST)
        with torch.enable_grad(), _soup(bench.base.model, plan, group_of, weights):
            for batches in _steps(bench, draw):
                optimizer.zero_grad()
                for examples in batches:  # the mean over tasks, a task at a time
                    (_loss(bench.base.model, examples) / len(batches)).backward()
                optimizer.step()
                with torch.no_grad():
                    weights.clamp_(space.low, space.high)
        scorer(space.candidate(weights.detach().flatten().tolist()))


def _steps(bench: Bench, draw: random.Random) -> Iterator[list[list[Example]]]:
    """For each step of an epoch a batch of every task; tasks with fewer examples begin again."""
    size = max(1, bench.held.batch_size // len(bench.tests))
    orders = {task: draw.sample(list(tests), len(tests)) for task, tests in bench.tests.items()}
    for step in range(-(-max(map(len, orders.values())) // size)):
        yield [
            [order[(step * size + at) % len(order)] for at in range(min(size, len(order)))] for order in orders.values()
        ]


def _loss(model: BaseModel, examples: Sequence[Example]) -> torch.Tensor:
    """Mean negative log-likelihood in nats per answer token."""
    rows = [list(examples)] if is_exact(model, list(examples)) else [[example] for example in examples]
    losses = []
    for row in rows:
        logits, targets, _ = forward(model, pack(row))
        losses.append(cross_entropy(logits.float(), targets, reduction="none"))
    return torch.cat(losses).mean()


@contextmanager
def _soup(model: BaseModel, plan: MergePlan, group_of: Any, weights: torch.Tensor) -> Iterator[None]:
    """The model with every adapter on it, at its weight of `weights` (adapters x groups), for as long as the block."""
    terms: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for index, parent in enumerate(plan.parents):
        for module, delta in parent.adapter.deltas():
            A, B = (factor.to(model.device, torch.float32) for factor in (delta.A, delta.B))
            terms.setdefault(module, []).append((index, A, delta.scaling * B))
    hooks = []
    for module, mine in terms.items():

        def add(layer: Any, given: Any, out: torch.Tensor, mine: Any = mine, module: str = module) -> torch.Tensor:
            x, group = given[0].float(), group_of.get(module, 0)
            for index, a, b in mine:
                out = out + (weights[index, group].to(x.device) * ((x @ a.T) @ b.T)).to(out.dtype)
            return out

        hooks.append(model.get_submodule(module).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
