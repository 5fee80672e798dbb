"""A table of hostile and broken archives, each with the refusal it must get; nothing of them is ever registered."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.archive import LAYOUT, read_archive, write_archive
from adapterhub_local.registry.version import File, Version
from adapterhub_local.settings import Home
from tests.patience import ends
from tests.stores import CONFIG, LINEAGE, files, weights

Entries = dict[str, bytes]
WEIGHTS, JSON = "adapter_model.safetensors", "adapter_config.json"


def blob(data: bytes) -> str:
    """The name of a blob in an archive."""
    return f"blobs/sha256/{digest_bytes(data).removeprefix('sha256:')}"


def layout(manifest: bytes, *others: bytes, index: Any = None) -> Entries:
    """An archive with one manifest and some blobs."""
    named = {"manifests": [{"digest": digest_bytes(manifest)}]} if index is None else index
    data = named if isinstance(named, bytes) else json.dumps(named).encode()
    return {"oci-layout": LAYOUT, "index.json": data, **{blob(one): one for one in (manifest, *others)}}


def version(lineage: Any = None, given: dict[str, bytes] | None = None, **fields: Any) -> Entries:
    """An archive of one version whose digests are right, with another lineage, other files or other fields."""
    contents = given if given is not None else {name: bytes(data) for name, data in files(1).items()}  # type: ignore[arg-type]
    raw = canonical_json(LINEAGE if lineage is None else lineage)
    made = Version("a", 1, "2026-01-01T00:00:00.000000Z", tuple(File.of(*item) for item in contents.items()),
                   File.of("lineage.json", raw), LINEAGE)  # fmt: skip
    manifest = json.loads(made.manifest)
    for path, value in fields.items():
        target = manifest
        *parts, last = path.split("__")
        for part in parts:
            target = target[int(part) if part.isdigit() else part]
        target[last.replace("_", ".")] = value
    return layout(canonical_json(manifest), raw, *contents.values())


def changed(entries: Entries, **change: bytes | None) -> Entries:
    """An archive with some entries replaced or left out."""
    return {name: data for name, data in ({**entries, **change}).items() if data is not None}


def without(kind: str) -> Entries:
    """A sound archive but for one entry: that of the weights, the lineage or the manifest."""
    entries = version()
    gone = {"weights": blob(bytes(files(1)[WEIGHTS])), "lineage": blob(canonical_json(LINEAGE))}  # type: ignore[arg-type]
    manifest = next(name for name, data in entries.items() if b"schemaVersion" in data)
    del entries[{**gone, "manifest": manifest}[kind]]
    return entries


def annotated(key: str, value: Any) -> Entries:
    """A sound archive but for one annotation of its manifest."""
    return version(**{f"annotations__{key.replace('.', '_')}": value})


DEEP = b"[" * 100_000 + b"]" * 100_000
ABSENT = {"manifests": [{"digest": "sha256:" + "0" * 64}]}
MANY = {"manifests": [{"digest": "sha256:" + f"{number:064x}"} for number in range(1001)]}
OTHER = {**LINEAGE, "kind": "\x1b[2J"}
# what is refused, by what the refusal says
CONTENTS: dict[str, tuple[Callable[[], Entries], str]] = {
    "nothing": (dict, "in the OCI layout"),
    "no layout": (lambda: {k: v for k, v in version().items() if k != "oci-layout"}, "no oci-layout"),
    "no index": (lambda: {k: v for k, v in version().items() if k != "index.json"}, "no index.json"),
    "index is a list": (lambda: {**version(), "index.json": b"[]"}, "no index.json with manifests"),
    "index is cut": (lambda: {**version(), "index.json": b"{"}, "in the OCI layout"),
    "index is empty": (lambda: {**version(), "index.json": b'{"manifests":[]}'}, "with manifests"),
    "index is deep": (lambda: {**version(), "index.json": DEEP}, "in the OCI layout"),
    "index is not UTF-8": (lambda: {**version(), "index.json": b"\xff\xfe{}"}, "in the OCI layout"),
    "index is huge": (lambda: {**version(), "index.json": b" " * (17 << 20)}, "no archive needs that"),
    "index without digest": (lambda: {**version(), "index.json": b'{"manifests":[{}]}'}, "does not name its manifests"),
    "index with a number": (lambda: {**version(), "index.json": b'{"manifests":[{"digest":1}]}'}, "does not name"),
    "index with a path": (lambda: {**version(), "index.json": b'{"manifests":[{"digest":"../x"}]}'}, "does not name"),
    "index of upper case": (lambda: layout(b"{}", index={"manifests": [{"digest": "sha256:" + "A" * 64}]}), "not name"),
    "index of many": (lambda: layout(b"{}", index=MANY), "more than 1,000 versions"),
    "index of what is absent": (lambda: layout(b"{}", index=ABSENT), "holds a manifest"),
    "manifest is a list": (lambda: layout(b"[]"), "holds a manifest"),
    "manifest is text": (lambda: layout(b"text"), "holds a manifest"),
    "manifest is deep": (lambda: layout(DEEP), "holds a manifest"),
    "manifest without layers": (lambda: version(layers=None), "holds a manifest"),
    "manifest with more": (lambda: version(extra=1), "holds a manifest"),
    "manifest of another type": (lambda: version(artifactType="x"), "holds a manifest"),
    "name goes up": (lambda: version(annotations__org_qhub_name="../up"), "cannot be here"),
    "name is absolute": (lambda: version(annotations__org_qhub_name="/etc/a"), "cannot be here"),
    "name has an escape": (lambda: version(annotations__org_qhub_name="a\x1b[2J"), "cannot be here"),
    "name is long": (lambda: version(annotations__org_qhub_name="a" * 200), "cannot be here"),
    "number is zero": (lambda: version(annotations__org_qhub_version="0"), "holds a manifest"),
    "number is negative": (lambda: version(annotations__org_qhub_version="-1"), "holds a manifest"),
    "number is too high": (lambda: version(annotations__org_qhub_version=str(2**31)), "holds a manifest"),
    "number is long": (lambda: version(annotations__org_qhub_version="9" * 5000), "holds a manifest"),
    "number is not plain": (lambda: version(annotations__org_qhub_version="0x1"), "holds a manifest"),
    "time is not one": (lambda: version(annotations__org_opencontainers_image_created="now"), "holds a manifest"),
    "file goes up": (lambda: version(layers__0__annotations={"org.opencontainers.image.title": "../x"}), "manifest"),
    "file is hidden": (lambda: version(layers__0__annotations={"org.opencontainers.image.title": ".x"}), "manifest"),
    "file has another size": (lambda: version(layers__0__size=3), "does not hold"),
    "file has a negative size": (lambda: version(layers__0__size=-3), "holds a manifest"),
    "file twice": (lambda: version(layers__1__annotations={"org.opencontainers.image.title": WEIGHTS}), "manifest"),
    "no weights": (lambda: without("weights"), "does not hold"),
    "no lineage": (lambda: without("lineage"), "holds a manifest"),
    "no manifest": (lambda: without("manifest"), "holds a manifest"),
    "lineage is a list": (lambda: version([1]), "holds a manifest"),
    "lineage with an escape": (lambda: version(OTHER), "holds a manifest"),
    "lineage with odd parents": (lambda: version({**LINEAGE, "parents": [1]}), "holds a manifest"),
    "lineage with odd metrics": (lambda: version({**LINEAGE, "metrics": {"t": 1}}), "holds a manifest"),
    "weights are cut": (lambda: version(given={WEIGHTS: weights()[:-3], JSON: CONFIG}), "adapter_model"),
    "weights are a pickle": (lambda: version(given={WEIGHTS: b"\x80\x04x" * 9, JSON: CONFIG}), "adapter_"),
    "config is deep": (lambda: version(given={WEIGHTS: weights(), JSON: DEEP}), "adapter_config"),
    "a stranger's file": (lambda: {**version(), "notes.txt": b"x"}, "which no archive of versions has"),
    "a file outside": (lambda: {**version(), "../escaped": b"x"}, "which no archive of versions has"),
    "an absolute file": (lambda: {**version(), "/escaped": b"x"}, "which no archive of versions has"),
    "a blob of another name": (lambda: {**version(), "blobs/sha256/" + "0" * 64: b"x"}, "has other bytes"),
    "a blob of sha512": (lambda: {**version(), "blobs/sha512/" + "0" * 128: b"x"}, "which no archive of versions has"),
}  # fmt: skip


# what was whole once, as far as anybody can tell, and has been damaged since: the request was sound
DAMAGED = frozenset(["file has another size", "no weights", "a blob of another name", "torn"])


def exit_code(what: str) -> int:
    """What the command line ends with."""
    return 1 if what in DAMAGED else 2


def pack(entries: Entries, target: Path, *, prefix: str = "", mode: str = "w") -> Path:
    """A tar of these entries."""
    with tarfile.open(target, mode) as tar:  # type: ignore[call-overload]
        for name, data in entries.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return target


def unpack(entries: Entries, target: Path) -> Path:
    """A folder of these entries."""
    for name, data in entries.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


def refused(source: Path, home: Home, match: str, exit_code: int) -> None:
    """Reading it fails with that sentence and exit code, soon, and leaves nothing."""
    with ends(), pytest.raises(QhubError, match=match) as caught:
        read_archive(Registry(home), source)
    assert caught.value.exit_code == exit_code
    assert not any(ord(letter) < 32 for letter in str(caught.value)), caught.value
    assert not Registry(home).versions()
    assert not home.tmp.exists() or not list(home.tmp.iterdir())
    assert not list(home.root.parent.rglob("escaped"))


@pytest.mark.parametrize("what", CONTENTS)
def test_hostile_contents_are_refused(what: str, home: Home, tmp_path: Path) -> None:
    """Whatever is wrong inside an archive is refused with its reason, and nothing is registered or left behind."""
    make, said = CONTENTS[what]
    refused(pack(make(), tmp_path / "bad.tar"), home, said, exit_code(what))


def special(kind: bytes, name: str, link: str = "") -> Callable[[Path], Path]:
    """A sound tar with one entry that is not a plain file."""

    def make(folder: Path) -> Path:
        target = pack(version(), folder / "bad.tar")
        with tarfile.open(target, "a") as tar:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, link
            tar.addfile(entry)
        return target

    return make


def cut(folder: Path) -> Path:
    """A tar that ends in the middle."""
    target = pack(version(), folder / "bad.tar")
    target.write_bytes(target.read_bytes()[:3000])
    return target


def twice(folder: Path) -> Path:
    """A tar with the same name twice."""
    target = pack(version(), folder / "bad.tar")
    with tarfile.open(target, "a") as tar:
        tar.addfile(tarfile.TarInfo("./index.json"), io.BytesIO())
    return target


def bomb(folder: Path) -> Path:
    """A small .tgz that would unpack to a gigabyte."""
    data = bytes(1 << 20)
    with gzip.open(folder / "bad.tgz", "wb", compresslevel=9) as out:
        entry = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
        entry.size = 1 << 30
        out.write(entry.tobuf())
        for _ in range(1 << 8):
            out.write(data)
    return folder / "bad.tgz"


def torn(folder: Path) -> Path:
    """A .tgz with damaged bytes."""
    target = pack(version(), folder / "bad.tgz", mode="w:gz")
    data = bytearray(target.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    target.write_bytes(data)
    return target


def written(data: bytes) -> Callable[[Path], Path]:
    """A file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / "bad.tar").write_bytes(data)
        return folder / "bad.tar"

    return make


