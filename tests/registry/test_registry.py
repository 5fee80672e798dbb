"""The registry: versions that never change, numbers without gaps, aliases that move, bytes that are checked."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import BadReference, Corrupt, InputError, InUse, NotFound, QhubError
from adapterhub_local.registry import File, Registry, Version
from adapterhub_local.registry.migrations import MIGRATIONS
from adapterhub_local.settings import Home

FILES: dict[str, Path | bytes] = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}
LINEAGE: dict[str, Any] = {"kind": "test", "base": {"name": "tiny", "fingerprint": "sha256:" + "0" * 64}}
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def registry() -> Registry:
    """A registry at this test's own home."""
    return Registry()


def test_a_published_version_is_found_with_all_it_was_given(registry: Registry) -> None:
    """Resolving gives back name, number, lineage and digests, and a folder with the very bytes."""
    made = registry.publish("sentiment", FILES, LINEAGE)
    found = Registry().resolve("sentiment")
    assert found == made
    assert str(found) == "sentiment@1"
    assert found.lineage == LINEAGE
    assert found.base_fingerprint == DIGEST
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == FILES


def test_the_newest_version_answers_to_the_bare_name(registry: Registry) -> None:
    """Numbers count up per name; `name` and `name@latest` are the highest."""
    for content in (b"1", b"2", b"3"):
        registry.publish("a", {"f": content}, LINEAGE)
    registry.publish("b", FILES, LINEAGE)
    assert [str(version) for version in registry.versions()] == ["a@1", "a@2", "a@3", "b@1"]
    assert registry.resolve("a") == registry.resolve("a@latest") == registry.resolve("a@3")
    assert registry.names() == ["a", "b"]
    assert [version.number for version in registry.versions_on_base(DIGEST)] == [1, 2, 3, 1]


def test_equal_files_have_one_content_digest_and_one_blob(registry: Registry) -> None:
    """The same files published twice are two versions with one content digest, stored once."""
    first = registry.publish("a", FILES, LINEAGE)
    second = registry.publish("b", FILES, {**LINEAGE, "kind": "other"})
    assert first.content_digest == second.content_digest
    assert first.manifest_digest != second.manifest_digest
    blobs = [path for path in registry.home.blobs.rglob("*") if path.is_file()]
    assert len(blobs) == 2 + 2 + 2 + 2  # files, lineages, manifests, records
    assert all(path.stat().st_mode & 0o222 == 0 for path in blobs)
    assert list(registry.home.tmp.iterdir()) == []


def test_a_digest_names_a_version(registry: Registry) -> None:
    """Content and manifest digests, whole or their first digits, resolve to the version."""
    version = registry.publish("a", FILES, LINEAGE)
    for digest in (version.content_digest, version.manifest_digest):
        assert registry.resolve(f"a@{digest}") == version
        assert registry.resolve(f"a@{digest[:19]}") == version
    with pytest.raises(NotFound):
        registry.resolve("a@sha256:" + "f" * 64)


def test_a_digest_of_several_versions_with_equal_content_names_the_newest(registry: Registry) -> None:
    """Equal content is not ambiguous: whichever version is meant, the adapter is the same."""
    registry.publish("a", FILES, LINEAGE)
    second = registry.publish("a", FILES, LINEAGE)
    assert registry.resolve(f"a@{second.content_digest}") == second


def test_a_short_digest_that_fits_different_versions_is_refused(registry: Registry) -> None:
    """Two versions whose digests begin alike are not confused: more digits are asked for."""
    for number in (1, 2):
        version = registry.publish("a", {"f": str(number).encode()}, LINEAGE)
    with registry.database.writing() as db:  # nobody can make such digests, so their first digits are made equal
        db.execute("DROP TRIGGER versions_keep")
        db.execute("UPDATE versions SET content_digest = 'sha256:aaaaaaaaaaaa' || substr(content_digest, 20)")
    with pytest.raises(BadReference, match="more digits"):
        registry.resolve("a@sha256:aaaaaaaaaaaa")
    assert registry.resolve(f"a@sha256:aaaaaaaaaaaa{version.content_digest[19:]}").number == 2


def test_what_is_not_there_is_answered_with_what_is(registry: Registry) -> None:
    """NotFound tells the nearest names, or the versions and aliases of the name."""
    for name in ("sentiment", "origin"):
        registry.publish(name, FILES, LINEAGE)
    registry.set_alias("origin", "prod", 1)
    with pytest.raises(NotFound, match="did you mean sentiment"):
        registry.resolve("sentimnt")
    with pytest.raises(NotFound, match="qhub list"):
        registry.resolve("xyzzy")
    with pytest.raises(NotFound, match="has versions 1 and aliases prod"):
        registry.resolve("origin@2")
    with pytest.raises(NotFound, match="has versions 1 and aliases prod"):
        registry.resolve("origin@stage")


