"""A version on its way to or from a remote: what it was called, what it is called now, and how much was sent."""

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Moved:
    """A version that was, or would be, pushed or pulled: what it is called where it was and where it went.

    `is_new` is False if it was there already; `num_objects` and `num_bytes` count what was sent.
    """

    source: str
    target: str
    is_new: bool
    num_objects: int
    num_bytes: int
    manifest_digest: str


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""
