"""Call: one request as the gateway hands it to a replica; and what a replica answers with."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from adapterhub_local.errors import QhubError
from adapterhub_local.keys import Key
from serve.requests.begun import Begun

Message = Mapping[str, Any]  # of ASGI, from the application to the server
DRAINING = "qhub.draining"  # the type of a message instead of an answer: ask another replica


@dataclass(frozen=True)
class Call:
    """A request whose key was checked and counted, and whose body was read.

    pinned     the versions that its model's name was found to mean, None where that is not known
    affinity   the digest of what answers; None: the base, or nobody knows, so any replica is as good
    routed     what a router chose for it, as `Routed` has it, if one was asked
    is_asking  the model is a router's choice: a replica says which adapter that is, or answers if it is the base
    avoid      names of replicas that could not answer it
    begun      what makes its answer the same on any of them, and how far a stream has come
    """

    id: str
    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    key: Key | None = None
    pinned: str | None = None
    affinity: str | None = None
    routed: Mapping[str, Any] | None = None
    is_asking: bool = False
    avoid: tuple[str, ...] = ()
    begun: Begun = field(default_factory=Begun)

    def again(self, outputs: Sequence[list[Any]], spent: float, lost: str | None) -> "Call":
        """The same, to be asked of another replica than the one that was `lost`, after these tokens and seconds."""
        avoid = self.avoid if lost is None else (*self.avoid, lost)
        return replace(self, avoid=avoid, begun=replace(self.begun, outputs=tuple(outputs), spent=spent))


@dataclass(frozen=True)
class Whole:
    """A whole answer, of one replica."""

    replica: str
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Lost(QhubError):
    """A replica ended while it answered, or before; `replica` is its name, if that is known."""

    def __init__(self, message: str, replica: str | None = None) -> None:
        super().__init__(message)
        self.replica = replica


class Engines(Protocol):
    """All replicas, as the gateway sees them."""

    def answer(self, call: Call) -> AsyncIterator[Sequence[Message]]:
        """The messages of an answer, as they come. Raises Lost when its replica ends, Busy when too many wait."""
        ...

    async def answers(self, call: Call) -> list[Whole]:
        """The whole answer of each replica that gives one in time."""
        ...
