"""SIGKILL at random moments of publish, gc, fsck, rebuild, import and sync: nothing acknowledged is ever lost.

python -m tests.registry.test_registry_kills 300    # so many kills, in a home of their own; prints what was seen
"""

import os
import random
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import adapterhub_local.lora.finite  # noqa: F401 - here, not in every child
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import collect, remove
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.push import push
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.registry.remotes import add_remote, find_remote
from adapterhub_local.registry.store import open_store
from adapterhub_local.settings import home as home_at
from tests.stores import CONFIG, LINEAGE, weights

KINDS = ("publish", "mixed", "gc", "fsck", "rebuild", "import", "sync")
Said = Callable[[str], None]


def publish(registry: Registry, name: str, said: Said) -> None:
    """One more version, acknowledged once it is there."""
    values = array("f", list(os.urandom(100))).tobytes()  # finite: what is imported is checked
    made = {"adapter_model.safetensors": weights(values), "adapter_config.json": CONFIG}
    version = registry.publish(name, made, LINEAGE, alias="newest")
    said(f"{version} {version.manifest_digest}")


def work(kind: str, root: Path, said: Said) -> None:
    """Do one kind of work without an end."""
    registry, other = Registry(root / "home"), Registry(root / "other")
    turn = 0
    while True:
        turn += 1
        publish(registry, f"n{turn % 5}", said)
        if kind in ("gc", "mixed"):
            version = registry.resolve(f"n{turn % 5}")
            removed = registry.publish("rubbish", {"f": os.urandom(100)}, {})
            said(f"{removed} {removed.manifest_digest} removed")
            remove(registry, removed)
            collect(registry, apply=True, grace=-1, purge=0)
            registry.add_evaluation(version, "task", {"adapter": {"exact_match": turn / 1e6}})
        if kind in ("fsck", "mixed"):
            fsck(registry, repair=True)
        if kind in ("rebuild", "mixed"):
            rebuild(registry)
        if kind == "import":
            target = root / f"{os.getpid()}-{turn}.tar"
            write_archive(registry, registry.resolve(f"n{turn % 5}"), target)
            for done in read_archive(other, target):
                said(f"other {done.version} {done.version.manifest_digest}")
            target.unlink()
        if kind == "sync":
            store = open_store(find_remote(registry.home, "team"))
            push(registry, store, [registry.resolve(f"n{turn % 5}")])
            pull(other, store, Reference.parse(f"n{turn % 5}"))


def open_databases(root: Path) -> list[str]:
    """The databases below `root` this process has open: a child that is forked must not inherit any."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [name for name in names if name.startswith(str(root)) and "registry.db" in name]


def killed(kind: str, root: Path, seconds: float) -> list[str]:
    """What a child acknowledged of its work before it was killed, so many seconds after its first word."""
    assert not open_databases(root)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                work(kind, root, lambda line: _tell(out, line))
        except BaseException as error:
            os.write(2, f"{kind}: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(70)
    os.close(writing)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        said = [line for line in (first, *lines.readlines()) if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"{kind} ended by itself: {os.waitstatus_to_exitcode(status)}"
    return said


def _tell(out: TextIO, line: str) -> None:
    out.write(f"{line}\n")
    out.flush()


def trial(root: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill so often, and hold what is there against what was acknowledged; the numbers acknowledged and found."""
    rng = random.Random(seed)
    here: dict[str, str] = {}
    there: dict[str, str] = {}
    gone: set[str] = set()
    add_remote(home_at(root / "home"), "team", str(root / "remote"))
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        for line in killed(kind, root, rng.uniform(0, 0.25 if kind in ("import", "sync") else 0.12)):
            words = line.split()
            if words[0] == "other":
                there[words[1]] = words[2]
            else:
                here[words[0]] = words[1]
                gone |= {words[0]} if words[-1] == "removed" else set()
        check(root / "home", {name: here[name] for name in here.keys() - gone}, here, whole=number % 10 == 9)
        check(root / "other", there, there, whole=number % 10 == 9)
    check(root / "home", {name: here[name] for name in here.keys() - gone}, here, whole=True)
    check(root / "other", there, there, whole=True)
    for path in (root / "home").glob("registry.db*"):  # and all of it comes back without the database
        path.unlink()
    assert rebuild(Registry(root / "home")).lost == []
    check(root / "home", {name: here[name] for name in here.keys() - gone}, here, whole=True)
    return len(here) + len(there), len(Registry(root / "home").versions()) + len(Registry(root / "other").versions())


def check(home: Path, live: dict[str, str], ever: dict[str, str], *, whole: bool) -> None:
    """Everything acknowledged is there under its number, no number was given twice, and nothing is damaged."""
    registry = Registry(home)
    found = {f"{row['name']}@{row['number']}": row["manifest_digest"] for row in
             registry.database.rows("SELECT name, number, manifest_digest FROM versions")}  # fmt: skip
    lost = {name for name, digest in ever.items() if found.get(name) != digest}
    assert not lost, f"lost of {home.name}: {sorted(lost)[:5]}"
    shown = {str(version) for version in registry.versions()}
    assert live.keys() <= shown, sorted(live.keys() - shown)[:5]
    if home.name == "home":
        for name in registry.names():
            numbers = sorted(int(one.partition("@")[2]) for one in found if one.startswith(f"{name}@"))
            assert numbers == list(range(1, len(numbers) + 1)), name
    if whole:
        assert fsck(registry).problems == []
    registry.database.close()


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """Fourteen kills, two of every kind: all that was acknowledged is there, gapless, sound, also from blobs alone."""
    acknowledged, found = trial(tmp_path, 14, seed=1)
    assert acknowledged >= 14
    assert found > 0


if __name__ == "__main__":
    num_kills = int(sys.argv[1])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        acknowledged, found = trial(Path(folder), num_kills, seed=int(sys.argv[2]) if len(sys.argv) > 2 else 15)
    took = f"{num_kills} kills in {time.monotonic() - begin:.0f} s"
    sys.stdout.write(f"{took}: {acknowledged:,} acknowledged, {found:,} there, 0 lost\n")
