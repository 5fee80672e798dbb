"""Heard: what all replicas answered to a question that anybody may ask, remembered for a moment.

Balancers ask a gateway each second whether it is ready, and whoever has no key may ask as well: without this, each time
a thousand replicas would be asked.
"""

import asyncio
from dataclasses import dataclass

from serve.cluster.call import Call, Engines, Whole

SECONDS = 1.0  # for which an answer is good


@dataclass(frozen=True)
class _Round:
    answers: asyncio.Task[list[Whole]]
    asked: float

    def is_over(self, since: float) -> bool:
        """Whether all that could answer has, and that failed or is older than `since`."""
        return self.answers.done() and (self.asked < since or self.answers.exception() is not None)


class Heard:
    """Asks all replicas, once at a time for each path."""

    def __init__(self, engines: Engines, seconds: float = SECONDS) -> None:
        self.engines = engines
        self.seconds = seconds
        self._rounds: dict[str, _Round] = {}

    async def answers(self, call: Call) -> list[Whole]:
        """What each replica answers to a call of its path without a key, now or `seconds` ago at most."""
        now = asyncio.get_running_loop().time()
        latest = self._rounds.get(call.path)
        if latest is None or latest.is_over(now - self.seconds):
            question = Call(call.id, call.method, call.path)
            latest = self._rounds[call.path] = _Round(asyncio.create_task(self.engines.answers(question)), now)
        return await asyncio.shield(latest.answers)  # who hangs up ends the wait of nobody else
