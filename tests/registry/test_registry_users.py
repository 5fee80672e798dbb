"""A home that several users share, and one that nobody may write: two real users, so root is needed to be both."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
from tests.stores import small_store

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="being two users needs root")
TEAM, ALICE, BOB = 31000, 31001, 31002

# Everything is imported before root becomes somebody else, who may not be able to read where Python is.
BECOME = """
import os, sys
from adapterhub_local.cli import main, list, show, fsck, path, export, gc, verify, alias, lineage
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry, ancestry, archive, blobs, catalog, fsck, gc, marks, rebuild
from tests.stores import LINEAGE, files, weights
import adapterhub_local.registry.split, encodings.idna, rich.console, rich.table, rich.box, tarfile
user, team, mask = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3], 8)
os.setgroups([team]); os.setresgid(user, user, user); os.setresuid(user, user, user); os.umask(mask)
"""
VERBS = """
for line in sys.argv[4:]:
    try:
        main.run(line.split())
    except SystemExit as end:
        print("exit", end.code or 0, flush=True)
"""
PUBLISH = """
for turn in range(int(sys.argv[4])):
    made = {"adapter_model.safetensors": weights(os.urandom(16)), "adapter_config.json": b"{}"}
    print(Registry().publish("a", made, LINEAGE, alias=f"of-{user}").number, flush=True)
"""


def start(
    code: str, user: int, home: Path, *arguments: str, mask: str = "002", imports: str = ""
) -> subprocess.Popen[str]:
    """A process of a user who is in the team."""
    command = [sys.executable, "-c", imports + BECOME + code, str(user), str(TEAM), mask, *arguments]
    environment = {**os.environ, "QHUB_HOME": str(home), "HOME": str(home.parent / str(user)), "XDG_CACHE_HOME": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def verbs(user: int, home: Path, *lines: str, mask: str = "002") -> str:
    """What a user's verbs print, and their exit codes."""
    return start(VERBS, user, home, *lines, mask=mask).communicate(timeout=120)[0]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user of the machine may enter, with a place for each user's own files."""
    with tempfile.TemporaryDirectory(prefix="qhub-test-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:
        os.chmod(folder, 0o755)
        for user in (ALICE, BOB):
            (Path(folder) / str(user)).mkdir()
            os.chown(Path(folder) / str(user), user, user)
        yield Path(folder)


@pytest.fixture
def shared(place: Path) -> Path:
    """A home that is the team's: setgid, and the group may write."""
    home = place / "home"
    home.mkdir()
    os.chown(home, ALICE, TEAM)
    home.chmod(0o2775)
    return home


@needs_root
@pytest.mark.parametrize("mask", ["002", "022", "077"])
def test_two_users_publish_at_once(shared: Path, mask: str) -> None:
    """Both publish 50 versions at the same time, numbered on without a gap, whatever their umask is.

    Nobody has used the home before: both make it.
    """
    count = 50 if mask == "002" else 5
    processes = [start(PUBLISH, user, shared, str(count), mask=mask) for user in (ALICE, BOB)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    numbers = [[int(line) for line in output.split()] for output in outputs]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 2 * count + 1))
    report = fsck(Registry(shared))
    assert {problem.kind for problem in report.problems} <= {"header"}
    assert report.num_versions == 2 * count


MEET = """
homes = sys.argv[4:]
for number, home in enumerate(homes):
    os.environ["QHUB_HOME"] = home
    made = {"adapter_model.safetensors": weights(os.urandom(16)), "adapter_config.json": b"{}"}
    here = [os.path.join(homes[0], f".{number}.{member}") for member in (31001, 31002)]
    open(here[user == 31002], "w").close()
    while not all(map(os.path.exists, here)):  # the one who waits goes on in the moment that the other has come
        pass
    Registry().publish("a", made, LINEAGE)
print("done")
"""


@needs_root
def test_a_home_is_made_by_two_at_once(place: Path) -> None:
    """Twenty times two members make the same home at the very same moment: both publish, all files are the group's."""
    homes = []
    for number in range(20):
        homes.append(place / f"home{number}")
        homes[-1].mkdir()
        os.chown(homes[-1], ALICE, TEAM)
        homes[-1].chmod(0o2775)
    members = [start(MEET, user, homes[0], *map(str, homes), mask="077") for user in (ALICE, BOB)]
    assert [member.communicate(timeout=240)[0] for member in members] == ["done\n", "done\n"]
    for home in homes:
        assert {version.number for version in Registry(home).versions("a")} == {1, 2}
        wrong = [path for path in home.glob("registry.*") if path.stat().st_mode & 0o660 != 0o660]
        assert not wrong


