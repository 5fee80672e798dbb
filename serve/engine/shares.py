"""Shares: how the tokens of one step are divided among the prompts that are being read. No torch.

Higher priorities first, then the shortest remainder, so that a short prompt waits a step and not for all the long ones
before it. A quarter of what long prompts may have is the oldest prompt's, whatever else comes: so every prompt is read
within a bound, four times the work of those that came before it.
"""

from collections.abc import Sequence

from serve.engine.request import Request, Scheduled

OLDEST = 4  # the share of the oldest prompt: one part in so many


def divide(
    prompts: Sequence[Request], budget: int, *, max_part: int, max_scored: int, is_awaited: bool
) -> list[Scheduled]:
    """The next tokens of `prompts`, the oldest first, at most `budget` in all and `max_scored` of them scored.

    In a step that somebody awaits - `is_awaited` for an answer, or because a prompt is read to its end - prompts that
    are not read to their end get at most `max_part` tokens in all; beside prompts that are, at most as many as these,
    or the share of the oldest: so the first token of a short one is not held up by those it was put before. At least
    one token, if there are prompts and budget.
    """
    counts = dict.fromkeys(prompts, 0)
    scored = max_scored

    def give(request: Request, most: int) -> None:
        """Up to `most` tokens more, fewer where their log-probabilities would be too many for one step."""
        nonlocal budget, scored
        before, start = counts[request], request.num_computed + counts[request]
        count = min(_rest(request) - before, most, budget)
        if request.num_unscored:  # before these there is only what was scored before a preemption
            count = min(count, max(0, request.num_scored - start) + scored)
        counts[request] += max(0, count)
        budget -= counts[request] - before
        scored -= len(Scheduled(request, start, counts[request] - before).scored)

    def part() -> int:
        """How many tokens more the prompts may have that are not read to their end."""
        parts = sum(count for request, count in counts.items() if count < _rest(request))
        ended = sum(counts.values()) - parts
        return max(0, min(max_part, max(share, ended) if ended else max_part) - parts)

    share = max(1, min(budget, max_part) // OLDEST)
    if prompts:
        give(prompts[0], share)
        is_awaited = is_awaited or counts[prompts[0]] == _rest(prompts[0])
    order, place = sorted(prompts, key=lambda each: (-each.priority, _rest(each))), 0
    while place < len(order):
        request = order[place]
        is_last = _rest(request) - counts[request] <= (min(budget, max_part) if is_awaited else budget)
        give(request, budget if is_last or not is_awaited else part())
        if counts[request] == _rest(request):  # with each of these there is more for those before it
            is_awaited, place = True, 0
            order.remove(request)
        else:
            place += 1
    return [Scheduled(request, request.num_computed, count) for request, count in counts.items() if count]


def _rest(request: Request) -> int:
    """Tokens that are known and not computed."""
    return request.num_tokens - request.num_computed
