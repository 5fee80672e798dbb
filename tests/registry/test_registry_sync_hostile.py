"""Remotes that lie: nothing they say is believed unchecked, and nothing of it is left."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import Corrupt, QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry import pull as module
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remote_layout import all_numbers, blob_path, slot_path
from adapterhub_local.registry.remotes import add_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, blob_paths, files, merged
from tests.synced import named


def hostile(registry: Registry, store: Store, **changes: object) -> None:
    """Put `evil@1` at the remote, sound but for the changes, whose keys are paths of the manifest."""
    version = registry.publish("evil", files(7), LINEAGE)
    push(registry, store, [version])
    manifest = json.loads(version.manifest)
    for key, value in changes.items():
        table, *rest = key.split("__")
        part = manifest[table]
        for step in rest[:-1]:
            part = part[int(step) if step.isdigit() else step]
        part[rest[-1]] = value
    raw = canonical_json(manifest)
    store.put(blob_path(digest_bytes(raw)), raw)
    store.put(slot_path("evil", 1), canonical_json({"manifest": digest_bytes(raw), "origin": None}))


TITLE = "org.opencontainers.image.title"
# part of a manifest, its replacement, the exit code, a part of the message
LIES: list[tuple[str, object, int, str]] = [
    ("layers__0__annotations", {TITLE: "../../escaped"}, 2, "holds a manifest"),
    ("layers__0__annotations", {TITLE: "/escaped"}, 2, "holds a manifest"),
    ("layers__0__digest", "sha256:../../../../etc/passwd", 2, "holds a manifest"),
    ("layers__0__digest", "sha256:" + "0" * 64, 1, "is not there"),
    ("layers__0__size", 10**15, 1, "has 76 bytes"),
    ("layers__0__size", 1, 1, "has 76 bytes"),
    ("layers__0__size", -1, 2, "holds a manifest"),
    ("layers__0__size", "9", 2, "holds a manifest"),
    ("config__digest", "sha256:" + "0" * 64, 1, "lacks its manifest or lineage"),
    ("config__digest", "../x", 2, "is not a digest"),
    ("annotations__org.qhub.name", "../evil", 2, "is not a name"),
    ("annotations__org.qhub.name", "other", 1, "where 'evil@1' should be"),
    ("annotations__org.qhub.version", "2", 1, "where 'evil@1' should be"),
    ("annotations__org.opencontainers.image.created", "\u001b[31m", 2, "holds a manifest"),
]


@pytest.mark.parametrize(("part", "said", "code", "words"), LIES, ids=[f"{lie[0]}-{lie[1]}"[:50] for lie in LIES])
def test_a_manifest_that_lies_is_refused(
    part: str, said: object, code: int, words: str, home: Home, tmp_path: Path
) -> None:
    """Paths out of the folder, foreign digests, wrong and huge sizes: refused, and nothing is registered or left."""
    store = open_store(add_remote(home, "team", str(tmp_path / "remote")))
    hostile(Registry(), store, **{part: said})
    other = Registry(tmp_path / "other")
    with pytest.raises(QhubError, match=words) as caught:
        pull(other, store, named("evil"))
    assert caught.value.exit_code == code
    assert str(caught.value).isprintable()
    assert other.versions() == []
    assert blob_paths(other.home) == []
    assert list(other.home.tmp.iterdir()) == []
    assert not list(tmp_path.rglob("escaped"))


def test_objects_that_lie_are_refused(folder_store: Store, tmp_path: Path) -> None:
    """Changed, grown, cut and missing objects and slots, and a version in another's place: refused, nothing left."""
    store = folder_store
    registry, other = Registry(), Registry(tmp_path / "other")
    version, decoy = registry.publish("a", files(1), LINEAGE), registry.publish("b", files(2), LINEAGE)
    push(registry, store, [version, decoy])
    paths = [blob_path(digest) for digest in (version.manifest_digest, version.lineage_file.digest,
                                              *(file.digest for file in version.files))]  # fmt: skip
    slot = store.read(slot_path("a", 1), 1000)
    other_slot = store.read(slot_path("b", 1), 1000)
    for path in [*paths, slot_path("a", 1)]:
        good = store.read(path, 10_000)
        lies = [good[:-1], good + b"x", bytes([good[0] ^ 1]) + good[1:], b"", b"x" * 5000]
        for lie in [*lies, *([other_slot, b"[]"] if path == slot_path("a", 1) else [])]:
            store.put(path, lie)
            with pytest.raises(QhubError):
                pull(other, store, named("a"))
        store.remove(path)
        with pytest.raises(QhubError):
            pull(other, store, named("a"))
        store.put(path, good)
    assert store.read(slot_path("a", 1), 1000) == slot
    assert other.versions() == []
    assert blob_paths(other.home) == []
    assert list(other.home.tmp.iterdir()) == []
    store.put("versions/UPPER/@1", slot)
    store.put("versions/a/@0", slot)
    assert all_numbers(store) == {"a": [1], "b": [1]}
    assert [one.is_new for one in pull(other, store, named("a"))] == [True]


def test_a_remote_that_sends_more_than_it_said_is_cut_off(
    folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object without end is not read to its end: the fetch stops when there is more than the manifest says."""
    store = folder_store
    registry, other = Registry(), Registry(tmp_path / "other")
    push(registry, store, [registry.publish("a", files(1), LINEAGE)])
    given = 0

    def endless(self: Store, path: str, start: int = 0) -> Iterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield b"x" * 50

    monkeypatch.setattr(Store, "blocks", endless)
    with pytest.raises(Corrupt, match="does not match the digest in its name"):
        pull(other, store, named("a"))
    assert given < 20
    assert list(other.home.tmp.iterdir()) == []


def test_parents_without_end_are_refused(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote whose versions have ever more parents is cut off."""
    registry, other = Registry(), Registry(tmp_path / "other")
    store = open_store(add_remote(home, "team", str(tmp_path / "remote")))
    top = registry.publish("a", files(0), LINEAGE)
    for seed in range(1, 6):
        top = merged(registry, f"m{seed}", (top, 1.0))
    push(registry, store, [top])
    monkeypatch.setattr(module, "MAX_VERSIONS", 4)
    with pytest.raises(Corrupt, match="more than 4"):
        pull(other, store, named("m5"))
    monkeypatch.setattr(module, "MAX_VERSIONS", 6)
    assert len(pull(other, store, named("m5"))) == 6
