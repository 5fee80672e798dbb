"""Drawing tokens at random, for many requests at once and for each as if it were alone.

Temperature, then the cuts min_p, top_k, and top_p of what they left. No cut sorts the vocabulary if it can help it.
"""

from collections.abc import Sequence

import torch

from serve.engine.request import SamplingParams

CANDIDATES = 512  # a nucleus is nearly always within the likeliest of these


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token for each row of logits (n, vocabulary) with its own settings and its own number from [0, 1).

    A row's token does not depend on the others. Tokens as likely as the last one that min_p or top_p keeps stay, too.
    """
    vocabulary = logits.shape[-1]
    sizes = [vocabulary if each.top_k is None else min(each.top_k, vocabulary) for each in params]
    tokens = [0] * len(params)
    for size in set(sizes):  # of so many likeliest tokens; neighbours with other sizes must not change which
        rows = [row for row, own in enumerate(sizes) if own == size]
        own, places = logits[rows], None
        if size < vocabulary:
            places = own.topk(size).indices.sort(dim=-1).values
            own = own.gather(-1, places)
        drawn = _draw(own, [params[row] for row in rows], [uniforms[row] for row in rows])
        chosen = (drawn if places is None else places.gather(-1, drawn))[:, 0].tolist()
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> torch.Tensor:
    """Columns (n, 1) of logits (n, tokens), after temperature, min_p and top_p."""
    logits = logits / _column([each.temperature for each in params], logits)
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))  # of the likeliest token: 1
    if any(each.min_p > 0 for each in params):
        weights = _above(weights, _column([each.min_p for each in params], weights))
    if rows := [row for row, each in enumerate(params) if each.top_p < 1]:
        weights[rows] = nucleus(weights[rows], _column([params[row].top_p for row in rows], weights, torch.float64))
    filled = weights.cumsum(dim=-1, dtype=torch.float64)
    # the first token at which more than this is filled: never one without weight
    wanted = _column(uniforms, filled) * filled[:, -1:]
    return torch.searchsorted(filled, wanted, right=True).clamp_(max=logits.shape[-1] - 1)


def nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of likeliest tokens that holds the share `top_p` (n, 1) of weights (n, vocabulary); else 0.

    The likeliest token always stays. Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    total = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    least, is_known = _least(weights.topk(min(CANDIDATES, weights.shape[-1])).values, total)
    for row in (~is_known).nonzero().tolist():  # flat distributions
        least[row] = _least(weights[row].sort(dim=-1, descending=True).values, total[row])[0]
    return _above(weights, least)


def _least(best: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last (n, 1) of the falling weights `best` that is needed to fill `wanted` (n, 1), and whether they do (n,).

    A token stays if those before it do not fill the nucleus yet.
    """
    filled = best.cumsum(dim=-1, dtype=torch.float64)
    num_kept = (filled - best < wanted).sum(dim=-1, keepdim=True)
    return best.gather(-1, (num_kept - 1).clamp(min=0)), (filled[:, -1:] >= wanted)[:, 0]


def _above(weights: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    return weights.masked_fill(weights < least, 0.0)


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
