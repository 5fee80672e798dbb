"""Speculation: guesses are what came before, cost no more than they may, and change no answer."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.form import Trail
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool
from serve.engine.request import Request, SamplingParams, State
from serve.engine.sampler import Sampler
from serve.engine.scheduler import Scheduler
from serve.engine.speculate import ALLOWANCE, MAX_DRAFT, MOST, SIZES, START, Costs, Drafter, Lookup
from serve.engine.verify import verify
from tests.serve.engine.test_scheduler import check_pages

PAGE_BYTES = PAGE * 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32


@given(
    st.sampled_from(["cpu", "cuda"]),
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1e4)), max_size=60),
    st.lists(st.integers(0, 600), min_size=2, max_size=8, unique=True),
)
def test_a_price_is_a_share_whatever_was_measured(
    device: str, steps: list[tuple[int, float]], sizes: list[int]
) -> None:
    """However long steps took on a busy machine, one more token costs between nothing and what each of the others does,
    more in a larger step, and nothing in a step that has only prompts."""
    costs = Costs(device)
    for num_tokens, seconds in steps:
        costs.note(num_tokens, seconds)
    prices = [costs.price(size) for size in sorted(sizes)]
    assert all(0 <= price <= 1 for price in prices)
    assert prices == sorted(prices)
    assert costs.price(0) == 0


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=3), st.integers(1, MAX_DRAFT))
def test_guesses_are_what_came_before(tokens: list[int], ahead: list[int], size: int) -> None:
    """A guess continues the last place at which the same tokens came, as if the sequence went on with it."""
    lookup = Lookup()
    for token in tokens:  # however it is told of them
        lookup.extend([token])
    guess = lookup.guess(ahead, size)
    whole = [*tokens, *ahead]
    for length in SIZES:
        places = [end for end in range(length, len(tokens)) if tokens[end - length : end] == whole[-length:]]
        if len(whole) >= length and places:
            wanted = list(whole)
            for number in range(size if length == SIZES[0] else (size + 1) // 2):
                wanted.append(wanted[places[-1] + number])
            assert guess == wanted[len(whole) :]
            return
    assert guess == []


@given(st.lists(st.tuples(st.integers(0, 15), st.floats(0.05, 1.0)), max_size=100))
def test_wrong_guesses_cost_little(steps: list[tuple[int, float]]) -> None:
    """Whatever is right and wrong, what guesses cost in steps is bounded by a share of the steps and a constant."""
    drafter = Drafter()
    prompt, output = [1, 2, 3, 4] * 8, []
    lost = 0.0
    for kept, price in steps:
        draft = drafter.draft(prompt, output, (), MAX_DRAFT, price)
        kept = min(kept, len(draft))
        drafter.note(len(draft), kept)
        lost += price * len(draft) - kept
        output = [*output, *draft[:kept], 1 + len(output) % 4]
        assert lost <= START + ALLOWANCE * len(output) + 1e-6


def test_what_is_right_grows() -> None:
    """Guesses that are right become long ones in a few steps; when they are wrong they become rare."""
    drafter, prompt = Drafter(), list(range(100)) * 2
    output: list[int] = []
    sizes = []
    while len(output) < 60:
        draft = drafter.draft(prompt, output, (), MAX_DRAFT, 0.2)
        sizes.append(len(draft))
        drafter.note(len(draft), len(draft))
        output += [*draft, (len(output) + len(draft)) % 100]
    assert sizes == [2, 4, 8, 15, 15, 15]
    drafts = []
    for _ in range(200):
        drafts.append(len(drafter.draft(prompt, output, (), MAX_DRAFT, 0.5)))
        drafter.note(drafts[-1], 0)
        output.append((output[-1] + 1) % 100)
    assert drafts[0] == 8, "what the account can pay"
    assert 8 < sum(drafts) <= (MOST + 200 * ALLOWANCE) / 0.5


@pytest.mark.parametrize("ratio", [0.5, 4.0, 30.0])
def test_costs_are_learned(ratio: float) -> None:
    """From noisy steps of several sizes the price of one more token is found; some that were interrupted do no harm."""
    costs, chance = Costs("cpu"), random.Random(0)
    for _ in range(400):
        count = chance.choice([1, 2, 3, 5, 9, 16])
        pause = 40.0 if chance.random() < 0.02 else 0.0
        costs.note(count, (ratio + count) * 0.01 * chance.uniform(0.95, 1.05) + pause)
    for count in (1, 4, 16):
        assert costs.price(count) == pytest.approx(count / (ratio + count), rel=0.35)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), max_size=60), st.integers(1, 64))
def test_prices_are_shares(steps: list[tuple[int, float]], count: int) -> None:
    """Whatever was measured, a price lies between nothing and what a token costs."""
    costs = Costs("cuda")
    for number, seconds in steps:
        costs.note(number, seconds)
    assert 0 <= costs.price(count) <= 1


@given(st.data())
def test_a_trail_is_walked_there_and_back(data: st.DataObject) -> None:
    """What is noted and taken back adds up to the answer and what is tried after it."""
    trail, output, noted = Trail(), [], []
    for _ in range(data.draw(st.integers(1, 8))):
        output += data.draw(st.lists(st.integers(0, 2), max_size=3))
        ahead = data.draw(st.lists(st.integers(0, 2), max_size=3))
        back, new = trail.move(output, ahead)
        assert [noted.pop() for _ in back] == back
        noted += new
        assert noted == output + ahead


def test_sampled_answers_have_their_distribution() -> None:
    """With guesses, right ones and wrong ones, tokens are as likely as the model says (chi-square)."""
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    first, second = rows  # after nothing, and after the guess
    counts: Counter[tuple[int, ...]] = Counter()
    total = 6000
    for seed in range(total):
        request = Request("r", (0,), SamplingParams(9, seed=seed))
        (run,) = verify([Sampler(request)], [(1,)], rows.log())
        assert isinstance(run, list)
        counts[tuple(each.token for each in run)] += 1
    expected = {(0,): first[0], (2,): first[2]} | {(1, token): first[1] * second[token] for token in range(3)}
    assert counts.keys() == expected.keys()
    chi = sum((counts[key] - total * float(p)) ** 2 / (total * float(p)) for key, p in expected.items())
    assert chi < 18.5, "4 degrees of freedom: 1 in 1,000"


def test_scheduler_with_guesses() -> None:
    """Right and wrong guesses leave pages, budgets and lengths as they must be; none is made where there is no room."""
    options = EngineOptions(max_rows=3, tokens_per_step=12)
    chance = random.Random(5)
    scheduler = Scheduler(options, PagePool(12, max_idle=3), costs=Costs("cuda"))
    requests = [Request(str(n), (1, 2, 3, 4, 5) * (2 + n), SamplingParams(20 + n)) for n in range(8)]
    scheduler.submit(*requests)
    num_drafted = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        check_pages(scheduler.pages, scheduler.running)
        assert sum(item.num_tokens for item in batch) <= options.tokens_per_step
        for item in batch:
            assert len(item.request.pages) * PAGE >= item.end
            assert len(item.request.output) + item.num_choices <= item.request.params.max_tokens
            num_drafted += len(item.draft)
            kept = chance.randint(0, len(item.draft))
            scheduler.update(item, [*item.draft[:kept], (item.tokens[-1] % 5) + 1] if item.wants_token else [])
    assert num_drafted > 20
    assert all(len(each.output) == each.params.max_tokens for each in requests)
    assert all(each.state is State.FINISHED for each in requests)
    assert scheduler.pages.num_used == 0


class Spelled:
    """A constraint with forced tokens: a fixed text, with a choice of two letters at every fourth place."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def _next(self, place: int) -> tuple[int, ...]:
        return (40, 50) if place % 4 == 3 else (60 + place % 4,)

    def allowed(self) -> bytes:
        return bytes(token in self._next(len(self.seen)) for token in range(256))

    def advance(self, token: int) -> None:
        assert token in self._next(len(self.seen))
        self.seen.append(token)

    def rollback(self, count: int) -> None:
        del self.seen[len(self.seen) - count :]

    def forced(self) -> list[int]:
        place, found = len(self.seen), []
        while len(self._next(place)) == 1:
            found += self._next(place)
            place += 1
        return found


