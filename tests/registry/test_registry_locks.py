"""One process has the database open for long, others come and go: whatever the first does meanwhile, nothing is lost.

POSIX locks are a process's: closing any descriptor of the file gives them all up, and the next process that leaves
then takes itself for the last one and removes the log under the one that stays.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_local.doctor import examine
from adapterhub_local.errors import QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect
from adapterhub_local.registry.rebuild import rebuild
from tests.patience import PATIENCE

PUBLISH = """
from adapterhub_local.registry import Registry
print(Registry().publish("visitor", {"f": b"1"}, {}))
"""


def visit() -> str:
    """Another process publishes and leaves; what it says."""
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def in_a_thread(registry: Registry) -> None:
    """Read in a thread that ends, and closes its connection with it."""
    thread = threading.Thread(target=registry.versions)
    thread.start()
    thread.join()


DOINGS: dict[str, Callable[[Registry], object]] = {
    "nothing": lambda registry: None,
    "problem": lambda registry: registry.database.problem(),
    "fsck": fsck,
    "repair": lambda registry: fsck(registry, repair=True),
    "gc": lambda registry: collect(registry, apply=True, grace=-1),
    "rebuild": rebuild,
    "doctor": lambda registry: list(examine(registry.home)),
    "thread": in_a_thread,
}


@pytest.mark.parametrize("doing", DOINGS)
def test_who_stays_and_who_visits_lose_nothing(doing: str, registry: Registry) -> None:
    """Both publish in turn, and either knows all that the other did."""
    registry.publish("host", {"f": b"0"}, {})
    for turn in (1, 2):
        DOINGS[doing](registry)
        assert visit() == f"visitor@{turn}"
        assert str(registry.publish("host", {"f": b"0"}, {})) == f"host@{turn + 1}"

    wanted = ["host@1", "host@2", "host@3", "visitor@1", "visitor@2"]
    assert [str(version) for version in registry.versions()] == wanted
    registry.database.close()
    assert [str(version) for version in Registry(registry.home).versions()] == wanted
    assert fsck(registry).is_clean


def test_a_log_that_was_removed_is_reported(registry: Registry) -> None:
    """Code of a user that reads the file itself, as a backup does, gives up the locks: what follows is refused."""
    registry.publish("host", {"f": b"0"}, {})
    shutil.copytree(registry.home.root, registry.home.root.with_name("copy"))
    assert visit() == "visitor@1"
    for _ in range(2):
        with pytest.raises(QhubError, match=r"registry\.db-wal was removed.*start it again"):
            registry.publish("host", {"f": b"0"}, {})
    with pytest.raises(QhubError, match="was removed"):
        registry.versions()
    assert visit() == "visitor@2"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here: open files cannot be listed")
@pytest.mark.parametrize("doing", [name for name in DOINGS if name != "nothing"])
def test_no_connection_is_left_open(doing: str, registry: Registry) -> None:
    """Once the registry's own connection is closed, this process holds nothing of the database."""
    registry.publish("host", {"f": b"0"}, {})
    DOINGS[doing](registry)
    registry.database.close()

    assert not [name for name in open_files() if name.startswith(str(registry.home.database))]


def open_files() -> list[str]:
    """The names of the files this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:  # the listing's own
            continue
    return found
