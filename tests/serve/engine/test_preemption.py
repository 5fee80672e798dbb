"""Preemption: with too few pages for all, requests are computed again, and nobody can tell from the answers."""

import pytest
import torch

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE
from serve.engine.request import Request, SamplingParams
from serve.errors import ContextTooLong

PAGE_BYTES = PAGE * 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
NUM_PAGES = 7


def make_engine(built_base, **options) -> Engine:
    limits = EngineOptions(**{"max_rows": 4, "tokens_per_step": 24, "base_exec": "nf4", **options})
    return build_engine(load_base(read_record(built_base), device="cpu"), limits)


class Bytes:
    """A constraint that allows the bytes 32 to 126 in turn with all others."""

    def __init__(self) -> None:
        self.num_seen = 0

    def allowed(self) -> bytes:
        return bytes((32 <= token < 127) == (self.num_seen % 2 == 0) for token in range(256))

    def advance(self, token: int) -> None:
        self.num_seen += 1

    def rollback(self, count: int) -> None:
        self.num_seen -= count

    def forced(self) -> list[int]:
        return []


@pytest.mark.parametrize("prefix_bytes", [0, 4 * PAGE_BYTES])
def test_answers_do_not_change(built_base, served_registry: Registry, prefix_bytes: int) -> None:
    """Greedy, seeded, penalised and constrained answers, as they are streamed, are those of an engine with room."""
    kinds = [
        SamplingParams(50, temperature=0),
        SamplingParams(50, temperature=1.5, seed=3, top_p=0.95),
        SamplingParams(50, temperature=1.0, seed=4, presence_penalty=0.5, repetition_penalty=1.2),
        SamplingParams(50, temperature=0.8, seed=5),
        SamplingParams(50, temperature=0, frequency_penalty=0.3),
    ]
    versions = [None, served_registry.resolve("alpha"), served_registry.resolve("beta")]
    answers = []
    for pages, rows in ((NUM_PAGES, 4), (40, 1)):
        engine = make_engine(built_base, kv_bytes=pages * PAGE_BYTES, max_rows=rows, prefix_bytes=prefix_bytes)
        requests = []
        for number, params in enumerate(kinds * 2):
            version = versions[number % 3]
            adapter = engine.pool.acquire(version).digest if version else None
            prompt = tuple(range(number, number + 3 + 5 * number))
            requests.append(Request(str(number), prompt, params, adapter, Bytes() if number % 5 == 3 else None))
        engine.submit(*requests)
        streamed: dict[str, list[int]] = {request.id: [] for request in requests}
        while engine.has_work:
            assert len(engine.scheduler.running) + len(engine.scheduler.waiting) <= len(requests)
            for output in engine.step():
                assert output.error is None, output.error
                streamed[output.request_id].append(output.sampled.token)
            assert engine.snapshot().kv_usage <= 1
        assert streamed == {request.id: request.output for request in requests}
        assert (engine.snapshot().stats.num_preemptions > 0) == (rows == 4)
        assert engine.snapshot().kv_usage == 0
        assert not any(engine.pool.users().values())
        answers.append(streamed)
    assert answers[0] == answers[1]


def test_what_can_never_fit_is_refused(built_base) -> None:
    """What is larger than the whole KV cache is refused with what to do; the largest that fits is answered."""
    engine = make_engine(built_base, kv_bytes=NUM_PAGES * PAGE_BYTES + 1)
    assert engine.max_length == NUM_PAGES * PAGE

    def largest(max_tokens: int) -> Request:
        return Request(f"r{max_tokens}", (5,) * (NUM_PAGES * PAGE - 20), SamplingParams(max_tokens, temperature=0))

    with pytest.raises(ContextTooLong, match=r"112 tokens, all that the KV cache holds.*--kv-cache-mb"):
        engine.submit(largest(21))
    requests = [largest(20), largest(19), largest(18)]
    engine.submit(*requests)
    while engine.has_work:
        engine.step()
    assert [len(request.output) for request in requests] == [20, 19, 18]
    with pytest.raises(InputError, match="too few for a KV cache"):
        make_engine(built_base, kv_bytes=PAGE_BYTES - 1)


@torch.inference_mode()
def test_what_overflowed_is_cleared(built_base) -> None:
    """Pages that were given back before it was known that they hold no NaN are zeroed before another has them."""
    engine = make_engine(built_base, kv_bytes=NUM_PAGES * PAGE_BYTES, tokens_per_step=8)
    good = Request("good", tuple(range(40)), SamplingParams(8, temperature=0))
    engine.submit(good)
    while engine.has_work:
        engine.step()
    half = Request("half", tuple(range(50, 130)), SamplingParams(8))
    engine.submit(half)
    engine.step()
    engine.step()
    for keys, values in engine.runner.cache._layers.values():
        for page in half.pages:
            keys[page] = values[page] = float("nan")  # as an adapter that overflows would leave them
    engine.abort("half")
    again = Request("again", tuple(range(100, 140)), SamplingParams(8, temperature=0))
    engine.submit(again)
    while engine.has_work:
        assert not any(output.error for output in engine.step())
    assert len(again.output) == 8
