"""torchrun starts the processes of a run again when one is lost: by one command, and with the same result."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.data.dataset import read_data
from adapterhub_local.errors import NotFound
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home, restarts
from adapterhub_local.train.check import divides
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.train import train
from tests.chats import write_recipe
from tests.patience import PATIENCE
from tests.processes import family

CHANGES = ["train.epochs=8", "train.save_every=1"]  # 16 steps, a state after each


def test_a_process_is_lost(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A worker is killed in the middle: the run goes on from its last state, and ends with the very adapter of one
    process that nothing happened to. The two processes divide the base between them."""
    path = write_recipe(tmp_path)
    one = train(load_recipe(path, [*CHANGES, "train.micro_batch_size=4"]), home)
    options = [part for change in CHANGES for part in ("--set", change)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "tests.train.lost", "train", str(path), "--resume", *options]
    command += ["--shard-base"] if divides() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "output", "w+") as output:
        torchrun = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            code = torchrun.wait(PATIENCE)
        finally:
            for pid in family(torchrun.pid) if torchrun.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
            torchrun.wait()
    told = Path(output.name).read_text()

    assert code == 0, told
    assert told.count("there is no state to continue from yet") == 1
    assert told.count("another process of this run is gone, so it cannot go on") == 1
    assert "Traceback" not in told
    two = Registry(home).resolve("yes-no")
    assert (two.number, two.lineage["training"]["processes"]) == (2, 2)
    assert two.content_digest == one.content_digest


def test_a_run_that_was_finished(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only torchrun may begin with --resume; what it starts again although it was registered is not trained again."""
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(NotFound, match="leave out --resume"):
        train(recipe, home, resume=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = train(recipe, home, resume=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = train(recipe, home, resume=True)

    assert str(again) == str(first) == "yes-no@1"
    assert Run(recipe, tiny_base, home, read_data(recipe)).registered() == "yes-no@1"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train(recipe, home, resume=True).number == 2  # it was asked for anew


@pytest.mark.parametrize(("value", "count"), [(None, None), ("", None), ("often", None), ("0", 0), ("3", 3)])
def test_how_often(monkeypatch: pytest.MonkeyPatch, value: str | None, count: int | None) -> None:
    """What torchrun says, and nothing without it."""
    if value is None:
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", value)
    assert restarts() == count
