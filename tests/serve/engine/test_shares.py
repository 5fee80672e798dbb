"""A fair share: laws of how a step is divided among prompts, and of who is admitted first."""

from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.engine.request import HIGH, LOW, NORMAL, Request, SamplingParams, Scheduled, Scores, State
from serve.engine.scheduler import RISE
from serve.engine.shares import OLDEST, divide
from tests.serve.engine.test_scheduler import make_scheduler, request, step

prompts = st.lists(
    st.tuples(st.integers(2, 60), st.integers(0, 50), st.sampled_from([LOW, NORMAL, HIGH]), st.booleans()),
    min_size=1,
    max_size=8,
)


def reading(drawn: list[tuple[int, int, int, bool]], *, has_scores: bool) -> list[Request]:
    """Prompts, the oldest first, each of so many tokens, of which some are computed already."""
    made = []
    for number, (size, computed, priority, is_scored) in enumerate(drawn):
        params = SamplingParams(1, prompt_logprobs=0 if is_scored and has_scores else None)
        each = Request(str(number), tuple(range(size)), params, priority=priority)
        each.num_computed = min(computed, size - 2)
        if each.params.prompt_logprobs is not None:
            each.scores.append(scores(each.num_computed))
        made.append(each)
    return made


def scores(count: int) -> Scores:
    return Scores(array("d", [0.0] * count), array("q"), 0, array("q"), array("d"))


def rest(each: Request) -> int:
    return each.num_tokens - each.num_computed


