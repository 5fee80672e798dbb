"""The engine as a whole: faults stay with their requests, aborted work is dropped, nothing leaks."""

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams, State, Submission, TokenOutput
from serve.engine.sampler import NotFinite
from serve.errors import Busy, ContextTooLong, GenerationFailed
from serve.lora.product import Slot
from tests.serve.adapter_makers import publish

POISON = 200  # a token the faulty model cannot compute


@pytest.fixture(scope="module")
def base(built_base) -> BaseInfo:
    """The record of the tiny base."""
    return read_record(built_base)


@pytest.fixture(scope="module")
def shared_engine(base: BaseInfo, served_registry: Registry) -> Engine:
    """One engine for all tests of this file, with memory for two adapters beside those in use."""
    options = EngineOptions(max_rows=4, tokens_per_step=12, max_adapters=2, queue_limit=64)
    return build_engine(load_base(base, device="cpu"), options)


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The engine, which must be as empty after a test as before it."""
    yield shared_engine
    assert not shared_engine.has_work
    assert shared_engine.pages.num_used == 0
    assert not shared_engine._requests
    assert not shared_engine._samplers
    assert not any(shared_engine.pool.users().values())


def request(engine: Engine, name: str, version=None, *, length: int = 6, max_tokens: int = 8, seed: int = 0) -> Request:
    """A greedy request with a random prompt; its adapter is acquired."""
    prompt = tuple(random.Random(seed).choices(range(POISON), k=length))
    adapter = engine.pool.acquire(version).digest if version else None
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0), adapter)


def submission(engine: Engine, name: str, **asked) -> Submission:
    """The same as it is given to the loop."""
    made = request(engine, name, **asked)
    return Submission(made.id, made.prompt, made.params, made.adapter)


def drain(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def alone(engine: Engine, like: Request, version=None) -> list[int]:
    """What `like` answers when nothing else runs."""
    copy = Request("alone", like.prompt, like.params, engine.pool.acquire(version).digest if version else None)
    engine.submit(copy)
    drain(engine)
    return copy.output


def test_fault_stays_with_its_request(engine: Engine, served_registry: Registry) -> None:
    """If the model fails on a batch, the request to blame gets the error and the others their whole answers."""
    alpha = served_registry.resolve("alpha")
    good = [request(engine, "g1", alpha, seed=1), request(engine, "g2", seed=2)]
    expected = [alone(engine, good[0], alpha), alone(engine, good[1])]
    bad = Request("bad", (1, POISON, 2), SamplingParams(max_tokens=5), engine.pool.acquire(alpha).digest)

    def fail(module, args) -> None:
        if (args[0] == POISON).any():
            raise RuntimeError("poisoned")

    hook = engine.runner.model.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        engine.submit(good[0], bad, good[1])
        outputs = drain(engine)
    finally:
        hook.remove()
    failed = [output for output in outputs if output.error]
    assert [output.request_id for output in failed] == ["bad"]
    assert isinstance(failed[0].error, GenerationFailed)
    assert "poisoned" not in str(failed[0].error)
    assert [each.output for each in good] == expected


def test_adapter_that_overflows(engine: Engine, base: BaseInfo, served_registry: Registry) -> None:
    """An adapter that leads to NaN fails its own request, and leaves nothing behind in its pages."""
    wild = publish(served_registry, "wild", base, seed=9, strength=1e25)
    good = request(engine, "good", length=20, seed=3)
    expected = alone(engine, good)
    engine.submit(request(engine, "wild", wild, length=40), good)
    failed = [output for output in drain(engine) if output.error]
    assert [output.request_id for output in failed] == ["wild"]
    assert isinstance(failed[0].error, NotFinite)
    assert good.output == expected
    for number in range(4):  # whoever gets the pages next
        assert alone(engine, request(engine, f"next{number}", length=20, seed=3)) == expected


def test_abort(engine: Engine, served_registry: Registry) -> None:
    """Aborted requests, running or waiting, say nothing more and give back pages and adapter."""
    alpha = served_registry.resolve("alpha")
    requests = [request(engine, f"r{number}", alpha, max_tokens=30, seed=number) for number in range(7)]
    engine.submit(*requests)
    for _ in range(5):
        engine.step()
    for each in (requests[0], requests[6]):
        engine.abort(each.id)
    engine.abort("never heard of")
    later = {output.request_id for output in drain(engine)}
    assert later == {"r1", "r2", "r3", "r4", "r5"}
    assert len(requests[0].output) < 30
    assert requests[6].output == []


def test_too_long(engine: Engine) -> None:
    """What does not fit into the context is refused before it is queued."""
    with pytest.raises(ContextTooLong, match="512 tokens"):
        engine.submit(request(engine, "long", length=500, max_tokens=13))


def test_failed_submit_queues_nothing(engine: Engine) -> None:
    """When a group is refused, nothing of it is left in the engine."""
    with pytest.raises(Busy):
        engine.submit(*[request(engine, f"many{number}") for number in range(65)])


def test_random_traffic(engine: Engine, base: BaseInfo, served_registry: Registry) -> None:
    """Random arrivals, lengths, adapters, evictions and aborts: every finished answer is the one given alone."""
    versions = [
        None,
        *(publish(served_registry, f"t{seed}", base, seed=50 + seed, rank=1 + 3 * seed) for seed in range(5)),
    ]
    engine.pool.max_bytes, before = 200_000, engine.pool.max_bytes  # two to six of them
    chance = random.Random(1)
    plans = [
        (index, chance.randrange(len(versions)), chance.randint(1, 40), chance.randint(1, 10), chance.random() < 0.2)
        for index in range(60)
    ]
    live: dict[str, Request] = {}
    try:
        for index, which, length, max_tokens, is_aborted in plans:
            while True:
                try:
                    each = request(
                        engine, f"t{index}", versions[which], length=length, max_tokens=max_tokens, seed=index
                    )
                    break
                except Busy:
                    engine.step()
            engine.submit(each)
            live[each.id] = each
            for _ in range(chance.randint(0, 3)):
                assert not any(output.error for output in engine.step())
            if is_aborted:
                engine.abort(chance.choice(list(live)))
        assert not any(output.error for output in drain(engine))
        assert engine.pool.num_evictions > 0
        for index, which, *_ in plans:
            each = live[f"t{index}"]
            if each.finish_reason != "abort":
                assert each.output == alone(engine, each, versions[which]), each.id
    finally:
        engine.pool.max_bytes = before


def test_seeded_sampling_does_not_depend_on_neighbours(engine: Engine, served_registry: Registry) -> None:
    """A seeded request draws the same tokens alone and in a full batch."""
    alpha = served_registry.resolve("alpha")
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=7)

    def seeded(name: str) -> Request:
        return Request(name, (5, 6, 7), params, engine.pool.acquire(alpha).digest)

    first, again = seeded("first"), seeded("again")
    engine.submit(first)
    drain(engine)
    engine.submit(request(engine, "n1", seed=1), again, request(engine, "n2", served_registry.resolve("beta"), seed=2))
    drain(engine)
    assert first.output == again.output


def test_loop_delivers_and_stops(engine: Engine) -> None:
    """Tokens reach asyncio; who still waits when the loop stops gets an error, and later requests are refused."""
    loop = EngineLoop(engine)

    async def go() -> None:
        loop.start()
        queue = loop.submit(submission(engine, "short", max_tokens=3))
        outputs = [await asyncio.wait_for(queue.get(), 10) for _ in range(3)]
        assert [output.finish_reason for output in outputs] == [None, None, "length"]
        queue = loop.submit(submission(engine, "endless", max_tokens=480))
        await asyncio.wait_for(queue.get(), 10)
        await asyncio.to_thread(loop.stop)
        last = None
        while last is None or not last.is_last:
            last = await asyncio.wait_for(queue.get(), 10)
        assert isinstance(last.error, QhubError)
        with pytest.raises(Busy):
            loop.submit(submission(engine, "late"))

    asyncio.run(go())
    assert not loop.is_alive
    engine.abort("endless")
    engine.step()


def test_each_answer_after_a_rest_begins_anew(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many threads compute is measured anew once nothing was to be done, and only then."""
    resumed: list[int] = []
    monkeypatch.setattr(engine.runner.cores, "resume", lambda: resumed.append(len(resumed)))
    loop = EngineLoop(engine)

    async def go() -> None:
        for number in range(3):
            queue = loop.submit(submission(engine, f"r{number}", max_tokens=5))
            while not (await asyncio.wait_for(queue.get(), 10)).is_last:
                assert len(resumed) == number + 1
            while engine.has_work:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # the loop waits again
        await asyncio.to_thread(loop.stop)

    loop.start()
    asyncio.run(go())
    assert 3 <= len(resumed) <= 4  # the last when it stops


