"""Properties of the scheduler under random arrivals, lengths, adapters and aborts."""

import itertools
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.errors import InputError
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool, pages_for
from serve.engine.request import Request, SamplingParams, Scheduled, Scores, State
from serve.engine.scheduler import Scheduler
from serve.errors import Busy

END = 7


def request(name: str, prompt: int = 4, max_tokens: int = 3, adapter: str | None = None) -> Request:
    return Request(name, tuple(range(prompt)), SamplingParams(max_tokens, stop_token_ids=frozenset({END})), adapter)


def make_scheduler(num_pages: int = 1000, max_idle: int = 0, **options) -> Scheduler:
    return Scheduler(EngineOptions(**options), PagePool(num_pages, max_idle=max_idle))


def check_pages(pages: PagePool, running: list[Request]) -> None:
    """Every page is in one place, used as often as requests name it, and enough for what they have computed."""
    users = Counter(page for each in running for page in each.pages)
    assert users == pages._users
    everywhere = [*users, *pages._idle, *pages._free]
    assert sorted(everywhere) == list(range(1, pages.num_pages + 1))
    assert {page: key for key, page in pages._known.items()} == pages._keys
    assert set(pages._idle) <= set(pages._keys)
    assert pages.num_idle <= pages.max_idle
    for each in running:
        assert len(set(each.pages)) == len(each.pages) >= pages_for(each.num_computed)
        for page in each.pages[each.num_computed // PAGE :]:  # what is still written to is nobody else's
            assert users[page] == 1


def step(scheduler: Scheduler, token: int = 1) -> list[Scheduled]:
    """One step in which every request that wants a token gets `token`."""
    batch = scheduler.schedule()
    for item in batch:
        scheduler.update(item, [token] if item.wants_token else [])
    return batch


def test_scored_tokens_are_bounded() -> None:
    """A step scores no more tokens of prompts than it may, in all; others get the rest of it, and all are scored."""
    scheduler = make_scheduler(tokens_per_step=32)
    scheduler.max_scored = 5
    scored = [
        Request(f"s{size}", tuple(range(size)), SamplingParams(0, prompt_logprobs=0, stop_token_ids=frozenset({1})))
        for size in (12, 1, 23)
    ]
    plain = request("plain", 60)
    scheduler.submit(*scored, plain)
    num_steps = 0
    while scheduler.has_work:
        batch = step(scheduler)
        num_steps += 1
        assert sum(len(item.scored) for item in batch) <= 5
        for item in batch:
            zeros = array("d", [0.0] * len(item.scored))
            item.request.scores.append(Scores(zeros, array("q"), 0, array("q"), array("d")))
        if plain.num_computed < 60:
            num_waited = num_steps
    assert num_waited < num_steps - 1, "it does not wait for those that are scored"
    assert [each.num_scored for each in scored] == [11, 0, 22]
    assert {each.finish_reason for each in scored} == {"length"}


arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps after the one before
        st.integers(1, 40),  # prompt
        st.integers(1, 6),  # answer
        st.sampled_from([None, "a", "b", "c", "d"]),
        st.one_of(st.none(), st.integers(0, 8)),  # steps until it is aborted
    ),
    max_size=24,
)