def test_aliases_move_and_every_move_is_logged(registry: Registry) -> None:
    """An alias points where it was last set; with `expect` it moves only from the version expected."""
    for _ in range(3):
        registry.publish("a", FILES, LINEAGE)
    registry.set_alias("a", "prod", 1)
    registry.set_alias("a", "prod", 2, expect=1)
    with pytest.raises(InUse, match="points to 2, not to 1"):
        registry.set_alias("a", "prod", 3, expect=1)
    with pytest.raises(InUse, match="points to nothing"):
        registry.set_alias("a", "stage", 3, expect=1)
    assert registry.aliases("a") == {"prod": 2}
    assert registry.resolve("a@prod").number == 2
    with registry.database.writing() as db:
        moves = [tuple(row) for row in db.execute("SELECT alias, old_number, new_number FROM alias_log ORDER BY id")]
    assert moves == [("prod", None, 1), ("prod", 1, 2)]


def test_an_alias_points_only_to_what_exists(registry: Registry) -> None:
    """Pointing an alias at a version that is not there, or giving it a reserved name, changes nothing."""
    registry.publish("a", FILES, LINEAGE)
    with pytest.raises(NotFound):
        registry.set_alias("a", "prod", 2)
    with pytest.raises(BadReference):
        registry.set_alias("a", "latest", 1)
    with pytest.raises(BadReference):
        registry.publish("a", FILES, LINEAGE, alias="v2")
    assert registry.aliases("a") == {}
    assert len(registry.versions("a")) == 1


def test_publishing_can_set_an_alias_in_the_same_step(registry: Registry) -> None:
    """The alias given to publish points to the new version."""
    registry.publish("a", FILES, LINEAGE, alias="prod")
    second = registry.publish("a", {"f": b"2"}, LINEAGE, alias="prod")
    assert registry.resolve("a@prod") == second


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE versions SET number = 7",
        "UPDATE versions SET lineage = '{}'",
        "DELETE FROM versions",
        "UPDATE alias_log SET new_number = 7",
        "DELETE FROM alias_log",
    ],
)
def test_the_database_itself_keeps_versions_and_logs(registry: Registry, statement: str) -> None:
    """Whoever opens the database by hand cannot change or delete a version or an entry of the log."""
    registry.publish("a", FILES, LINEAGE, alias="prod")
    with sqlite3.connect(registry.home.database) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    connection.close()
    assert registry.resolve("a@prod").lineage == LINEAGE


def test_a_damaged_blob_is_found_and_publishing_repairs_it(registry: Registry) -> None:
    """A flipped byte is Corrupt as soon as the files are wanted; the same bytes published again replace it."""
    version = registry.publish("a", FILES, LINEAGE)
    folder = version.path
    blob = registry.blobs.path(version.files[-1].digest)
    blob.chmod(0o644)
    blob.write_bytes(b"Weights")
    with pytest.raises(Corrupt, match=r"adapter_model.safetensors is damaged .*publish it again"):
        _ = registry.resolve("a").path
    registry.publish("a", FILES, LINEAGE)
    assert registry.resolve("a@1").path == folder
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"


def test_a_missing_blob_is_said_to_be_missing(registry: Registry) -> None:
    """A blob that is gone is Corrupt, with its name in the version."""
    version = registry.publish("a", FILES, LINEAGE)
    registry.blobs.path(version.files[0].digest).unlink()
    with pytest.raises(Corrupt, match=r"adapter_config.json is missing"):
        _ = version.path


@pytest.mark.parametrize("tampering", ["replaced", "removed", "whole folder"])
def test_a_changed_folder_is_made_again(registry: Registry, tampering: str) -> None:
    """What PEFT is given is what was published, whatever was done to the folder since."""
    folder = registry.publish("a", FILES, LINEAGE).path
    victim = folder / "adapter_config.json"
    if tampering == "whole folder":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    else:
        victim.unlink()
    if tampering == "replaced":
        victim.write_bytes(b"[]")
    again = registry.resolve("a").path
    assert again == folder
    assert {path.name: path.read_bytes() for path in again.iterdir()} == FILES


def test_reading_creates_nothing(registry: Registry, home: Home) -> None:
    """Listing and resolving at a home that does not exist leave it so."""
    assert registry.versions() == []
    assert registry.names() == []
    assert registry.aliases("a") == {}
    with pytest.raises(NotFound):
        registry.resolve("a")
    assert not home.root.exists()


def test_a_home_whose_path_has_spaces_and_umlauts(tmp_path: Path) -> None:
    """The home may be anywhere, also below folders with spaces, quotes, percent signs and other scripts."""
    registry = Registry(tmp_path / "mein Ördner 'x' %20?#" / "アダプタ")
    made = registry.publish("a", FILES, LINEAGE, alias="prod")
    assert Registry(registry.home.root).resolve("a@prod").path == made.path


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A home that cannot be a folder is an InputError that names it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="name a folder"):
        Registry(tmp_path / "file")
    with pytest.raises(InputError, match="QHUB_HOME"):
        Registry(tmp_path / "file" / "below").publish("a", FILES, LINEAGE)


