"""Follow: a home becomes what a remote says, keeps on when it is away, and brings only what somebody asks for."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub_local.errors import BadFile, Incompatible, NotFound, RemoteError
from adapterhub_local.keys import Keys
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_log import Log, open_log
from adapterhub_local.registry.remote_moves import move_alias, publish_key, revoke_key, set_split
from adapterhub_local.registry.split import split_of
from adapterhub_local.registry.store import Store, open_store
from serve import follow as module
from serve.follow import Follower
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files, weights


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until something holds, which another thread brings about."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def publish(store: Store, name: str = "a", count: int = 1, seed: int = 0) -> Log:
    """The log of the remote, to which this test's home has sent some versions."""
    registry = Registry()
    push(registry, store, [registry.publish(name, files(seed + index), LINEAGE) for index in range(count)])
    return open_log(store)


@contextmanager
def following(registry: Registry, store: Store, fits: Callable[[Version], None] = lambda _: None) -> Iterator[Follower]:
    """A follower that runs."""
    follower = Follower(registry, store.remote, fits, interval=0.02)
    follower.begin()
    follower.start()
    try:
        yield follower
    finally:
        follower.stop()


def digest(registry: Registry, reference: str) -> str:
    return registry.resolve(reference).content_digest


def test_what_is_asked_for_is_brought_and_followed(store: Store, tmp_path: Path) -> None:
    """A name comes when it is asked for, with aliases and split; from then on every move counts here soon."""
    mine, theirs = Registry(), Registry(tmp_path / "theirs")
    log = publish(store, count=3)
    publish(store, "b")
    move_alias(log, "a", "prod", 1)
    move_alias(log, "a", "canary", 2)
    set_split(log, "a", [("canary", 10), ("prod", 90)])
    with following(theirs, store) as follower:
        assert theirs.names() == []
        assert follower.is_new(["a"])
        follower.bring(["a"])
        assert not follower.is_new(["a"])
        assert [version.number for version in theirs.versions()] == [1, 2, 3]
        assert theirs.aliases("a") == {"canary": 2, "prod": 1}
        assert split_of(theirs, "a") == [("canary", 10), ("prod", 90)]
        newer = mine.publish("a", files(9), LINEAGE)
        push(mine, store, [newer])
        move_alias(log, "a", "prod", 4, expect=1)
        wait_until(lambda: theirs.aliases("a")["prod"] == 4)
        assert digest(theirs, "a@prod") == digest(theirs, "a") == newer.content_digest
        set_split(log, "a", [])
        move_alias(log, "a", "canary", None)
        wait_until(lambda: theirs.aliases("a") == {"prod": 4})
        assert split_of(theirs, "a") == []
        assert theirs.names() == ["a"]
        assert not follower.fetch([Reference.parse("a@prod")])
        assert not follower.fetch([Reference.parse("nobody"), Reference.parse("b@7"), Reference.parse("b@prod")])
        assert theirs.names() == ["a"]


def test_old_versions_come_one_by_one(folder_store: Store, tmp_path: Path) -> None:
    """A number, or a digest, that nothing points to is fetched when it is asked for, and not before."""
    theirs = Registry(tmp_path / "theirs")
    publish(folder_store, count=4)
    with following(theirs, folder_store) as follower:
        follower.bring(["a"])
        assert [version.number for version in theirs.versions()] == [4]
        assert follower.fetch([Reference.parse("a@2")])
        assert follower.fetch([Reference("a", digest=Registry().resolve("a@1").manifest_digest[:30])])
        assert [version.number for version in theirs.versions()] == [1, 2, 4]