def test_model_keeps_its_answers(engine: Engine, base: BaseInfo) -> None:
    """The wrapped model without an adapter answers as the model that was never wrapped, bit for bit per token."""
    each = request(engine, "plain", max_tokens=20, seed=8)
    model = load_base(base, device="cpu").model
    with torch.inference_mode():
        tokens = model.generate(torch.tensor([each.prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert alone(engine, each) == tokens[0, len(each.prompt) :].tolist()


def test_a_cold_adapter_stalls_nobody(engine: Engine, base: BaseInfo, served_registry: Registry) -> None:
    """While an adapter is copied into its slot, however long that takes, all that run get a token each step."""
    alpha, cold = served_registry.resolve("alpha"), publish(served_registry, "cold", base, seed=31, rank=5)
    expected = alone(engine, request(engine, "cold", seed=5), cold)
    engine.unload(cold.content_digest)
    copy, may_copy = engine.slots.put, threading.Event()

    def slow(*args) -> Slot:
        assert may_copy.wait(20)
        return copy(*args)

    running = [request(engine, f"run{number}", alpha, max_tokens=40, seed=number) for number in range(3)]
    engine.submit(*running)
    while not all(each.output for each in running):
        engine.step()
    engine.slots.put = slow
    try:
        late = request(engine, "late", cold, seed=5)
        engine.submit(late)
        for _ in range(10):
            outputs = engine.step()
            assert {output.request_id for output in outputs} == {each.id for each in running}
            assert cold.content_digest not in engine.slots
        assert late.state is State.WAITING
        may_copy.set()
        engine.loader.wait(20)
    finally:
        del engine.slots.put
    engine.step()
    assert late.state is State.RUNNING
    drain(engine)
    assert late.output == expected
    assert [len(each.output) for each in running] == [40] * 3


def test_a_slot_that_cannot_be_had(engine: Engine, base: BaseInfo, served_registry: Registry) -> None:
    """An adapter that the device has no memory for fails its own requests; those that run, and later ones, go on."""
    wide = publish(served_registry, "wide", base, seed=32, rank=7)
    expected = alone(engine, request(engine, "wide", seed=6), wide)
    engine.unload(wide.content_digest)
    good = request(engine, "good", served_registry.resolve("alpha"), seed=1)
    whole = alone(engine, good, served_registry.resolve("alpha"))

    def fail(*_) -> None:
        raise RuntimeError("out of memory")

    engine.slots.put = fail
    try:
        engine.submit(good, request(engine, "bad", wide, seed=6))
        outputs = []
        while not any(output.error for output in outputs):
            outputs += engine.step()
    finally:
        del engine.slots.put
    outputs += drain(engine)
    assert [output.request_id for output in outputs if output.error] == ["bad"]
    assert good.output == whole
    assert alone(engine, request(engine, "again", seed=6), wide) == expected
