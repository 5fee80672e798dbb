"""Removing versions and collecting what nothing needs: never what something does."""

import threading

import pytest

from adapterhub_local.cli.main import run
from adapterhub_local.errors import Corrupt, InUse, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect, lease, release, remove
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, blob_paths, files, small_store


def test_a_needed_version_is_not_removed(home: Home) -> None:
    """An alias or a merge that came from it keeps a version, unless forced; then the alias goes too, logged."""
    registry = Registry()
    first, second, child = small_store(registry)
    with pytest.raises(InUse, match="a@prod"):
        remove(registry, first)
    registry.set_alias("a", "prod", 2)
    with pytest.raises(InUse, match="parent of team/b@1"):
        remove(registry, first)
    remove(registry, child)
    remove(registry, first)
    with pytest.raises(NotFound):
        registry.resolve("a@1")
    remove(registry, second, force=True)
    assert registry.aliases("a") == {}
    assert registry.versions() == []
    assert fsck(registry).is_clean


def test_a_removed_number_is_never_used_again(home: Home) -> None:
    """Not by the next version, and not after the database was made again from blobs alone."""
    registry = Registry()
    for seed in (1, 2):
        registry.publish("a", files(seed), LINEAGE)
    remove(registry, registry.resolve("a@2"))
    collect(registry, apply=True, grace=-1)
    registry.database.close()
    for path in home.root.glob("registry.db*"):
        path.unlink()
    rebuild(registry)
    assert [str(version) for version in registry.versions()] == ["a@1"]
    assert registry.publish("a", files(3), LINEAGE).number == 3
    assert fsck(registry).is_clean


def test_only_what_nothing_needs_is_collected(home: Home) -> None:
    """A dry run changes nothing; files of removed versions go, what others share or what is young stays."""
    registry = Registry()
    versions = small_store(registry)
    _ = versions[1].path
    remove(registry, versions[1], force=True)
    before = blob_paths(home)
    assert collect(registry, apply=True).num_blobs == 0  # everything is young
    dry = collect(registry, grace=-1)
    assert (dry.num_blobs, dry.applied, blob_paths(home)) == (1, False, before)
    done = collect(registry, apply=True, grace=-1)
    assert (done.num_blobs, done.blob_bytes) == (dry.num_blobs, dry.blob_bytes)
    gone = registry.blobs.path(versions[1].files[1].digest)
    assert set(before) - set(blob_paths(home)) == {gone}
    assert [path.name for path in home.quarantine.iterdir()] == [f"{gone.name}.unused"]
    assert list(home.folders.iterdir()) == []
    assert registry.resolve("a@1").path.is_dir()
    assert fsck(registry).is_clean
    assert collect(registry, apply=True, purge=-1).num_purged == 1
    assert list(home.quarantine.iterdir()) == []


def test_leftovers_of_a_crash_are_collected(home: Home) -> None:
    """Blobs without a version and old temporary files go; young ones stay."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE)
    registry.blobs.put("orphan", b"left behind")
    (home.tmp / "half").write_bytes(b"x")
    assert fsck(registry).num_unreferenced == 1
    assert fsck(registry).is_clean
    assert collect(registry, apply=True, grace=-1).num_blobs == 1
    assert (home.tmp / "half").exists()
    assert fsck(registry).num_unreferenced == 0


def test_a_lease_keeps_content(home: Home) -> None:
    """What a running server leased is not collected before the lease ends or is given back."""
    registry = Registry()
    version = registry.publish("a", files(1), LINEAGE)
    lease(registry, version, "server 1", 60)
    remove(registry, version)
    assert collect(registry, apply=True, grace=-1).num_blobs == 0
    release(registry, "server 1")
    lease(registry, version, "server 2", -1)
    assert collect(registry, apply=True, grace=-1).num_blobs == 2


def test_nothing_is_collected_without_a_sound_database(home: Home) -> None:
    """Where it is not known what is needed, everything is kept."""
    registry = Registry()
    small_store(registry)
    registry.database.close()
    home.database.write_bytes(b"nothing" * 1000)
    for path in home.root.glob("registry.db-*"):
        path.unlink()
    before = blob_paths(home)
    with pytest.raises(Corrupt, match="Nothing was collected"):
        collect(Registry(), apply=True, grace=-1)
    assert blob_paths(home) == before


def test_publishing_while_collecting_loses_nothing(home: Home) -> None:
    """Versions of bytes that lay unreferenced, published while gc sweeps without grace, are whole."""
    registry = Registry()
    stop = threading.Event()
    failures: list[Exception] = []

    def sweep() -> None:
        own = Registry()
        try:
            while not stop.wait(0.01):  # leaves the write lock to the publisher now and then
                collect(own, apply=True, grace=-1, purge=-1)
        except Exception as error:
            failures.append(error)
        finally:
            own.database.close()

    registry.publish("other", files(0), LINEAGE)
    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        for turn in range(10):
            version = registry.publish("a", files(1), {**LINEAGE, "turn": turn})
            assert version.path.is_dir()
            remove(registry, version)
    finally:
        stop.set()
        thread.join()
    assert failures == []
    registry.publish("a", files(1), LINEAGE)
    assert fsck(registry).problems == []


def test_the_verbs_say_it(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """rm and gc on the command line."""
    small_store(Registry())
    for line, code, said in [
        ("rm a", 2, "say which version"),
        ("rm a@2", 0, "removed a@2"),
        ("rm a@1", 2, "a@prod"),
        ("gc --grace 0", 0, "would be set aside"),
        ("gc --grace 0 --apply", 0, "1 blobs"),
        ("fsck", 0, "2 versions"),
        ("verify", 0, "2 versions verified"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run(line.split())
        captured = capsys.readouterr()
        assert caught.value.code == code, captured.err
        assert said in captured.out + captured.err
