"""Remotes: a folder, and a real S3-speaking server. Nothing is sent twice, overwritten, or believed unchecked."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import Corrupt, NotFound, QhubError, RemoteError
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_layout import MARKER, all_numbers, blob_path, prepare, read_slot
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import Home
from tests.patience import PATIENCE
from tests.stores import CONFIG, LINEAGE, files, flip, weights
from tests.synced import named


def test_what_is_pushed_can_be_pulled(store: Store, merge: Version, tmp_path: Path) -> None:
    """A merge goes out and comes back with its parents, numbers and digests; again, nothing is sent or fetched."""
    plan = push(Registry(), store, [merge], dry_run=True)
    assert store.names("", deep=True) == []
    sent = push(Registry(), store, [merge])
    assert [(one.source, one.target, one.is_new) for one in sent] == [
        ("a@1", "a@1", True), ("team/b@1", "team/b@1", True), ("top@1", "top@1", True),
    ]  # fmt: skip
    # the config is the same in all three, and two versions have one lineage; a plan does not know what it will send
    assert [one.num_objects for one in plan] == [4, 4, 4]
    assert [one.num_objects for one in sent] == [4, 2, 3]
    assert not any(one.is_new or one.num_objects for one in push(Registry(), store, [merge], recheck=True))
    assert all_numbers(store) == {"a": [1], "team/b": [1], "top": [1]}

    other = Registry(tmp_path / "other")
    plan = pull(other, store, named("top"), dry_run=True)
    assert other.versions() == []
    pulled = pull(other, store, named("top"))
    assert [(one.target, one.is_new, one.num_bytes) for one in pulled] == [
        (one.target, one.is_new, one.num_bytes) for one in plan
    ]
    assert other.versions() == Registry().versions()
    assert other.resolve("top").path.is_dir()
    assert fsck(other).is_clean
    assert list(other.home.tmp.iterdir()) == []
    assert not any(one.is_new or one.num_objects for one in pull(other, store, named("top@1")))


def test_a_number_is_never_taken_from_another(store: Store, tmp_path: Path) -> None:
    """Two homes that both have a@1: the second gets the next number at the remote, and both find their own there."""
    mine, theirs = Registry(), Registry(tmp_path / "theirs")
    first = mine.publish("a", files(1), LINEAGE)
    second = theirs.publish("a", files(2), LINEAGE)
    assert push(mine, store, [first])[0].target == "a@1"
    (plan,) = push(theirs, store, [second], dry_run=True)
    (moved,) = push(theirs, store, [second])
    assert (plan.target, moved.target, moved.is_new) == ("a@2", "a@2", True)
    (again,) = push(theirs, store, [second])
    assert (again.target, again.is_new, again.num_objects) == ("a@2", False, 0)
    assert read_slot(store, "a", 1).manifest == first.manifest_digest
    (own,) = pull(theirs, store, named("a@2"))
    assert (own.target, own.is_new) == ("a@1", False)
    (came,) = pull(mine, store, named("a"))
    assert (came.target, came.is_new) == ("a@2", True)
    assert mine.resolve("a@2").content_digest == second.content_digest
    (back,) = push(mine, store, [mine.resolve("a@2")])
    assert (back.target, back.is_new) == ("a@2", False)
    (other,) = pull(theirs, store, named("a@1"))
    assert (other.target, other.is_new) == ("a@2", True)
    (back,) = push(theirs, store, [theirs.resolve("a@2")])
    assert (back.target, back.is_new) == ("a@1", False)
    assert fsck(mine).is_clean
    assert fsck(theirs).is_clean


def test_pushers_at_once_each_get_a_number(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushers that all found the same number free: one gets it, the others the next ones, and nothing is lost."""
    registries = [Registry(tmp_path / f"home-{index}") for index in range(4)]
    versions = [registry.publish("a", files(index), LINEAGE) for index, registry in enumerate(registries)]
    barrier = threading.Barrier(4, timeout=PATIENCE)
    lock = threading.Lock()  # the server in these tests looks and writes in two steps
    real = Store.create
    waited: set[int] = set()

    def create(self: Store, path: str, data: bytes) -> bool:
        if path.startswith("versions/") and threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            barrier.wait()
        if self.remote.folder is not None:
            return real(self, path, data)
        with lock:
            return real(self, path, data)

    prepare(store)
    monkeypatch.setattr(Store, "create", create)
    results: list[str] = []

    def work(index: int) -> None:
        results.append(push(registries[index], open_store(store.remote), [versions[index]])[0].target)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
    assert sorted(results) == ["a@1", "a@2", "a@3", "a@4"]
    other = Registry(tmp_path / "other")
    pull(other, store, named("a"), every=True)
    assert {one.content_digest for one in other.versions()} == {one.content_digest for one in versions}