def linked(folder: Path) -> Path:
    """A folder whose index is a link out of it."""
    target = unpack(version(), folder / "bad")
    (target / "index.json").rename(folder / "index.json")
    (target / "index.json").symlink_to(folder / "index.json")
    return target


def piped(folder: Path) -> Path:
    """A folder with a FIFO."""
    target = unpack(version(), folder / "bad")
    os.mkfifo(target / "pipe")
    return target


def fifo(folder: Path) -> Path:
    """A FIFO that nobody writes to."""
    os.mkfifo(folder / "bad.tar")
    return folder / "bad.tar"


CONTAINERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "link": (special(tarfile.SYMTYPE, "blobs/sha256/" + "0" * 64, "/etc/passwd"), "not a plain file"),
    "hard link": (special(tarfile.LNKTYPE, "blobs/sha256/" + "0" * 64, "index.json"), "not a plain file"),
    "fifo": (special(tarfile.FIFOTYPE, "pipe"), "not a plain file"),
    "device": (special(tarfile.CHRTYPE, "null"), "not a plain file"),
    "block device": (special(tarfile.BLKTYPE, "disk"), "not a plain file"),
    "sparse": (special(tarfile.GNUTYPE_SPARSE, "blobs/sha256/" + "1" * 64), "not a plain file"),
    "folder": (special(tarfile.DIRTYPE, "../escaped"), "not a plain file"),
    "cut": (cut, "in the OCI layout"),
    "twice": (twice, "holds 'index.json' twice"),
    "bomb": (bomb, "unpacks to more than"),
    "torn": (torn, "."),
    "empty file": (written(b""), "in the OCI layout"),
    "text": (written(b"not a tar at all"), "in the OCI layout"),
    "zip": (written(b"PK\x03\x04" + bytes(600)), "in the OCI layout"),
    "gzip of nothing": (written(gzip.compress(b"")), "in the OCI layout"),
    "folder with a link": (linked, "not a plain file"),
    "folder with a fifo": (piped, "not a plain file"),
    "a fifo": (fifo, "is not a file that can be read"),
    "a device": (lambda folder: Path("/dev/zero"), "is not a file that can be read"),
    "absent": (lambda folder: folder / "none.tar", "there is no file"),
}


