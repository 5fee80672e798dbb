"""Drawing tokens at random, for many requests at once and for each as if it were alone.

Temperature, then the cuts min_p, top_k, and top_p of what they left. No cut sorts the vocabulary if it can help it.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from serve.engine.request import SamplingParams

CANDIDATES = 512  # a nucleus is nearly always within the likeliest of these
BLOCK = 256  # tokens that are summed up together: to look into one of them is enough
NEAR = 48  # blocks in which a nucleus is looked for


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
    warmth = _column([each.temperature for each in params], logits)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(warmth).exp_()  # of the likeliest token: 1
    if any(each.min_p > 0 for each in params):
        weights = _above(weights, _column([each.min_p for each in params], weights))
    if rows := [row for row, each in enumerate(params) if each.top_p < 1]:
        shares = _column([params[row].top_p for row in rows], weights, torch.float64)
        if len(rows) == len(weights):
            weights = nucleus(weights, shares)
        else:
            weights[rows] = nucleus(weights[rows], shares)
    return _first_beyond(weights, _column(uniforms, weights, torch.float64))


def _first_beyond(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Columns (n, 1) at which more than a share (n, 1) below 1 of the row's weights is filled: none without weight."""
    blocks = _in_blocks(weights, 0.0)
    sums = blocks.sum(dim=-1).double()  # within a block float32 is as exact as the weights are
    ends = sums.cumsum(dim=-1)
    wanted = _below(shares * ends[:, -1:], ends)
    block = torch.searchsorted(ends, wanted, right=True)
    filled = _of_block(blocks, block).cumsum(dim=-1, dtype=torch.float64)
    wanted = _below(wanted - (ends - sums).gather(-1, block), filled)  # sums in another order differ in the last bit
    return block * BLOCK + torch.searchsorted(filled, wanted, right=True)


def _below(wanted: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """`wanted` (n, 1), but not below 0, and less than the last of what is `filled`, so that it is found."""
    last = filled[:, -1:]
    return torch.minimum(wanted, torch.nextafter(last, torch.zeros_like(last))).clamp_(min=0.0)


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of each row of logits (n, vocabulary) and the first column that has it, both (n,); NaN if one is.

    The same as `max`, in a tenth of its time on a CPU: torch looks for places one number after the other.
    """
    if logits.device.type != "cpu":
        values, places = logits.max(dim=-1)
        return values, places
    blocks = _in_blocks(logits, -torch.inf)
    values, block = blocks.amax(dim=-1).max(dim=-1)
    return values, block * BLOCK + _of_block(blocks, block[:, None]).argmax(dim=-1)


def _in_blocks(rows: torch.Tensor, value: float) -> torch.Tensor:
    """Rows (n, size) as (n, blocks, BLOCK), the last one filled up."""
    missing = -rows.shape[-1] % BLOCK
    return (pad(rows, (0, missing), value=value) if missing else rows).reshape(len(rows), -1, BLOCK)


def _of_block(blocks: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Of each row the block (n, BLOCK) with that number (n, 1)."""
    return blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]


def nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of likeliest tokens that holds the share `top_p` (n, 1) of weights (n, vocabulary); else 0.

    The likeliest token always stays. Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    total = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    least, is_known = _least_nearby(weights, total)
    if rows := (~is_known).nonzero()[:, 0].tolist():
        best = weights[rows].topk(min(CANDIDATES, weights.shape[-1])).values
        least[rows], is_known[rows] = _least(best, total[rows])
    for row in (~is_known).nonzero().tolist():  # flat distributions
        least[row] = _least(weights[row].sort(dim=-1, descending=True).values, total[row])[0]
    return _above(weights, least)


def _least_nearby(weights: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_least` of weights (n, vocabulary) in no order, as far as it is in the blocks that hold the likeliest tokens."""
    blocks = _in_blocks(weights, 0.0)
    count = min(NEAR, blocks.shape[1])
    highest, places = pad(blocks.amax(dim=-1), (0, 1)).topk(count + 1)  # one more, of nothing
    near = blocks.gather(1, places[:, :count, None].expand(-1, -1, BLOCK)).flatten(1)
    least, is_known = _least(near.topk(min(CANDIDATES, near.shape[-1])).values, wanted)
    return least, is_known & (least >= highest[:, count:])[:, 0]  # all that is likelier is in these blocks


def _least(best: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last (n, 1) of the falling weights `best` that is needed to fill `wanted` (n, 1), and whether they do (n,).

    A token stays if those before it do not fill the nucleus yet.
    """
    filled = best.cumsum(dim=-1, dtype=torch.float64)
    num_kept = (filled - best < wanted).sum(dim=-1, keepdim=True)
    return best.gather(-1, (num_kept - 1).clamp(min=0)), (filled[:, -1:] >= wanted)[:, 0]


def _above(weights: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    return torch.where(weights < least, 0.0, weights)


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
