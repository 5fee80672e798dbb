"""Embeddings of prompts: the hidden states that the output head sees, put together as they come."""

from array import array
from collections.abc import Sequence

import torch

from serve.engine.request import Scheduled


def pool(batch: Sequence[Scheduled], hidden: torch.Tensor) -> None:
    """Add what this step has of each embedding to its request.

    `hidden` (n, hidden size) are the states at the places whose logits the runner gives, in their order: of each item
    its scored positions, and its last if it wants a token.
    """
    start = 0
    for item in batch:
        end = start + len(item.scored) + item.wants_token
        request, states = item.request, hidden[start:end]
        start = end
        if request.params.pooling is None or not len(states):
            continue
        if request.params.pooling == "mean":
            part = states.float().sum(dim=0) / len(request.prompt)
            known = torch.tensor(request.vector, device=part.device) if request.vector else torch.zeros_like(part)
            request.vector = array("f", (known + part).tolist())
        elif request.params.pooling == "last":
            request.vector = array("f", states[-1].float().tolist())
        elif not request.vector:
            request.vector = array("f", states[0].float().tolist())
