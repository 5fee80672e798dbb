"""A database deleted, emptied, cut or brought back from an older backup: every verb says so, and it is repaired."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub_local.cli.main import run
from adapterhub_local.errors import Corrupt, NotFound, QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.found import Record
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect, remove
from adapterhub_local.registry.journal import in_order
from adapterhub_local.registry.marks import add_tags, alias_log, tags_of
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.registry.split import set_split, split_of
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, backup, blob_paths, drop, files, small_store

VERBS = (
    "list", "show a", "show a@3", "list a", "path a@1", "alias list a", "alias set a prod 2", "alias rollback a prod",
    "tag a@1 x", "describe a@1 text", "rm a@2", "gc", "gc --apply --grace 0", "search yes", "export a@1 --oci out.tar",
    "lineage a@1", "verify a@1", "fsck",
)  # fmt: skip


def as_by_an_older_qhub(home: Home) -> None:
    """A home as it was before there was a ledger."""
    home.ledger.unlink()
    shutil.rmtree(home.receipts)
    shutil.rmtree(home.changes)


def deleted(home: Home, older: Path) -> None:
    """The file is gone."""
    drop(home)


def emptied(home: Home, older: Path) -> None:
    """A file of no bytes is there."""
    drop(home)
    home.database.touch()


def restored(home: Home, older: Path) -> None:
    """Last night's backup is there."""
    drop(home)
    shutil.copy(older, home.database)


def without_log(home: Home, older: Path) -> None:
    """Somebody copied the one file, without the log SQLite had beside it."""
    data = home.database.read_bytes()
    drop(home)
    home.database.write_bytes(data)


