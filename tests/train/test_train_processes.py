"""Several processes train one adapter: the same as one process makes of the same rows."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.data.dataset import read_data
from adapterhub_local.errors import InputError
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.settings import Home, Process, process
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.launch import launch
from adapterhub_local.train.optimise import agree
from adapterhub_local.train.past_runs import read_log
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.train import train
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch
from tests.architectures import save_architecture
from tests.chats import RECIPE, write_recipe

CHANGES = ["train.epochs=4", "train.eval_every=3"]
ONE = [*CHANGES, "train.micro_batch_size=4"]  # what one process does with the rows of two


def test_two_processes_are_one_with_twice_the_accumulation(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run of a sweep in two processes (gloo) registers once the very adapter that one makes with half-size rows."""
    one = train(load_recipe(write_recipe(tmp_path, count=14), ONE), home)  # the last batch is not whole
    path = write_recipe(tmp_path, RECIPE + "[sweep.grid]\ntrain.epochs = [4]\n", count=14)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path), "--nproc", "2", "--json", "--set", CHANGES[1]])
    captured = capsys.readouterr()
    assert exit_info.value.code == 0, captured.err
    (only,) = json.loads(captured.out)["runs"]
    two = Registry(home).resolve("yes-no@best")

    assert (only["version"], only["changes"], two.number) == ("yes-no@2", ["train.epochs=4"], 2)
    assert two.lineage["training"]["processes"] == 2
    assert two.content_digest == one.content_digest
    assert len(read_log(home.runs / two.lineage["run"])) == 8 + 3


def test_experts_that_no_token_was_routed_to(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mixture, of whose experts a step meets a part, two processes train the very adapter of one."""
    folder = save_architecture("qwen3-moe", tmp_path / "model", num_experts=48, mlp_only_layers=[0])
    add_base("tiny", folder, home)
    changes = ["train.epochs=1", "train.batch_size=2"]
    path = write_recipe(tmp_path, count=6)
    one = train(load_recipe(path, [*changes, "train.micro_batch_size=1"]), home)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path), "--nproc", "2", *(part for change in changes for part in ("--set", change))])
    two = Registry(home).resolve("yes-no")

    assert exit_info.value.code == 0
    assert (two.number, two.lineage["training"]["processes"]) == (2, 2)
    assert two.content_digest == one.content_digest


def test_two_machines_are_one(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Two machines of one process each, each with a home of its own, make the adapter of one process; the second's
    home is left as it was."""
    path = write_recipe(tmp_path, count=14)
    one = train(load_recipe(path, ONE), home)
    other = Home(tmp_path / "other")
    shutil.copytree(home.bases, other.bases)
    before = sorted(other.root.rglob("*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    overrides = [part for change in CHANGES for part in ("--set", change)]
    nodes = []
    for rank, place in enumerate((home, other)):
        options = ["--nnodes", "2", "--node-rank", str(rank), "--rendezvous", rendezvous, "--json", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "QHUB_HOME": str(place.root)}
        command = [sys.executable, "-m", "adapterhub_local", "train", str(path), *options]
        nodes.append(subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment))
    (output, errors), (output_of_other, errors_of_other) = (node.communicate(timeout=300) for node in nodes)

    assert [node.returncode for node in nodes] == [0, 0], errors + errors_of_other
    assert output_of_other == ""
    assert json.loads(output)["reference"] == "yes-no@2"
    assert Registry(home).resolve("yes-no@2").content_digest == one.content_digest
    assert {path for path in other.root.rglob("*") if path.is_file()} == {path for path in before if path.is_file()}


def test_machines_that_do_not_train_the_same(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with other data or another recipe is named with what differs, before anything is trained."""
    recipe = load_recipe(write_recipe(tmp_path))
    run = Run(recipe, tiny_base, home, read_data(recipe))
    write_recipe(tmp_path, count=15)
    changed = load_recipe(recipe.path, ["train.seed=1"])
    other = Run(changed, tiny_base, home, read_data(changed))

    def gather(told: list, own: dict) -> None:
        told[:] = [other.decisive, own]  # process 0 is another machine

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"process 1 .*: data.train \(train.jsonl\) changed, train.seed changed from 1 to 0"
    ):
        agree(run)
    other = run
    agree(run)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--nnodes 2", "needs --node-rank (0 to 1, different on each machine) and --rendezvous HOST:PORT"),
        ("--nnodes 2 --node-rank 2 --rendezvous a:1", "with --nnodes 2 it is from 0 to 1"),
        ("--nnodes 2 --node-rank 0 --rendezvous 29500", "write HOST:PORT"),
        ("--nnodes 2 --node-rank 0 --rendezvous a:99999", "write HOST:PORT"),
        ("--node-rank 0", "say with --nnodes how many"),
        ("--only-run 3", "has 2 runs"),
        ("--nnodes 2 --node-rank 0 --rendezvous a:1", "--nnodes is for one run, and"),
        ("--dry-run", "--dry-run is for one run, and"),
    ],
)
def test_options_that_make_no_sense(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, told: str
) -> None:
    """Machines without a rank or a meeting place, and a sweep where one run is needed, are reported in one line."""
    path = write_recipe(tmp_path, RECIPE + "[sweep.grid]\ntrain.seed = [1, 2]\n")
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path), *options.split()])

    assert exit_info.value.code == 2
    assert told in capsys.readouterr().err


def test_all_stop_after_the_same_step(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A stop that another process was asked for comes with the sum of the gradients, in the same step."""
    recipe = load_recipe(write_recipe(tmp_path))
    base = load_base(tiny_base)
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
    model = with_adapter(base, recipe)
    watch = Watch(lambda entry: None)
    trainer = make_trainer(model, examples, recipe, tmp_path / "run", watch)

    def other(vector: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        theirs = torch.ones_like(vector)  # a loss of 1, asked to stop, gradients of 1
        return vector + theirs

    trainer.accelerator.reduce = other
    factors = list(factors_of(model).values())
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    loss_and_metrics = trainer._sum_over_processes(torch.tensor([2.0, 0.5]))

    assert loss_and_metrics.tolist() == [3.0, 1.5]
    assert watch.stop_asked
    assert all(torch.equal(factor.grad, torch.ones_like(factor)) for factor in factors)


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
    with pytest.raises(InputError, match="accelerate cannot shard this base"):
        train(load_recipe(write_recipe(tmp_path)), home)


def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun a process is alone and leads; a rank that is not a number is reported."""
    assert process() == Process(0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process() == Process(3, 0, 4)
    assert not process().is_leader
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="whole numbers"):
        process()
