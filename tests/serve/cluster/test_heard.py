"""What anybody may ask of all replicas is asked once, however many ask."""

import asyncio
from dataclasses import dataclass, field

import pytest

from adapterhub_local.keys import Key
from serve.cluster.call import Call, Whole
from serve.cluster.heard import Heard


@dataclass
class Engines:
    """Replicas that answer when `may` is set, and note what they were asked."""

    may: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[Call] = field(default_factory=list)
    is_broken: bool = False

    async def answers(self, call: Call) -> list[Whole]:
        """See Engines."""
        self.asked.append(call)
        await self.may.wait()
        if self.is_broken:
            raise OSError("away")
        return [Whole("r", 200, (), str(len(self.asked)).encode())]


def test_many_ask_once() -> None:
    """Concurrent callers, and those a moment later, share one answer; each path has its own, and needs no key."""

    async def run() -> None:
        engines = Engines()
        heard = Heard(engines, seconds=3600)
        key = Key("k", "0" * 64, ("infer",), "now")
        waiting = [asyncio.create_task(heard.answers(Call(str(n), "GET", "/ready", key=key))) for n in range(9)]
        await asyncio.sleep(0)
        waiting.pop().cancel()
        await asyncio.sleep(0)
        engines.may.set()
        bodies = {(await each)[0].body for each in waiting} | {
            (await heard.answers(Call("x", "GET", "/ready")))[0].body
        }
        assert bodies == {b"1"}
        assert (await heard.answers(Call("y", "GET", "/health")))[0].body == b"2"
        assert [(call.path, call.key) for call in engines.asked] == [("/ready", None), ("/health", None)]

    asyncio.run(run())


def test_what_is_old_or_failed_is_asked_again() -> None:
    """An answer is reused until it expires; a failure is never reused."""

    async def run() -> None:
        engines = Engines()
        engines.may.set()
        heard = Heard(engines, seconds=-1)
        assert [(await heard.answers(Call("x", "GET", "/ready")))[0].body for _ in range(2)] == [b"1", b"2"]
        engines.is_broken = True
        heard = Heard(engines, seconds=3600)
        for _ in range(2):
            with pytest.raises(OSError, match="away"):
                await heard.answers(Call("x", "GET", "/ready"))
        assert len(engines.asked) == 4

    asyncio.run(run())
