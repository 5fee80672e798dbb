"""Versions as one tar, out and in: the same digests, and nothing hostile gets through."""

import io
import json
import struct
import tarfile
from pathlib import Path

import pytest

from adapterhub_local.cli.main import run
from adapterhub_local.errors import BadFile, InUse, NotFound, QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.ancestry import ancestry, text
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.fsck import fsck
from tests.stores import CONFIG, LINEAGE, blob_paths, files, merged, weights


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A tar with a merge and its two parents."""
    registry = Registry()
    first, second = (registry.publish(name, files(seed), LINEAGE) for seed, name in ((1, "a"), (2, "b")))
    top = merged(registry, "top", (first, 0.5), (second, 0.5))
    write_archive(registry, top, tmp_path / "top.tar")
    return tmp_path / "top.tar"


def test_what_goes_out_comes_in_the_same(archive: Path, tmp_path: Path) -> None:
    """In an empty home every version keeps number and digests; importing again changes nothing."""
    other = Registry(tmp_path / "other")
    imported = read_archive(other, archive)
    assert [(str(done.version), done.is_new) for done in imported] == [("a@1", True), ("b@1", True), ("top@1", True)]
    assert other.versions() == Registry().versions()
    assert other.resolve("top").path.is_dir()
    assert not any(done.is_new for done in read_archive(other, archive))
    write_archive(other, other.resolve("top"), tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    assert fsck(other).is_clean
    with pytest.raises(InUse):
        write_archive(other, other.resolve("top"), archive)


def test_a_taken_number_is_not_taken_twice(archive: Path, tmp_path: Path) -> None:
    """Where the number belongs to something else the version gets the next one, and lineage still finds it."""
    other = Registry(tmp_path / "other")
    other.publish("a", files(9), LINEAGE)
    imported = read_archive(other, archive)
    assert [str(done.version) for done in imported] == ["a@2", "b@1", "top@1"]
    assert other.resolve("a@2").content_digest == Registry().resolve("a@1").content_digest
    assert any("a@2" in line for line in text(ancestry(other, other.resolve("top"))))
    assert not any(done.is_new for done in read_archive(other, archive))


def rewritten(archive: Path, target: Path, change: dict[str, bytes | None], extra: list | None = None) -> Path:
    """The tar with some entries replaced or left out, and others added."""
    with tarfile.open(archive) as source, tarfile.open(target, "w") as tar:
        for entry in source:
            data = source.extractfile(entry).read()
            for end, new in change.items():
                if entry.name.endswith(end):
                    data = new
            if data is not None:
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        for entry in extra or []:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return target


def odd(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """An entry that no archive of versions has."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    return entry


@pytest.mark.parametrize(
    "extra",
    [
        odd("../escaped"), odd("/tmp/escaped"), odd("blobs/sha256/../../escaped"), odd("notes.txt"), odd("index.json"),
        odd("blobs/sha256/" + "0" * 64), odd("blobs/sha256/" + "0" * 64, tarfile.SYMTYPE, "/etc/passwd"),
        odd("blobs/sha256/" + "0" * 64, tarfile.LNKTYPE, "index.json"), odd("pipe", tarfile.FIFOTYPE),
        odd("blobs/sha256/" + "1" * 64, tarfile.GNUTYPE_SPARSE),
    ],
    ids=lambda entry: f"{entry.name[:24]} {entry.type!r}",
)  # fmt: skip
def test_a_hostile_entry_is_refused(archive: Path, tmp_path: Path, extra: tarfile.TarInfo) -> None:
    """Paths out, links, devices, doubles, foreign names and wrong bytes: nothing is registered, nothing is left."""
    other = Registry(tmp_path / "other")
    with pytest.raises(QhubError):
        read_archive(other, rewritten(archive, tmp_path / "bad.tar", {}, [extra]))
    assert other.versions() == []
    assert list(other.home.tmp.iterdir()) == []
    assert not list(tmp_path.rglob("escaped"))


def test_damaged_and_incomplete_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    """A changed or missing blob, a cut file, another tar, no tar: an error, and nothing is registered."""
    other = Registry(tmp_path / "other")
    weights = Registry().resolve("b").files[1].digest.removeprefix("sha256:")
    elsewhere = json.dumps({"manifests": [{"digest": "../x"}]}).encode()
    changes: list[dict[str, bytes | None]] = [
        *({weights: b"changed"}, {weights: None}, {"oci-layout": None}),
        *({"index.json": data} for data in (b"[]", b"{", elsewhere, None)),
    ]
    for number, change in enumerate(changes):
        with pytest.raises(QhubError):
            read_archive(other, rewritten(archive, tmp_path / f"{number}.tar", change))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:5000])
    (tmp_path / "no.tar").write_bytes(b"no tar at all")
    for path in (cut, tmp_path / "no.tar"):
        with pytest.raises(BadFile):
            read_archive(other, path)
    with pytest.raises(NotFound):
        read_archive(other, tmp_path / "none.tar")
    assert other.versions() == []


NAN = struct.pack("<f", float("nan"))
UNSOUND = {
    "NaN or infinity": {"adapter_model.safetensors": weights(bytes(12) + NAN)},
    "damaged header": {"adapter_model.safetensors": weights().replace(b"lora_B", b"lora_A")},
    "is not a LoRA factor": {"adapter_model.safetensors": weights().replace(b"lora_B", b"lora_C")},
    "which target_modules": {"adapter_model.safetensors": weights().replace(b"q_proj", b"k_proj")},
    "has rank 1, its config says 2": {"adapter_config.json": CONFIG.replace(b'"r": 1', b'"r": 2')},
    "not supported": {"adapter_config.json": CONFIG.replace(b"{", b'{"lora_bias": true, ', 1)},
    "sets use_dora, but there are no": {"adapter_config.json": CONFIG.replace(b"{", b'{"use_dora": true, ', 1)},
    "does not carry its config": {"adapter_config.json": None},
    "extra bytes": {"adapter_model.safetensors": weights() + b"x"},
}


@pytest.mark.parametrize("told", UNSOUND)
def test_an_adapter_that_is_not_sound_is_not_imported(told: str, tmp_path: Path) -> None:
    """Digests may be right and the adapter wrong all the same: NaN, foreign tensors, a config that does not fit."""
    registry, other = Registry(), Registry(tmp_path / "other")
    changed = {name: data for name, data in {**files(1), **UNSOUND[told]}.items() if data is not None}
    write_archive(registry, registry.publish("a", changed, LINEAGE), tmp_path / "a.tar")
    with pytest.raises(BadFile, match=told) as caught:
        read_archive(other, tmp_path / "a.tar")
    assert "a.tar, a@1: adapter_" in str(caught.value)
    assert other.versions() == []
    assert blob_paths(other.home) == []


def test_export_and_import_on_the_command_line(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """export --oci says what is in the tar, import what it became."""
    target = str(tmp_path / "out.tar")
    for line, code, said in [
        (["export", "top", "--oci", target], 0, "a@1, b@1, top@1"),
        (["export", "top", "--oci", target], 2, "exists already"),
        (["import", target], 0, "top@1 here already"),
        (["import", str(tmp_path / "none.tar")], 2, "there is no file"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run(line)
        captured = capsys.readouterr()
        assert caught.value.code == code, captured.err
        assert said in captured.out + captured.err
