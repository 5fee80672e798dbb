"""Wire: an answer goes from its replica to a gateway over a connection of its own.

Through Ray each message costs both sides a fixed price, a multiple of what it costs to make a token of a small model.
So a request goes through Ray, which knows where, and what comes back through Ray is a ticket: the replica's port gives
the one answer for it, and closes at anything else. Whoever holds a ticket was given it through Ray.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.cluster.call import Lost, Message

logger = logging.getLogger("serve.cluster")
HEAD = struct.Struct("!BI")  # of a frame: its kind, and the bytes that follow
START, PART, END, OTHER, BEAT = range(5)
# flags of a part: more of the body comes; the tokens that it is of stand before it, with their size; it is an error
MORE, NOTED, FAILED = 1, 2, 4
SIZE = struct.Struct("!I")
SECRET = 16  # bytes
SECONDS = 10.0  # to connect, and to show a ticket
UNTAKEN_SECONDS = 60.0  # after which nobody comes for an answer any more
READ = 1 << 16
BEAT_SECONDS = 5.0  # after which a replica says that it is there, whatever else it has to say
SILENT_SECONDS = 30.0  # after which one that says nothing is lost: a machine without power closes no connection


@dataclass(frozen=True)
class Ticket:
    """Where an answer is fetched, once."""

    host: str
    port: int
    secret: bytes
    replica: str | None = None


@dataclass(frozen=True, eq=False)
class _Offer:
    source: AsyncIterator[Sequence[Message]]
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Outlet:
    """A replica's port, and the answers that wait to be fetched there."""

    def __init__(self, replica: str | None = None) -> None:
        self._replica = replica
        self._offers: dict[bytes, _Offer] = {}

    async def start(self, host: str) -> None:
        """Listen at `host`, an address of this machine, on a free port. Raises OSError."""
        self._host = host
        self._server = await asyncio.start_server(self._serve, host, 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more; answers that are being fetched go on."""
        self._server.close()

    async def offer(self, source: AsyncIterator[Sequence[Message]]) -> AsyncIterator[Ticket]:
        """A ticket for the answer in `source`; over when it was fetched, or nobody wants it any more."""
        offer, secret = _Offer(source), secrets.token_bytes(SECRET)
        self._offers[secret] = offer
        try:
            yield Ticket(self._host, self._port, secret, self._replica)
            async with asyncio.timeout(UNTAKEN_SECONDS):
                await offer.taken.wait()
            await offer.over.wait()
        except TimeoutError:
            logger.warning("an answer was not fetched within %g s", UNTAKEN_SECONDS)
        finally:
            self._offers.pop(secret, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        offer = None
        try:
            async with asyncio.timeout(SECONDS):
                offer = self._offers.pop(await reader.readexactly(SECRET), None)
            if offer is None:
                return
            offer.taken.set()
            work = asyncio.create_task(_send(offer.source, writer))
            gone = asyncio.create_task(reader.read(1))
            beat = asyncio.create_task(_beat(writer))
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            for task in (work, gone, beat):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await work
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # who came has no ticket, or is gone
        except Exception:
            logger.exception("an answer was not made to its end")
        finally:
            if offer is not None:
                offer.over.set()
            writer.close()


async def fetch(ticket: Ticket) -> AsyncGenerator[Sequence[Message]]:
    """The messages of the answer, all that are there each time some are. Raises Lost if it breaks off."""
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(ticket.host, ticket.port)
    except (OSError, TimeoutError) as error:
        raise Lost(f"it cannot be reached at {ticket.host}:{ticket.port}: {error}", ticket.replica) from None
    try:
        writer.write(ticket.secret)
        buffer, is_over = bytearray(), False
        while not is_over:
            try:
                async with asyncio.timeout(SILENT_SECONDS):
                    part = await reader.read(READ)
            except TimeoutError:
                raise Lost(f"nothing was heard of it for {SILENT_SECONDS:g} s", ticket.replica) from None
            except OSError:
                part = b""
            if not part:
                raise Lost("its connection ended before the answer did", ticket.replica)
            buffer += part
            found = [frame for frame in _unpacked(buffer) if frame[0] != BEAT]
            is_over = any(kind == END for kind, _ in found)
            if messages := [message for kind, message in found if kind != END or message]:
                yield messages
    finally:
        writer.close()


async def _beat(writer: asyncio.StreamWriter) -> None:
    """Say again and again that this replica is there; between two frames, since each is written at once."""
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        writer.write(HEAD.pack(BEAT, 0))


async def _send(source: AsyncIterator[Sequence[Message]], writer: asyncio.StreamWriter) -> None:
    """Write an answer, no faster than it is read."""
    async with contextlib.aclosing(source) as batches:  # type: ignore[type-var]
        async for batch in batches:
            for message in batch:
                writer.write(packed(message))
            await writer.drain()
    writer.write(HEAD.pack(END, 0))
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def packed(message: Message) -> bytes:
    """A message as a frame."""
    if message["type"] == "http.response.body":
        body: bytes = message.get("body", b"")
        flags = MORE * message.get("more_body", False) | FAILED * message.get("has_failed", False)
        noted = b""
        if outputs := message.get("outputs"):
            tokens = json.dumps(outputs).encode()
            flags, noted = flags | NOTED, SIZE.pack(len(tokens)) + tokens
        return HEAD.pack(PART, len(body) + len(noted) + 1) + bytes([flags]) + noted + body
    kind, rest = OTHER, dict(message)
    if message["type"] == "http.response.start":
        kind = START
        headers = message.get("headers", ())
        rest["headers"] = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers]
    body = json.dumps(rest).encode()
    return HEAD.pack(kind, len(body)) + body


def _part(frame: bytes) -> Message:
    """A part of a body."""
    message: dict[str, Any] = {"type": "http.response.body", "more_body": bool(frame[0] & MORE)}
    begin = 1
    if frame[0] & FAILED:
        message["has_failed"] = True
    if frame[0] & NOTED:
        begin += SIZE.size + SIZE.unpack_from(frame, 1)[0]
        message["outputs"] = json.loads(frame[1 + SIZE.size : begin])
    return message | {"body": frame[begin:]}


def _unpacked(buffer: bytearray) -> Iterator[tuple[int, Message]]:
    """The whole frames at the beginning of a buffer, which are taken out of it."""
    at = 0
    while len(buffer) - at >= HEAD.size:
        kind, size = HEAD.unpack_from(buffer, at)
        end = at + HEAD.size + size
        if len(buffer) < end:
            break
        body, at = bytes(buffer[at + HEAD.size : end]), end
        if kind == PART:
            yield kind, _part(body)
            continue
        message = json.loads(body) if body else {}
        if kind == START:
            headers = message["headers"]
            message["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        yield kind, message
    del buffer[:at]
