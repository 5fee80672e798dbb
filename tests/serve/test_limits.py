"""Limits: one counter or many that share a Redis give the same answers; nobody gets more, whatever is lost."""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.errors import InputError
from serve.__main__ import EXPOSED, command
from serve.errors import LimitsAway, error_body
from serve.limits import Bounds, Counts, Lease, LocalLimits, Refusal
from serve.options import HttpOptions
from serve.redis_limits import RedisLimits, has_password, shown
from tests.serve.redis_server import RedisServer

KEYS = (f"{number:08x}" for number in itertools.count())  # a new one for each test: they share a Redis


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis for the tests of this file."""
    server = RedisServer()
    yield server
    server.close()


def sharing(
    redis: RedisServer, work: Callable[[Sequence[RedisLimits]], Awaitable[None]], num: int = 3, seconds: float = 30.0
) -> None:
    """Do something with the limits of several servers that share a Redis."""

    async def run() -> None:
        all_ = [RedisLimits(redis.url, lease_seconds=seconds) for _ in range(num)]
        try:
            await work(all_)
        finally:
            for one in all_:
                await one.close()

    asyncio.run(run())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60),
    st.integers(1, 5),
    st.integers(1, 60),
)
def test_no_window_has_more_than_the_rate(steps: list[tuple[int, bool]], requests: int, seconds: int) -> None:
    """Wherever a window of the period begins, no more ran in it, or were refused in it, than the rate says."""
    now = 0
    counts = Counts(lambda: now)
    ran: list[int] = []
    refused: list[int] = []
    for wait, runs in steps:
        now += wait
        answer = counts.admit("k", Bounds(requests, seconds))
        if isinstance(answer, Lease):
            (ran if runs else refused).append(now)
            counts.release(answer, ran=runs)
        else:  # it could not have run, and can as soon as it is said
            times = ran if answer.why == "rate" else refused
            assert len([time for time in times if time > now - seconds]) == requests
            assert 0 < answer.seconds <= seconds
    for times in (ran, refused):
        for start in times:
            assert len([time for time in times if start <= time < start + seconds]) <= requests


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(st.just(-1), st.tuples(st.integers(0, 8), st.booleans())), max_size=25),
    st.one_of(st.none(), st.integers(1, 4)),
    st.one_of(st.none(), st.integers(1, 3)),
)
def test_many_that_share_count_as_one(
    redis: RedisServer, steps: list[int | tuple[int, bool]], requests: int | None, concurrency: int | None
) -> None:
    """Three servers with one Redis admit, refuse and give back, step by step, as one counter does."""
    bounds = Bounds(requests, 3600 if requests else None, concurrency)
    key = next(KEYS)

    async def compare(all_: Sequence[RedisLimits]) -> None:
        counts, held = Counts(), []
        turn = itertools.cycle(all_)
        for step in steps:
            if isinstance(step, int):
                ours, theirs = counts.admit(key, bounds), await next(turn).admit(key, bounds)
                assert getattr(ours, "why", None) == getattr(theirs, "why", None)
                if isinstance(ours, Refusal):
                    assert abs(ours.seconds - theirs.seconds) < 60
                else:
                    held.append((ours, theirs))
            elif held:
                ours, theirs = held.pop(step[0] % len(held))
                counts.release(ours, ran=step[1])
                await next(turn).release(theirs, ran=step[1])  # twice changes nothing
                await next(turn).release(theirs, ran=step[1])

    sharing(redis, compare)


def test_many_at_once_get_exactly_the_rate(redis: RedisServer) -> None:
    """Of 60 requests at once at three servers exactly as many are let in as the key may; the same for concurrency."""

    async def flood(all_: Sequence[RedisLimits]) -> None:
        for bounds, limit in ((Bounds(10, 60), 10), (Bounds(None, None, 2), 2)):
            key = next(KEYS)
            answers = await asyncio.gather(*(all_[number % 3].admit(key, bounds) for number in range(60)))
            assert sum(isinstance(answer, Lease) for answer in answers) == limit

    sharing(redis, flood)


def test_a_lost_server_holds_nothing_for_long(redis: RedisServer) -> None:
    """A request whose server was killed is counted out by itself; one that still runs is not, however long."""
    bounds, key = Bounds(concurrency=1), next(KEYS)

    async def lose(all_: Sequence[RedisLimits]) -> None:
        killed, lives = all_
        assert isinstance(await killed.admit(key, bounds), Lease)
        killed._renewing.cancel()  # as a kill does
        assert isinstance(await lives.admit(key, bounds), Refusal)
        await asyncio.sleep(0.7)
        lease = await lives.admit(key, bounds)
        assert isinstance(lease, Lease)
        await asyncio.sleep(0.9)
        assert isinstance(await lives.admit(key, bounds), Refusal)
        await lives.release(lease, ran=True)
        assert isinstance(await lives.admit(key, bounds), Lease)

    sharing(redis, lose, num=2, seconds=0.6)


def test_who_cannot_count_lets_nobody_in(caplog: pytest.LogCaptureFixture) -> None:
    """Without Redis limited keys are a 503 that says so, logged once; when it is back, they are let in again."""
    server, key = RedisServer(), next(KEYS)

    async def lose(all_: Sequence[RedisLimits]) -> None:
        (limits,) = all_
        lease = await limits.admit(key, Bounds(10, 60))
        server.stop()
        for _ in range(3):
            with pytest.raises(LimitsAway, match="not let in") as caught:
                await limits.admit(key, Bounds(10, 60))
        await limits.release(lease, ran=True)
        assert (error_body(caught.value).status, error_body(caught.value).code) == (503, "limits_unavailable")
        server.start()
        assert isinstance(await limits.admit(key, Bounds(10, 60)), Lease)

    sharing(server, lose, num=1)
    server.close()
    assert [record.levelname for record in caplog.records if "limits at" in record.message] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("url", ["", "http://host", "10.0.0.5:6379", "redis://host/name", "redis://host:many/0"])
def test_what_is_not_a_redis_url(url: str) -> None:
    """A wrong address is refused when the server starts, with one that would be right."""
    with pytest.raises(InputError, match="is not a Redis URL: write redis://HOST:6379/0"):
        RedisLimits(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@host:many/0", "redis://:s3/cret@host/0", "redis://:s3#cret@host/0", "redis://:s3?cret@host/0",
        "redis://:12/s3cret@host/0", "redis://user:12?s3cret@host", "redis://:s3cret", "redis://user:s3cret",
        "user:s3cret@host", "http://:s3cret@host/0", "redis://[s3cret", "redis://host/0?password=s3@cret",
        "redis://:s3cret@host/name", "unix://:s3cret@/a@b",
    ],
)  # fmt: skip
def test_a_refused_url_does_not_show_its_password(url: str) -> None:
    """Wherever a password stands, and however it is cut by its own letters, the refusal shows no part of it."""
    with pytest.raises(InputError, match="is not a Redis URL") as caught:
        RedisLimits(url)
    assert not re.search("s3|cret|12", str(caught.value))


def test_a_password_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As redis-cli reads it, ours first; a wrong one lets nobody in, and no log shows the right or the wrong one."""
    server, key = RedisServer("s3cret"), next(KEYS)

    async def ask(all_: Sequence[RedisLimits]) -> None:
        assert isinstance(await all_[0].admit(key, Bounds(10, 60)), Lease)

    async def fail(all_: Sequence[RedisLimits]) -> None:
        with pytest.raises(LimitsAway):
            await all_[0].admit(key, Bounds(10, 60))

    try:
        sharing(server, fail, num=1)
        monkeypatch.setenv("REDISCLI_AUTH", "s3cret")
        sharing(server, ask, num=1)
        monkeypatch.setenv("QHUB_REDIS_PASSWORD", "wr0ng")
        sharing(server, fail, num=1)
        monkeypatch.setenv("REDISCLI_AUTH", "wr0ng")
        monkeypatch.setenv("QHUB_REDIS_PASSWORD", "s3cret")
        sharing(server, ask, num=1)
        monkeypatch.setenv("QHUB_REDIS_PASSWORD", "wr0ng")
        server.url = server.url.replace("unix://", "unix://:s3cret@")  # what the URL has goes before
        sharing(server, ask, num=1)
    finally:
        server.close()
    assert "limits at unix:" in caplog.text
    assert not re.search("s3cret|wr0ng", caplog.text)


def test_a_password_on_the_command_line_is_noted() -> None:
    """It can be read by all users of the machine, which only a URL without one avoids."""
    held = {"redis://:secret@host": True, "redis://host?password=secret": True, "redis://user@host": False}
    assert {url: has_password(url) for url in held} == held
    given = ["--base", "nothing", "--limits", "redis://:secret@host"]
    done = CliRunner().invoke(command, given)
    assert EXPOSED in done.stderr
    assert "secret" not in done.output


def test_a_password_is_not_shown() -> None:
    """What is logged of an address has no secret."""
    assert shown("rediss://user:secret@host:1/2?password=secret") == "rediss://host:1/2"


def test_local_limits_are_the_default() -> None:
    """A server without --limits counts for itself."""
    assert HttpOptions().limits is None
    assert isinstance(asyncio.run(LocalLimits().admit("k", Bounds(1, 1, 1))), Lease)
