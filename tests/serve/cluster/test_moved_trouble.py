"""Streams that move while more goes wrong than one replica: full ones, broken devices, silent machines, late limits."""

import asyncio
import re
from collections.abc import Iterator

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.data.answer_log import read_log
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.cluster import wire
from serve.cluster.call import Lost
from serve.cluster.placement import tiers
from serve.cluster.relay import Stream, is_complete
from serve.errors import Busy, DeviceLost, GenerationFailed
from serve.options import HttpOptions
from serve.requests.begun import Begun
from serve.text.generate import Generation
from tests.serve.cluster.conftest import Gateway
from tests.serve.cluster.test_auto import NOBODYS, auto, num_routed, routed  # noqa: F401
from tests.serve.cluster.test_gateway import STREAMS
from tests.serve.cluster.test_moved import CHAT, COMPLETION, LONG, SEED, cut, known_seed, untimed  # noqa: F401
from tests.serve.cluster.test_wire import START, over_the_wire
from tests.serve.conftest import Server

BODY = {"model": "delta", "stream": True, **LONG}


@pytest.fixture(scope="module")
def three(built_base, shared_registry: Registry) -> Iterator[Gateway]:
    """A gateway before three replicas."""
    running = Gateway(built_base, shared_registry, 3)
    yield running
    running.stop()


def services(gateway: Gateway) -> dict:
    """The service of each replica, in the order in which they are asked for `delta`."""
    cut(gateway, CHAT, BODY)
    affinity = gateway.engines.asked[-1][1].affinity
    order = [name for tier in tiers(affinity, gateway.engines.apps) for name in tier]
    return {name: gateway.engines.apps[name].state.services.first for name in order}


def full(*requests: object) -> None:
    if requests:
        raise Busy("the queue is full")


def asked(gateway: Gateway, since: int) -> list[str]:
    """The replicas that were asked."""
    return [name for name, _ in gateway.engines.asked[since:]]


