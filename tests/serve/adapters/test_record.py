"""One record for each content: what it says in every state, who holds it, and that it is forgotten."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import Incompatible
from serve.adapters import record as records_module
from serve.adapters.pool import AdapterPool, Hold
from serve.adapters.reader import AdapterReader
from serve.adapters.record import Label, State
from serve.adapters.source import Folder
from serve.errors import BadParameter, Busy

FACTORS = {"q": (torch.ones(4, 2), torch.ones(2, 4))}  # 64 bytes


class Reader(AdapterReader):
    """Reads no file: a source's content is its name."""

    before: Callable[[], None] = staticmethod(lambda: None)

    def read(self, source: Folder) -> dict:
        self.before()
        if source.name == "bad":
            raise Incompatible("bad")
        return FACTORS


def make_pool(max_bytes: int = 1000) -> AdapterPool:
    """A pool with two slots at most for what is pinned."""
    reader = Reader(BaseInfo.__new__(BaseInfo), {}, {}.__getitem__, torch.float32)
    return AdapterPool(reader, max_bytes=max_bytes, max_pins=1)


def source(name: str, content: str | None = None) -> Folder:
    """An adapter of this name and content."""
    found = Folder(name, 1, "2026-01-01T00:00:00Z", None, ())
    vars(found)["content_digest"] = content or name
    return found


def states(pool: AdapterPool) -> dict[str, State]:
    """What is shown of each content."""
    return {status.digest: status.state for status in pool.status({})}


def test_every_state_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading while it is read, then ready, draining while that is waited for, and absent once it left memory."""
    pool, seen = make_pool(), []
    monkeypatch.setattr(Reader, "before", staticmethod(lambda: seen.append(states(pool))))
    assert pool.acquire(source("a"), is_request=True) == Hold("a", was_read=True)
    assert seen == [{"a": State.LOADING}]
    assert pool.acquire(source("a"), is_request=True) == Hold("a", was_read=False)
    assert states(pool) == {"a": State.READY}
    with pool.draining("a"):
        assert states(pool) == {"a": State.DRAINING}
    assert pool.drop("a") == 0, "it is held"
    pool.release("a")
    pool.release("a")
    assert pool.drop("a") == 64
    (status,) = pool.status({"a": 3})
    assert (status.state, status.num_requests, status.num_running, status.num_bytes) == (State.ABSENT, 2, 3, 0)
    assert status.label == Label("a@1", ("a",))
    assert status.last_used is not None


def test_what_was_never_used_leaves_no_record() -> None:
    """A load that failed, one that was never asked by a request, and a draining of nothing leave nothing behind."""
    pool = make_pool()
    with pytest.raises(Incompatible):
        pool.acquire(source("bad"), is_request=True)
    with pool.draining("nothing"):
        pass
    pool.release(pool.acquire(source("a")).digest)
    pool.drop("a")
    assert pool.records.all() == []
    assert (pool.num_bytes, len(pool)) == (0, 0)


def test_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adapters that left memory only so many are remembered, the latest; what is held stays, however old."""
    monkeypatch.setattr(records_module, "MAX_REMEMBERED", 3)
    pool = make_pool(max_bytes=2 * 64)
    pool.acquire(source("held"), is_request=True)
    for number in range(10):
        pool.release(pool.acquire(source(f"a{number}"), is_request=True).digest)
    assert {record.digest for record in pool.records.all()} == {"held", "a8", "a9"}
    assert (pool.num_loads, pool.num_evictions, pool.num_bytes) == (11, 9, 128)


@pytest.mark.parametrize("again", [False, True])
def test_a_name_has_one_hold(again: bool) -> None:
    """However often a name is given the same content it holds it once, pinned as it was said last; so does another."""
    pool = make_pool()
    for pinned in (True, False, True) if again else (True,):
        pool.keep(pool.acquire(source("a")).digest, "x", pinned=pinned)
    pool.keep(pool.acquire(source("b", "a")).digest, "y", pinned=False)
    assert (pool.users(), pool.pinned) == ({"a": 2}, {"a"})
    (status,) = pool.status({})
    assert (status.is_held, status.is_pinned, status.label.text) == (True, True, "x")
    pool.unkeep("a", "x")
    assert (pool.users(), pool.pinned) == ({"a": 1}, frozenset())
    pool.unkeep("a", "y")
    assert pool.users() == {"a": 0}
    assert dataclasses.replace(status, is_held=False, is_pinned=False, label=Label("a@1", ("a",))) in pool.status({})


def test_a_refused_name_leaves_the_hold_to_its_owner() -> None:
    """Too many pins, or too much held for good, are refused, and what was held before stays as it was."""
    pool = make_pool(max_bytes=4 * 64)
    pool.keep(pool.acquire(source("a")).digest, "x", pinned=True)
    pool.acquire(source("b"))
    with pytest.raises(BadParameter, match="'y' cannot be pinned: 1 are, of 2 slots"):
        pool.keep("b", "y", pinned=True)
    pool.keep("b", "y", pinned=False)
    pool.acquire(source("c"))
    with pytest.raises(Busy, match="more than half"):
        pool.keep("c", "z", pinned=False)
    pool.release("c")
    assert (pool.users(), pool.pinned) == ({"a": 1, "b": 1, "c": 0}, {"a"})
