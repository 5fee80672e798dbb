"""Several processes train one adapter: the same as one process makes of the same rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterhub_local.base.store import BaseInfo
from adapterhub_local.errors import InputError
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home, Process, process
from adapterhub_local.train.launch import launch
from adapterhub_local.train.run import train
from adapterhub_local.train.runs import list_runs
from tests.chats import write_recipe


def qhub(*arguments: str, **changes: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "adapterhub_local", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_are_one_with_twice_the_accumulation(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Two processes (gloo) stopped and resumed register once the adapter that one makes with half-size rows."""
    path = write_recipe(tmp_path, count=14)  # the last batch is not whole
    changes = ["train.epochs=30", "train.eval_every=20"]
    one = train(load_recipe(path, [*changes, "train.micro_batch_size=4"]), home)
    arguments = [
        "train",
        str(path),
        "--nproc",
        "2",
        "--json",
        *(part for change in changes for part in ("--set", change)),
    ]
    stopped = qhub(*arguments)
    folder = None
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and stopped.poll() is None:
        going = [run for run in list_runs(home) if run.status == "running" and run.to_json()["step"] > 2]
        if going:
            folder = going[0].folder
            break
        time.sleep(0.05)
    os.kill(stopped.pid, signal.SIGINT)
    _, errors = stopped.communicate(timeout=200)
    assert (stopped.returncode, folder is None) == (130, False), errors
    assert "--resume" in errors
    assert "Traceback" not in errors

    resumed = qhub(*arguments, "--resume")
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert json.loads(output)["reference"] == "yes-no@2"
    two = Registry(home).resolve("yes-no@2")
    assert two.lineage["training"]["processes"] == 2
    assert two.content_digest == one.content_digest


def test_an_error_is_told_once(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake that every process makes is one line and its exit code."""
    code = launch(["show", "nothing"], 2)
    output, errors = capfd.readouterr()

    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "nothing" in errors


def test_sharding_is_refused(tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP is refused with the reason before anything is loaded."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP cannot shard this base"):
        train(load_recipe(write_recipe(tmp_path)), home)


def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun a process is alone and leads; a rank that is no number is told."""
    assert process() == Process(0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process() == Process(3, 0, 4)
    assert not process().is_leader
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="whole numbers"):
        process()
