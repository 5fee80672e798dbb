"""Choosing tokens: greedy, temperature, nucleus, seeds and log-probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.draw import BLOCK, CANDIDATES, NEAR, _first_beyond, likeliest, nucleus
from serve.engine.request import Request, Sampled, SamplingParams
from serve.engine.sampler import NotFinite, NothingAllowed, Sampler, choose

KINDS = (
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 40},
    {"top_k": 7, "top_p": 0.5},
    {"min_p": 0.2},
    {"temperature": 5.0, "top_p": 0.99},
    {"logit_bias": ((3, 5.0),)},
    {"temperature": 0, "presence_penalty": 1.0, "output": (1, 2)},
)
LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def sampler(*, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), constraint=None, **settings) -> Sampler:
    """A sampler of a request with these settings, which has given `output` already."""
    params = SamplingParams(**{"max_tokens": 100, **settings})
    return Sampler(Request("r", prompt, params, constraint=constraint, output=list(output)))


def sample(one: Sampler, logits: torch.Tensor) -> Sampled:
    """What a request gets that is alone in its batch."""
    (result,) = choose([one], logits[None])
    if isinstance(result, Exception):
        raise result
    return result


def draws(count: int = 4000, **settings) -> torch.Tensor:
    """How often each token is drawn, as fractions of as many requests in one batch."""
    samplers = [sampler(**{"seed": seed, **settings}) for seed in range(count)]
    tokens = [result.token for result in choose(samplers, LOGITS.expand(count, -1))]
    return torch.bincount(torch.tensor(tokens), minlength=5) / count


def answer(count: int, logits: torch.Tensor = LOGITS, **settings) -> list[int]:
    """So many tokens of one request, one after the other."""
    one = sampler(**settings)
    for _ in range(count):
        one.request.output.append(sample(one, logits).token)
    return one.request.output


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

    assert answer(40, seed=3) == answer(40, seed=3)
    assert answer(40, seed=3) != answer(40, seed=4)
    assert answer(40, seed=None) != answer(40, seed=None)  # equal by chance: 0.29^40
    assert answer(40, seed=-1) == answer(40, seed=-1)


def test_tokens_of_one_answer_are_independent() -> None:
    """One request's tokens come as often as they are likely, and a token says nothing of the next."""
    tokens = torch.tensor(answer(4000, seed=7))
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 4000, LOGITS.exp(), atol=0.04, rtol=0)
    after_likeliest = tokens[1:][tokens[:-1] == 1]
    assert float((after_likeliest == 1).double().mean()) == pytest.approx(0.4, abs=0.06)  # of 1,600: 5 deviations


def test_neighbours_change_nothing() -> None:
    """A request's token is the one it gets alone, whatever settings the others of its batch have."""
    logits = torch.randn(len(KINDS), 3000, generator=torch.Generator().manual_seed(0)) * 2
    samplers = [sampler(seed=seed, **settings) for seed, settings in enumerate(KINDS)]
    alone = [sample(one, own).token for one, own in zip(samplers, logits, strict=True)]
    assert [result.token for result in choose(samplers, logits)] == alone
    assert [sample(one, own).token for one, own in zip(samplers, logits, strict=True)] == alone, (
        "asking changes nothing"
    )


@pytest.mark.parametrize("size", [100, 5 * CANDIDATES, (NEAR + 30) * BLOCK - 1])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_nucleus_is_exact(scale: float, size: int) -> None:
    """What the shortcut over the likeliest tokens keeps is what sorting all of them keeps, however flat they are."""
    weights = torch.softmax(torch.randn(6, size, dtype=torch.float64) * scale, dim=-1).float()
    top_p = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.99, 1 - 1e-9], dtype=torch.float64)[:, None]
    values, order = weights.sort(dim=-1, descending=True)
    total = weights.double().sum(-1, keepdim=True)
    kept = torch.zeros_like(weights, dtype=torch.bool).scatter(
        1, order, values.double().cumsum(-1) - values < top_p * total
    )
    torch.testing.assert_close(nucleus(weights, top_p), weights.where(kept, 0.0), rtol=0, atol=0)