def test_pulls_side_by_side(folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that ends while another runs in the same home takes away nothing that the other needs."""
    mine, theirs = Registry(), Registry(tmp_path / "theirs")
    push(mine, folder_store, [mine.publish("a", files(seed), LINEAGE) for seed in range(2)])
    real, begun = Store.blocks, []

    def blocks(self: Store, path: str, start: int = 0) -> Iterator[bytes]:
        if not begun:
            begun.append(path)
            pull(theirs, self, named("a@2"))
        return real(self, path, start)

    monkeypatch.setattr(Store, "blocks", blocks)
    pull(theirs, folder_store, named("a@1"))
    assert theirs.versions() == mine.versions()


def test_an_existing_object_is_not_replaced(store: Store) -> None:
    """`create` leaves what is there, says so, and takes its own earlier write for its own."""
    assert store.create("x/y", b"one")
    assert store.create("x/y", b"one")
    assert not store.create("x/y", b"two")
    assert not store.create("x/y", b"three")
    assert store.read("x/y", 10) == b"one"


def test_a_store_that_heeds_no_condition_is_refused(
    store: Store, merge: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that replaces what it was told to leave is found out before anything is pushed to it."""
    monkeypatch.setattr(Store, "create", lambda self, path, data: self.put(path, data) or True)
    with pytest.raises(QhubError, match="replaces what it was asked to keep"):
        push(Registry(), store, [merge])
    assert store.names("", deep=True) == []


def test_an_interrupted_pull_goes_on(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the connection broke is not fetched again; a beginning that went bad is."""
    registry, other = Registry(), Registry(tmp_path / "other")
    push(registry, store, [registry.publish("a", files(1), LINEAGE)])
    total = sum(file.size for file in registry.resolve("a").files)
    (largest,) = [file for file in registry.resolve("a").files if file.path.endswith(".safetensors")]
    real, asked = Store.blocks, []

    def broken(self: Store, path: str, start: int = 0) -> Iterator[bytes]:
        asked.append((path, start))
        data = b"".join(real(self, path, start))
        yield data[: len(data) // 2]
        if path == blob_path(largest.digest):
            raise RemoteError("the line is dead")
        yield data[len(data) // 2 :]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "blocks", broken)
        with pytest.raises(RemoteError):
            pull(other, store, named("a"))
    assert other.versions() == []
    kept = sum(path.stat().st_size for path in (other.home.tmp / "sync").iterdir())
    assert kept == total - largest.size + largest.size // 2

    def watched(self: Store, path: str, start: int = 0) -> Iterator[bytes]:
        asked.append((path, start))
        yield from real(self, path, start)

    asked.clear()
    monkeypatch.setattr(Store, "blocks", watched)
    (part,) = (other.home.tmp / "sync").glob("*.part")
    good = part.read_bytes()
    part.write_bytes(bytes(len(good)))
    pull(other, store, named("a"))
    assert asked == [(blob_path(largest.digest), len(good)), (blob_path(largest.digest), 0)]
    assert other.versions() == registry.versions()
    assert list(other.home.tmp.iterdir()) == []


def test_an_interrupted_push_goes_on(store: Store, merge: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that broke off shows nothing half-pushed; the next sends the rest only."""
    real, left = Store.put, 5

    def broken(self: Store, path: str, source: Path | bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RemoteError("the line is dead")
        real(self, path, source)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", broken)
        with pytest.raises(RemoteError):
            push(Registry(), store, [merge])
    assert all_numbers(store) == {"a": [1]}
    assert sum(one.num_objects for one in push(Registry(), store, [merge])) == 4


def test_damage_on_the_way_is_found(store: Store, merge: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that arrive changed at the remote are reported, the version is hidden there; --recheck repairs objects."""
    real = Store.put
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", lambda self, path, source: real(self, path, b"x" * 3))
        with pytest.raises(Corrupt, match="differs from what was sent"):
            push(Registry(), store, [merge])
    assert all_numbers(store) == {}
    push(Registry(), store, [merge])
    weights = next(file for file in merge.files if file.path.endswith(".safetensors"))
    store.put(blob_path(weights.digest), bytes(weights.size))
    assert not any(one.num_objects for one in push(Registry(), store, [merge]))
    assert sum(one.num_objects for one in push(Registry(), store, [merge], recheck=True)) == 1
    assert store.digest(blob_path(weights.digest)) == weights.digest


def test_pulling_again_repairs(folder_store: Store, merge: Version) -> None:
    """A version whose blob is damaged or gone is whole again after it was pulled."""
    store = folder_store
    registry = Registry()
    push(registry, store, [merge])
    for spoil in (lambda path: flip(path, 5), lambda path: path.unlink()):
        spoil(registry.blobs.path(merge.files[1].digest))
        assert not fsck(registry).is_clean
        assert [one.num_objects for one in pull(registry, store, named("top"))] == [1]
        assert fsck(registry).is_clean


FULL = """
import resource, sys
from adapterhub_local.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
run(sys.argv[2:])
"""


@pytest.mark.parametrize("verb", ["pull", "import", "push", "export"])
def test_a_full_disk_while_moving_versions(verb: str, home: Home, tmp_path: Path) -> None:
    """Pull, import, push and export that find no space say so with exit code 1, and leave nothing behind."""
    from adapterhub_local.registry.archive import write_archive

    registry = Registry()
    big = {"adapter_model.safetensors": weights(bytes(400_000)), "adapter_config.json": CONFIG}
    version = registry.publish("big", big, LINEAGE)
    target = tmp_path / "remote"
    store = open_store(add_remote(home, "team", str(target)))
    if verb in ("pull", "import"):
        push(registry, store, [version])
        write_archive(registry, version, tmp_path / "big.tar")
    other = Registry(tmp_path / "other")
    add_remote(other.home, "team", str(target))
    small = other.publish("small", files(1), LINEAGE)
    other.database.close()
    lines = {
        "pull": ["sync", "pull", "team", "big"], "import": ["import", str(tmp_path / "big.tar")],
        "push": ["sync", "push", "team", "big"], "export": ["export", "big", "--oci", str(tmp_path / "out.tar")],
    }  # fmt: skip
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "registry.db" not in path.name)
    where = other.home.root if verb in ("pull", "import") else home.root
    environment = {**os.environ, "QHUB_HOME": str(where)}
    # the database's files are larger than nothing: the limit is above them and below the weights
    command = [sys.executable, "-c", FULL, "300000", *lines[verb]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert "no space left" in done.stderr
    assert done.stderr.count("\n") == 1
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "registry.db" not in path.name)
    left = [path for path in after if path not in before and path.name != MARKER]
    if verb == "push":  # what came whole is there for the next push
        left = [path for path in left if digest_bytes(path.read_bytes()) != f"sha256:{path.name}"]
    assert left == []
    assert Registry(other.home).versions() == [small]
    assert fsck(Registry(other.home)).is_clean
    assert all_numbers(store) == ({"big": [1]} if verb in ("pull", "import") else {})


def test_too_little_space_is_told_before_anything_is_fetched(
    folder_store: Store, merge: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that cannot fit is refused at once."""
    store = folder_store
    push(Registry(), store, [merge])
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QhubError, match="no space for"):
        pull(Registry(tmp_path / "other"), store, named("top"))


def test_what_is_not_there_is_named(folder_store: Store, merge: Version, tmp_path: Path) -> None:
    """Unknown names and numbers, aliases, an empty remote, and digests."""
    store = folder_store
    registry, other = Registry(), Registry(tmp_path / "other")
    with pytest.raises(NotFound, match="remote show team"):
        pull(other, store, named("a"))
    push(registry, store, [merge])
    with pytest.raises(NotFound, match="has versions 1"):
        pull(other, store, named("a@2"))
    with pytest.raises(NotFound, match="has no alias 'a@prod': `qhub sync push team a --alias prod` makes it"):
        pull(other, store, named("a@prod"))
    digest = registry.resolve("a").manifest_digest[:30]
    assert [one.target for one in pull(other, store, named(f"a@{digest}"))] == ["a@1"]
    remove(other, other.resolve("a@1"))
    # its number stays taken forever
    assert [one.target for one in pull(other, store, named("a@1"))] == ["a@2"]


def test_numbers_with_gaps_are_kept(folder_store: Store, tmp_path: Path) -> None:
    """Pulling the seventh version of a team gives the seventh; earlier ones can follow, publishing goes on after."""
    store = folder_store
    from adapterhub_local.registry.rebuild import rebuild

    registry, other = Registry(), Registry(tmp_path / "other")
    versions = [registry.publish("a", files(seed), LINEAGE) for seed in range(3)]
    push(registry, store, versions)
    assert [one.target for one in pull(other, store, named("a"))] == ["a@3"]
    assert other.publish("a", files(9), LINEAGE).number == 4
    assert rebuild(other).num_versions == 2
    assert [one.target for one in pull(other, store, named("a"), every=True)] == ["a@1", "a@2", "a@3"]
    assert fsck(other).is_clean
