"""Choosing tokens: greedy, temperature, nucleus, seeds and log-probabilities."""

import math

import pytest
import torch

from serve.engine.request import Request, SamplingParams
from serve.engine.sampler import NotFinite, NothingAllowed, Sampler

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def sampler(*, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), constraint=None, **settings) -> Sampler:
    """A sampler of a request with these settings, which has given `output` already."""
    params = SamplingParams(**{"max_tokens": 100, **settings})
    return Sampler(Request("r", prompt, params, constraint=constraint, output=list(output)))


def draws(count: int = 4000, **settings) -> torch.Tensor:
    """How often each token is drawn with one seed, as fractions."""
    one = sampler(**{"seed": 1, **settings})
    tokens = [one.sample(LOGITS).token for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / count


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 1}, {"top_p": 1e-9}])
def test_greedy(settings: dict) -> None:
    """Temperature 0, one candidate, or a nucleus of nothing: the likeliest token, always."""
    assert draws(50, **settings)[1] == 1


def test_frequencies_follow_the_distribution() -> None:
    """At temperature 1 tokens come as often as they are likely (4,000 draws: within 0.04, 5 deviations)."""
    torch.testing.assert_close(draws(), LOGITS.exp(), atol=0.04, rtol=0)


def test_temperature() -> None:
    """Frequencies are those of the logits divided by the temperature."""
    torch.testing.assert_close(draws(temperature=0.5), torch.softmax(LOGITS / 0.5, -1), atol=0.04, rtol=0)


def test_top_k() -> None:
    """Only the k likeliest are drawn, in their proportion."""
    torch.testing.assert_close(draws(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), atol=0.04, rtol=0)


def test_top_p() -> None:
    """The smallest set of likeliest tokens that reaches p is drawn from: 0.4 + 0.3 do not reach 0.75, 0.85 does."""
    wanted = torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85
    torch.testing.assert_close(draws(top_p=0.75), wanted, atol=0.04, rtol=0)


def test_top_k_and_top_p_together() -> None:
    """The nucleus is taken of what top_k left: 4/7 alone reaches a half."""
    assert draws(100, top_k=2, top_p=0.5)[1] == 1


def test_seed() -> None:
    """The same seed gives the same tokens, another one others, none a fresh one each time; negative ones are seeds."""

    def tokens(seed: int | None) -> list[int]:
        one = sampler(seed=seed)
        return [one.sample(LOGITS).token for _ in range(40)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)  # equal by chance: 0.29^40
    assert tokens(-1) == tokens(-1)


def test_logprobs() -> None:
    """Log-probabilities are of the model's distribution, whatever the temperature."""
    chosen = sampler(temperature=0, logprobs=2).sample(LOGITS + 5)
    assert chosen.logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in chosen.top_logprobs] == [1, 3]
    assert sampler(temperature=0).sample(LOGITS).logprob is None
    assert sampler(temperature=0, logprobs=0).sample(LOGITS).top_logprobs == ()
    assert sampler(temperature=0, logprobs=1, logit_bias=((2, 50.0),)).sample(LOGITS).logprob == pytest.approx(
        math.log(0.05), abs=1e-6
    ), "log-probabilities are the model's own, before the bias"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad: float) -> None:
    """NaN and infinity are an error, never a token."""
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFinite):
        sampler(temperature=0).sample(logits)
    with pytest.raises(NotFinite):
        sampler().sample(torch.full((5,), -math.inf))


def test_min_p() -> None:
    """Tokens less likely than a share of the likeliest are not drawn: 0.3 of 0.4 is 0.12."""
    torch.testing.assert_close(draws(min_p=0.3), torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=0.04, rtol=0)
    assert draws(50, min_p=1.0)[1] == 1


def test_tiny_temperature_is_greedy() -> None:
    """A temperature near zero takes the likeliest token instead of overflowing."""
    assert draws(20, temperature=1e-300)[1] == 1


def test_logit_bias() -> None:
    """A bias is added to the logit: enough of it forces a token, and -100 rules it out."""
    assert draws(20, logit_bias=((2, 100.0),))[2] == 1
    assert draws(200, logit_bias=((1, -100.0),))[1] == 0
    assert sampler(temperature=0, logit_bias=((1, -100.0),)).sample(LOGITS).token == 3


def test_penalties_follow_their_formulas() -> None:
    """Presence once, frequency per occurrence in the answer, repetition by sign of the logit, prompt included."""
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5, 3.0])
    one = sampler(prompt=(0, 2), output=(3, 3, 4), presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    wanted = torch.tensor([1.0, 1.0, -2.0, 0.25 - 0.5 - 0.5, 1.5 - 0.5 - 0.25])
    torch.testing.assert_close(one._adjust(logits), wanted)
    torch.testing.assert_close(one._adjust(logits), wanted, msg="tokens are counted once, however often one asks")
    one.request.output.append(1)
    assert one._adjust(logits)[1] == pytest.approx(0.5 - 0.5 - 0.25)
    assert logits.tolist() == [2.0, 1.0, -1.0, 0.5, 3.0], "the model's logits are left alone"


def test_min_tokens() -> None:
    """Before so many tokens none that ends the answer is chosen."""
    settings = {"temperature": 0, "stop_token_ids": frozenset([1]), "min_tokens": 2}
    assert sampler(**settings, output=(0,)).sample(LOGITS).token == 3
    assert sampler(**settings, output=(0, 0)).sample(LOGITS).token == 1


class Alternating:
    """Allows even and odd tokens by turns; it knows fewer tokens than there are logits."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> bytes:
        return bytes((index + len(self.seen)) % 2 == 0 for index in range(4))

    def advance(self, token: int) -> None:
        self.seen.append(token)


def test_constraint() -> None:
    """Only allowed tokens are chosen, those that the constraint does not know never, and it sees each token once."""
    one = sampler(temperature=0, constraint=Alternating())
    assert one.sample(LOGITS).token == one.sample(LOGITS).token == 0
    one.request.output.append(0)
    assert one.sample(LOGITS).token == one.sample(LOGITS).token == 1
    assert one.request.constraint.seen == [0]
    assert {sampler(constraint=Alternating()).sample(LOGITS).token for _ in range(50)} == {0, 2}


def test_nothing_allowed() -> None:
    """An answer that cannot go on is an error, not a forbidden token."""
    bias = tuple((token, -math.inf) for token in range(4))
    with pytest.raises(NothingAllowed):
        sampler(constraint=Alternating(), logit_bias=bias).sample(LOGITS)
