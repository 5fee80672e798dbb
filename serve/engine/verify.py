"""Verify: of each request's guesses those that would have been chosen anyway, and the token chosen after them."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from serve.engine.request import Sampled
from serve.engine.sampler import Sampler, choose

Run = list[Sampled] | Exception


def verify(samplers: Sequence[Sampler], drafts: Sequence[Sequence[int]], logits: torch.Tensor) -> list[Run]:
    """The next tokens of each request, at least one, or why there is none.

    `logits` (n, vocabulary) in float32 are those after a request's newest token and after each token of its draft. A
    token is chosen at each place as it would be without a draft, and the next place counts if that is the guess.
    """
    first = [0, *accumulate(1 + len(draft) for draft in drafts)]
    runs: list[Run] = [[] for _ in samplers]
    live = list(range(len(samplers)))
    num_right = 0  # guesses of each live request
    while live:
        places = [first[row] + num_right for row in live]
        own = logits if len(places) == len(logits) else logits[places]
        ahead = [drafts[row][:num_right] for row in live]
        going = []
        for row, result in zip(live, choose([samplers[row] for row in live], own, ahead), strict=True):
            run = runs[row]
            assert isinstance(run, list)
            if isinstance(result, Exception):
                if not run:  # else it is met again in the next step, after what could be chosen
                    runs[row] = result
                continue
            run.append(result)
            is_right = num_right < len(drafts[row]) and result.token == drafts[row][num_right]
            if is_right and result.token not in samplers[row].request.params.stop_token_ids:
                going.append(row)
        live, num_right = going, num_right + 1
    return runs
