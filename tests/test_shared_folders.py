"""What several processes of one home make and remove at the same time: folders, locks of runs, parts of a fetch."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from adapterhub_local.durable import share_parents
from adapterhub_local.registry import Registry
from adapterhub_local.registry.fetch import Download
from adapterhub_local.registry.push import push
from adapterhub_local.registry.store import Store
from adapterhub_local.train.past_runs import holding, is_held
from tests.stores import LINEAGE, files

SECONDS = 1.0


def at_once(*loops: Callable[[], object]) -> None:
    """Call each again and again in a thread of its own for a while. Raises what one of them raised."""
    end = time.monotonic() + SECONDS
    errors: list[BaseException] = []

    def repeat(one: Callable[[], object]) -> None:
        try:
            while time.monotonic() < end and not errors:
                one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(one,)) for one in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_a_folder_is_made_while_another_removes_it(tmp_path: Path) -> None:
    """Whoever wants a folder has it or makes it, and is never told that it exists and does not."""
    folder = tmp_path / "shared"

    def remove() -> None:
        with suppress(FileNotFoundError):
            folder.rmdir()

    at_once(lambda: share_parents(folder), lambda: share_parents(folder), remove)


@pytest.mark.parametrize("mode", [0o755, 0o2775])
def test_a_parent_is_replaced_while_a_folder_is_made_in_it(tmp_path: Path, mode: int) -> None:
    """Another member who makes the same folders puts its own, as empty, in the place of ours."""
    tmp_path.chmod(mode)
    parent = tmp_path / "parent"

    def replace() -> None:
        other = tmp_path / "other"
        other.mkdir()
        other.chmod(mode)
        try:
            other.rename(parent)
        except OSError:
            other.rmdir()

    def make() -> None:
        share_parents(parent / "child")
        with suppress(OSError):
            (parent / "child").rmdir()

    at_once(make, make, replace)


def test_a_lock_of_a_run_is_held_once(tmp_path: Path) -> None:
    """The lock's file is removed by whoever had it, with the folder if nothing else is in it."""
    runs = tmp_path / "runs"
    inside: list[str] = []
    held: list[str] = []

    def train(name: str) -> None:
        try:
            with holding(runs / name):
                inside.append(name)
                assert inside.count(name) == 1, "two processes train one run"
                assert is_held(runs / name)
                inside.remove(name)
                held.append(name)
        except BlockingIOError:
            return
        with suppress(OSError):
            runs.rmdir()

    at_once(*[lambda: train("a")] * 3, lambda: train("b"))
    assert held.count("a") > 10
    assert held.count("b") > 10


def test_fetches_share_a_folder(folder_store: Store, tmp_path: Path) -> None:
    """Each has the files, whichever ends first."""
    registry = Registry()
    version = registry.publish("a", files(), LINEAGE)
    push(registry, folder_store, [version])
    shared, count = tmp_path / "sync", iter(range(10**6))

    def fetch() -> None:
        folder = tmp_path / f"mine-{next(count)}"
        folder.mkdir()
        with Download(folder_store, version.files, folder, shared, lambda done, total: None):
            assert len(list(folder.iterdir())) == len({file.digest for file in version.files})

    at_once(*[fetch] * 4)
    assert not shared.exists()
