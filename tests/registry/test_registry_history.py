"""The history: every kind of change, by whom, page by page, filtered, and without what a crash left behind."""

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterhub_local.actor import acting_as
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import BadReference, InputError, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect, remove
from adapterhub_local.registry.history import history
from adapterhub_local.registry.journal import KINDS
from adapterhub_local.registry.key_log import create_key, revoke_key
from adapterhub_local.registry.marks import add_tags, describe, remove_tags, rollback
from adapterhub_local.registry.migrations import apply_migrations
from adapterhub_local.registry.protecting import approve, protect, unprotect
from adapterhub_local.registry.split import set_split
from tests.stores import LINEAGE, files, small_store


def change_everything(registry: Registry) -> None:
    """One change of every kind, as `ada`."""
    with acting_as("ada"):
        version = registry.publish("a", files(1), LINEAGE, alias="prod")
        registry.publish("a", files(2), LINEAGE)
        registry.set_alias("a", "prod", 2)
        rollback(registry, "a", "prod")
        add_tags(registry, version, ("good",))
        remove_tags(registry, version, ("good",))
        describe(registry, version, "says yes")
        set_split(registry, "a", [("prod", 1)])
        set_split(registry, "a", [])
        registry.add_evaluation(version, "task", {"adapter": {"exact_match": 0.5}})
        protect(registry, "a", "prod", ["exact_match>0.1"], 1)
        approve(registry, version, "prod")
        unprotect(registry, "a", "prod")
        key, _ = create_key(registry, scopes=("admin",), note="for ci")
        revoke_key(registry, key.id)
        remove(registry, registry.resolve("a@2"))


def test_every_kind_of_change_has_its_actor(tmp_path: Path) -> None:
    """All kinds of records are made by the verbs, each with who did it, newest first, and a line that says what."""
    registry = Registry(tmp_path)
    change_everything(registry)
    entries = history(registry).entries
    assert {entry["event"] for entry in entries} == set(KINDS)
    assert {entry["actor"] for entry in entries} == {"ada"}
    assert [entry["id"] for entry in entries] == list(range(len(entries), 0, -1))
    said = [entry["what"] for entry in reversed(entries)]
    assert said[:4] == ["published a@1 (train)", "moved a@prod from nothing to 1", "published a@2 (train)",
                        "moved a@prod from 1 to 2"]  # fmt: skip
    assert said[-3:] == [
        said[-3], f"revoked the API key {entries[1]['key']} (admin): for ci", "removed a@2"
    ]  # fmt: skip
    assert "protected a@prod: exact_match>0.1, 1 approvals" in said


def test_records_of_all_kinds_are_needed_by_the_collector_and_sound(tmp_path: Path) -> None:
    """Neither gc nor fsck takes a record for rubbish, and what is lost of one is written again."""
    registry = Registry(tmp_path)
    change_everything(registry)
    before = history(registry).entries
    collect(registry, apply=True, grace=-1, purge=0)
    report = fsck(registry)
    assert (report.problems, report.num_unreferenced) == ([], 0)
    assert history(registry).entries == before


def test_pages_repeat_and_lose_nothing_while_others_change(tmp_path: Path) -> None:
    """Going on behind a page gives each change once, whatever is added meanwhile."""
    registry = Registry(tmp_path)
    change_everything(registry)
    whole = history(registry).entries
    seen, after = [], None
    while True:
        page = history(registry, after=after, limit=4)
        seen += page.entries
        add_tags(registry, registry.resolve("a@1"), (f"t{len(seen)}",))
        if (after := page.after) is None:
            break
    assert seen == whole


def test_a_name_a_kind_and_an_actor_narrow_it(tmp_path: Path) -> None:
    """Each filter keeps what fits; names that may not be seen, and keys of nobody's adapters, are not shown."""
    registry = Registry(tmp_path)
    change_everything(registry)
    with acting_as("bob"):
        registry.publish("b", files(3), LINEAGE)
    assert [entry["reference"] for entry in history(registry, actor="bob").entries] == ["b@1"]
    assert {entry["event"] for entry in history(registry, events=["key", "removal"]).entries} == {"key", "removal"}
    assert {entry["name"] for entry in history(registry, name="b").entries} == {"b"}
    assert {entry["name"] for entry in history(registry, allowed=["b"]).entries} == {"b"}
    with pytest.raises(InputError, match="is not a kind of change"):
        history(registry, events=["rename"])
    for place in ("x", "--1", "1" * 20, "²"):
        with pytest.raises(InputError, match=f"^{re.escape(ascii(place))} is not a place in the history"):
            history(registry, after=place)


