"""A run that is stopped late or has no room left keeps what was trained, and says where it is and what to do."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.data.dataset import read_data
from adapterhub_local.errors import InUse, QhubError, Stopped
from adapterhub_local.progress import Counting, Quiet
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.optimise import stopping
from adapterhub_local.train.past_runs import checkpoints, list_runs, read_log
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.train import train
from adapterhub_local.train.watch import Watch
from tests.chats import RECIPE, write_recipe


class Impatient(Quiet):
    """Somebody who presses Ctrl-C, or whatever else is raised, when the trained adapter is being evaluated."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    @contextmanager
    def counting(self, what: str) -> Iterator[Counting]:
        raise self.error(what)
        yield


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["train.max_steps=3"],
        ["train.learning_rate=1", "train.epochs=40", "train.eval_every=1", "train.patience=3", "train.warmup=0.5"],
    ],
    ids=["to the end", "within an epoch", "ended early"],
)
def test_stopped_after_the_last_step(tiny_base: BaseInfo, home: Home, tmp_path: Path, changes: list[str]) -> None:
    """Ctrl-C while the result is evaluated loses nothing: --resume registers the very adapter, the best if that counts,
    and the log, steps and time are those of the whole run."""
    recipe = load_recipe(write_recipe(tmp_path), changes)
    whole = train(recipe, home)
    log = [entry["loss"] for entry in read_log(list_runs(home)[-1].folder) if "loss" in entry]
    with pytest.raises(Stopped, match=r"after the last step, before the adapter was registered.*--resume"):
        train(recipe, home, reporter=Impatient(KeyboardInterrupt))
    (run,) = list_runs(home)
    assert (run.status, run.can_resume) == ("stopped", True)
    resumed = train(recipe, home, resume=True)

    assert resumed.content_digest == whole.content_digest
    assert [entry["loss"] for entry in read_log(run.folder) if "loss" in entry] == log
    for key in ("steps", "loss", "best_step", "stopped_early", "curve"):
        assert resumed.lineage["training"].get(key) == whole.lineage["training"].get(key)
    assert resumed.lineage["training"]["tokens_per_second"] > 0
    assert checkpoints(run.folder) == []


def test_an_evaluation_that_fails_keeps_the_factors(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """An error after the last step is reported as it is, and --resume continues after the training."""
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(MemoryError):
        train(recipe, home, reporter=Impatient(MemoryError))
    (run,) = list_runs(home)

    assert (run.status, run.record["reason"]) == ("failed", "MemoryError: evaluating the adapter")
    assert train(recipe, home, resume=True).number == 1


def test_one_run_in_two_processes(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The very same run, started again while it goes on, is refused at once; another run of the recipe is not."""
    recipe = load_recipe(write_recipe(tmp_path))
    run = Run(recipe, tiny_base, home, read_data(recipe))
    with run.alone():
        with pytest.raises(InUse, match=f"{run.folder.name} is being trained by another process"):
            train(recipe, home)
        assert train(load_recipe(recipe.path, ["train.seed=1"]), home).number == 1
    assert train(recipe, home).number == 2
    assert list(home.runs.glob("*.lock")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_after_the_step(number: int) -> None:
    """Ctrl-C, SIGTERM and a terminal that is closed all ask for a stop; what nohup ignores stays ignored."""
    watch = Watch(lambda entry: None)
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with stopping(watch):
            os.kill(os.getpid(), number)
        assert watch.stop_asked
        signal.signal(number, signal.SIG_IGN)
        ignoring = Watch(lambda entry: None)
        with stopping(ignoring):
            os.kill(os.getpid(), number)
        assert not ignoring.stop_asked
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system lets nobody write a larger file, as a full disk would not: bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# of the adapter's factors (524 kB at rank 64) and the two moments of each
ROOM = {
    100_000: r"home/tmp cannot hold the factors \(1 MB\): File too large: free some space or set QHUB_HOME",
    600_000: r"the state of step 2 cannot be saved in .*\. Free some space$",
}


@pytest.mark.parametrize("size", ROOM)
def test_no_room(tiny_base: BaseInfo, home: Home, tmp_path: Path, size: int) -> None:
    """What cannot be written is one sentence with the folder and what to do; no half checkpoint and no version is left,
    and with room the same command works."""
    recipe = load_recipe(write_recipe(tmp_path, RECIPE.replace("rank = 4", "rank = 64")), ["train.save_every=2"])
    with no_file_above(size), pytest.raises(QhubError, match=ROOM[size]) as caught:
        train(recipe, home)

    assert caught.value.exit_code == 1
    assert list(home.runs.rglob("checkpoint-*")) == []
    assert list(home.tmp.iterdir()) == []
    assert Registry(home).versions() == []
    assert train(recipe, home).number == 1


def test_no_room_later(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """When a later state finds no room, the one before it is whole, named, and what --resume goes on from."""
    recipe = load_recipe(write_recipe(tmp_path, RECIPE.replace("rank = 4", "rank = 64")), ["train.save_every=1"])
    whole = train(load_recipe(recipe.path, ["output.name=whole"]), home)
    limited = no_file_above(600_000)

    class Filling(Quiet):
        @contextmanager
        def training(self, steps: int, tokens_a_step: float):
            def report(step: int, loss: float, more: str = "") -> None:
                if step == 3:
                    limited.__enter__()

            yield report

    try:
        with pytest.raises(QhubError, match=r"step 3 cannot be saved.*; --resume continues from checkpoint-2"):
            train(recipe, home, reporter=Filling())
    finally:
        limited.__exit__(None, None, None)

    assert [path.name for path in (home.runs).rglob("checkpoint-*")] == ["checkpoint-2"]
    assert train(recipe, home, resume=True).content_digest == whole.content_digest
