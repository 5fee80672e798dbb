"""Several processes publish at once, and one is killed on the way: numbers stay gapless and versions whole."""

import os
import signal
import subprocess
import sys
import time

import pytest

from adapterhub_local.registry import Registry
from tests.patience import PATIENCE
from tests.registry.test_registry import FILES, LINEAGE


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process of its own, at this test's home."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


PUBLISH = """
import sys
from adapterhub_local.registry import Registry
registry = Registry()
for turn in range(int(sys.argv[2])):
    files = {"f": b"same", "g": (sys.argv[1] + str(turn)).encode()}
    print(registry.publish("shared", files, {"kind": "test"}, alias="newest").number, flush=True)
"""


def test_eight_processes_publish_without_gaps_or_clashes(registry: Registry) -> None:
    """80 versions from 8 processes at once, on a home that none of them has made, are numbered 1 to 80."""
    processes = [start(PUBLISH, str(index), "10") for index in range(8)]
    numbers = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        numbers.append([int(line) for line in out.split()])
    assert sorted(number for own in numbers for number in own) == list(range(1, 81))
    assert all(own == sorted(own) for own in numbers)
    assert registry.resolve("shared@newest").number == 80
    assert len({version.content_digest for version in registry.versions("shared")}) == 80
    assert registry.resolve("shared@40").path.is_dir()


def test_a_process_killed_while_publishing_leaves_no_half_version(registry: Registry) -> None:
    """After kill -9 in the middle of publishing, what is listed is whole, and the next number follows."""
    for delay in (0.02, 0.05, 0.11):
        process = start(PUBLISH, f"killed-{delay}-", "100000")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=PATIENCE)
        process.stdout.close()
        process.stderr.close()
        versions = registry.versions("shared")
        assert [version.number for version in versions] == list(range(1, len(versions) + 1))
        for version in versions:
            for file in (*version.files, version.lineage_file):
                registry.blobs.check(file)
            assert registry.blobs.path(version.manifest_digest).read_bytes() == version.manifest
        assert registry.publish("shared", FILES, LINEAGE).number == len(versions) + 1


def test_a_failed_transaction_leaves_no_version(registry: Registry) -> None:
    """An error before the commit takes the version and its alias back; the number is used by the next one."""

    class Unlucky(Exception):
        """Something that goes wrong inside the transaction."""

    def fail() -> None:
        with registry.database.writing() as db:
            db.execute("INSERT INTO removals VALUES ('a', 1, 'now')")
            raise Unlucky

    registry.publish("a", FILES, LINEAGE)
    with pytest.raises(Unlucky):
        fail()
    assert registry.resolve("a").number == 1
    assert registry.publish("a", FILES, LINEAGE).number == 2
