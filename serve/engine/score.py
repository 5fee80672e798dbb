"""Log-probabilities of the tokens of prompts, from the logits of the positions before them."""

from array import array
from collections.abc import Sequence

import torch

from serve.engine.request import Scheduled, Scores
from serve.engine.sampler import NotFinite

ROWS = 64  # at once: what is computed beside the logits is as large as they are
LEAST = -9999.0  # as in vLLM: JSON has no infinity


def score_prompts(
    batch: Sequence[Scheduled], logits: torch.Tensor
) -> tuple[dict[str, Scores | NotFinite], torch.Tensor]:
    """Scores by request, or what is wrong with its logits, of what the items score; and the logits for the next tokens.

    `logits` (n, vocabulary) are the runner's: of each item its scored positions, and those where one may be chosen.
    """
    if not any(item.scored for item in batch):
        return {}, logits
    scores: dict[str, Scores | NotFinite] = {}
    last: list[int] = []
    row = 0
    for item in batch:
        if count := len(item.scored):
            request = item.request
            tokens = request.tokens(item.scored.start + 1, count)
            try:
                scores[request.id] = score(logits[row : row + count], tokens, request.params.prompt_logprobs or 0)
            except NotFinite as error:
                scores[request.id] = error
            row += count
        last += range(row, row + item.num_choices)
        row += item.num_choices
    return scores, logits[last]


def score(logits: torch.Tensor, tokens: Sequence[int], num_best: int) -> Scores:
    """Scores of `tokens` (n) from logits (n, vocabulary) in float32, and the `num_best` likeliest at each place.

    Raises NotFinite.
    """
    num_best = min(num_best, logits.shape[1])
    targets = torch.tensor(tokens, dtype=torch.int64).to(logits.device)[:, None]
    parts = [_score(rows, own, num_best) for rows, own in zip(logits.split(ROWS), targets.split(ROWS), strict=True)]
    logprobs, ranks, values, best = (torch.cat(column).flatten().tolist() for column in zip(*parts, strict=True))
    return Scores(array("d", logprobs), array("q", ranks), num_best, array("q", best), array("d", values))


def _score(logits: torch.Tensor, targets: torch.Tensor, num_best: int) -> tuple[torch.Tensor, ...]:
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):  # a NaN is the largest
        raise NotFinite("the model gave no finite logits for this prompt: the adapter may be damaged")
    logprobs = torch.log_softmax(logits, dim=-1).clamp_(min=LEAST)
    own = logprobs.gather(1, targets)
    ranks = (logprobs > own).sum(dim=-1, keepdim=True) + 1
    values, best = logprobs.topk(num_best)
    return own, ranks, values, best