def test_a_full_replica_is_passed_over(three: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the second replica refuses for now, the third goes on with a stream."""
    whole, (_, second, _) = cut(three, CHAT, BODY), services(three).values()
    monkeypatch.setattr(second.engine, "submit", full)
    before, order = len(three.engines.asked), list(services(three))
    assert cut(three, CHAT, BODY, 4) == whole
    assert asked(three, before + 1) == order


def test_a_device_that_fails(three: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that fails in the middle of an answer is a lost replica to its client, and no error."""
    body, (first, _, _) = {**BODY, "max_tokens": 40}, services(three).values()
    whole, step, left = cut(three, CHAT, body), first.engine.step, [15]

    def failing():
        left[0] -= 1
        if left[0] < 0:
            raise DeviceLost("the GPU does not answer")
        return step()

    monkeypatch.setattr(first.engine, "step", failing)
    assert cut(three, CHAT, body) == whole
    monkeypatch.undo()
    first.loop._is_stopping = False  # as a process that Ray has put in its place
    first.loop.start()


def test_what_a_stop_string_ended_needs_no_replica(three: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that its text has ended is not made again: no replica has to have room for it."""
    body = {"model": "delta", "stream": True, "prompt": "Hi", "max_tokens": 99, "ignore_eos": True, "temperature": 1.0}
    letters = re.findall(r'"text": "([a-zA-Z])"', cut(three, COMPLETION, body))
    body["stop"] = [letters[2]]
    whole = cut(three, COMPLETION, body)
    for each in list(services(three).values())[1:]:
        monkeypatch.setattr(each.engine, "submit", full)
    count = whole.count("data: ")
    assert [cut(three, COMPLETION, body, after) == whole for after in (count, count + 1)] == [True, True]


@pytest.mark.parametrize("path", STREAMS)
def test_the_replicas_own_error_is_the_only_one(three: Gateway, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that a replica has sent is not followed by another when it is lost before the end of the stream."""
    body, first = {"model": "delta", "stream": True, **STREAMS[path]}, next(iter(services(three).values()))
    come, left = Generation._come, [0]

    async def failing(self):
        if self._loop is first.loop:
            left[0] -= 1
            if left[0] < 0:
                raise GenerationFailed("the model failed on this request")
        return await come(self)

    monkeypatch.setattr(Generation, "_come", failing)
    left[0] = 3
    whole = cut(three, path, body)
    assert "the model failed" in whole
    events = whole.count("\n\n") or whole.count("\n")
    for after in range(events, events + 3):
        left[0] = 3
        before = len(three.engines.asked)
        text = cut(three, path, body, after)
        if "the model failed" in text:
            assert (text, len(asked(three, before))) == (whole, 1)


def test_what_a_call_says_is_not_the_end() -> None:
    """Arguments of a call are objects in Ollama's form: what they say of being done is theirs."""
    line = b'{"message": {"tool_calls": [{"function": {"arguments": {"done": true}}}]}, "done": false}\n'
    assert not is_complete("/api/chat", line)
    assert is_complete("/api/chat", line + b'{"message": {"content": ""}, "done": true}\n')


def test_named_events_are_counted_not_words() -> None:
    """Each event begins with its name; a request that is given back may hold the same words."""
    stream = Stream()
    stream.sent({"type": "http.response.body", "body": b'event: a\ndata: {"x": "event: y"}\n\nevent: b\ndata: {}\n\n'})
    assert stream.num_events == 2


def test_the_router_is_asked_once(auto: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What it has chosen when a stream began holds wherever that goes on, the base as well as an adapter."""
    body = {"model": "auto", "stream": True, "prompt": NOBODYS, "max_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    whole = cut(auto, COMPLETION, body)
    before = num_routed(auto)
    assert cut(auto, COMPLETION, body, 4) == whole
    assert num_routed(auto) == before + 1


def test_the_time_that_an_answer_may_take_is_one(three: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that moves has the rest of its time, and not all of it again."""
    cut(three, CHAT, BODY, 4)
    first, second = (call.begun.spent for _, call in three.engines.asked[-2:])
    assert first == 0 < second
    monkeypatch.setattr("serve.cluster.gateway.Begun", lambda: Begun(SEED, 1e9, spent=1e6))
    refused = three.post(CHAT, **BODY)
    assert refused.status_code in (200, 504)  # a token may come before the clock is looked at: the stream ends so, then
    assert '"code": "timeout"' in refused.text


def test_a_machine_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without power closes no connection: it is lost when it is silent; one that is slow says that it is there."""
    monkeypatch.setattr(wire, "SILENT_SECONDS", 0.5)

    async def slow():
        yield [START]
        await asyncio.sleep(1.5)
        yield [{"type": "http.response.body", "body": b"late", "more_body": False}]

    async def ask(outlet: wire.Outlet) -> list:
        return [each async for ticket in outlet.offer(slow()) async for batch in wire.fetch(ticket) for each in batch]

    async def check(outlet: wire.Outlet) -> None:
        monkeypatch.setattr(wire, "BEAT_SECONDS", 0.1)
        assert (await ask(outlet))[-1]["body"] == b"late"
        monkeypatch.setattr(wire, "BEAT_SECONDS", 60.0)
        with pytest.raises(Lost, match="nothing was heard"):
            await ask(outlet)

    over_the_wire(check)


def test_a_place_is_free_when_the_answer_is_there(built_base, tmp_path) -> None:
    """A key that may ask one thing at a time may ask the next as soon as it has the answer."""
    registry = Registry(tmp_path / "one")
    _, token = Keys(registry.home).create(concurrency=1)
    gateway = Gateway(built_base, registry, 2)
    try:
        gateway.http.headers["Authorization"] = f"Bearer {token}"
        for stream in (True, False):
            body = {"model": read_record(built_base).name, "stream": stream, **LONG, "max_tokens": 2}
            assert [gateway.post(CHAT, **body).status_code for _ in range(30)] == [200] * 30
    finally:
        gateway.stop()


def test_a_plain_server_logs_what_was_asked(built_base, shared_registry: Registry, tmp_path) -> None:
    """The seed that an answer was drawn by for want of another is not what its request asked for."""
    http = HttpOptions(request_log=tmp_path / "log", request_log_all=True)
    server = Server(load_base(read_record(built_base), device="cpu"), shared_registry, http=http)
    try:
        for extra in ({}, {"seed": 5}):
            assert server.http.post(CHAT, json={"model": "delta", **LONG, **extra}).status_code == 200
    finally:
        server.stop()
    assert [entry.record["parameters"]["seed"] for entry in read_log(tmp_path / "log")] == [None, 5]
