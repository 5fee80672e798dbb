"""A crash at any moment loses nothing that was published and shows nothing that was not.

A child process publishes and is stopped: at each call that changes the disk in turn (fault injection), and
by SIGKILL at random moments. The disk is then what the next process finds.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.rebuild import rebuild
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files, small_store

# Counts every call that changes the disk and ends the process, as a power switch would, at the n-th.
# SQLite's own writes are inside the library: its transaction is stopped before each of its statements.
# Each line asked for is one process, forked from this one, which has loaded everything and opened nothing.
HARNESS = """
import builtins, io, json, os, pathlib, sqlite3, sys
from adapterhub_local.registry import Registry, database
from tests.stores import LINEAGE, files, weights

for line in sys.stdin:
    stop_at, kind, home, log = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.environ["QHUB_HOME"], count = home, 0
for number, name in enumerate(("out", "err"), 1):
    os.dup2(os.open(log + "." + name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)

def tick(name):
    global count
    count += 1
    if count == stop_at:
        if kind == "exit":
            os._exit(77)
        raise OSError(*((5, "Input/output error") if kind == "EIO" else (28, "No space left on device")))

folders = 0
def counted(function, name):
    def call(*arguments, **options):
        global folders
        folders += name == "mkdir"
        if name != "mkdir" or folders < 8:  # the 256 folders of the blobs are all alike
            tick(name)
        return function(*arguments, **options)
    return call

for name in ("fsync", "rename", "replace", "mkdir", "unlink", "fchmod", "link"):
    setattr(os, name, counted(getattr(os, name), name))
real_open = builtins.open

class Writer:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        tick("write")
        self.file.write(data[: len(data) // 2])  # a write may be cut in the middle
        self.file.flush()
        tick("write")
        return self.file.write(data[len(data) // 2 :])
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()

def open_counted(path, mode="r", *arguments, **options):
    file = real_open(path, mode, *arguments, **options)
    if "x" in mode or "w" in mode:
        tick("open")
        return Writer(file)
    return file

builtins.open = open_counted

class Connection(sqlite3.Connection):
    def execute(self, statement, *values):
        if not statement.startswith(("SELECT", "PRAGMA")):
            tick(statement)
            if statement == "COMMIT" and kind == "exit":
                result = super().execute(statement, *values)
                tick("after the commit")
                return result
        return super().execute(statement, *values)

real_connect = sqlite3.connect
sqlite3.connect = lambda *arguments, **options: real_connect(*arguments, factory=Connection, **options)
try:
    print(Registry().publish("a", files(7), LINEAGE, alias="prod").manifest_digest, flush=True)
finally:
    real_open(log, "w").write(str(count))
"""
PUBLISH = """
import os
from adapterhub_local.registry import Registry
from tests.stores import LINEAGE, weights
registry = Registry()
for turn in range(100000):
    files = {"adapter_model.safetensors": weights(os.urandom(2000)), "adapter_config.json": b"{}"}
    version = registry.publish("a", files, LINEAGE, alias="newest")
    print(version.number, version.manifest_digest, flush=True)
"""


@pytest.fixture(scope="module")
def harness() -> Iterator[subprocess.Popen[str]]:
    """What forks the processes that are stopped."""
    command = [sys.executable, "-c", HARNESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        yield started


def stop_at(harness: subprocess.Popen[str], call: int, kind: str, home: Path, log: Path) -> tuple[int, str, str]:
    """A process that publishes `a` and is stopped at its `call`-th step: its exit status, output and errors."""
    assert harness.stdin is not None
    assert harness.stdout is not None
    print(json.dumps([call, kind, str(home), str(log)]), file=harness.stdin, flush=True)
    return int(harness.stdout.readline()), Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text()


# an error is raised alike whatever its number is: each number in one of the homes
@pytest.mark.parametrize(
    ("kind", "fresh"),
    [("exit", True), ("exit", False), ("full", True), ("EIO", False)],
    ids=["exit-new home", "exit-old home", "full-new home", "EIO-old home"],
)
def test_stopped_at_each_step_of_publishing(
    harness: subprocess.Popen[str], kind: str, fresh: bool, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped at every write, flush, rename, statement and commit in turn: all or nothing is there, fsck is clean."""
    log = tmp_path_factory.mktemp("log") / "count"
    call, stopped = 0, True
    seen = set()
    while stopped:
        call += 1
        log.unlink(missing_ok=True)
        home = tmp_path_factory.mktemp("home") / "home"
        monkeypatch.setenv("QHUB_HOME", str(home))
        registry = Registry()
        before = [] if fresh else small_store(registry)
        aliases = registry.aliases("a")
        code, output, errors = stop_at(harness, call, kind, home, log)
        stopped = not log.exists() or int(log.read_text()) >= call
        if kind == "exit":
            assert code == (77 if stopped else 0), errors
        after = Registry().versions()
        new = [version for version in after if version not in before]
        assert [version for version in after if version in before] == before
        assert len(new) <= 1
        seen.add(len(new))
        if output.strip():
            assert [version.manifest_digest for version in new] == [output.strip()]
        assert Registry().aliases("a") == ({**aliases, "prod": new[0].number} if new else aliases)
        report = fsck(Registry())
        assert report.problems == [], (call, errors)
        for version in after:
            assert version.path.is_dir()
        number = 1 + max((version.number for version in after if version.name == "a"), default=0)
        assert Registry().publish("a", files(8), LINEAGE).number == number
        if call % 4:
            continue
        # the database made again from blobs has them all too, and none twice
        assert rebuild(Registry()).lost == []
        assert len(Registry().versions()) == len(after) + 1
    assert seen == {0, 1}
    assert call > 20


def test_killed_at_random_moments() -> None:
    """After each kill -9 every acknowledged version is there, numbers have no gap, and fsck is clean."""
    acknowledged: dict[int, str] = {}
    rng = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", PUBLISH], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait(timeout=PATIENCE)
        process.stdout.close()
        acknowledged |= {int(line.split()[0]): line.split()[1] for line in lines if len(line.split()[-1]) == 71}
        versions = {version.number: version.manifest_digest for version in Registry().versions("a")}
        assert sorted(versions) == list(range(1, len(versions) + 1))
        assert acknowledged.items() <= versions.items()
        assert Registry().aliases("a") == {"newest": len(versions)}
        assert fsck(Registry()).problems == []