def of_no_versions(home: Home, older: Path) -> None:
    """A new, empty database, such as another home's."""
    drop(home)
    other = Registry(home.root.parent / "other")
    with other.database.writing():
        pass
    other.database.close()
    with closing(sqlite3.connect(other.home.database)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(other.home.database, home.database)


STATES: list[Callable[[Home, Path], None]] = [deleted, emptied, restored, without_log, of_no_versions]


@pytest.fixture(params=STATES, ids=lambda state: state.__name__)
def broken(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> Home:
    """A home in one of those states: of a@1 to a@3, with an alias, a tag, a split and evaluations, a backup has a@1."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE, alias="prod")
    backup(home, tmp_path / "older.db")
    keep_open = sqlite3.connect(home.database)  # so that the log is not written back when a test closes its own
    keep_open.execute("SELECT count(*) FROM versions").fetchall()
    second = registry.publish("a", files(2), LINEAGE)
    registry.publish("a", files(3), LINEAGE)
    registry.set_alias("a", "prod", 3)
    add_tags(registry, second, ("good",))
    registry.add_evaluation(second, "task", {"adapter": {"exact_match": 0.5}})
    registry.add_evaluation(second, "task", {"adapter": {"exact_match": 0.75}})
    set_split(registry, "a", [("prod", 3)])
    registry.database.close()
    request.param(home, tmp_path / "older.db")
    keep_open.close()
    return home


def call(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and all that a verb printed."""
    with pytest.raises(SystemExit) as caught:
        run(line.split())
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out + captured.err


def test_every_verb_says_so(
    broken: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reading, writing, collecting and checking all fail with the reason and the way out, and nothing is changed."""
    monkeypatch.setenv("COLUMNS", "400")  # else a table breaks long paths
    monkeypatch.chdir(tmp_path)
    before = blob_paths(broken)
    for path in before:
        os.utime(path, (0, 0))
    for line in VERBS:
        code, said = call(line, capsys)
        assert code == 1, (line, said)
        assert "registry.db" in said or "does not know it" in said, (line, said)
        assert "qhub fsck" in said, (line, said)
    with pytest.raises(Corrupt, match="fsck"):
        Registry().publish("a", files(9), LINEAGE)
    with pytest.raises(Corrupt, match="fsck"):
        Registry().publish("new", files(9), LINEAGE)
    assert set(before) <= set(blob_paths(broken))


@pytest.mark.parametrize("verb", ["fsck --repair", "fsck --rebuild-db"])
def test_what_was_published_comes_back(broken: Home, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, aliases with their log, tags, splits and the newest evaluation are back; the next number is 4."""
    code, said = call(verb, capsys)
    assert code == 0, said
    assert "lost" not in said
    registry = Registry()
    assert [str(version) for version in registry.versions("a")] == ["a@1", "a@2", "a@3"]
    assert registry.aliases("a") == {"prod": 3}
    assert [move["new_number"] for move in alias_log(registry, "a")] == [1, 3]
    assert tags_of(registry, registry.resolve("a@2")) == ["good"]
    assert registry.metrics(registry.resolve("a@2"))["task"]["adapter"]["exact_match"] == 0.75
    assert split_of(registry, "a") == [("prod", 3)]
    assert registry.publish("a", files(4), LINEAGE).number == 4
    assert call("fsck", capsys)[0] == 0
    assert collect(registry, apply=True, grace=-1).num_blobs == 0


def test_what_is_gone_is_named_and_its_number_stays_taken(broken: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the newest version's manifest is gone, too, it is named as lost, with its alias; nobody gets its number."""
    manifests = [path for path in blob_paths(broken) if b'"org.qhub.version":"3"' in path.read_bytes()]
    for path in manifests:
        path.unlink()
    code, said = call("fsck --rebuild-db", capsys)
    assert code == 0, said
    assert "lost: a@3" in said
    assert "lost: alias of a@3" in said
    registry = Registry()
    assert [str(version) for version in registry.versions("a")] == ["a@1", "a@2"]
    assert registry.publish("a", files(4), LINEAGE).number == 4
    assert call("fsck", capsys)[0] == 0
    assert rebuild(registry).lost == []


def test_a_home_of_an_older_qhub(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a ledger the manifests tell: nothing is published or collected before the database knows them all."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE, alias="prod")
    backup(home, tmp_path / "older.db")
    registry.publish("a", files(2), LINEAGE)
    registry.database.close()
    as_by_an_older_qhub(home)
    restored(home, tmp_path / "older.db")
    with pytest.raises(Corrupt, match="does not know a@2"):
        Registry().publish("a", files(3), LINEAGE)
    with pytest.raises(Corrupt, match="Nothing was collected"):
        collect(Registry(), apply=True, grace=-1)
    assert [problem.kind for problem in fsck(Registry()).problems] == ["unknown"]
    assert fsck(Registry(), repair=True).is_repaired
    assert Registry().publish("a", files(3), LINEAGE).number == 3
    assert home.ledger.is_file()
    assert fsck(Registry()).is_clean
    drop(home)
    home.ledger.unlink()
    for line in ("list", "fsck", "gc"):
        code, said = call(line, capsys)
        assert code == 1, line
        assert ("registry.db" in said and "--rebuild-db" in said) or "missing" in said, said
    rebuild(Registry())
    assert len(Registry().versions("a")) == 3


def test_a_number_that_was_given_twice_by_an_older_qhub(home: Home, tmp_path: Path) -> None:
    """Both are kept: one has the number, the other gets the next one, with its evaluation, and it is said."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE)
    backup(home, tmp_path / "older.db")
    lost = registry.publish("a", files(2), LINEAGE)
    registry.add_evaluation(lost, "task", {"adapter": {"exact_match": 0.5}})
    registry.database.close()
    as_by_an_older_qhub(home)
    aside = [path for path in blob_paths(home) if b'"org.qhub.version":"2"' in path.read_bytes()]
    for path in aside:
        path.rename(tmp_path / path.name)
    restored(home, tmp_path / "older.db")
    registry = Registry()
    kept = registry.publish("a", files(3), LINEAGE)
    registry.database.close()
    as_by_an_older_qhub(home)
    for path in aside:
        (tmp_path / path.name).rename(path)
    drop(home)
    rebuilt = rebuild(Registry())
    assert rebuilt.moved == [f"a@2 ({lost.manifest_digest[:19]}) is a@3 now: there is another a@2"]
    assert rebuilt.lost == []
    registry = Registry()
    assert registry.resolve("a@2") == kept
    again = registry.resolve("a@3")
    assert again.content_digest == lost.content_digest
    assert again.lineage["imported_from"]["reference"] == "a@2"
    assert registry.metrics(again)["task"]["adapter"]["exact_match"] == 0.5
    assert fsck(registry).is_clean
    assert rebuild(registry).moved == []


def test_a_server_sees_that_the_file_was_replaced(home: Home, tmp_path: Path) -> None:
    """A registry that has the file open notices that it was deleted or restored, and that it is whole again."""
    registry = Registry()
    small_store(registry)
    backup(home, tmp_path / "older.db")
    registry.publish("a", files(8), LINEAGE)
    backup(home, tmp_path / "newer.db")
    assert registry.resolve("a").number == 3
    drop(home)
    with pytest.raises(Corrupt, match="is missing, but the home holds 4 versions"):
        registry.resolve("a")
    restored(home, tmp_path / "older.db")
    with pytest.raises(Corrupt, match="does not know a@3"):
        registry.resolve("a")
    restored(home, tmp_path / "newer.db")
    assert registry.resolve("a").number == 3


def test_a_crash_between_commit_and_ledger_loses_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that could not be appended is appended by those who publish later; a torn line spoils no other."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE)
    with monkeypatch.context() as patch:
        patch.setattr(type(registry.database.ledger), "append", lambda *_: (_ for _ in ()).throw(OSError("full")))
        registry.publish("a", files(2), LINEAGE)
    with open(home.ledger, "ab") as file:
        file.write(b"version a@7 sha256:abc")
    for seed in range(3, 40):
        registry.publish("a", files(seed), LINEAGE)
    lines, size = registry.database.ledger.read()
    assert {line.subject for line in lines if line.kind == "version"} == {f"a@{number}" for number in range(1, 40)}
    assert {line.subject for line in lines if line.kind == "mark"} == {str(number) for number in range(1, 40)}
    assert size == home.ledger.stat().st_size
    assert fsck(registry).is_clean


def test_a_ledger_that_was_deleted_or_cut_is_written_again(home: Home) -> None:
    """The ledger of a sound database comes back with the next write, whole."""
    registry = Registry()
    small_store(registry)
    whole = set(registry.database.ledger.read()[0])
    assert len(whole) == 3 + 1 + 2 + 4  # versions, an evaluation, moves; and the records of the first two
    for damage in (home.ledger.unlink, lambda: os.truncate(home.ledger, 50), lambda: home.ledger.write_bytes(b"")):
        damage()
        assert fsck(registry).is_clean
        for number in (2, 1):
            registry.set_alias("a", "beta", number)
        assert whole <= set(Registry().database.ledger.read()[0])
        assert Registry().resolve("a@beta").number == 1


def test_a_record_that_was_never_committed_does_not_count() -> None:
    """Of two records with one number the one the ledger names counts, whatever the clock said."""
    early = Record("sha256:" + "a" * 64, {"id": 1, "at": "2020", "new": 1})
    late = Record("sha256:" + "b" * 64, {"id": 1, "at": "2030", "new": 2})
    assert in_order([early, late], {early.digest}) == [early.value]
    assert in_order([late, early], {late.digest}) == [late.value]
    assert in_order([late, early], set()) == [late.value]


def test_a_move_that_a_crash_left_behind_is_not_replayed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias move, a removal and an evaluation whose commit never came are not made true by a rebuild."""
    registry = Registry()
    first = registry.publish("a", files(1), LINEAGE, alias="prod")
    registry.publish("a", files(2), LINEAGE)
    real = registry.database.connection

    def stopping(*arguments: object, **options: object) -> sqlite3.Connection | None:
        connection = real(create=True)
        assert connection is not None
        connection.set_authorizer(
            lambda action, name, *_: sqlite3.SQLITE_DENY
            if action == sqlite3.SQLITE_TRANSACTION and name == "COMMIT" else sqlite3.SQLITE_OK
        )  # fmt: skip
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(registry.database, "connection", stopping)
        for attempt in (
            lambda: registry.set_alias("a", "prod", 2),
            lambda: remove(registry, first, force=True),
            lambda: registry.add_evaluation(first, "task", {"adapter": {"exact_match": 0.1}}),
        ):
            with pytest.raises(QhubError, match="not authorized"):
                attempt()
    registry.database.close()
    registry = Registry()
    registry.set_alias("a", "beta", 1)
    assert any(b'"new":2' in path.read_bytes() for path in blob_paths(home))
    drop(home)
    rebuild(Registry())
    assert Registry().aliases("a") == {"beta": 1, "prod": 1}
    assert len(Registry().versions("a")) == 2
    assert Registry().metrics(first) == {}
    assert fsck(Registry()).is_clean
    with pytest.raises(NotFound):
        Registry().resolve("a@3")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("verb", ["list", "fsck", "fsck --repair", "fsck --rebuild-db", "gc", "alias set a prod 1"])
def test_a_ledger_that_is_no_file(
    make: Callable[[Path], None], verb: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """No verb waits for a pipe or takes a folder for an empty file; the message says what to do, and doing it helps."""
    registry = Registry()
    small_store(registry)
    registry.database.close()
    home.ledger.unlink()
    make(home.ledger)
    with pytest.raises(SystemExit) as ended:
        run(verb.split())
    assert ended.value.code == 1
    assert "registry.ledger is not a file: move it away" in capsys.readouterr().err
    home.ledger.rename(home.root / "away")
    assert fsck(Registry(), repair=True).is_repaired
    assert len(Registry().versions()) == 3
