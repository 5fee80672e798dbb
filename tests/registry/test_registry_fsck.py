"""fsck finds whatever is wrong, repairs what can be repaired, and makes the database again from the blobs."""

import os
import sqlite3
from pathlib import Path

import pytest

from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import Corrupt
from adapterhub_local.registry import File, Registry
from adapterhub_local.registry.catalog import search
from adapterhub_local.registry.database import Database
from adapterhub_local.registry.fsck import Checked, fsck, verify
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.marks import (
    add_tags,
    alias_log,
    describe,
    description_of,
    remove_alias,
    remove_tags,
    rollback,
    tags_of,
)
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, blob_paths, files, flip, small_store


def shown(registry: Registry) -> list[tuple]:
    """All that a user sees of the versions."""
    versions = registry.versions()
    return [
        (version, version.lineage, registry.metrics(version), registry.aliases(version.name)) for version in versions
    ]


def test_a_sound_store_is_clean(home: Home) -> None:
    """Nothing is reported where nothing is wrong, and checking an empty home creates nothing."""
    assert fsck(Registry()).is_clean
    assert not home.root.exists()
    registry = Registry()
    small_store(registry)
    report = fsck(registry)
    assert report.problems == []
    assert (report.num_versions, report.num_blobs, report.num_unreferenced) == (3, len(blob_paths(home)), 0)


def test_every_flipped_bit_is_found(home: Home) -> None:
    """A flipped bit of a blob is found by fsck wherever it is, and loading the versions it touches is refused."""
    registry = Registry()
    versions = small_store(registry)
    blobs = blob_paths(home)
    sizes = {path: path.stat().st_size * 8 for path in blobs}
    count = 0
    # blobs are independent of each other: one bit of each is flipped at once, and each must be found
    for turn in range(60):
        bits = {
            path: size * turn // 60 if turn < 52 else size - 60 + turn for path, size in sizes.items() if size >= 16
        }
        bits |= {path: turn % size for path, size in sizes.items() if size < 16 or turn < 8}
        for path, bit in bits.items():
            flip(path, bit)
        found = {problem.subject for problem in fsck(registry).problems if problem.kind == "damaged"}
        assert found == {f"sha256:{path.name}" for path in blobs}
        for path, bit in bits.items():
            flip(path, bit)
        count += len(bits)
    assert count == 60 * len(blobs)
    for version in versions:
        for file in version.files:
            flip(registry.blobs.path(file.digest), 0)
            with pytest.raises(Corrupt, match="damaged"):
                _ = registry.resolve(str(version)).path
            assert verify(registry, version)
            flip(registry.blobs.path(file.digest), 0)
    assert fsck(registry).is_clean


def test_every_single_bit_of_a_small_store(home: Home) -> None:
    """Each bit of every file, config, lineage and manifest in turn: fsck's judgement is `damaged`, loading refuses."""
    registry = Registry()
    version = registry.publish("a", files(1), LINEAGE)
    own = {registry.blobs.path(file.digest) for file in version.files}
    bits = 0
    for path in blob_paths(home):
        entry = File("x", f"sha256:{path.name}", path.stat().st_size)
        path.chmod(0o644)
        with open(path, "r+b", buffering=0) as file:
            data = file.read()
            for bit in range(8 * len(data)):
                position = bit // 8
                os.pwrite(file.fileno(), bytes([data[position] ^ 1 << bit % 8]), position)
                assert Checked(registry).state(entry.digest) == "damaged"
                with pytest.raises(Corrupt, match="damaged"):
                    registry.blobs.check(entry)
                if bit % 400 == 0:
                    assert [problem.subject for problem in fsck(registry).problems] == [entry.digest]
                    if path in own:
                        with pytest.raises(Corrupt, match="damaged"):
                            _ = registry.resolve("a").path
                os.pwrite(file.fileno(), data[position : position + 1], position)
            bits += 8 * len(data)
    assert len(blob_paths(home)) == 5  # two files, lineage, manifest, and the record of who published
    assert bits > 10_000
    assert fsck(registry).is_clean


def test_a_damaged_blob_is_set_aside_and_the_rest_works(home: Home) -> None:
    """Repair moves the damaged file to quarantine; its version refuses, others load, publishing brings it back."""
    registry = Registry()
    versions = small_store(registry)
    victim = registry.blobs.path(versions[0].files[1].digest)
    flip(victim, 100)
    report = fsck(registry, repair=True)
    assert [(problem.kind, bool(problem.repaired)) for problem in report.problems] == [("damaged", True)]
    assert [path.name.partition(".")[0] for path in home.quarantine.iterdir()] == [victim.name]
    with pytest.raises(Corrupt, match="is missing"):
        _ = registry.resolve("a@1").path
    assert registry.resolve("a@2").path.is_dir()
    assert [problem.kind for problem in fsck(registry).problems] == ["missing"]
    registry.publish("a", files(1), LINEAGE)
    assert registry.resolve("a@1").path.is_dir()
    assert fsck(registry).is_clean


