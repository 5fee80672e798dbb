"""Prefix reuse: the beginning of a prompt is computed once, for one adapter's content only, with the same answers."""

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry, Version
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE, PagePool, page_key, root_key
from serve.engine.request import Request, SamplingParams
from tests.serve.adapter_makers import publish

PROMPT = tuple(range(100, 100 + 3 * PAGE + 5))


@pytest.fixture(scope="module")
def cold(built_base) -> Engine:
    """An engine that remembers nothing."""
    return build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(max_rows=4, prefix_bytes=0))


@pytest.fixture
def engine(built_base) -> Engine:
    """An engine that has seen nothing yet."""
    options = EngineOptions(max_rows=4, tokens_per_step=20, base_exec="nf4")
    return build_engine(load_base(read_record(built_base), device="cpu"), options)


def answer(
    engine: Engine, prompt: tuple[int, ...], version: Version | None = None, max_tokens: int = 8
) -> tuple[Request, list[float]]:
    """One greedy answer and its log-probabilities."""
    adapter = engine.pool.acquire(version).digest if version else None
    request = Request("r", prompt, SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0), adapter)
    engine.submit(request)
    logprobs = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            logprobs.append(output.sampled.logprob)
    return request, logprobs


@pytest.mark.parametrize("name", [None, "alpha"])
def test_cached_equals_uncached(engine: Engine, cold: Engine, served_registry: Registry, name: str | None) -> None:
    """The same tokens with log-probabilities within 1e-4, whether the beginning was computed or taken over."""
    version = served_registry.resolve(name) if name else None
    wanted, expected = answer(cold, PROMPT, version)
    assert wanted.num_cached == 0
    for cached in (0, 3 * PAGE, 3 * PAGE):
        request, logprobs = answer(engine, PROMPT, version)
        assert request.num_cached == cached
        assert request.output == wanted.output
        assert logprobs == pytest.approx(expected, abs=1e-4)
    assert engine.snapshot().stats.num_cached == 6 * PAGE


def test_conversations_go_on_where_they_were(engine: Engine, cold: Engine) -> None:
    """A prompt that begins with an earlier prompt and its answer computes what is new only."""
    first, _ = answer(engine, PROMPT, max_tokens=2 * PAGE)
    longer = (*PROMPT, *first.output, 7, 8, 9)
    request, logprobs = answer(engine, longer)
    assert request.num_cached == (len(PROMPT) + 2 * PAGE - 1) // PAGE * PAGE
    wanted, expected = answer(cold, longer)
    assert request.output == wanted.output
    assert logprobs == pytest.approx(expected, abs=1e-4)


def test_a_shared_beginning_is_enough(engine: Engine, cold: Engine) -> None:
    """Prompts that part ways share what is before that; one that begins otherwise shares nothing."""
    answer(engine, PROMPT)
    parted = (*PROMPT[: PAGE + 3], 5, *PROMPT[PAGE + 4 :])
    request, _ = answer(engine, parted)
    assert request.num_cached == PAGE
    assert request.output == answer(cold, parted)[0].output
    assert answer(engine, (5, *PROMPT[1:]))[0].num_cached == 0
    assert answer(engine, PROMPT[: 2 * PAGE])[0].num_cached == PAGE  # the last token is computed in any case


def test_no_adapter_finds_what_another_computed(engine: Engine, cold: Engine, served_registry: Registry) -> None:
    """Base, adapters and a changed adapter under an old name each compute their own beginning."""
    base = engine.pool.reader.base
    old = publish(served_registry, "changing", base, seed=71)
    versions = [None, served_registry.resolve("alpha"), served_registry.resolve("beta"), old]
    for version in versions:
        assert answer(engine, PROMPT, version)[0].num_cached == 0
    new = publish(served_registry, "changing", base, seed=72)
    changed, _ = answer(engine, PROMPT, new)
    assert changed.num_cached == 0
    assert changed.output == answer(cold, PROMPT, new)[0].output
    for version in (*versions, new):
        request, _ = answer(engine, PROMPT, version)
        assert request.num_cached == 3 * PAGE
        assert request.output == answer(cold, PROMPT, version)[0].output


def test_answers_to_one_prompt_share_it(engine: Engine, cold: Engine) -> None:
    """Four requests at once with one prompt, as `n` makes them, compute it once, and each gets its own answer."""
    params = SamplingParams(max_tokens=8, temperature=0)
    requests = [Request(str(number), PROMPT, params) for number in range(4)]
    engine.submit(*requests)
    while engine.has_work:
        assert not any(output.error for output in engine.step())
    wanted = answer(cold, PROMPT)[0].output
    assert [request.output for request in requests] == [wanted] * 4
    assert [request.num_cached for request in requests] == [0, 3 * PAGE, 3 * PAGE, 3 * PAGE]
    assert engine.stats.num_tokens == len(PROMPT) + 3 * 5 + 4 * 7


def test_names_of_pages() -> None:
    """A page's name depends on base, adapter, kind and every token before it; an empty digest is not base."""
    names = set()
    for base in ("x", "y"):
        for adapter in (None, "", "a"):
            for tokens in (PROMPT[:PAGE], PROMPT[1 : PAGE + 1]):
                first = page_key(root_key(base, adapter), tokens)
                names |= {first, page_key(first, tokens)}
    assert len(names) == 2 * 3 * 2 * 2


def test_budget() -> None:
    """The least recently used sequence leaves first, its end before its beginning; pages in use never do."""
    pages = PagePool(6, max_idle=4)

    def use(first: int, length: int) -> Request:
        request = Request("r", tuple(range(first, first + length)), SamplingParams(1))
        assert pages.allocate(request, spare=0)
        found = request.num_computed
        request.num_computed = length
        pages.insert(request)
        request.num_cached = found
        return request

    for first, length in ((0, 3 * PAGE), (500, PAGE), (900, PAGE + 3)):
        pages.free(use(first, length), is_clean=True)
    assert (pages.num_used, pages.num_idle, pages.num_available) == (0, 4, 6)
    again = use(0, 3 * PAGE + 1)  # its third page had to go
    assert again.num_cached == 2 * PAGE
    assert (pages.num_used, pages.num_idle) == (4, 2)
    assert not pages.allocate(Request("r", tuple(range(3 * PAGE)), SamplingParams(1)), spare=2)
    last = use(100, 2 * PAGE)  # takes what is idle, not what is used
    assert (pages.num_used, pages.num_idle, pages.num_available) == (6, 0, 0)
    pages.free(last, is_clean=True)
    assert use(0, 2 * PAGE + 5).num_cached == 2 * PAGE  # shared while the other still uses it
    nothing = PagePool(6)
    again = Request("r", PROMPT, SamplingParams(1))
    assert nothing.allocate(again, spare=0)
    again.num_computed = len(PROMPT)
    nothing.insert(again)
    nothing.free(again, is_clean=False)
    assert nothing.num_available == 6
    assert sorted(nothing.take_dirty()) == [1, 2, 3, 4]
    assert nothing.take_dirty() == []