def test_a_file_that_is_no_database_is_corrupt(registry: Registry, home: Home) -> None:
    """A registry.db with other bytes in it is Corrupt, not an error of SQLite."""
    home.root.mkdir()
    home.database.write_bytes(b"this is not a database, but it is long enough to look like one" * 20)
    with pytest.raises(Corrupt, match="is damaged: file is not a database"):
        registry.versions()


def test_a_damaged_database_is_corrupt(registry: Registry) -> None:
    """A database with overwritten pages is Corrupt for readers, not an error of SQLite."""
    for _ in range(20):
        registry.publish("a", FILES, {**LINEAGE, "note": "x" * 4000})
    with sqlite3.connect(registry.home.database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(registry.home.database.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    registry.home.database.write_bytes(data)
    for read in (Registry().versions, lambda: Registry().resolve("a"), lambda: Registry().aliases("a")):
        with pytest.raises(Corrupt, match=r"registry.db is damaged"):
            read()


def test_a_database_that_is_locked_for_long_is_reported(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits in vain gets an error that says so, and the lock's owner loses nothing."""
    registry.publish("a", FILES, LINEAGE)
    monkeypatch.setattr("adapterhub_local.registry.connection.BUSY_TIMEOUT_MS", 50)
    with registry.database.writing(), pytest.raises(QhubError, match="cannot be written: database is locked"):
        Registry().publish("a", FILES, LINEAGE)
    assert registry.publish("a", FILES, LINEAGE).number == 2


def test_a_newer_database_is_refused_unchanged(registry: Registry) -> None:
    """A database of a newer qhub is not touched; the message says what to install."""
    registry.publish("a", FILES, LINEAGE)
    connection = sqlite3.connect(registry.home.database)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(InputError, match="newer version of qhub"):
        Registry().resolve("a")
    with pytest.raises(InputError, match="newer version of qhub"):
        Registry().publish("a", FILES, LINEAGE)


def test_an_older_database_is_brought_up_to_date(registry: Registry, home: Home) -> None:
    """A database that stopped at the first migration gets the others when it is opened, and keeps its rows."""
    home.root.mkdir()
    connection = sqlite3.connect(home.database)
    connection.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1")
    connection.close()
    version = registry.publish("a", FILES, LINEAGE)
    registry.add_evaluation(version, "task", {"adapter": {"exact_match": 0.5}})
    assert registry.metrics(version)["task"]["adapter"]["exact_match"] == 0.5


def test_evaluations_are_kept_beside_the_version(registry: Registry) -> None:
    """The newest evaluation of a task is told, others stay, and the version and its digests do not change."""
    version = registry.publish("a", FILES, {**LINEAGE, "metrics": {"own": {"adapter": {"exact_match": 0.1}}}})
    for score in (0.2, 0.3):
        registry.add_evaluation(version, "other", {"adapter": {"exact_match": score}})
    assert registry.metrics(Registry().resolve("a")) == {
        "own": {"adapter": {"exact_match": 0.1}},
        "other": {"adapter": {"exact_match": 0.3}},
    }
    assert registry.resolve("a").manifest_digest == version.manifest_digest


@pytest.mark.parametrize(
    "path", ["../x", "a/b", "/etc/passwd", "..", ".", "", ".hidden", "a\\b", "a\n", "ä", "-x", "a b"]
)
def test_a_file_name_is_never_a_way_out(registry: Registry, path: str) -> None:
    """A name with a slash, dots in front or other letters is refused when publishing and in a manifest."""
    with pytest.raises(Corrupt):
        registry.publish("a", {path: b"x"}, LINEAGE)
    version = registry.publish("a", {"good": b"x"}, LINEAGE)
    manifest = json.loads(version.manifest)
    manifest["layers"][0]["annotations"]["org.opencontainers.image.title"] = path
    with pytest.raises(Corrupt):
        Version.from_manifest(canonical_json(manifest), b"{}")


def test_a_manifest_tells_its_version_again(registry: Registry) -> None:
    """Manifest and lineage are enough to make the version again, and both are blobs."""
    version = registry.publish("a", FILES, LINEAGE)
    manifest = registry.blobs.path(version.manifest_digest).read_bytes()
    lineage = registry.blobs.path(version.lineage_file.digest).read_bytes()
    again = Version.from_manifest(manifest, lineage)
    assert again == version
    assert again.lineage == LINEAGE


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b"null", b'{"annotations": 3}', b"\xff", b'{"layers": [1]}'])
def test_a_manifest_that_is_none_is_corrupt(manifest: bytes) -> None:
    """Bytes that describe no version are Corrupt, never another error."""
    with pytest.raises(Corrupt, match="manifest"):
        Version.from_manifest(manifest, b"{}")


def test_a_file_needs_a_whole_digest() -> None:
    """A digest that is not a sha256, or a negative size, cannot be a file of a version."""
    for digest, size in (("sha256:abc", 1), ("md5:" + "0" * 32, 1), ("../" + "0" * 64, 1), (DIGEST, -1)):
        with pytest.raises(Corrupt):
            File("name", digest, size)
