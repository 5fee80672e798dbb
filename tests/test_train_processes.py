"""Several processes train one adapter: the same as one process makes of the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.load import load_base
from adapterhub_local.base.store import BaseInfo
from adapterhub_local.errors import InputError
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home, Process, process
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.examples import read_chats, tokenise
from adapterhub_local.train.launch import launch
from adapterhub_local.train.run import train
from adapterhub_local.train.runs import read_log
from adapterhub_local.train.trainer import make_trainer
from tests.chats import write_recipe


def test_two_processes_are_one_with_twice_the_accumulation(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Two processes (gloo) register once the very adapter that one makes with half-size rows."""
    path = write_recipe(tmp_path, count=14)  # the last batch is not whole
    changes = ["train.epochs=4", "train.eval_every=3"]
    one = train(load_recipe(path, [*changes, "train.micro_batch_size=4"]), home)
    overrides = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "adapterhub_local", "train", str(path), "--nproc", "2", "--json", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reference"] == "yes-no@2"
    two = Registry(home).resolve("yes-no@2")
    assert two.lineage["training"]["processes"] == 2
    assert two.content_digest == one.content_digest
    assert len(read_log(home.runs / two.lineage["run"])) == 8 + 3


def test_all_stop_after_the_same_step(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A stop that another process was asked for comes with the sum of the gradients, in the same step."""
    recipe = load_recipe(write_recipe(tmp_path))
    base = load_base(tiny_base)
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
    model = with_adapter(base, recipe)
    trainer, watch = make_trainer(model, examples, recipe.train, tmp_path / "run", lambda entry: None)

    def other(vector: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        theirs = torch.ones_like(vector)  # a loss of 1, asked to stop, gradients of 1
        return vector + theirs

    trainer.accelerator.reduce = other
    loss = trainer._sum_over_processes(model, torch.tensor(2.0))

    assert loss == 3
    assert watch.stop_asked
    assert all(torch.equal(factor.grad, torch.ones_like(factor)) for factor in factors_of(model).values())


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
