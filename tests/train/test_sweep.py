"""Sweeps: every run a version, the best aliased, nothing trained twice."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState, TrainingArguments

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from adapterhub_local.train.watch import Watch
from tests.chats import RECIPE, write_recipe

SWEEP = """
[sweep.grid]
train.learning_rate = [1e-4, 2e-2]
[sweep.paired]
adapter.rank = [2, 4]
adapter.alpha = [4, 8]
"""


def sweep_json(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    """What `qhub train ... --json` prints for a sweep."""
    with pytest.raises(SystemExit) as exit_info:
        run(["train", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert exit_info.value.code == 0, captured.err
    return json.loads(captured.out)


def test_a_sweep(tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Four runs are four versions; the best by held-out loss has the aliases; again, nothing is trained."""
    path = write_recipe(tmp_path, RECIPE + SWEEP)
    changes = ["train.learning_rate=2e-2", "adapter.rank=4", "adapter.alpha=8", "output.description=alone"]
    alone = train(load_recipe(path, changes), home)
    printed = sweep_json(capsys, path, "--set", "output.alias=prod")
    registry = Registry(home)
    versions = {str(version): version for version in registry.versions("yes-no")}
    losses = {entry["version"]: entry["scores"]["loss"] for entry in printed["runs"]}

    assert len(versions) == 5
    assert len(losses) == 4
    assert printed["best"] == min(losses, key=lambda version: losses[version])
    assert registry.aliases("yes-no") == {"best": int(printed["best"][-1]), "prod": int(printed["best"][-1])}
    assert {versions[name].lineage["recipe"]["resolved"]["adapter"]["rank"] for name in losses} == {2, 4}
    same = next(
        e for e in printed["runs"] if "adapter.rank=4" in e["changes"] and "train.learning_rate=0.02" in e["changes"]
    )
    assert versions[same["version"]].content_digest == alone.content_digest
    again = sweep_json(capsys, path, "--set", "output.alias=prod")
    assert [entry["was_there"] for entry in again["runs"]] == [True] * 4
    assert again["best"] == printed["best"]
    with pytest.raises(SystemExit):
        run(["train", str(path), "--set", "output.alias=prod"])
    assert f"{printed['best']} is the best by loss: yes-no@best" in capsys.readouterr().out


def test_a_run_that_fails_does_not_end_the_sweep(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A learning rate with which the loss is not a number is reported; the other runs count."""
    # a decay of 10 at a rate of 1 makes every factor nine times as large in each step
    paired = "[sweep.paired]\ntrain.weight_decay = [10, 0]\ntrain.learning_rate = [1, 1e-2]\ntrain.epochs = [15, 1]\n"
    path = write_recipe(tmp_path, RECIPE + paired)
    constant = ("--set", "train.schedule=constant")
    printed = sweep_json(capsys, path, *constant)
    with pytest.raises(SystemExit):
        run(["train", str(path), *constant])

    assert [entry["version"] for entry in printed["runs"]] == [None, "yes-no@1"]
    assert "the loss" in printed["runs"][0]["error"]
    assert printed["best"] == "yes-no@1"
    assert "failed" in capsys.readouterr().out


def test_a_sweep_that_is_stopped_goes_on(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second run keeps the first; --resume goes on in the second and makes what was left."""
    path = write_recipe(tmp_path, RECIPE + "[sweep.grid]\ntrain.epochs = [1, 3, 2]\n")
    at_step_end = Watch.on_step_end

    def stop_in_the_second(watch: Watch, arguments: TrainingArguments, state: TrainerState, *others, **given) -> Any:
        if (state.max_steps, state.global_step) == (6, 2):
            os.kill(os.getpid(), signal.SIGINT)
        return at_step_end(watch, arguments, state, *others, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", stop_in_the_second)
        with pytest.raises(SystemExit) as exit_info:
            run(["train", str(path)])
    assert exit_info.value.code == 130
    assert "--resume" in capsys.readouterr().err
    assert len(Registry(home).versions()) == 1
    printed = sweep_json(capsys, path, "--resume")
    direct = train(load_recipe(path, ["train.epochs=3", "output.description=direct"]), home)

    assert [entry["was_there"] for entry in printed["runs"]] == [True, False, False]
    second = Registry(home).resolve(printed["runs"][1]["version"])
    assert second.content_digest == direct.content_digest


@pytest.mark.parametrize(
    ("sweep", "changes", "told"),
    [
        ("[sweep.grid]\ntrain.seed = [1, -1]\n", [], "train.seed = -1: must be from 0 to 4294967295"),
        ("[sweep.grid]\ntrain.seed = [1, 2]\n", ["data.test_share=0"], "set data.test or data.test_share"),
        ("[sweep.grid]\ndata.limit = [6, 16]\n", ["data.test_share=0.5"], "set data.test"),
        ("[sweep.grid]\nbase.name = ['tiny', 'none']\n", [], "there is no base 'none'"),
    ],
)
def test_a_sweep_that_cannot_be_run(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture,
    sweep: str, changes: list[str], told: str,
) -> None:  # fmt: skip
    """What is wrong with any run is reported before the first one starts."""
    path = write_recipe(tmp_path, RECIPE.replace('test = "test.jsonl"\n', "") + sweep)
    options = [part for change in changes or ["data.test_share=0.5"] for part in ("--set", change)]
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path), *options])

    assert exit_info.value.code == 2
    assert told in capsys.readouterr().err
    assert Registry(home).versions() == []