@pytest.mark.parametrize("what", CONTAINERS)
def test_hostile_containers_are_refused(what: str, home: Home, tmp_path: Path) -> None:
    """Links, devices, cut files, bombs and what is not an archive are refused, without reading what they point to."""
    make, said = CONTAINERS[what]
    refused(make(tmp_path), home, said, exit_code(what))


def test_the_corpus_is_large_enough() -> None:
    """The table has at least forty members of either kind together."""
    assert len(CONTENTS) + len(CONTAINERS) >= 70


@pytest.mark.parametrize("form", ["tar", "packed again", "zipped", "folder"])
def test_an_archive_may_be_packed_in_any_way(form: str, tmp_path: Path) -> None:
    """A tar, one that was unpacked and packed again, a .tgz, and the folder itself give the same versions."""
    registry = Registry()
    made = registry.publish("a", files(1), LINEAGE)
    write_archive(registry, made, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "a", filter="data")
    source = tmp_path / "a.tar"
    if form == "folder":
        source = tmp_path / "a"
    elif form != "tar":
        source = tmp_path / "again.tgz"
        with tarfile.open(source, "w:gz" if form == "zipped" else "w") as tar:
            tar.add(tmp_path / "a", arcname=".")
    (done,) = read_archive(Registry(tmp_path / "other"), source)
    assert done.version == made


def test_an_index_that_names_one_version_many_times(tmp_path: Path) -> None:
    """Twenty thousand mentions of one version are one version, read once."""
    entries = version()
    index = json.loads(entries["index.json"])
    entries["index.json"] = json.dumps({"manifests": index["manifests"] * 20_000}).encode()
    with ends():
        assert len(read_archive(Registry(tmp_path / "other"), pack(entries, tmp_path / "many.tar"))) == 1


def test_a_version_number_that_leaves_none_after_it(tmp_path: Path) -> None:
    """The highest number there can be is not taken from an archive, so the next publish has one."""
    entries = version(annotations__org_qhub_version=str(2**31 - 1))
    registry = Registry(tmp_path / "other")
    (done,) = read_archive(registry, pack(entries, tmp_path / "high.tar"))
    assert (str(done.version), done.reference) == ("a@1", f"a@{2**31 - 1}")
    assert registry.publish("a", files(2), LINEAGE).number == 2
