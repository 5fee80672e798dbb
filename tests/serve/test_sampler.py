"""Choosing tokens: greedy, temperature, nucleus, seeds and log-probabilities."""

import math

import pytest
import torch

from serve.engine.request import SamplingParams
from serve.engine.sampler import NotFinite, make_generator, sample

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def draws(count: int = 4000, **settings) -> torch.Tensor:
    """How often each token is drawn with one seed, as fractions."""
    params = SamplingParams(max_tokens=1, **{"seed": 1, **settings})
    generator = make_generator(params)
    tokens = [sample(LOGITS, params, generator).token for _ in range(count)]
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
        params = SamplingParams(max_tokens=1, seed=seed)
        generator = make_generator(params)
        return [sample(LOGITS, params, generator).token for _ in range(40)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)  # equal by chance: 0.29^40
    assert tokens(-1) == tokens(-1)


def test_logprobs() -> None:
    """Log-probabilities are of the model's distribution, whatever the temperature."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=2)
    chosen = sample(LOGITS + 5, params, None)
    assert chosen.logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in chosen.top_logprobs] == [1, 3]
    assert sample(LOGITS, SamplingParams(max_tokens=1, temperature=0), None).logprob is None
    assert sample(LOGITS, SamplingParams(max_tokens=1, temperature=0, logprobs=0), None).top_logprobs == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad: float) -> None:
    """NaN and infinity are an error, never a token."""
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFinite):
        sample(logits, SamplingParams(max_tokens=1, temperature=0), None)
    with pytest.raises(NotFinite):
        sample(torch.full((5,), -math.inf), SamplingParams(max_tokens=1), make_generator(SamplingParams(max_tokens=1)))
