"""The log of a remote: aliases, splits, tags, evaluations and keys on which several homes agree."""

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import Corrupt, InUse, NotFound
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry import remote_log as module
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.marks import add_tags, alias_log, remove_tags, rollback, tags_of
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_layout import prepare
from adapterhub_local.registry.remote_log import Log, open_log
from adapterhub_local.registry.remote_marks import take_keys, take_marks
from adapterhub_local.registry.remote_moves import (
    aliases_at,
    move_alias,
    number_of,
    publish_key,
    revoke_key,
    set_split,
    split_at,
)
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.registry.split import split_of
from adapterhub_local.registry.store import Store, open_store
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files
from tests.synced import named

SCORES = {"adapter": {"exact_match": 0.5, "loss": 1.0, "rows": 2}}


def run(*arguments: str) -> Result:
    """A command; what it raises is in the result."""
    return CliRunner().invoke(qhub, list(arguments))


def pushed(store: Store, count: int = 2, name: str = "a") -> Log:
    """The log of a remote that has some versions of a name, from this home."""
    registry = Registry()
    push(registry, store, [registry.publish(name, files(index), LINEAGE) for index in range(count)])
    return open_log(store)


def test_an_alias_moves_in_every_home(store: Store, tmp_path: Path) -> None:
    """What one home says another one hears: alias, split, tag and evaluation, with who said it; again it is no news."""
    mine, theirs = Registry(), Registry(tmp_path / "theirs")
    log = pushed(store)
    move_alias(log, "a", "prod", 1)
    add_tags(mine, mine.resolve("a@2"), ("reviewed",))
    mine.add_evaluation(mine.resolve("a@2"), "task", SCORES)
    push(mine, store, [mine.resolve("a@2")])
    move_alias(log, "a", "canary", 2)
    set_split(log, "a", [("canary", 10), ("prod", 90)])
    assert mine.aliases("a") == {}

    for number in (1, 2):
        pull(theirs, store, named(f"a@{number}"))
    taken = take_marks(theirs, open_log(store), "a")
    assert [(one.kind, one.before, one.now, one.reason) for one in taken] == [
        ("alias", None, 1, None),
        ("alias", None, 2, None),
        ("split", {}, {"canary": 10, "prod": 90}, None),
        ("tag", None, "reviewed", None),
        ("evaluation", None, "task", None),
    ]
    assert all("@" in one.by and one.at.endswith("Z") for one in taken)
    assert theirs.aliases("a") == {"canary": 2, "prod": 1}
    assert split_of(theirs, "a") == [("canary", 10), ("prod", 90)]
    assert tags_of(theirs, theirs.resolve("a@2")) == ["reviewed"]
    assert theirs.metrics(theirs.resolve("a@2")) == {"task": SCORES}
    assert take_marks(theirs, open_log(store), "a") == []

    log.catch_up()
    before = log.last
    push(theirs, store, theirs.versions("a"))
    log.catch_up()
    assert log.last == before
    move_alias(log, "a", "prod", 2)
    rollback_to = [one.now for one in take_marks(theirs, open_log(store), "a")]
    assert rollback_to == [2]
    assert rollback(theirs, "a", "prod") == 1
    assert [move["action"] for move in alias_log(theirs, "a", "prod")] == ["pulled", "pulled", "rollback"]
    assert fsck(theirs).is_clean


def test_what_the_remote_never_heard_of_stays(folder_store: Store, tmp_path: Path) -> None:
    """An alias, a tag and a split of this home alone stay; what the remote has a record of becomes what it says."""
    theirs = Registry(tmp_path / "theirs")
    log = pushed(folder_store)
    for number in (1, 2):
        pull(theirs, folder_store, named(f"a@{number}"))
    theirs.set_alias("a", "mine", 1)
    theirs.set_alias("a", "prod", 2)
    move_alias(log, "a", "prod", 1)
    move_alias(log, "a", "old", 1)
    take_marks(theirs, log, "a")
    assert theirs.aliases("a") == {"mine": 1, "old": 1, "prod": 1}
    move_alias(log, "a", "old", None)
    assert [(one.subject, one.before, one.now) for one in take_marks(theirs, log, "a")] == [("a@old", 1, None)]
    assert theirs.aliases("a") == {"mine": 1, "prod": 1}