@given(
    arrivals=arrivals,
    rows=st.integers(1, 5),
    extra=st.integers(0, 20),
    adapters=st.integers(1, 3),
    num_pages=st.integers(3, 12),
    max_idle=st.integers(0, 12),
)
def test_every_request_ends_within_budgets(arrivals, rows, extra, adapters, num_pages, max_idle) -> None:
    """Budgets hold in every step, no page is lost or written to by two, tokens come in order, every request ends."""
    options = EngineOptions(max_rows=rows, tokens_per_step=rows + extra, max_adapters=adapters)
    scheduler = Scheduler(options, PagePool(num_pages, max_idle=max_idle))
    times = itertools.accumulate(arrival[0] for arrival in arrivals)
    plan = [
        (time, request(str(index), prompt, answer, adapter), None if abort is None else time + abort)
        for index, (time, (_, prompt, answer, adapter, abort)) in enumerate(zip(times, arrivals, strict=True))
    ]
    # even if each were computed again for every token of the others'
    work = sum(len(each.prompt) + each.params.max_tokens for _, each, _ in plan) * (1 + len(plan))
    now, last = 0, plan[-1][0] if plan else 0
    while now <= last or scheduler.has_work:
        for time, each, abort in plan:
            if time == now:
                scheduler.submit(each)
            if abort == now and each.state is not State.FINISHED:
                scheduler.finish(each, "abort")
        had_work = scheduler.has_work
        batch = scheduler.schedule()
        check_pages(scheduler.pages, scheduler.running)
        assert bool(batch) == had_work
        assert sum(item.num_tokens for item in batch) <= options.tokens_per_step
        assert len(scheduler.running) <= rows
        assert len({each.adapter for each in scheduler.running} - {None}) <= adapters
        assert len({item.request.id for item in batch}) == len(batch)
        for item in batch:
            assert item.start == item.request.num_computed
            assert item.num_tokens >= 1
            assert item.request.state is State.RUNNING
            assert pages_for(item.end) <= len(item.request.pages)
            scheduler.update(item, [1] if item.wants_token else [])
        now += 1
        assert now < last + work + 10, "it goes round in circles"
    for _, each, abort in plan:
        assert each.state is State.FINISHED
        assert not each.pages
        if abort is None:
            assert len(each.output) == each.params.max_tokens
    check_pages(scheduler.pages, [])
    assert not scheduler.adapters
    assert not scheduler.pages._in_flight


def test_long_prompt_does_not_stop_answers() -> None:
    """While a long prompt is read in chunks, running answers get their token in every step."""
    scheduler = make_scheduler(max_rows=2, tokens_per_step=8)
    decoding, long = request("decoding", prompt=2, max_tokens=50), request("long", prompt=60)
    scheduler.submit(decoding)
    step(scheduler)
    scheduler.submit(long)
    steps = 0
    while not long.output:
        batch = step(scheduler)
        assert [item.num_tokens for item in batch if item.request is decoding] == [1]
        steps += 1
    assert steps == 15  # 60 tokens, 4 a step: half of it


def test_queue_limit_is_all_or_none() -> None:
    """A group that does not fit into the queue is refused whole."""
    scheduler = make_scheduler(queue_limit=3)
    scheduler.submit(request("a"), request("b"))
    with pytest.raises(Busy):
        scheduler.submit(request("c"), request("d"))
    assert len(scheduler.waiting) == 2


def test_adapter_that_waits_is_not_starved() -> None:
    """Others may pass a request that waits for a place among the adapters, but not forever."""
    scheduler = make_scheduler(max_rows=2, max_adapters=1, tokens_per_step=64)
    scheduler.submit(request("first", adapter="a"))
    patient = request("patient", adapter="b")
    scheduler.submit(patient)
    for number in range(200):
        scheduler.submit(request(f"a{number}", adapter="a"))
        step(scheduler)
        if patient.state is State.FINISHED:
            break
    assert patient.state is State.FINISHED
    assert number < 60


def test_time_is_bounded_too() -> None:
    """Whoever waits at the head for long is waited for, even if hardly anyone passes."""
    scheduler = make_scheduler(max_rows=4, max_adapters=1, tokens_per_step=64)
    scheduler.submit(request("first", adapter="a", max_tokens=200))
    patient = request("patient", adapter="b")
    scheduler.submit(patient)
    for number in range(700):
        if number % 100 == 50:  # before the one before has ended
            scheduler.submit(request(f"a{number}", adapter="a", max_tokens=200))
        step(scheduler)
    assert patient.state is State.FINISHED
    assert patient.num_waited > 256
    assert patient.num_passed < 6


