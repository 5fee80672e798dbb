"""Who makes a change, for the records of it: a claim on one's own disk, the API key over HTTP.

key:3f9c21aa      a request with this key; the console's sessions are those of a key, too
http:127.0.0.1    a request to a server that needs no key, from this address
build-bot         the value of QHUB_ACTOR
ada@laptop        else the user and the machine

Nobody proves to their own disk who they are: whoever may write a home may write any name. What a server wrote there is
the key it was shown.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from adapterhub_local.errors import InputError
from adapterhub_local.settings import claimed_actor, user_name

MAX_LENGTH = 128
_ACTOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@/+=-]*")
_current: ContextVar[str | None] = ContextVar("actor", default=None)


def current_actor() -> str:
    """Who makes the change that runs now. Raises InputError if QHUB_ACTOR is not a name."""
    if (acting := _current.get()) is not None:
        return acting
    if (claimed := claimed_actor()) is not None:
        return check_actor(claimed, "QHUB_ACTOR is")
    return named(f"{user_name()}@{socket.gethostname()}")


@contextmanager
def acting_as(actor: str) -> Iterator[None]:
    """Have the block, and the threads and tasks that are given its context, act as `actor`."""
    token = _current.set(check_actor(actor))
    try:
        yield
    finally:
        _current.reset(token)


def check_actor(text: str, what: str = "an actor is") -> str:
    """`text`, if it may stand in a record. Raises InputError."""
    if len(text) > MAX_LENGTH or not _ACTOR.fullmatch(text):
        shown = text.encode("unicode_escape").decode()[:80]
        raise InputError(f"{what} '{shown}': use letters, digits and . _ : @ / + = -, up to {MAX_LENGTH}")
    return text


def named(text: str) -> str:
    """What another system calls somebody, as an actor: characters that an actor has not become _."""
    cleaned = re.sub(r"[^A-Za-z0-9._:@/+=-]", "_", text)[:MAX_LENGTH]
    return cleaned if _ACTOR.fullmatch(cleaned) else f"_{cleaned}"[:MAX_LENGTH]