def test_an_alias_of_a_version_that_is_elsewhere_another(folder_store: Store, tmp_path: Path) -> None:
    """Numbers differ between homes, contents do not: an alias is set to the version, whatever it is called here."""
    theirs = Registry(tmp_path / "theirs")
    theirs.publish("a", files(9), LINEAGE)
    log = pushed(folder_store, 1)
    move_alias(log, "a", "prod", 1)
    (left,) = take_marks(theirs, log, "a")
    assert (left.now, left.reason) == (None, "a@1 is not here")
    assert theirs.aliases("a") == {}
    pull(theirs, folder_store, named("a@prod"))
    take_marks(theirs, log, "a")
    assert theirs.aliases("a") == {"prod": 2}
    assert theirs.resolve("a@prod").content_digest == Registry().resolve("a@1").content_digest


def test_a_tag_that_was_taken_away_does_not_come_back_by_a_push(folder_store: Store, tmp_path: Path) -> None:
    """Whoever still has a tag that the remote says was taken away does not give it again by pushing."""
    from adapterhub_local.registry.remote_moves import set_tag

    mine = Registry()
    version = mine.publish("a", files(), LINEAGE)
    add_tags(mine, version, ("draft",))
    push(mine, folder_store, [version])
    log = open_log(folder_store)
    set_tag(log, "a", 1, "draft", is_set=False)
    push(mine, folder_store, [version])
    assert log.get("tag", "a", 1, "draft").fields["is_set"] is False
    take_marks(mine, log, "a")
    assert tags_of(mine, version) == []
    with pytest.raises(NotFound):
        remove_tags(mine, version, ("draft",))


def test_writers_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many who move one alias at once each get a number of their own, and each record says what it truly replaced."""
    pushed(store, 8)
    barrier, lock = threading.Barrier(8, timeout=PATIENCE), threading.Lock()
    real, waited = Store.create, set()

    def create(self: Store, path: str, data: bytes) -> bool:
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            barrier.wait()
        if self.remote.folder is not None:
            return real(self, path, data)
        with lock:  # the server in these tests looks and writes in two steps
            return real(self, path, data)

    monkeypatch.setattr(Store, "create", create)
    told = []

    def work(number: int) -> None:
        told.append(move_alias(Log(open_store(store.remote)), "a", "prod", number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
    moves = [one for one in open_log(store).every() if one.kind == "alias"]
    assert len(moves) == len(told) == 8
    assert [one.fields["old"] for one in moves] == [None, *(one.fields["number"] for one in moves[:-1])]
    assert sorted((one.before or 0, one.now) for one in told) == sorted(
        (one.fields["old"] or 0, one.fields["number"]) for one in moves
    )


def test_compare_and_set_at_the_remote(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several who expect the same, one moves the alias; the others learn where it is, and change nothing."""
    log = pushed(store, 3)
    move_alias(log, "a", "prod", 1, expect=0)
    other = open_log(store)
    move_alias(log, "a", "prod", 2, expect=1)
    last = log.last
    with pytest.raises(InUse, match=r"a@prod points to 2 at remote 'team', not to 1: nothing was changed"):
        move_alias(other, "a", "prod", 3, expect=1)
    assert not move_alias(other, "a", "prod", 2).is_new
    with pytest.raises(NotFound, match="push it first"):
        move_alias(other, "a", "prod", 9)
    with pytest.raises(NotFound, match="no alias a@nothing"):
        set_split(other, "a", [("prod", 1), ("nothing", 1)])
    set_split(other, "a", [("prod", 1)])
    with pytest.raises(InUse, match="traffic"):
        move_alias(other, "a", "prod", None)
    assert open_log(store).last == last + 1


def test_keys_are_known_by_their_hashes(store: Store, tmp_path: Path) -> None:
    """A published key opens another home's server; revoked there, or here, it opens none, and never again."""
    mine = Keys(Registry().home)
    theirs = Keys(Registry(tmp_path / "theirs").home)
    key, token = mine.create(scopes=("infer",), adapters=("sql*",), rate="9/min", priority="high")
    log = pushed(store, 1)
    assert publish_key(log, key).is_new
    assert not publish_key(open_log(store), key).is_new
    text = b"".join(store.read(f"records/{path}", 1 << 20) for path in store.names("records"))
    assert token[-20:].encode() not in text
    taken = take_keys(theirs, open_log(store))
    assert [(one.subject, one.before, one.now) for one in taken] == [(key.id, None, "valid")]
    assert theirs.find(token) == key
    assert take_keys(theirs, open_log(store)) == []
    revoke_key(open_log(store), key.id)
    for keys in (theirs, mine):
        assert [one.now for one in take_keys(keys, open_log(store))] == ["revoked"]
        assert keys.find(token) is None
    with pytest.raises(InUse, match="cannot be taken back"):
        publish_key(open_log(store), key)
    with pytest.raises(NotFound):
        revoke_key(open_log(store), "00000000")


