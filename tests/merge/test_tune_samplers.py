"""`qhub tune-merge` with samplers on a real base: groups, methods, fronts, early stopping, and searches stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.evaluate.gate import base_for, open_bench
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.merge.merge import merge_to_path
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.merge.tuning import Scored
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.tune.gradient import _soup
from tests.cli.test_cli import Qhub, qhub, save_adapter  # noqa: F401
from tests.merge.noisy_plan import write_plan

PLAN = """\
[[adapter]]
reference = "yes-no"
weight = 1

[[adapter]]
reference = "noise.safetensors"
weight = 0.1

[output]
name = "tuned"

[tune]
search = "gp"
evaluations = 8

[tune.data]
long = "long.jsonl"
short = "short.jsonl"
"""
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture
def plan(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> Path:
    """A plan for a trained adapter and one that is noise, with held-out data of two tasks beside it."""
    return write_plan(PLAN, {"long.jsonl": (40, 3), "short.jsonl": (32, 0)}, tiny_base, home, tmp_path)


def tuned(home: Home, name: str = "tuned") -> dict:
    """What the lineage of the newest version says of its search."""
    tuning: dict = Registry(home).resolve(name).lineage["tuning"]
    return tuning


def candidates(tuning: dict) -> list:
    """What was proposed, in order."""
    return [(trial["weights"], trial["method"], trial["parameters"], trial["share"]) for trial in tuning["trail"]]


def test_groups_and_methods_are_searched_and_the_best_is_a_plan(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """The budget holds more trials than evaluations, as the worse are given up; the best is whole and can be remade."""
    done = qhub("tune-merge", plan, "--groups", "2", "--methods", "weighted_sum,ties", "--json")
    assert done.code == 0, done.err
    told, tuning = json.loads(done.out), tuned(home)
    trail = tuning["trail"]
    assert (tuning["search"], tuning["seed"], tuning["groups"]) == ("optuna-gp", 0, 2)
    assert tuning["spent"] == pytest.approx(sum(trial["share"] for trial in trail), abs=1e-3)
    assert tuning["spent"] <= 8 < len(trail)
    assert {trial["share"] for trial in trail} <= {0.25, 0.5, 1}
    best = trail[tuning["best"]]
    assert best["share"] == 1
    assert best["objective"] == min(trial["objective"] for trial in trail)
    assert [len(weight) for weight in told["weights"]] == [2, 2]
    assert "of 8 evaluations" in done.err
    assert " left]" in done.err
    (file, *others) = told["plans"]
    remade = qhub("merge", file, "--name", "again", "--json")
    assert (remade.code, others) == (0, []), remade.err
    assert json.loads(remade.out)["content_digest"] == told["content_digest"]


def test_a_front_is_plans_that_can_be_merged(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """Each of the front is a file beside the log; no other trial beats it; the best of the mean is registered."""
    done = qhub("tune-merge", plan, "--pareto", "--search", "tpe", "--json")
    assert done.code == 0, done.err
    told, tuning = json.loads(done.out), tuned(home)
    assert len(told["plans"]) == 1 + len(tuning["front"])
    assert tuning["best"] in tuning["front"]
    whole = [trial["scores"] for trial in tuning["trail"] if trial["share"] == 1]
    for number in tuning["front"]:
        mine = [score["loss"] for score in tuning["trail"][number]["scores"].values()]
        others = [[score["loss"] for score in scores.values()] for scores in whole]
        assert not any(all(a < b for a, b in zip(other, mine, strict=True)) for other in others)
    assert qhub("merge", told["plans"][-1], "--name", "chosen").code == 0
    shown = qhub("tune-merge", plan, "--pareto", "--search", "tpe")
    assert "plans of the front" in shown.out
    assert "front-1.toml" in shown.out


def test_a_search_that_was_cut_off_continues_as_if_it_never_had(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """With part of its log, the last line torn, the same candidates are scored; what is there is not scored again."""
    assert qhub("tune-merge", plan).code == 0
    whole = tuned(home)
    (log,) = home.runs.glob("tune-*/trials.jsonl")
    lines = log.read_text().splitlines()
    assert len(lines) == len(whole["trail"])
    log.write_text("\n".join([*lines[:3], lines[3][:50]]))
    assert qhub("tune-merge", plan).code == 0
    assert candidates(tuned(home)) == candidates(whole)
    again = log.read_text().splitlines()
    assert (again[:3], len(again)) == (lines[:3], len(lines) + 1)  # the torn line stays
    assert qhub("tune-merge", plan, "--evaluations", "9").code == 0
    assert candidates(tuned(home))[: len(lines)] == candidates(whole)
    assert qhub("tune-merge", plan, "--seed", "1").code == 0
    assert candidates(tuned(home)) != candidates(whole)


def test_ctrl_c_keeps_what_was_found(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """Exit code 130, the best so far is a plan, nothing is registered or left in tmp; the same command goes on."""
    command = [sys.executable, "-m", "adapterhub_local", "tune-merge", str(plan), "--evaluations", "200"]
    program = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "QHUB_HOME": str(home.root)}
    )
    end = time.monotonic() + 240
    while not any(log.read_text().count("\n") > 2 for log in home.runs.glob("tune-*/trials.jsonl")):
        assert program.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, told = program.communicate(timeout=120)
    (log,) = home.runs.glob("tune-*/trials.jsonl")
    scored = log.read_text().splitlines()
    assert program.returncode == 130, told
    assert f"The best so far: qhub merge {log.with_name('best.toml')}" in told
    assert "tuned" not in Registry(home).names()
    assert [path for path in home.tmp.iterdir() if path.is_dir()] == []
    assert qhub("merge", log.with_name("best.toml"), "--dry-run").code == 0
    assert qhub("tune-merge", plan).code == 0
    assert log.read_text().splitlines()[: len(scored)] == scored
    assert qhub("tune-merge", plan, "--minutes", "1e-9", "--json").code == 0
    assert len(tuned(home)["trail"]) == 1


def test_more_groups_than_layers_are_refused(qhub: Qhub, plan: Path) -> None:  # noqa: F811
    """And a time that is no number; before the base is loaded, with exit code 2."""
    done = qhub("tune-merge", plan, "--groups", "9")
    assert (done.code, "weights for 9 groups of layers, but the adapters have 2 layers" in done.err) == (2, True)
    done = qhub("tune-merge", plan, "--minutes", "nan")
    assert (done.code, "tune.minutes is nan: give a number above 0" in done.err) == (2, True), done.err


def test_weights_of_layers_are_learnt(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """Each epoch is better than the plan's own weights and counts as three evaluations; the same twice."""
    plan.write_text(PLAN.replace('"gp"', '"gradient"').replace("weight = 1\n", "weight = 0.5\n").replace("= 8", "= 10"))
    assert qhub("tune-merge", plan, "--groups", "2", "--json").code == 0
    tuning = tuned(home)
    first, *epochs = tuning["trail"]
    assert (tuning["search"], tuning["spent"], len(epochs)) == ("lora-soups", 9.0, 2)
    assert all(epoch["objective"] < first["objective"] for epoch in epochs)
    assert first["weights"] == [[0.5, 0.5], [0.1, 0.1]]
    assert epochs[-1]["weights"][0][0] != epochs[-1]["weights"][0][1]
    assert qhub("tune-merge", plan, "--groups", "2", "--json").code == 0
    assert candidates(tuned(home)) == candidates(tuning)


