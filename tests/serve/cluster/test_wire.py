"""Answers over a connection: what a replica sends is what a gateway gets, for one ticket once, however it ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cluster.call import Lost, Message
from serve.cluster.wire import Outlet, Ticket, _unpacked, fetch, packed
from tests.patience import PATIENCE

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain"), (b"x", b"\xe9")]}
MESSAGES: list[Message] = [
    START,
    {"type": "http.response.body", "body": b"", "more_body": True},
    {"type": "http.response.body", "body": bytes(range(256)), "more_body": True},
    {"type": "http.response.body", "body": b"x" * 200_000, "more_body": True},
    {"type": "http.response.body", "body": b"data: ", "more_body": True, "outputs": [[0, 5], [1, 7, "stop", 3]]},
    {"type": "http.response.body", "body": b"end", "more_body": False},
]


def over_the_wire(check: Callable[[Outlet], Awaitable[None]]) -> None:
    """Run `check` beside an outlet."""

    async def run() -> None:
        outlet = Outlet()
        await outlet.start("127.0.0.1")
        async with asyncio.timeout(PATIENCE):
            await check(outlet)
        await outlet.stop()

    asyncio.run(run())


async def source(messages: Sequence[Message], then: Exception | None = None) -> AsyncIterator[Sequence[Message]]:
    """An answer, message by message."""
    for message in messages:
        yield [message]
    if then is not None:
        raise then


async def fetched(
    outlet: Outlet, answer: AsyncIterator[Sequence[Message]], found: list[Message] | None = None
) -> list[Message]:
    """All messages that come for a ticket, as far as they come in `found`."""
    found = [] if found is None else found
    async for ticket in outlet.offer(answer):
        async for batch in fetch(ticket):
            found += batch
    return found


@pytest.mark.parametrize(
    "messages",
    [
        MESSAGES,
        [{"type": "qhub.draining", "replica": "r0"}],
        [{"type": "http.response.start", "status": 421, "headers": []}, MESSAGES[-1]],
        [],
    ],
)
def test_what_is_sent_is_what_comes(messages: list[Message]) -> None:
    """Every kind of message, of any size, in order."""

    async def check(outlet: Outlet) -> None:
        assert await fetched(outlet, source(messages)) == messages

    over_the_wire(check)


@given(st.lists(st.sampled_from(MESSAGES), max_size=5), st.lists(st.integers(1, 400), min_size=1, max_size=50))
def test_frames_are_read_however_they_are_cut(messages: list[Message], sizes: list[int]) -> None:
    """Where a connection cuts them changes nothing."""
    whole, buffer, found, at = b"".join(map(packed, messages)), bytearray(), [], 0
    for size in (*sizes, len(whole)):
        buffer += whole[at : at + size]
        at += size
        found += [message for _, message in _unpacked(buffer)]
    assert found == messages
    assert not buffer


def test_a_ticket_is_for_one_answer_once() -> None:
    """Who has none, a wrong one or a used one gets nothing, and others are answered."""

    async def check(outlet: Outlet) -> None:
        async for ticket in outlet.offer(source(MESSAGES)):
            wrong = Ticket(ticket.host, ticket.port, b"x" * 16)
            for other in (wrong, Ticket(ticket.host, ticket.port, b"short")):
                reader, writer = await asyncio.open_connection(other.host, other.port)
                writer.write(other.secret)
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            assert [message async for batch in fetch(ticket) for message in batch] == MESSAGES
            with pytest.raises(Lost, match="its connection ended before the answer did"):
                await anext(fetch(ticket))

    over_the_wire(check)


def test_an_answer_that_breaks_off_is_lost() -> None:
    """What came before the end is there, and the end is missed."""

    async def check(outlet: Outlet) -> None:
        found: list[Message] = []
        with pytest.raises(Lost):
            await fetched(outlet, source(MESSAGES[:2], RuntimeError("the engine has stopped")), found)
        assert found == MESSAGES[:2]
        with pytest.raises(Lost, match="it cannot be reached"):
            await anext(fetch(Ticket("127.0.0.1", 1, b"x" * 16)))

    over_the_wire(check)


@pytest.mark.parametrize("taken", [0, 3])
def test_who_hangs_up_ends_the_answer(taken: int) -> None:
    """The source is closed, and no more of it was made than a connection holds."""
    made: list[int] = []
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[Sequence[Message]]:
        try:
            while True:
                made.append(1)
                yield [{"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True}]
        finally:
            closed.set()

    async def check(outlet: Outlet) -> None:
        async for ticket in outlet.offer(endless()):
            async with contextlib.aclosing(fetch(ticket)) as batches:
                batch: Any = await anext(batches)
                for _ in range(taken):
                    batch = await anext(batches)
                assert batch
            await closed.wait()
        assert len(made) < 40

    over_the_wire(check)