def test_a_key_that_is_another_here_stays(folder_store: Store, tmp_path: Path) -> None:
    """Two keys with one id: the one that is here is not changed, nor revoked, and the other is named."""
    theirs = Keys(Registry(tmp_path / "theirs").home)
    key, _ = Keys(Registry().home).create()
    _, token = theirs.create()
    theirs.path.write_text(theirs.path.read_text().replace(token.split("-")[1], key.id))
    log = pushed(folder_store, 1)
    publish_key(log, key)
    revoke_key(log, key.id)
    (left,) = take_keys(theirs, log)
    assert left.reason.startswith("another key has this id here")
    assert [one.is_valid() for one in theirs.all()] == [True]


def test_what_counts_is_kept_so_that_not_all_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log with many records is known from the newest of its summaries and what came after it, and is the same."""
    monkeypatch.setattr(module, "KEEP_EVERY", 5)
    log = pushed(store, 2)
    for index in range(12):
        move_alias(log, "a", "prod", index % 2 + 1)
    assert store.names("records/at") == ["@10", "@5"]
    read: list[str] = []
    real = Store.read
    monkeypatch.setattr(Store, "read", lambda self, path, limit: read.append(path) or real(self, path, limit))
    fresh = open_log(store)
    assert (fresh.last, fresh.all("alias"), fresh.all("version")) == (log.last, log.all("alias"), log.all("version"))
    assert sorted(path for path in read if path.startswith("records/@")) == [f"records/@{n}" for n in range(11, 16)]
    assert len(list(fresh.every())) == log.last


def test_a_record_that_is_gone_is_noticed(folder_store: Store) -> None:
    """A record that was deleted is an error, not the end of the log: nobody takes its number again."""
    log = pushed(folder_store, 2)
    move_alias(log, "a", "prod", 1)
    folder_store.remove("records/@2")
    with pytest.raises(Corrupt, match="records/@2 is gone"):
        open_log(folder_store)
    with pytest.raises(Corrupt, match="records/@2 is gone"):
        move_alias(Log(folder_store), "a", "prod", 2)


HOSTILE = [
    b"", b"null", b"[]", b"{", b"[" * 20_000, b'{"kind": "alias"}', b"\xff", b"x" * 100_000,
    b'{"kind": ["alias"], "by": "a@b", "at": "2026-01-01T00:00:00Z"}',
    b'{"kind": "dance", "by": "a@b", "at": "2026-01-01T00:00:00Z"}',
]  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE)
def test_what_cannot_be_believed_is_passed_over_and_named(folder_store: Store, raw: bytes) -> None:
    """A record that is none of ours keeps its number and changes nothing; those after it count."""
    log = pushed(folder_store, 1)
    assert folder_store.create(f"records/@{log.last + 1}", raw)
    move_alias(log, "a", "prod", 1)
    fresh = open_log(folder_store)
    assert number_of(fresh, "a", "prod") == 1
    assert list(fresh.unread) == [log.last - 1]
    assert len(list(fresh.every())) == log.last - 1


def test_verbs(folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`qhub sync` moves aliases and splits, pulls, shows and logs them; each says what was there before, and who."""
    monkeypatch.setenv("QHUB_ACTOR", "build-bot")
    registry = Registry()
    for seed in range(2):
        registry.publish("a", files(seed), LINEAGE)
    first = run("sync", "push", "team", "a@1", "--alias", "prod")
    assert first.exit_code == 0, first.output
    assert "team a@prod: nothing -> 1" in first.stdout
    moved = json.loads(run("sync", "push", "team", "a", "--alias", "prod", "--expect", "1", "--json").stdout)
    assert moved["changes"] == [{"subject": "a@prod", "before": 1, "now": 2, "is_new": True}]
    assert isinstance(run("sync", "push", "team", "a", "--alias", "prod", "--expect", "1").exception, InUse)
    assert "a: not split -> prod=1" in run("sync", "push", "team", "a", "--split", "prod=1").stdout
    log = json.loads(run("sync", "log", "team", "a", "--json").stdout)
    assert [(one["kind"], one["by"]) for one in log] == [
        (kind, "build-bot") for kind in ("version", "alias", "version", "alias", "split")
    ]
    monkeypatch.setenv("QHUB_HOME", str(tmp_path / "theirs"))
    assert run("remote", "add", "team", folder_store.url).exit_code == 0
    status = json.loads(run("sync", "status", "team", "--json").stdout)
    shown = {one["reference"]: (one["there"], one["here"], one["state"]) for one in status["entries"]}
    assert shown == {"a": (2, None, "not here"), "a@prod": (2, None, "not here"), "a (split)": ("prod=1", "", "other")}
    refused = run("sync", "pull", "team", "a@prod", "--expect", "7")
    assert str(refused.exception) == "a@prod points to nothing here, not to 7: nothing was changed"
    pulled = run("sync", "pull", "team", "a@prod", "--expect", "0")
    assert "alias a@prod: nothing -> 2, by build-bot at " in pulled.stdout
    assert Registry().aliases("a") == {"prod": 2}
    status = json.loads(run("sync", "status", "team", "a", "--json").stdout)
    assert {one["state"] for one in status["entries"]} == {"same"}
    assert run("sync", "status", "team").exit_code == 0
    assert "build-bot" in run("sync", "log", "team").stdout


