"""Speculation: guesses at an answer's next tokens, which a step computes and checks at once. No torch.

A guess is what a grammar forces, or what came after the same tokens before, in prompt or answer (Yang et al. 2023,
arXiv 2304.04487). What is sampled decides: a guess is kept as far as it is what would have been sampled without it,
which is rejection sampling (Leviathan et al. 2022, arXiv 2211.17192) with the same random numbers.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.engine.request import Scheduled

MAX_DRAFT = 15  # tokens
SIZES = (4, 2)  # of the n-grams that are looked up, the longest first
ALLOWANCE = 0.03  # of a request's steps, which wrong guesses may cost
# tokens that cost as much as what all tokens of a step share, before anything was measured
SHARED = {"cpu": 5.0, "cuda": 64.0}
START, MOST = 1.0, 4.0  # steps that may be lost at once: before anything is known, and after guesses that were right


class Lookup:
    """Where every few neighbouring tokens of a sequence came last."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> the place after it

    def extend(self, tokens: Sequence[int]) -> None:
        """Note the next tokens of the sequence."""
        for token in tokens:
            end = len(self._tokens)  # of the n-grams that this token comes after
            for size in SIZES:
                if end >= size:
                    self._ends[tuple(self._tokens[end - size : end])] = end
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def guess(self, ahead: Sequence[int], size: int) -> list[int]:
        """Up to `size` tokens that came after the last ones, of the sequence and `ahead`, when they came before.

        Half as many where only few of the last ones are the same. What repeats itself tends to keep repeating itself.
        """
        tail = [*self._tokens[-SIZES[0] :], *ahead]
        for length in SIZES:
            place = self._ends.get(tuple(tail[-length:])) if len(tail) >= length else None
            if place is not None:
                found = [*self._tokens[place : place + size], *ahead]
                known = len(self._tokens) - place + len(ahead)  # from that place to the end of all
                while len(found) < size:
                    found.append(found[len(found) - known])
                return found[: size if length == SIZES[0] else (size + 1) // 2]
        return []


class Costs:
    """Seconds of steps without prompts, as a part that all tokens share and a part for each: a moving fit of both.

    On the CPU they are of the thread that computes, so that other work on the machine does not count.
    """

    def __init__(self, device: str) -> None:
        self._prior = SHARED.get(device, SHARED["cuda"])
        self._clock = time.thread_time if device == "cpu" else time.perf_counter
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    @contextmanager
    def timed(self, batch: Sequence["Scheduled"]) -> Iterator[None]:
        """Note what the step takes that is computed meanwhile, unless there are prompts in it."""
        start = self._clock()
        yield
        if batch and all(item.num_tokens == item.num_choices for item in batch):
            self.note(sum(item.num_tokens for item in batch), self._clock() - start)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step of this many tokens took this long."""
        if self._weight > 8:  # what was interrupted says nothing
            seconds = min(seconds, 3 * self._t / self._weight)
        sums = (self._weight, self._n, self._t, self._nn, self._nt)
        new = (1.0, num_tokens, seconds, num_tokens**2, num_tokens * seconds)
        self._weight, self._n, self._t, self._nn, self._nt = (
            0.98 * old + one for old, one in zip(sums, new, strict=True)
        )

    def price(self, num_tokens: int) -> float:
        """What one more token costs in a step of `num_tokens`, as a share of what each of these costs: 0 to 1.

        In a step of none there is nothing to share, and it is 0.
        """
        if not num_tokens:
            return 0.0
        ratio = self._prior
        if self._weight:
            n, t = self._n / self._weight, self._t / self._weight
            spread, together = self._nn / self._weight - n * n, self._nt / self._weight - n * t
            each = (together + t / (self._prior + n)) / (spread + 1)  # drawn to the prior as by a spread of 1
            each = min(max(each, t / (100 * n + 100)), t / n)
            ratio = t / each - n if each > 0 else self._prior
        return num_tokens / (max(ratio, 0.0) + num_tokens)


class Drafter:
    """The guesses of one request, and what came of them.

    Its account is in steps: every step gives ALLOWANCE, a guess takes its price and gives what was kept. There is no
    guess that it could not pay, so that on the whole they cost no more than that share and START.
    """

    def __init__(self) -> None:
        self.lookup = Lookup()
        self.account = START
        self._size = 2
        self._num_guessed = 0  # of the last draft
        self._price = 0.0

    def draft(
        self, prompt: Sequence[int], output: Sequence[int], forced: Sequence[int], most: int, price: float
    ) -> tuple[int, ...]:
        """At most `most` tokens that may come after `output`; `forced` ones first."""
        self.account = min(MOST, self.account + ALLOWANCE)
        most = min(most, MAX_DRAFT)
        known, self._num_guessed, self._price = tuple(forced[:most]), 0, price
        size = min(self._size, most - len(known), int(self.account / max(price, 0.01)))
        if size < 1:
            return known
        seen = len(self.lookup)
        if seen < len(prompt):
            self.lookup.extend(prompt[seen:])
        self.lookup.extend(output[len(self.lookup) - len(prompt) :])
        guess = self.lookup.guess(known, size)
        self._num_guessed = len(guess)
        return known + tuple(guess)

    def note(self, num_drafted: int, num_kept: int) -> None:
        """Of the last draft, that had so many tokens, so many were kept."""
        if not self._num_guessed:
            return
        kept = max(0, num_kept - (num_drafted - self._num_guessed))
        self.account = min(MOST, self.account + kept - self._price * self._num_guessed)
        self._size = min(MAX_DRAFT, 2 * self._size) if kept == self._num_guessed else max(2, kept + 1)