KINDS = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.2, "logprobs": 2},
    {"temperature": 0.7, "seed": 1, "top_p": 0.9},
    {
        "temperature": 1.0,
        "seed": 2,
        "frequency_penalty": 0.4,
        "min_tokens": 30,
        "stop_token_ids": frozenset(range(9, 40)),
    },
    {"temperature": 0.8, "seed": 3, "logit_bias": ((5, 4.0), (7, 4.0)), "top_k": 20},
    {"temperature": 0.5, "seed": 4, "min_p": 0.1, "logprobs": 0},
)


@pytest.fixture(scope="module")
def versions(served_registry: Registry) -> list:
    return [None, served_registry.resolve("alpha"), served_registry.resolve("beta")]


def answers(built_base, versions: list, speculation: str, kernels: str, rows: int) -> tuple[dict, Engine]:
    """Tokens and log-probabilities of requests of all kinds, on an engine with too few pages for all."""
    options = EngineOptions(
        max_rows=rows, tokens_per_step=32, kv_bytes=10 * PAGE_BYTES, prefix_bytes=2 * PAGE_BYTES, base_exec="nf4",
        kernels=kernels, speculation=speculation,
    )  # fmt: skip
    engine = build_engine(load_base(read_record(built_base), device="cpu"), options)
    if engine.scheduler.costs is not None:
        engine.scheduler.costs.price = lambda _: 0.0  # guess as much as can be, whatever it costs
    requests = []
    for number, settings in enumerate([*KINDS, *KINDS]):
        version = versions[number % 3]
        prompt = tuple(random.Random(number).choices(range(40, 60), k=3)) * (3 + number % 5)
        adapter = engine.pool.acquire(version).digest if version else None
        form = Spelled() if number in (2, 6) else None
        requests.append(Request(str(number), prompt, SamplingParams(40, **settings), adapter, form))
    found: dict[str, list] = {request.id: [] for request in requests}
    engine.submit(*requests)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id].append(output.sampled)
    assert not any(engine.pool.users().values())
    return found, engine


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_answers_are_the_same(built_base, versions: list, kernels: str) -> None:
    """With and without guesses, in one batch and alone: the same tokens and log-probabilities, in fewer steps."""
    plain, without = answers(built_base, versions, "off", kernels, 1)
    guessed, engine = answers(built_base, versions, "auto", kernels, 4)
    for key, sampled in plain.items():
        assert [each.token for each in guessed[key]] == [each.token for each in sampled], key
        for ours, theirs in zip(guessed[key], sampled, strict=True):
            assert (ours.logprob is None) == (theirs.logprob is None)
            assert math.isclose(ours.logprob or 0, theirs.logprob or 0, abs_tol=1e-3)
    assert without.stats.num_drafted == 0
    assert engine.stats.num_accepted > 50
    assert engine.stats.num_drafted > engine.stats.num_accepted, "some guesses must be wrong, or this shows less"