def test_verbs_of_keys(folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`qhub key publish` and `revoke --remote` work from any home; a pull brings keys only if it is asked to."""
    push(Registry(), folder_store, [Registry().publish("a", files(), LINEAGE)])
    token = run("key", "create").stdout.strip()
    identity = token.split("-")[1]
    assert isinstance(run("key", "publish", "team", "00000000").exception, NotFound)
    assert run("key", "publish", "team", token).stdout == f"team has {identity}\n"
    assert json.loads(run("key", "publish", "team", identity, "--json").stdout)[0]["is_new"] is False
    assert "still accepted there: add --remote" in run("key", "revoke", run("key", "create").stdout.strip()).stderr
    monkeypatch.setenv("QHUB_HOME", str(tmp_path / "theirs"))
    assert run("remote", "add", "team", folder_store.url).exit_code == 0
    assert run("sync", "pull", "team", "a").exit_code == 0
    assert Keys(Registry().home).all() == []
    assert f"key {identity}: nothing -> valid" in run("sync", "pull", "team", "a", "--keys").stdout
    assert Keys(Registry().home).find(token)
    assert json.loads(run("sync", "status", "team", "--json").stdout)["keys"] == 1
    monkeypatch.setenv("QHUB_HOME", str(tmp_path / "third"))
    assert run("remote", "add", "team", folder_store.url).exit_code == 0
    assert run("key", "revoke", identity, "--remote", "team").stdout == f"revoked {identity} at team\n"
    listed = run("sync", "log", "team", "--json").stdout
    assert "digest" not in json.dumps([one for one in json.loads(listed) if one["kind"] == "key"])
    assert token.split("-", 2)[2] not in listed


def test_pull_brings_what_the_aliases_point_to(folder_store: Store, tmp_path: Path, monkeypatch) -> None:
    """`sync pull NAME` fetches the newest version and what the remote's aliases point to; --no-aliases only that."""
    log = pushed(folder_store, 4)
    move_alias(log, "a", "prod", 2)
    monkeypatch.setenv("QHUB_HOME", str(tmp_path / "theirs"))
    add_remote(Registry().home, "team", folder_store.url)
    assert run("sync", "pull", "team", "a", "--no-aliases").exit_code == 0
    assert (len(Registry().versions("a")), Registry().aliases("a")) == (1, {})
    assert run("sync", "pull", "team", "a").exit_code == 0
    assert ([one.number for one in Registry().versions("a")], Registry().aliases("a")) == ([2, 4], {"prod": 2})


def test_a_new_remote_has_a_log_without_records(store: Store) -> None:
    """Nothing is there, and looking does not write."""
    log = open_log(store)
    assert (log.last, aliases_at(log), split_at(log, "a")) == (0, [], [])
    assert store.names("", deep=True) == []
    prepare(store)
    assert open_log(store).last == 0