@pytest.mark.parametrize("loss", ["flipped", "removed"])
def test_what_the_database_holds_is_written_again(home: Home, loss: str) -> None:
    """Manifests, lineages and evaluations that are damaged or gone come back byte for byte."""
    registry = Registry()
    versions = small_store(registry)
    kept = {file.digest for version in versions for file in version.files}
    before = {path: path.read_bytes() for path in blob_paths(home)}
    for path in before:
        if f"sha256:{path.name}" not in kept:
            flip(path, 7) if loss == "flipped" else path.unlink()
    report = fsck(registry, repair=True)
    # manifests, lineages, an evaluation, moves of an alias, and who published three times and evaluated once
    assert len(report.problems) == 3 + 2 + 1 + 2 + 3 + 1
    assert report.is_repaired
    assert {path: path.read_bytes() for path in blob_paths(home)} == before
    assert fsck(registry).is_clean


def test_what_is_no_blob_is_told_and_set_aside(home: Home) -> None:
    """A stranger's file among the blobs, and a blob in a wrong folder, are problems of their own."""
    registry = Registry()
    small_store(registry)
    (home.blobs / "ab").mkdir(exist_ok=True)
    (home.blobs / "ab" / "notes.txt").write_text("hello")
    (home.blobs / "ab" / ("0" * 64)).write_bytes(b"x")
    assert [problem.kind for problem in fsck(registry, repair=True).problems] == ["foreign", "foreign"]
    assert fsck(registry).is_clean


def test_a_file_that_was_published_unsound_is_reported(home: Home) -> None:
    """A .safetensors file with a wrong header is a problem although its bytes are what was published."""
    registry = Registry()
    registry.publish("a", {"adapter_model.safetensors": b"weights"}, LINEAGE)
    (problem,) = fsck(registry).problems
    assert (problem.kind, problem.subject) == ("header", "a@1")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE versions SET number = 9 WHERE number = 2", "row"),
        ("UPDATE versions SET created_at = '2020'", "row"),
        ("UPDATE versions SET lineage = '{}'", "row"),
        ("UPDATE versions SET manifest = replace(manifest, 'a', 'b')", "row"),
        ("UPDATE versions SET base_fingerprint = NULL", "row"),
        ("UPDATE evaluations SET evaluation = '{}'", "row"),
        ("UPDATE evaluations SET task = 'other'", "row"),
        ("UPDATE aliases SET number = 2", "alias"),
        ("DELETE FROM aliases", "alias"),
    ],
)
def test_a_changed_row_is_found(statement: str, kind: str) -> None:
    """A database whose rows were changed does not agree with its digests or its log, and fsck says so."""
    registry = Registry()
    small_store(registry)
    connection = sqlite3.connect(registry.home.database)
    connection.execute("DROP TRIGGER versions_keep")
    connection.execute(statement)
    connection.commit()
    connection.close()
    assert kind in {problem.kind for problem in fsck(registry).problems}


