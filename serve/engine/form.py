"""Following an answer token by token, also ahead of it: what was tried is taken back where the answer differs."""

from collections.abc import Sequence
from typing import Protocol

from adapterhub_local.errors import QhubError


class Constraint(Protocol):
    """What an answer may look like: which tokens may come next, given those that came."""

    def allowed(self) -> bytes:
        """One byte a token of the vocabulary, 0 where the token may not come next."""
        ...

    def advance(self, token: int) -> None:
        """Note that `token` came."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        ...

    def forced(self) -> list[int]:
        """Tokens that must come next, as far as that is known at once. Others may spell the same."""
        ...


class Trail:
    """Which tokens somebody has noted: those of an answer so far, and some that are tried after them."""

    def __init__(self) -> None:
        self._num_sure = 0  # of the answer, which only grows
        self._tried: list[int] = []

    def move(self, output: Sequence[int], ahead: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Go to the end of `ahead` after `output`: the tokens to take back, the last one first, and those to note."""
        wanted = [*output[self._num_sure :], *ahead]
        same = 0
        while same < min(len(wanted), len(self._tried)) and wanted[same] == self._tried[same]:
            same += 1
        back, new = self._tried[same:][::-1], wanted[same:]
        self._num_sure, self._tried = len(output), list(ahead)
        return back, new


class Form:
    """What an answer may look like, followed by whoever samples and whoever drafts."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self._trail = Trail()

    def allowed(self, output: Sequence[int], ahead: Sequence[int] = ()) -> bytes:
        """One byte a token, 0 where it may not come after `output` and `ahead`. Raises as the constraint."""
        self._follow(output, ahead)
        return self.constraint.allowed()

    def forced(self, output: Sequence[int]) -> list[int]:
        """Tokens that must come after `output`, as far as is known; none if the answer cannot continue."""
        try:
            self._follow(output, ())
            return self.constraint.forced()
        except QhubError:  # whoever samples meets it again, and says so
            return []

    def _follow(self, output: Sequence[int], ahead: Sequence[int]) -> None:
        back, new = self._trail.move(output, ahead)
        if back:
            self.constraint.rollback(len(back))
        for token in new:
            self.constraint.advance(token)
