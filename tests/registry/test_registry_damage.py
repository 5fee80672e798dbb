"""Bytes of the database changed anywhere, disks that fail, limits that are reached, and repairs that meet."""

import errno
import os
import random
import resource
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub_local.errors import Corrupt, InputError, QhubError
from adapterhub_local.registry import Registry, mounts
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.settings import Home
from tests.stores import LINEAGE, blob_paths, files, flip, small_store


@pytest.fixture
def data(home: Home) -> bytes:
    """The bytes of a database of three versions, all in the one file."""
    registry = Registry()
    small_store(registry)
    registry.database.close()
    with closing(sqlite3.connect(home.database)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return home.database.read_bytes()


def placed(home: Home, data: bytes) -> Registry:
    """The home with another database."""
    for path in home.root.glob("registry.db*"):
        path.unlink()
    home.database.write_bytes(data)
    return Registry()


def refusals(registry: Registry) -> list[str]:
    """What the reading of a damaged database is refused with, where it is."""
    said = []
    for read, *arguments in ((registry.versions,), (registry.resolve, "a@1"), (registry.aliases, "a")):
        try:
            read(*arguments)
        except QhubError as error:
            said.append(str(error))
    return said


def test_any_damaged_byte_is_survived(home: Home, data: bytes) -> None:
    """Header, schema and rows: reading is right or a sentence, and a rebuild always gives back every version."""
    rng = random.Random(15)
    first = data.index(b"CREATE TABLE versions")
    places = [*range(0, 100, 3), *range(first, first + 60, 4), *(rng.randrange(len(data)) for _ in range(40))]
    for place in places:
        changed = bytearray(data)
        changed[place] = rng.choice([0xFF, 0x00, changed[place] ^ 1, changed[place] ^ 0x80])
        registry = placed(home, bytes(changed))
        assert all("registry.db" in said for said in refusals(registry)), place
        registry.database.close()
        fsck(Registry())
        rebuild(Registry())
        again = Registry()
        assert [str(one) for one in again.versions()] == ["a@1", "a@2", "team/b@1"], place
        assert again.aliases("a") == {"prod": 1}, place
        assert again.metrics(again.resolve("a@2"))["task"]["adapter"]["exact_match"] == 0.5, place
        assert fsck(again).is_clean, place
        again.database.close()


@pytest.mark.parametrize("text", [b"CREATE TABLE versions", b"manifest_digest TEXT", b"CREATE TRIGGER versions_keep"])
def test_a_schema_that_is_not_utf8(home: Home, data: bytes, text: bytes) -> None:
    """SQLite's own message cannot be decoded then: it is a sentence all the same, and the repair works."""
    registry = placed(home, data.replace(text, b"\xff" + text[1:]))
    with pytest.raises(Corrupt, match="fsck --rebuild-db"):
        registry.versions()
    registry.database.close()
    assert not fsck(Registry()).is_clean
    assert fsck(Registry(), repair=True).is_repaired
    assert len(Registry().versions()) == 3
    assert fsck(Registry()).is_clean


REPAIR = """
from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
import sys, time
time.sleep(max(0, float(sys.argv[1]) - time.time()))
report = fsck(Registry(), repair=True)
print(report.is_repaired)
"""


def test_three_repairs_at_once_all_end_well(home: Home) -> None:
    """Damaged, foreign and missing blobs repaired by three processes at the same moment: none fails."""
    import time

    registry = Registry()
    versions = small_store(registry)
    kept = {file.digest for version in versions for file in version.files}
    for path in blob_paths(home):
        if f"sha256:{path.name}" not in kept:
            flip(path, 5)
    (home.blobs / "ab").mkdir(exist_ok=True)
    for number in range(20):
        (home.blobs / "ab" / f"note-{number}.txt").write_text("hello")
    registry.database.close()
    moment = str(time.time() + 4)
    processes = [
        subprocess.Popen([sys.executable, "-c", REPAIR, moment], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs == [b"True\n"] * 3
    assert fsck(Registry()).is_clean


def limited(code: str, limit: str) -> str:
    """What a process prints that lowers a limit once everything is imported."""
    script = (
        "import resource, sys\n"
        "from adapterhub_local.errors import QhubError\n"
        "from adapterhub_local.cli import list, show, path, main, fsck, alias\n"
        "from adapterhub_local.registry import Registry, catalog, marks, fsck, rebuild, gc\n"
        "from tests.stores import LINEAGE, files\n"
        f"{limit}\n"
        f"try:\n    {code}\nexcept (QhubError, OSError) as error:\n    print('said', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("spare", range(6))
def test_too_few_files_may_be_open(spare: int) -> None:
    """A publish that may not open another file says so, and nothing is lost or half there."""
    registry = Registry()
    before = registry.publish("a", files(1), LINEAGE)
    registry.database.close()
    limit = (
        f"import os; n = len(os.listdir('/proc/self/fd')) - 1 + {spare}; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))"
    )
    said = limited("print('made', Registry().publish('a', files(2), LINEAGE))", limit)
    assert said.startswith(("said", "made")), said
    assert "rebuild" not in said
    registry = Registry()
    assert registry.versions()[0] == before
    assert fsck(registry).is_clean
    assert registry.publish("a", files(3), LINEAGE).number == (3 if said.startswith("made") else 2)


def test_advice_for_a_limit_is_not_a_rebuild() -> None:
    """Where SQLite may not write, nobody is sent to make a sound database again."""
    registry = Registry()
    registry.publish("a", files(1), LINEAGE)
    registry.database.close()
    limit = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    )
    said = limited("print(Registry().set_alias('a', 'prod', 1))", limit)
    assert said.startswith("said"), said
    assert "rebuild" not in said
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0
    assert fsck(Registry()).is_clean


MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/team\\040share rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2
31 22 0:41 / /mnt/ssh rw - fuse.sshfs me@host:/ rw
32 30 0:42 / /mnt/team\\040share/local rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/home/me", "ext4"), ("/mnt/team share/home", "nfs4"), ("/mnt/team share", "nfs4"), ("/mnt/team shared", "ext4"),
     ("/mnt/team share/local/x", "tmpfs"), ("/mnt/ssh/a/b", "fuse.sshfs"), ("/mnt/sshd", "ext4")],
)  # fmt: skip
def test_the_filesystem_of_a_folder(folder: str, kind: str) -> None:
    """The longest mount point above a folder says on what it is, spaces in it included."""
    assert mounts.filesystem_of(folder, MOUNTINFO) == kind


def test_a_home_on_a_network_is_refused(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home on NFS is not written, and the message says where to keep it and how to share; nothing is made there."""
    table = tmp_path / "mountinfo"
    table.write_text(f"22 1 0:1 / / rw - ext4 x rw\n30 22 0:40 / {tmp_path} rw - nfs4 server:/export rw\n")
    monkeypatch.setattr(mounts, "MOUNTS", table)
    with pytest.raises(InputError, match=r"is on nfs4.*qhub remote add") as caught:
        Registry().publish("a", files(1), LINEAGE)
    assert "QHUB_HOME" in str(caught.value)
    assert not home.database.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fchmod", "fsync", "rename"])
def test_a_disk_that_fails_loses_nothing(number: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publish that the disk fails at says so and leaves the home as it was; the next one gets its number."""
    registry = Registry()
    before = small_store(registry)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((QhubError, OSError)) as caught:
            registry.publish("a", files(9), LINEAGE)
    assert "space" in str(caught.value) or os.strerror(number) in str(caught.value)
    assert registry.versions() == before
    assert list(registry.home.tmp.iterdir()) == []
    assert fsck(registry).is_clean
    assert registry.publish("a", files(9), LINEAGE).number == 3