def test_what_goes_on_comes_first() -> None:
    """A request that brings tokens of its answer, which somebody reads already, does not wait behind new ones."""
    scheduler = make_scheduler(max_rows=2)
    new, begun = [request("a"), request("b")], [request("c", max_tokens=9), request("d", max_tokens=9)]
    for each in begun:
        each.output += [1, 2]
    scheduler.submit(*new)
    scheduler.submit(*begun)
    assert {item.request.id: item.num_tokens for item in step(scheduler)} == {"c": 6, "d": 6}
    assert [len(each.output) for each in begun] == [3, 3]
    later = request("e", max_tokens=9)
    later.output += [1]
    scheduler.submit(later)
    assert [each.id for each in scheduler.queue] == ["e", "a", "b"], "in the order in which they came"


def test_preemption() -> None:
    """When pages run out the request admitted last gives its own back, runs again before others, and loses nothing."""
    scheduler = make_scheduler(num_pages=4, max_rows=4, tokens_per_step=64)
    old, young = request("old", PAGE, 30, adapter="a"), request("young", PAGE - 1, 30)
    late = request("late", 1, 1)
    scheduler.submit(old, young)
    step(scheduler, token=1)
    scheduler.submit(late)
    for token in range(102, 140):
        if scheduler.num_preemptions:
            break
        step(scheduler, token)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, late]
    assert (young.pages, young.num_computed, young.state) == ([], 0, State.WAITING)
    assert len(young.output) > 10
    before = list(young.output)
    while scheduler.has_work:
        step(scheduler, 50)
    assert young.output[: len(before)] == before
    assert len(young.output) == len(old.output) == 30
    assert scheduler.pages.num_used == 0


def test_the_same_prompt_is_computed_once() -> None:
    """Of requests that come together and begin alike one computes the beginning, and the others share its pages."""
    scheduler = make_scheduler(num_pages=20, max_idle=20, max_rows=8, tokens_per_step=64)
    same = [request(str(number), 3 * PAGE + 2, 4, adapter="a") for number in range(4)]
    other = request("other", 3 * PAGE + 2, 4, adapter="b")
    scheduler.submit(*same, other)
    assert [(item.request.id, item.num_tokens) for item in step(scheduler)] == [("0", 50), ("other", 14)]
    assert [(item.request.id, item.num_tokens) for item in step(scheduler)] == [
        ("0", 1),
        *(("other", 36), ("1", 2), ("2", 2), ("3", 2)),
    ]
    assert len({tuple(each.pages[:3]) for each in same}) == 1
    assert scheduler.pages.num_used == 3 + 4 + 4
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_cached == 3 * 3 * PAGE
    assert scheduler.pages.num_idle == 6


def test_base_requests_pass_a_full_set_of_adapters() -> None:
    """Requests without an adapter need no place, and requests for a running adapter none either."""
    scheduler = make_scheduler(max_rows=4, max_adapters=1)
    requests = [request("a", adapter="a"), request("b", adapter="b"), request("base"), request("a2", adapter="a")]
    scheduler.submit(*requests)
    scheduler.schedule()
    assert [each.id for each in scheduler.running] == ["a", "base", "a2"]


def test_end_of_an_answer() -> None:
    """A stop token ends an answer with `stop`, the last allowed token with `length`."""
    scheduler = make_scheduler()
    stopped, cut = request("stopped", max_tokens=9), request("cut", max_tokens=2)
    scheduler.submit(stopped, cut)
    step(scheduler)
    batch = scheduler.schedule()
    for item in batch:
        scheduler.update(item, [END if item.request is stopped else 1])
    assert (stopped.finish_reason, cut.finish_reason) == ("stop", "length")


@pytest.mark.parametrize("wrong", [{"max_rows": 0}, {"queue_limit": -1}, {"max_rows": 8, "tokens_per_step": 7}])
def test_options_are_checked(wrong: dict) -> None:
    """Limits that cannot work are refused."""
    with pytest.raises(InputError):
        EngineOptions(**wrong)


def test_tokens_of_prompt_and_output() -> None:
    """A slice may lie in the prompt, in the output, or over both."""
    each = request("r", prompt=3)
    each.output = [10, 11]
    assert [each.tokens(start, 2) for start in range(4)] == [[0, 1], [1, 2], [2, 10], [10, 11]]
    assert each.tokens(0, 5) == [0, 1, 2, 10, 11]