def test_what_is_learnt_is_what_is_merged(plan: Path, home: Home, tmp_path: Path) -> None:
    """The losses of the model with the adapters at their weights are those of the merge with these weights."""
    held = Scored({"long": tmp_path / "long.jsonl"})
    registry = Registry(home)
    weights = [(0.7, -0.4), (0.3, 0.1)]
    made = make_plan(["yes-no", str(tmp_path / "noise.safetensors")], weights, registry)
    bench = open_bench(load_base(base_for(made.base, home)), held)
    merge_to_path(made, tmp_path / "merged")
    with _soup(bench.base.model, made, made.group, torch.tensor(weights)):
        learnt = evaluate(bench.base.model, bench.tests["long"], 16)
    assert learnt.losses == pytest.approx(bench.score(tmp_path / "merged")["long"].losses, rel=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"gp"', '"grid"', ":13: tune.search is 'grid': use one of pattern, gp, tpe, cmaes, gradient"),
        ('"gp"', '"pattern"\npareto = true', ":14: search 'pattern' makes one number small, not a Pareto front"),
        ('"gp"', '"cmaes"\nmethods = ["ties", "dare_ties"]', ":14: search 'cmaes' changes weights, it does not choose"),
        ('"gp"', '"gradient"\nmethods = ["ties"]', ":13: search 'gradient' learns the weights of a sum"),
        ('"gp"', '"gp"\nmethods = ["tie"]', ":14: there is no merge method 'tie': did you mean ties?"),
        ('"gp"', '"gp"\nmethods = ["ties", "ties"]', ":14: tune.methods names one twice"),
        ('"gp"', '"gp"\nmethods = "ties"', ":14: tune.methods must be a list of texts"),
        ('"gp"', '"gp"\nlow = -1\nmethods = ["slerp"]', ":15: slerp is between two adapters, with weights from 0"),
        ('"gp"', '"gp"\nseed = -1', ":14: tune.seed must be a whole number from 0, not -1"),
        ('"gp"', '"gp"\nminutes = 0', ":14: tune.minutes is 0: give a number above 0"),
        ('"gp"', '"gp"\ngroups = 2000000000', ":14: tune.groups is 2000000000: no base has more than 1000 layers"),
        ('"gp"', '"gp"\ngroups = 0', ":14: tune.groups must be a whole number from 1, not 0"),
        ("weight = 1\n", "weight = [1, 1, 1]\n", ""),
        ('short = "short.jsonl"\n', "", ""),
    ],
)
def test_what_cannot_be_searched_is_refused(qhub: Qhub, tmp_path: Path, old: str, new: str, told: str) -> None:  # noqa: F811
    """Exit code 2 with file, line and key, before a base is loaded; options are refused by the same rules."""
    for name in ("long", "short"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert PLAN.count(old) == 1
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new))
    options = () if told else ("--groups", "2", "--pareto")
    done = qhub("tune-merge", tmp_path / "plan.toml", *options)
    told = told or ("the adapters have 3 weights each" if "[1" in new else "a Pareto front is of several tasks")
    assert (done.code, told in done.err) == (2, True), done.err
