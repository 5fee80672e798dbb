"""Database and ledger brought back together from an older backup, beside the blobs of later versions."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_local.errors import Corrupt
from adapterhub_local.registry import Registry
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect, remove
from adapterhub_local.registry.history import history
from adapterhub_local.registry.marks import add_tags, describe, rollback
from adapterhub_local.registry.protecting import protect
from adapterhub_local.registry.receipts import Receipts
from adapterhub_local.registry.split import set_split
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, backup, drop, files


@pytest.mark.parametrize("turn", ["read", "same name", "other name", "received"])
def test_a_ledger_that_came_back_with_the_database(turn: str, home: Home, tmp_path: Path) -> None:
    """What later versions left among the blobs shows it: every verb refuses, no number is given twice, repair helps."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE, alias="prod")
    registry.database.close()
    backup(home, tmp_path / "old.db")
    shutil.copy(home.ledger, tmp_path / "old.ledger")
    registry = Registry()
    made = [registry.publish("a", files(2), LINEAGE, alias="prod"), registry.publish("b", files(3), LINEAGE)]
    registry.add_evaluation(made[0], "task", {"adapter": {"loss": 1.0, "rows": 2}})
    write_archive(registry, made[0], tmp_path / "a.tar")
    registry.database.close()
    drop(home)
    shutil.copy(tmp_path / "old.db", home.database)
    shutil.copy(tmp_path / "old.ledger", home.ledger)

    doings: dict[str, Callable[[], object]] = {
        "read": Registry().versions,
        "same name": lambda: Registry().publish("a", files(9), LINEAGE),
        "other name": lambda: Registry().publish("c", files(9), LINEAGE),
        "received": lambda: read_archive(Registry(), tmp_path / "a.tar"),
    }
    with pytest.raises(Corrupt, match=r"it does not know a@2, b@1.*fsck --repair"):
        doings[turn]()
    with pytest.raises(Corrupt, match=r"a@2.*Nothing was collected"):
        collect(Registry(), apply=True, grace=-1, purge=-1)
    assert [one.subject for one in fsck(Registry()).problems] == ["a@2", "b@1", "change 6"]

    assert fsck(Registry(), repair=True).is_repaired
    registry = Registry()
    assert [str(version) for version in registry.versions()] == ["a@1", "a@2", "b@1"]
    assert registry.resolve("a@prod").manifest_digest == made[0].manifest_digest
    assert registry.metrics(registry.resolve("a@2")) == {"task": {"adapter": {"loss": 1.0, "rows": 2}}}
    assert registry.publish("a", files(9), LINEAGE).number == 3
    assert fsck(registry).is_clean


def test_a_number_is_not_given_twice_where_few_have_receipts(home: Home, tmp_path: Path) -> None:
    """In a home of an older qhub most versions have none, so their count shows nothing; the number itself does."""
    registry = Registry()
    for number in range(3):
        registry.publish("old", files(number), LINEAGE)
    shutil.rmtree(home.receipts)
    registry.database.close()
    backup(home, tmp_path / "old.db")
    shutil.copy(home.ledger, tmp_path / "old.ledger")
    Registry().publish("old", files(7), LINEAGE)
    shutil.rmtree(home.changes)
    drop(home)
    shutil.copy(tmp_path / "old.db", home.database)
    shutil.copy(tmp_path / "old.ledger", home.ledger)

    assert len(Registry().versions()) == 3
    with pytest.raises(Corrupt, match=r"it does not know old@4"):
        Registry().publish("old", files(9), LINEAGE)
    assert fsck(Registry(), repair=True).is_repaired
    assert Registry().publish("old", files(9), LINEAGE).number == 5


def _move(registry: Registry) -> object:
    registry.set_alias("a", "prod", 2)
    return "prod"


def _remove(registry: Registry) -> object:
    return remove(registry, registry.resolve("a@2"))


CHANGES: dict[str, Callable[[Registry], object]] = {
    "alias": _move,
    "rollback": lambda registry: rollback(registry, "a", "live"),
    "removal": _remove,
    "evaluation": lambda registry: registry.add_evaluation(registry.resolve("a@1"), "task", {"adapter": {"loss": 1.0}}),
    "tag": lambda registry: add_tags(registry, registry.resolve("a@1"), ("good",)),
    "description": lambda registry: describe(registry, registry.resolve("a@1"), "better"),
    "split": lambda registry: set_split(registry, "a", [("live", 90), ("prod", 10)]),
    "protection": lambda registry: protect(registry, "a", "prod", approvals=1),
}


def _restore(home: Home, old: Path) -> None:
    drop(home)
    shutil.copy(old / "old.db", home.database)
    shutil.copy(old / "old.ledger", home.ledger)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_no_version_came_with(kind: str, home: Home, tmp_path: Path) -> None:
    """An older state of aliases, evaluations and removals is not taken for the present one, whatever changed last."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE, alias="prod")
    registry.publish("a", files(2), LINEAGE)
    registry.set_alias("a", "live", 1)
    registry.set_alias("a", "live", 2)
    if kind == "removal":
        registry.set_alias("a", "live", 1)
    registry.database.close()
    backup(home, tmp_path / "old.db")
    shutil.copy(home.ledger, tmp_path / "old.ledger")
    registry = Registry()
    CHANGES[kind](registry)
    newest = history(registry).entries[0]
    registry.database.close()
    _restore(home, tmp_path)

    for verb in (
        Registry().versions,
        lambda: Registry().publish("a", files(9), LINEAGE),
        lambda: Registry().resolve("a@1"),
    ):
        with pytest.raises(Corrupt, match=r"older than its home: it does not know changes.*fsck --repair"):
            verb()
    assert fsck(Registry(), repair=True).is_repaired
    registry = Registry()
    assert history(registry).entries[0] == newest
    assert fsck(registry).is_clean
    registry.database.close()

    # and once its record is gone, the repair names what is lost and the home goes on
    _restore(home, tmp_path)
    (number, (digest,)) = Receipts(home).last_change()
    (home.blobs / digest.removeprefix("sha256:")[:2] / digest.removeprefix("sha256:")).unlink()
    report = fsck(Registry(), repair=True)
    assert report.rebuilt is not None
    assert any(f"change {number}" in line for line in report.rebuilt.lost)
    assert Registry().publish("a", files(9), LINEAGE).number == 3
    assert fsck(Registry()).is_clean


def test_only_the_last_changes_are_kept(home: Home) -> None:
    """A late writer takes nothing newer away, and their number is bounded."""
    receipts = Receipts(home)
    digest = f"sha256:{'0' * 64}"
    receipts.add_changes((number, digest) for number in range(1, 60))
    receipts.add_changes([(3, digest)])
    assert receipts.last_change() == (59, [digest])
    assert len(list(home.changes.iterdir())) <= 17