@settings(max_examples=60)
@given(
    size=st.integers(1, 3 * BLOCK),
    kind=st.sampled_from(["flat", "steep", "few", "last"]),
    share=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
    seed=st.integers(0, 99),
)
def test_where_a_share_is_filled(size: int, kind: str, share: float, seed: int) -> None:
    """Found by blocks it is the place that sums of all weights in order give, but for the last bits; it has weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, size, generator=generator)
    if kind == "steep":
        weights = (weights * 40 - 40).exp()
    if kind in ("few", "last"):
        kept = torch.rand(3, size, generator=generator) < 0.02 if kind == "few" else torch.zeros(3, size) > 0
        kept[:, -1] = True
        weights = weights.clamp(min=0.1) * kept
    shares = torch.full((3, 1), share, dtype=torch.float64)
    found = _first_beyond(weights, shares)
    filled = weights.double().cumsum(-1)
    assert (weights.gather(-1, found) > 0).all()
    near = 1e-5 * filled[:, -1:]
    assert (filled.gather(-1, found) > shares * filled[:, -1:] - near).all()
    assert ((filled - weights).gather(-1, found) <= shares * filled[:, -1:] + near).all()


@settings(max_examples=60)
@given(size=st.integers(1, 3 * BLOCK), seed=st.integers(0, 99), has_nan=st.booleans())
def test_the_likeliest_is_the_first_of_the_highest(size: int, seed: int, has_nan: bool) -> None:
    """The same as `max`, of equal ones the first; infinity counts, and NaN is found."""
    logits = torch.randint(-3, 3, (4, size), generator=torch.Generator().manual_seed(seed)).float()
    logits[1] = -torch.inf
    logits[2, size // 2] = torch.inf
    if has_nan:
        logits[3, size // 3] = torch.nan
    values, places = likeliest(logits)
    torch.testing.assert_close(values, logits.amax(-1), equal_nan=True, rtol=0, atol=0)
    for row in range(3 + (not has_nan)):
        assert int(places[row]) == int((logits[row] == values[row]).nonzero()[0, 0])


def test_logprobs() -> None:
    """Log-probabilities are of the model's distribution, whatever the temperature."""
    chosen = sample(sampler(temperature=0, logprobs=2), LOGITS + 5)
    assert chosen.logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in chosen.top_logprobs] == [1, 3]
    assert sample(sampler(temperature=0), LOGITS).logprob is None
    assert sample(sampler(temperature=0, logprobs=0), LOGITS).top_logprobs == ()
    assert sample(sampler(temperature=0, logprobs=1, logit_bias=((2, 50.0),)), LOGITS).logprob == pytest.approx(
        math.log(0.05), abs=1e-6
    ), "log-probabilities are the model's own, before the bias"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad: float) -> None:
    """NaN and infinity are an error, never a token."""
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFinite):
        sample(sampler(temperature=0), logits)
    with pytest.raises(NotFinite):
        sample(sampler(), torch.full((5,), -math.inf))


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
    assert sample(sampler(temperature=0, logit_bias=((1, -100.0),)), LOGITS).token == 3


def test_penalties_follow_their_formulas() -> None:
    """Presence once, frequency per occurrence in the answer, repetition by sign of the logit, prompt included."""
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5, 3.0])
    one = sampler(prompt=(0, 2), output=(3, 3, 4), presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    wanted = torch.tensor([1.0, 1.0, -2.0, 0.25 - 0.5 - 0.5, 1.5 - 0.5 - 0.25])
    torch.testing.assert_close(one.adjust(logits), wanted)
    torch.testing.assert_close(one.adjust(logits), wanted, msg="tokens are counted once, however often one asks")
    one.request.output.append(1)
    assert one.adjust(logits)[1] == pytest.approx(0.5 - 0.5 - 0.25)
    assert logits.tolist() == [2.0, 1.0, -1.0, 0.5, 3.0], "the model's logits are left alone"


def test_min_tokens() -> None:
    """Before so many tokens none that ends the answer is chosen."""
    settings = {"temperature": 0, "stop_token_ids": frozenset([1]), "min_tokens": 2}
    assert sample(sampler(**settings, output=(0,)), LOGITS).token == 3
    assert sample(sampler(**settings, output=(0, 0)), LOGITS).token == 1


class Alternating:
    """Allows even and odd tokens by turns; it knows fewer tokens than there are logits."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> bytes:
        return bytes((index + len(self.seen)) % 2 == 0 for index in range(4))

    def advance(self, token: int) -> None:
        self.seen.append(token)

    def rollback(self, count: int) -> None:
        del self.seen[len(self.seen) - count :]

    def forced(self) -> list[int]:
        return []


def test_constraint() -> None:
    """Only allowed tokens are chosen, those that the constraint does not know never, and it sees each token once."""
    one = sampler(temperature=0, constraint=Alternating())
    assert sample(one, LOGITS).token == sample(one, LOGITS).token == 0
    one.request.output.append(0)
    assert sample(one, LOGITS).token == sample(one, LOGITS).token == 1
    assert one.request.constraint.seen == [0]
    assert {sample(sampler(constraint=Alternating()), LOGITS).token for _ in range(50)} == {0, 2}


def test_nothing_allowed() -> None:
    """An answer that cannot go on is an error, not a forbidden token."""
    bias = tuple((token, -math.inf) for token in range(4))
    with pytest.raises(NothingAllowed):
        sample(sampler(constraint=Alternating(), logit_bias=bias), LOGITS)