@needs_root
def test_a_folder_that_is_being_made_is_nobodys_trouble(shared: Path) -> None:
    """What one member has just made, and nobody else may enter yet, is passed over by another who comes first."""
    blobs = shared / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for folder in (blobs.parent, blobs):
        os.chown(folder, ALICE, TEAM)
        folder.chmod(0o2775)
    making = blobs / ".ab.0123"
    making.mkdir(mode=0o700)
    os.chown(making, ALICE, TEAM)
    assert start(PUBLISH, BOB, shared, "1").communicate(timeout=120)[0] == "1\n"
    assert "a@1" in verbs(BOB, shared, "list", "fsck")


@needs_root
@pytest.mark.parametrize("mask", ["002", "022"])
def test_a_reader_does_not_lock_the_owner_out(shared: Path, mask: str) -> None:
    """After another member's `list` the owner publishes, and then the other, and all files are the group's to write."""
    assert start(PUBLISH, ALICE, shared, "1", mask=mask).communicate(timeout=120)[0] == "1\n"
    assert "a@1" in verbs(BOB, shared, "list", mask=mask)
    assert start(PUBLISH, ALICE, shared, "1", mask=mask).communicate(timeout=120)[0] == "2\n"
    assert start(PUBLISH, BOB, shared, "1", mask=mask).communicate(timeout=120)[0] == "3\n"
    said = verbs(BOB, shared, "alias set a prod 1", "path a@1", "fsck --repair", "gc --apply", "list", mask=mask)
    assert said.count("exit 0") == 5, said
    assert start(PUBLISH, ALICE, shared, "1", mask=mask).communicate(timeout=120)[0] == "4\n"
    for path in shared.rglob("*"):
        if path.is_dir() or path.name.startswith("registry."):
            assert path.stat().st_mode & stat.S_IWGRP, path
            assert path.stat().st_gid == TEAM, path


@needs_root
def test_a_database_that_only_its_owner_may_write(shared: Path) -> None:
    """As an older qhub left it: the other member reads, leaves no file of his own, and is refused with a reason."""
    assert start(PUBLISH, ALICE, shared, "2").communicate(timeout=120)[0] == "1\n2\n"
    for path in shared.glob("registry.*"):
        path.chmod(0o644)
    said = verbs(BOB, shared, "list", "show a@1", "alias set a prod 1", "fsck")
    assert [line for line in said.splitlines() if line.startswith("exit")] == ["exit 0", "exit 0", "exit 1", "exit 0"]
    assert "registry.db cannot be written" in said
    assert {path.stat().st_uid for path in shared.glob("registry.*")} == {ALICE}
    assert start(PUBLISH, ALICE, shared, "1").communicate(timeout=120)[0] == "3\n"
    assert start(PUBLISH, BOB, shared, "1").communicate(timeout=120)[0] == "4\n"  # the owner repaired it on the way


@needs_root
def test_a_home_of_ones_own_stays_so(place: Path) -> None:
    """Outside a folder that a group shares the umask alone says who may read and write."""
    home = place / str(ALICE) / "home"
    assert start(PUBLISH, ALICE, home, "1", mask="077").communicate(timeout=120)[0] == "1\n"
    assert not [path for path in home.rglob("registry.*") if path.stat().st_mode & 0o077]
    assert home.stat().st_mode & 0o777 == 0o700


@needs_root
def test_a_read_only_home_serves_what_only_reads(place: Path) -> None:
    """path, export and verify work where nothing can be written and nobody asked for the version before; --oci, too."""
    home, out = place / "home", place / str(BOB)
    registry = Registry(home)
    small_store(registry)
    registry.database.close()
    for path in (home, *home.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = sorted(str(path) for path in home.rglob("*"))
    lines = (
        "list", "show a@1", "verify a@1", "path a@1", f"export a@1 -o {out}/a.safetensors", "lineage team/b",
        f"export a@1 --to peft -o {out}/a", f"export a@2 --oci {out}/a.tar", "fsck", "path a@1", "list --json",
    )  # fmt: skip
    said = verbs(BOB, home, *lines)
    assert said.count("exit 0") == len(lines), said
    folder = next(line for line in said.splitlines() if line.startswith(f"{out}/.cache/"))
    assert Path(folder, "adapter_model.safetensors").read_bytes() == (out / "a.safetensors").read_bytes()
    assert (out / "a" / "adapter_model.safetensors").is_file()
    assert not (out / "a" / "adapter_model.safetensors").is_symlink()
    refused = verbs(BOB, home, "alias set a prod 1", "gc --apply", "fsck --repair", "rm a@2", "alias log a")
    assert "Traceback" not in refused
    assert refused.count("cannot be written") >= 2, refused
    code = "print(open_adapter(Registry().resolve('a@2').path).shapes)"
    imports = "from adapterhub_local.lora.adapter import open_adapter"  # it loads torch: nobody else waits for that
    assert "q_proj" in start(code, BOB, home, imports=imports).communicate(timeout=120)[0]
    assert sorted(str(path) for path in home.rglob("*")) == before