@given(
    drawn=prompts, budget=st.integers(1, 80), part=st.integers(1, 80), scored=st.integers(1, 40), waits=st.booleans()
)
def test_bounds_of_a_step(drawn, budget, part, scored, waits: bool) -> None:
    """Tokens come in order and within budget, parts and scores within theirs; the oldest always has some."""
    asked = reading(drawn, has_scores=True)
    items = divide(asked, budget, max_part=part, max_scored=scored, is_awaited=waits)
    assert sum(item.num_tokens for item in items) <= budget
    assert sum(len(item.scored) for item in items) <= scored
    assert len({item.request.id for item in items}) == len(items)
    for item in items:
        assert item.start == item.request.num_computed
        assert 1 <= item.num_tokens <= rest(item.request)
    oldest = next(item for item in items if item.request is asked[0])
    limit = scored if asked[0].num_unscored else budget
    assert oldest.num_tokens >= min(rest(asked[0]), max(1, min(budget, part) // OLDEST), limit)


@given(drawn=prompts, budget=st.integers(1, 80), part=st.integers(1, 80), waits=st.booleans())
@example(
    drawn=[(7, 0, LOW, False), (2, 0, LOW, False), (2, 0, LOW, False), (2, 0, NORMAL, False), (11, 0, NORMAL, False)],
    budget=16,
    part=16,
    waits=False,
)
@example(drawn=[(3, 0, LOW, False), (2, 0, LOW, False), (4, 0, NORMAL, False)], budget=6, part=3, waits=True)
def test_nothing_is_left_lying(drawn, budget, part, waits) -> None:
    """A step is filled, but for what parts of prompts may not take while somebody waits for a token; and in order.

    Whoever gets tokens, but for the oldest, while one of a higher priority, or as urgent and shorter, is not read to
    its end, is read to his, and of a lower priority: parts had what they may have by then.
    """
    asked = reading(drawn, has_scores=False)
    items = divide(asked, budget, max_part=part, max_scored=1, is_awaited=waits)
    counts = {item.request: item.num_tokens for item in items}
    done = [each for each in asked if counts.get(each) == rest(each)]
    used, parts = sum(counts.values()), sum(count for each, count in counts.items() if each not in done)
    share = max(1, min(budget, part) // OLDEST)
    limit = min(part, max(share, used - parts)) if done else part
    if waits or done:
        assert parts <= part
    is_full = used == min(budget, sum(map(rest, asked)))
    # more than the limit where one of a higher priority had its part before a shorter one was read to its end
    assert is_full or (parts >= limit if waits or done else False)
    for late in asked[1:]:
        for first in asked:
            is_before = (-first.priority, rest(first)) < (-late.priority, rest(late))
            if counts.get(late) and is_before and first not in done:
                assert late in done, "it is read to its end, and does not count as a part"
                assert first.priority > late.priority


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(2, 150), min_size=1, max_size=3),
    budget=st.integers(8, 64),
    flood=st.integers(1, 20),
    part=st.integers(4, 64),
    late=st.sampled_from([NORMAL, HIGH]),
)
def test_no_prompt_is_starved(sizes, budget, flood, part, late) -> None:
    """Under any flood of shorter and more urgent prompts, each is read in four times the work of those before it."""
    scheduler = make_scheduler(max_rows=6, tokens_per_step=budget, prefill_tokens=part, queue_limit=10_000)
    long = [request(f"long{number}", size, 1) for number, size in enumerate(sizes)]
    scheduler.submit(*long)
    share = max(1, min(budget - scheduler.options.max_rows, part) // OLDEST)
    bound = sum(-(-size // share) for size in sizes) + len(sizes)
    for number in range(bound):
        if len(scheduler.waiting) < flood:
            short = request(f"short{number}", 2 + number % 5, 1)
            short.priority = late
            scheduler.submit(short)
        step(scheduler)
    assert all(each.state is State.FINISHED for each in long)


@pytest.mark.parametrize("size", [20, 100, 300])
def test_short_prompt_behind_long_ones(size: int) -> None:
    """A short prompt gets its first token in the step after it came, whatever is read; the long ones go on."""
    scheduler = make_scheduler(tokens_per_step=512)
    long = [request(f"long{number}", 2000) for number in range(3)]
    scheduler.submit(*long)
    step(scheduler)
    short = request("short", size, 30)
    scheduler.submit(short)
    batch = step(scheduler)
    assert short.output
    beside = sum(item.num_tokens for item in batch if item.request in long)
    assert beside == min(max(64, size), 256, 512 - size), "not much more than it would take alone"
    for _ in range(3):
        shares = {item.request.id: item.num_tokens for item in step(scheduler)}
        assert shares == {"short": 1, "long0": 256}, "one long prompt beside the answer"


def test_parts_make_no_answer_wait() -> None:
    """While an answer is made, or a prompt read to its end, long prompts have no more than their part of a step."""
    scheduler = make_scheduler(tokens_per_step=100, prefill_tokens=10, max_rows=4)
    answered, long = request("answered", 5, 8), request("long", 300, 1)
    scheduler.submit(long, answered)
    assert {item.request.id: item.num_tokens for item in step(scheduler)} == {"long": 5, "answered": 5}
    for _ in range(7):
        assert {item.request.id: item.num_tokens for item in step(scheduler)} == {"answered": 1, "long": 10}
    assert [item.num_tokens for item in step(scheduler)] == [100], "nobody waits for a token any more"


def order_of_answers(scheduler, requests: list[Request]) -> list[str]:
    order: list[str] = []
    while scheduler.has_work:
        step(scheduler)
        order += [each.id for each in requests if each.state is State.FINISHED and each.id not in order]
    return order


def test_who_is_admitted_first() -> None:
    """The most urgent first, and those of one priority in the order in which they came."""
    scheduler = make_scheduler(max_rows=1)
    priorities = [NORMAL, NORMAL, LOW, HIGH, NORMAL, HIGH]
    requests = [request(str(number)) for number in range(len(priorities))]
    for each, priority in zip(requests, priorities, strict=True):
        each.priority = priority
    scheduler.submit(*requests)
    assert order_of_answers(scheduler, requests) == ["3", "5", "0", "1", "4", "2"]


@pytest.mark.parametrize("steps", [2 * RISE - 20, 2 * RISE + 20])
def test_waiting_makes_urgent(steps: int) -> None:
    """A request of low priority passes those of high priority that came after it once it has waited long enough."""
    scheduler = make_scheduler(max_rows=1, tokens_per_step=8)
    patient = request("patient", 2, 1)
    patient.priority = LOW
    scheduler.submit(patient)
    for number in range(steps + 3):
        while len(scheduler.waiting) < 3:
            high = request(f"high{number}", 2, 1)
            high.priority = HIGH
            scheduler.submit(high)
        step(scheduler)
    assert (patient.state is State.FINISHED) == (steps > 2 * RISE)


def test_who_gives_pages_back() -> None:
    """When pages run out the least urgent request gives its own back, not the one that came last."""
    scheduler = make_scheduler(num_pages=4, max_rows=4, tokens_per_step=64)
    low, normal = request("low", 15, 30), request("normal", 16, 30)
    low.priority = LOW
    scheduler.submit(low)
    step(scheduler)
    scheduler.submit(normal)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.running == [normal]
    assert order_of_answers(scheduler, [low, normal]) == ["normal", "low"]


def test_scheduled_items_are_of_the_prompt() -> None:
    """Nothing is given to nobody, and a single token is a share, too."""
    assert divide([], 10, max_part=5, max_scored=5, is_awaited=True) == []
    (each,) = reading([(9, 0, NORMAL, False)], has_scores=False)
    assert divide([each], 1, max_part=1, max_scored=1, is_awaited=True) == [Scheduled(each, 0, 1)]