@pytest.mark.parametrize("damage", ["none", "removed", "zeroed", "header"])
def test_the_database_is_made_again_from_blobs(home: Home, damage: str) -> None:
    """Versions, lineages, evaluations and aliases come back from blobs, whatever is left of the old database."""
    registry = Registry()
    small_store(registry)
    before = shown(registry)
    registry.database.close()
    with sqlite3.connect(home.database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(home.database.read_bytes())
    if damage == "removed":
        for path in home.root.glob("registry.db*"):
            path.unlink()
    elif damage == "zeroed":
        data[4096:] = bytes(len(data) - 4096)
        home.database.write_bytes(data)
    elif damage == "header":
        home.database.write_bytes(b"\0" * 100 + data[100:])
    registry = Registry()
    if damage in ("zeroed", "header"):
        assert "database" in {problem.kind for problem in fsck(registry).problems}
        registry.database.close()
    rebuilt = rebuild(registry)
    assert (rebuilt.num_versions, rebuilt.num_evaluations) == (3, 1)
    after = shown(Registry())
    assert after == before
    assert bool(rebuilt.lost) is (damage in ("zeroed", "header"))  # it cannot know that what it lost is there again
    assert fsck(Registry()).is_clean
    assert Registry().publish("a", files(9), LINEAGE).number == 3


def said(registry: Registry) -> list[object]:
    """All that was said about versions and may change."""
    facts: list[object] = [
        registry.aliases("a"),
        alias_log(registry, "a"),
        [str(one) for one in search(registry, "new")],
    ]
    return facts + [(tags_of(registry, one), description_of(registry, one)) for one in registry.versions()]


@pytest.mark.parametrize("damage", ["none", "removed", "zeroed", "readable"])
def test_what_was_said_about_versions_is_made_again(home: Home, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases, their log, tags and descriptions come back in their order from blobs alone, and go on from there."""
    registry = Registry()
    first, second, _ = small_store(registry)
    if damage in ("none", "readable"):  # as an older qhub left it
        with registry.database.writing() as db:
            db.execute("INSERT INTO tags VALUES ('team/b', 1, 'older')")
    add_tags(registry, first, ("one", "two"))
    remove_tags(registry, first, ("one",))
    add_tags(registry, second, ("three",))
    describe(registry, first, "an old text")
    describe(registry, first, "a new text")
    registry.set_alias("a", "beta", 2)
    remove_alias(registry, "a", "beta")
    registry.set_alias("a", "prod", 2)
    rollback(registry, "a", "prod")
    remove(registry, second, force=True)
    before = said(registry)
    registry.database.close()
    with sqlite3.connect(home.database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    if damage == "removed":
        for path in home.root.glob("registry.db*"):
            path.unlink()
    elif damage == "zeroed":
        home.database.write_bytes(home.database.read_bytes()[:4096] + bytes(home.database.stat().st_size - 4096))
    if damage == "readable":  # damaged where nothing of this is
        monkeypatch.setattr(Database, "is_sound", lambda self: False)
    for _ in range(2):
        rebuild(Registry())
        monkeypatch.undo()
        monkeypatch.setenv("QHUB_HOME", str(home.root))
        assert said(Registry()) == before
        assert fsck(Registry()).is_clean
    Registry().set_alias("a", "prod", 1)
    add_tags(Registry(), first, ("four",))
    assert tags_of(Registry(), first) == ["four", "two"]
    assert fsck(Registry()).num_unreferenced == 1  # the weights of the removed version


def test_a_record_that_is_a_file_or_a_lineage_is_not_believed(home: Home) -> None:
    """Whoever publishes a file or lineage that looks like a removal or the move of an alias has said nothing by it."""
    registry = Registry()
    victim = registry.publish("a", files(1), LINEAGE, alias="prod")
    removal = {"removed": victim.manifest_digest, "removed_at": "2020"}
    move = {
        "action": "set",
        "alias": "prod",
        "at": "9999",
        "id": 1,
        "mark": "alias",
        "name": "a",
        "new": 7,
        "old": None,
    }
    registry.publish("evil", {"x.json": canonical_json(removal), "y.json": canonical_json(move)}, removal)
    registry.publish("evil", files(2), move)
    registry.database.close()
    for path in home.root.glob("registry.db*"):
        path.unlink()
    assert rebuild(Registry()).lost == []
    assert str(Registry().resolve("a@prod")) == "a@1"
    assert len(Registry().versions()) == 3


def test_a_rebuilt_database_keeps_versions_whose_manifest_is_gone(home: Home) -> None:
    """A version whose manifest blob was lost is taken from the old database; without either it is reported as lost."""
    registry = Registry()
    versions = small_store(registry)
    registry.blobs.path(versions[0].manifest_digest).unlink()
    assert rebuild(registry).num_versions == 3
    registry.database.close()
    for path in home.root.glob("registry.db*"):
        path.unlink()
    rebuilt = rebuild(Registry())
    assert rebuilt.num_versions == 2
    assert any("a@1" in line for line in rebuilt.lost)
    assert Registry().publish("a", files(1), LINEAGE).number == 3


def test_of_two_manifests_with_one_number_the_committed_one_counts(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest left behind by a crash before the commit never replaces the version that got the number."""
    from adapterhub_local.registry import registry as module

    registry = Registry()

    class Crash(BaseException):
        """The machine stops."""

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(module, "insert_version", crash)
        with pytest.raises(Crash):
            registry.publish("a", files(1), LINEAGE)
    kept = registry.publish("a", files(2), LINEAGE)
    registry.database.close()
    for path in home.root.glob("registry.db*"):
        path.unlink()
    rebuild(registry)
    assert Registry().versions() == [kept]


def test_a_file_that_looks_like_a_manifest_stays_a_file(home: Home, tmp_path: Path) -> None:
    """Whoever publishes a file that is a forged manifest gets no version out of it when the database is made again."""
    registry = Registry()
    real = registry.publish("a", files(1), LINEAGE)
    forged = real.manifest.replace(b'"org.qhub.name":"a"', b'"org.qhub.name":"evil"')
    registry.publish("b", {"notes.json": forged}, LINEAGE)
    registry.database.close()
    for path in home.root.glob("registry.db*"):
        path.unlink()
    rebuild(registry)
    assert Registry().names() == ["a", "b"]