def test_many_who_ask_at_once_fetch_once(folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests wait for a cold name, its version is fetched once, and all find it."""
    theirs = Registry(tmp_path / "theirs")
    publish(folder_store)
    real, pulls = module.pull, []

    def pull(*arguments, **named):
        pulls.append(arguments)
        time.sleep(0.1)
        return real(*arguments, **named)

    monkeypatch.setattr(module, "pull", pull)
    with following(theirs, folder_store) as follower:
        threads = [threading.Thread(target=follower.bring, args=(["a"],)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(pulls) == 1
        assert digest(theirs, "a") == digest(Registry(), "a")


def test_several_that_follow_into_one_home_fetch_once(
    folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the processes of one home that want a version, each with a follower of its own, one fetches it."""
    theirs = Registry(tmp_path / "theirs")
    log = publish(folder_store)
    real, pulls = module.pull, []

    def pull(*arguments, **named):
        pulls.append(arguments)
        time.sleep(0.1)
        return real(*arguments, **named)

    monkeypatch.setattr(module, "pull", pull)
    with following(theirs, folder_store) as first, following(theirs, folder_store) as second:
        threads = [threading.Thread(target=each.bring, args=(["a"],)) for each in (first, second, first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(pulls) == 1
        push(Registry(), folder_store, [Registry().publish("a", files(7), LINEAGE)])
        move_alias(log, "a", "prod", 2)
        wait_until(lambda: theirs.aliases("a") == {"prod": 2})
        assert len(pulls) == 2


def test_keys_count_without_being_asked_for(store: Store, tmp_path: Path) -> None:
    """Keys are there before the server listens; one that is published or revoked later counts soon."""
    theirs, keys = Registry(tmp_path / "theirs"), Keys(Registry().home)
    log = publish(store)
    (first, token), (second, other) = keys.create(), keys.create(rate="9/min")
    publish_key(log, first)
    found = Keys(theirs.home)
    with following(theirs, store):
        assert found.find(token) == first
        publish_key(log, second)
        wait_until(lambda: found.find(other) == second)
        revoke_key(log, first.id)
        wait_until(lambda: found.find(token) is None)
        assert found.find(other) == second


def test_what_cannot_be_served_is_refused_with_its_reason(folder_store: Store, tmp_path: Path, caplog) -> None:
    """A foreign base and a damaged adapter are refused by `fetch` with the reason; what was here before goes on."""
    mine, theirs = Registry(), Registry(tmp_path / "theirs")
    log = publish(folder_store)
    move_alias(log, "a", "prod", 1)
    foreign = mine.publish("a", files(5), {**LINEAGE, "base": {"name": "other", "fingerprint": "sha256:" + "1" * 64}})
    broken = mine.publish("b", {**files(), "adapter_model.safetensors": weights(b"\xff\xff\xff\x7f" * 4)}, LINEAGE)

    def fits(version: Version) -> None:
        if version.base_fingerprint != LINEAGE["base"]["fingerprint"]:
            raise Incompatible(f"'{version}' was made for another base")

    with following(theirs, folder_store, fits) as follower:
        follower.bring(["a"])
        push(mine, folder_store, [foreign, broken])
        move_alias(log, "a", "prod", foreign.number)
        log.catch_up()
        wait_until(lambda: "a@2" in follower.state()["refused"] and follower.state()["records"] == log.last)
        assert theirs.aliases("a") == {"prod": 1}
        with pytest.raises(Incompatible, match="another base"):
            follower.fetch([Reference.parse("a@2")])
        follower.bring(["b"])
        for _ in range(2):
            with pytest.raises(BadFile, match="has NaN or infinity"):
                follower.fetch([Reference.parse("b")])
        assert theirs.names() == ["a"]
        assert set(follower.state()["refused"]) == {"a@2", "b@1"}
    said = next(record.message for record in caplog.records if "b@1" in record.message)
    assert said.startswith("b@1 of team is not taken")


def test_what_is_here_goes_on_while_the_remote_is_away(folder_store: Store, tmp_path: Path, caplog) -> None:
    """A remote that goes away is said once, and once that it is back; names here are answered, others are a reason."""
    theirs = Registry(tmp_path / "theirs")
    log = publish(folder_store)
    move_alias(log, "a", "prod", 1)
    folder = Path(folder_store.url)
    with following(theirs, folder_store) as follower:
        follower.bring(["a"])
        folder.rename(tmp_path / "gone")
        wait_until(lambda: follower.is_away)
        time.sleep(0.1)
        assert follower.state()["state"] == "away"
        assert digest(theirs, "a@prod") == digest(Registry(), "a@1")
        with pytest.raises(RemoteError, match="'b' is not here, and remote 'team' does not answer"):
            follower.fetch([Reference.parse("b")])
        (tmp_path / "gone").rename(folder)
        wait_until(lambda: not follower.is_away)
        publish(folder_store, "b")
        wait_until(lambda: follower.fetch([Reference.parse("b")]))
        assert follower.state()["reason"] is None
    said = [(record.levelname, record.message) for record in caplog.records if record.name == "serve.follow"]
    assert [level for level, _ in said] == ["ERROR", "WARNING"], said


def test_a_start_without_the_remote(folder_store: Store, tmp_path: Path) -> None:
    """A home that never followed it does not start without it; one that has goes on, and follows when it is back."""
    log = publish(folder_store)
    move_alias(log, "a", "prod", 1)
    theirs, folder = Registry(tmp_path / "theirs"), Path(folder_store.url)
    with following(theirs, folder_store) as follower:
        follower.bring(["a"])
    folder.rename(tmp_path / "gone")
    with pytest.raises(NotFound, match="is its disk mounted"):
        Follower(Registry(tmp_path / "new"), folder_store.remote).begin()
    with following(theirs, folder_store) as follower:
        assert follower.is_away
        assert not follower.is_new(["a"])
        (tmp_path / "gone").rename(folder)
        push(Registry(), folder_store, [Registry().publish("a", files(7), LINEAGE)])
        move_alias(log, "a", "prod", 2)
        wait_until(lambda: theirs.aliases("a") == {"prod": 2})


def test_an_emptied_remote_is_away_too(folder_store: Store, tmp_path: Path) -> None:
    """A remote that has lost what it had opens nothing: what was known of it goes on, keys included."""
    log = publish(folder_store)
    publish_key(log, Keys(Registry().home).create()[0])
    theirs = Registry(tmp_path / "theirs")
    folder = Path(folder_store.url)
    with following(theirs, folder_store) as follower:
        folder.rename(tmp_path / "gone")
        folder.mkdir()
        wait_until(lambda: follower.is_away)
    with following(theirs, folder_store) as follower:
        assert "has lost what it had" in follower.state()["reason"]
        assert len(Keys(theirs.home).all()) == 1


def test_the_home_may_be_lost(folder_store: Store, tmp_path: Path) -> None:
    """A new, empty home that follows is what the lost one was."""
    log = publish(folder_store, count=2)
    move_alias(log, "a", "prod", 1)
    key, token = Keys(Registry().home).create()
    publish_key(log, key)
    for name in ("first", "second"):
        theirs = Registry(tmp_path / name)
        with following(theirs, folder_store) as follower:
            follower.bring(["a"])
            assert (digest(theirs, "a@prod"), theirs.aliases("a")) == (digest(Registry(), "a@1"), {"prod": 1})
            assert Keys(theirs.home).find(token) == key


def test_what_was_moved_here_is_put_back(
    folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An alias of the remote that is moved in a following home is put back and named; one of this home alone stays."""
    monkeypatch.setattr(module, "ALL_AGAIN", 0.05)
    log = publish(folder_store, count=2)
    move_alias(log, "a", "prod", 1)
    theirs = Registry(tmp_path / "theirs")
    with following(theirs, folder_store) as follower:
        follower.bring(["a"])
        theirs.set_alias("a", "mine", 2)
        for times in (1, 2):  # the second time as the first
            theirs.set_alias("a", "prod", 2)
            wait_until(lambda: theirs.aliases("a") == {"mine": 2, "prod": 1})
            told = "alias a@prod was moved here and is put back to what remote team says (1)"
            wait_until(lambda times=times, told=told: caplog.text.count(told) == times)


def test_versions_that_were_sent_without_a_log(folder_store: Store, tmp_path: Path) -> None:
    """A remote of before there were logs is followed: its versions come when they are asked for."""
    publish(folder_store, count=2)
    for path in folder_store.names("records", deep=True):
        folder_store.remove(f"records/{path}")
    theirs = Registry(tmp_path / "theirs")
    with following(theirs, folder_store) as follower:
        follower.bring(["a"])
        assert digest(theirs, "a") == digest(Registry(), "a@2")
        assert follower.fetch([Reference.parse("a@1")])


def test_a_look_costs_no_more_when_there_is_more(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is said, a look asks for one record, and whether the remote is there, however long the log is."""
    log = publish(store, count=2)
    for number in (1, 2, 1, 2):
        move_alias(log, "a", "prod", number)
    follower = Follower(Registry(tmp_path / "theirs"), store.remote)
    follower.begin()
    asked: list[str] = []
    real_read, real_size, real_names = Store.read, Store.size, Store.names
    monkeypatch.setattr(Store, "read", lambda self, path, limit: asked.append(path) or real_read(self, path, limit))
    monkeypatch.setattr(Store, "size", lambda self, path: asked.append(path) or real_size(self, path))
    monkeypatch.setattr(Store, "names", lambda self, *a, **k: asked.append("list") or real_names(self, *a, **k))
    follower._look()
    assert asked == [f"records/@{log.last + 1}", "qhub-remote.json"]
    follower.stop()
    assert open_store(store.remote).url == store.url
