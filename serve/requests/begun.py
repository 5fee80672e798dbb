"""Begun: what makes an answer the same wherever it is made, so that another replica can continue it."""

import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Begun:
    """Whence an answer comes, and how far it has come.

    seed      its ids are of it, and the tokens that are drawn without a seed of their own
    created   when it began, in seconds since 1970
    outputs   its tokens so far, in the order in which they came, as `Noted.to_json` has them
    spent     seconds that were spent on it elsewhere
    is_noted  whoever sent the request wants its tokens beside the events, to have it continued elsewhere
    """

    seed: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    outputs: tuple[list[Any], ...] = ()
    spent: float = 0.0
    is_noted: bool = False

    def seed_of(self, choice: int) -> int:
        """What the tokens of a choice are drawn by, if its request gives no seed: from [0, 2**63)."""
        return int(_digest(self.seed, f"choice {choice}")[:16], 16) >> 1


class Ids:
    """Ids of an answer and of its parts, 32 hexadecimal digits each: those of one seed are the same anywhere."""

    def __init__(self, seed: str | None = None) -> None:
        self._seed = seed or uuid.uuid4().hex
        self._num = 0
        self.answer = _digest(self._seed, "answer")

    def new(self) -> str:
        """The id of the next part."""
        self._num += 1
        return _digest(self._seed, f"part {self._num}")

    def call(self, choice: int, number: int) -> str:
        """The id of a call of a tool: which choice comes first is a matter of time."""
        return f"call_{_digest(self._seed, f'call {choice} {number}')[:24]}"


def _digest(seed: str, what: str) -> str:
    return hashlib.sha256(f"{seed} {what}".encode()).hexdigest()[:32]
