"""Disks that are full, homes that are read-only, odd paths, and old databases opened by many at once."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect
from adapterhub_local.registry.migrations import MIGRATIONS
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.settings import Home
from tests.patience import PATIENCE
from tests.stores import LINEAGE, blob_paths, files, small_store

FULL = """
import resource, sys
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry
from tests.stores import LINEAGE, weights
registry = Registry()
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    for turn in range(1000):
        big = weights(turn.to_bytes(4, "little") * int(sys.argv[2]))
        registry.publish("a", {"adapter_model.safetensors": big, "adapter_config.json": b"{}"}, LINEAGE, alias="new")
        print(turn, flush=True)
except QhubError as error:
    sys.exit(f"told: {error}")
"""
READ = """
import os, sys
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry
from tests.stores import LINEAGE, files
import adapterhub_local.registry.fsck as fsck
if os.geteuid() == 0:
    os.seteuid(65534)
registry = Registry(sys.argv[1])
assert str(registry.resolve("a@prod")) == "a@1"
assert registry.resolve("a@1").path.is_dir()
assert len(registry.versions()) == 3
assert fsck.fsck(registry).is_clean
try:
    registry.publish("a", files(9), LINEAGE)
except (QhubError, PermissionError) as error:
    print("refused", error)
"""


@pytest.mark.parametrize(
    ("limit", "size", "published", "said"),
    [(100_000, 50_000, 0, "no space left"), (250_000, 10, None, "cannot be written")],
    ids=["files", "database"],
)
def test_a_full_disk_loses_nothing(home: Home, limit: int, size: int, published: int | None, said: str) -> None:
    """A publish that finds no space says so, leaves no temporary file, and all that was published stays whole."""
    registry = Registry()
    before = small_store(registry)
    registry.database.close()
    command = [sys.executable, "-c", FULL, str(limit), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("told: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    count = len(done.stdout.split())
    assert published is None or count == published
    assert list(home.tmp.iterdir()) == []
    registry = Registry()
    assert len(registry.versions()) == len(before) + count
    report = fsck(registry)
    assert report.problems == []
    collect(registry, apply=True, grace=-1, purge=-1)
    collect(registry, apply=True, grace=-1, purge=-1)
    assert fsck(registry).num_unreferenced == 0
    assert registry.publish("a", files(5), LINEAGE).number == 3 + count


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user of the machine may enter."""
    with tempfile.TemporaryDirectory(prefix="qhub-test-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_read_only_home_can_be_read(public_folder: Path) -> None:
    """Resolving, loading, listing and checking work without a right to write; publishing is refused."""
    registry = Registry(public_folder / "home")
    small_store(registry)
    _ = registry.resolve("a@1").path
    registry.database.close()
    paths = [path for path in (public_folder / "home").rglob("*") if path.is_dir()] + [public_folder / "home"]
    before = blob_paths(registry.home)
    for path in paths:
        path.chmod(0o555)
    try:
        command = [sys.executable, "-c", READ, str(public_folder / "home")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("refused")
        assert blob_paths(registry.home) == before
    finally:
        for path in paths:
            path.chmod(0o755)


OLD = """
import os, sys
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    Registry(sys.argv[1]).names()
except InputError as error:
    print(error)
"""


def test_an_old_home_that_is_read_only(public_folder: Path) -> None:
    """A database that had to be brought up to date, where nothing can be written, says so; it is not called damaged."""
    connection = sqlite3.connect(public_folder / "registry.db")
    connection.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1")
    connection.close()
    (public_folder / "registry.db").chmod(0o444)
    public_folder.chmod(0o555)
    try:
        command = [sys.executable, "-c", OLD, str(public_folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert "was written by an older version of qhub and cannot be written here" in done.stdout
    finally:
        public_folder.chmod(0o755)


MIGRATE = """
from adapterhub_local.registry import Registry
registry = Registry()
assert len(registry.versions("a") + registry.versions("team/b")) == 3
registry.publish("new", {"f": b"x"}, {})
"""


@pytest.mark.parametrize("applied", range(1, len(MIGRATIONS)))
def test_processes_that_migrate_at_once(home: Home, applied: int) -> None:
    """Six processes that open an old database at the same moment all find it whole and up to date."""
    registry = Registry()
    made = small_store(registry)
    registry.database.close()
    for path in home.root.glob("registry.db*"):
        path.unlink()
    home.ledger.unlink()
    shutil.rmtree(home.changes)
    connection = sqlite3.connect(home.database)
    connection.executescript("".join(MIGRATIONS[:applied]) + f"PRAGMA user_version = {applied}")
    for version in made:
        lineage = registry.blobs.path(version.lineage_file.digest).read_text()
        columns = "name, number, manifest_digest, content_digest, base_fingerprint, created_at, manifest, lineage"
        connection.execute(
            f"INSERT INTO versions ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (version.name, version.number, version.manifest_digest, version.content_digest,
             version.base_fingerprint, version.created_at, version.manifest.decode(), lineage),
        )  # fmt: skip
    connection.commit()
    connection.close()
    processes = [subprocess.Popen([sys.executable, "-c", MIGRATE], stderr=subprocess.PIPE) for _ in range(6)]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, errors
    assert len(Registry().versions("new")) == 6
    rebuild(Registry())
    assert fsck(Registry()).is_clean


def test_all_of_it_on_a_path_with_spaces_and_other_letters(tmp_path: Path) -> None:
    """fsck, gc and rebuild work where the home's path has spaces, percent signs, question marks and umlauts."""
    registry = Registry(tmp_path / "mein Ördner %20?#" / "アダプタ")
    small_store(registry)
    assert fsck(registry).is_clean
    assert collect(registry, apply=True, grace=-1).num_blobs == 0
    assert rebuild(registry).num_versions == 3
    assert fsck(Registry(registry.home.root)).is_clean