def test_a_name_that_never_was_is_refused_with_a_near_one(tmp_path: Path) -> None:
    """An empty list would read as "nothing happened to it"; a removed name keeps its history."""
    registry = Registry(tmp_path)
    for number, name in enumerate(("sentiment", "gone", "hidden")):
        registry.publish(name, files(number), LINEAGE)
    remove(registry, registry.resolve("gone@1"))

    with pytest.raises(NotFound, match=r"there is no adapter 'sentimnt', and never was: did you mean sentiment\?"):
        history(registry, name="sentimnt")
    with pytest.raises(NotFound, match="`qhub list` shows what there is"):
        history(registry, name="hiden", allowed=["sentiment"])
    with pytest.raises(NotFound, match="there is no adapter 'hidden'"):
        history(registry, name="hidden", allowed=["sentiment"])
    with pytest.raises(BadReference, match="'sentiment@1' is not a name"):
        history(registry, name="sentiment@1")
    assert [entry["event"] for entry in history(registry, name="gone").entries] == ["removal", "version"]
    assert (
        history(registry, name="gone", events=["tag"]).entries
        == history(registry, name="gone", after="1").entries
        == []
    )


def test_what_came_by_an_archive_was_received(tmp_path: Path) -> None:
    """A version from elsewhere is a change here, by who took it in."""
    registry, other = Registry(tmp_path / "one"), Registry(tmp_path / "other")
    version = registry.publish("a", files(1), LINEAGE)
    write_archive(registry, version, tmp_path / "a.tar")
    with acting_as("bob"):
        read_archive(other, tmp_path / "a.tar")
    (entry,) = history(other).entries
    assert (entry["event"], entry["action"], entry["reference"], entry["actor"]) == (
        "version", "received", "a@1", "bob",
    )  # fmt: skip


def test_changes_before_there_was_a_history_are_listed_without_an_actor(tmp_path: Path) -> None:
    """A home of an older qhub shows its versions and moves as changes of nobody known, below all others."""
    registry = Registry(tmp_path)
    home = registry.home
    with registry.database.writing() as db:  # as the last form that knew no actors
        for name in [
            row["name"] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
        ]:
            if name.startswith("marks_by"):
                db.execute(f"DROP INDEX {name}")
        db.execute("ALTER TABLE alias_log DROP COLUMN actor")
        for name in ("listed_version", "listed_removed", "parents_of_version"):
            db.execute(f"DROP TRIGGER {name}")
        for name in ("listed", "parents"):
            db.execute(f"DROP TABLE {name}")
        apply_migrations(db, 6)
    small_store(registry)
    with registry.database.writing() as db:
        db.execute("DROP TRIGGER marks_stay")
        db.execute("DELETE FROM marks")
    shutil.rmtree(home.changes)
    with acting_as("ada"):
        Registry(home).publish("a", files(7), LINEAGE)
    entries = history(Registry(home)).entries
    assert [(entry["id"], entry["actor"], entry["what"]) for entry in entries] == [
        (1, "ada", "published a@3 (train)"),
        (None, None, "published team/b@1 (train)"),
        (None, None, "published a@2 (train)"),
        (None, None, "published a@1 (train)"),
    ]


def test_an_actor_that_is_none_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QHUB_ACTOR that cannot stand in a record is refused with its way out, and nothing is published."""
    registry = Registry(tmp_path)
    monkeypatch.setenv("QHUB_ACTOR", "a b")
    with pytest.raises(InputError, match="QHUB_ACTOR is 'a b'"):
        registry.publish("a", files(1), LINEAGE)
    monkeypatch.setenv("QHUB_ACTOR", "ada")
    assert registry.versions() == []
    assert str(registry.publish("a", files(1), LINEAGE)) == "a@1"


def test_the_verbs_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`history`, `alias protect`, `approve`, `alias list`, `show` and `log` say who did what, in words."""
    monkeypatch.setenv("QHUB_HOME", str(tmp_path))
    monkeypatch.setenv("QHUB_ACTOR", "ada")
    Registry().publish("a", files(1), LINEAGE)
    run = CliRunner(catch_exceptions=False).invoke

    def said(line: str) -> str:
        done = run(qhub, line.split())
        assert done.exit_code == 0, done.output
        return done.output

    assert "no version of a has a score task.exact_match yet" in said(
        "alias protect a prod --require task.exact_match>=0.8 --approvals 1"
    )
    assert "a@1 is approved for prod by ada" in said("approve a@1 --for prod")
    monkeypatch.setenv("QHUB_ACTOR", "bob")
    Registry().add_evaluation(Registry().resolve("a@1"), "task", {"adapter": {"exact_match": 0.9}})
    said("alias set a prod 1")
    assert "task.exact_match>=0.8, 1 approval" in said("alias list a")
    assert "protected by ada: task.exact_match>=0.8, 1 approval" in said("alias show a prod")
    assert '"actor": "ada"' in said("alias show a prod --json")
    assert "bob" in said("alias log a")
    table = said("history a")
    rows = [(entry["actor"], entry["what"]) for entry in history(Registry(), name="a").entries]
    assert rows[:2] == [("bob", "moved a@prod from nothing to 1"), ("bob", "evaluated a@1 on task")]
    assert [who for who, _ in rows[2:]] == ["ada"] * 3
    for who, what in rows:
        assert re.search(rf"{who} +{re.escape(what)}", table), what
    said("alias unprotect a prod")
