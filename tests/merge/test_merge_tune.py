"""Weights searched on held-out data, and the gate that keeps a merge that lost a skill from being registered."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.evaluate.gate import Requirement, check_scores
from adapterhub_local.evaluate.metrics import Score
from adapterhub_local.merge.tuning import Scored
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.tune.pattern import Weights, search
from tests.cli.test_cli import Qhub, qhub, save_adapter  # noqa: F401
from tests.merge.noisy_plan import write_plan

PLAN = """\
[[adapter]]
reference = "yes-no"
weight = 0.25

[[adapter]]
reference = "noise.safetensors"
weight = 1

[output]
name = "tuned"

[tune]
evaluations = 9

[tune.data]
answers = "valid.jsonl"

[evaluate]
require = ["answers.loss<50"]

[evaluate.data]
answers = "test.jsonl"
"""


@pytest.fixture
def plan(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> Path:
    """A plan for a trained adapter and one that is noise, with held-out data beside it."""
    return write_plan(PLAN, {"valid.jsonl": (8, 1)}, tiny_base, home, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_the_best_weights_are_found_and_kept_with_their_trail(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """The loss goes down, the trail is in the lineage, and the same command again scores nothing anew."""
    done = qhub("tune-merge", plan, "--json")
    assert done.code == 0, done.err
    told, version = json.loads(done.out), Registry(home).resolve("tuned@1")
    tuning = version.lineage["tuning"]
    trail = tuning["trail"]
    best = trail[tuning["best"]]
    assert trail[0]["weights"] == [0.25, 1.0]
    assert len(trail) == len({tuple(trial["weights"]) for trial in trail}) == 9
    assert best["objective"] == min(trial["objective"] for trial in trail) < trail[0]["objective"]
    assert best["objective"] == best["scores"]["answers"]["loss"]
    assert told["weights"] == best["weights"] == [parent["weight"] for parent in version.lineage["parents"]]
    assert tuning["data"][0]["file"] == "valid.jsonl"
    assert str(plan.parent) not in json.dumps(tuning)
    assert version.lineage["required"] == ["answers.loss<50"]
    assert version.lineage["metrics"]["answers"]["adapter"]["rows"] == 6

    (log,) = home.runs.glob("tune-*/trials.jsonl")
    lines = log.read_text().splitlines()
    remade = qhub("merge", log.with_name("best.toml"), "--name", "again", "--json")
    assert remade.code == 0, remade.err
    assert json.loads(remade.out)["content_digest"] == version.content_digest
    again = qhub("tune-merge", plan, "--evaluations", "10")
    assert again.code == 0, again.err
    assert log.read_text().splitlines()[:9] == lines
    assert len(log.read_text().splitlines()) == 10
    assert "the best of 10, " in again.out
    assert Registry(home).resolve("tuned@2")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_merge_that_loses_a_skill_is_not_registered(qhub: Qhub, plan: Path, home: Home) -> None:  # noqa: F811
    """Exit code 1 with the figure, nothing registered or written; what passes keeps its scores."""
    data = f"answers={plan.parent / 'test.jsonl'}"
    line = ("merge", "yes-no", plan.parent / "noise.safetensors", "--weights", "0,2", "--data", data)
    refused = qhub(*line, "--require", "answers.exact_match>=0.99", "--require", "answers.loss<1e3", "--name", "m")
    assert refused.code == 1
    assert "answers.exact_match is" in refused.err
    assert "but answers.exact_match>=0.99 is required" in refused.err
    assert "answers.loss" not in refused.err
    assert qhub(*line, "--require", "answers.exact_match>=0.99", "-o", "m.safetensors").code == 1
    assert list(Path.cwd().iterdir()) == []
    assert "m" not in Registry(home).names()
    assert [path for path in home.tmp.iterdir() if path.is_dir()] == []

    kept = qhub(*line, "--require", "answers.loss<1e3", "--limit", "3", "--name", "m")
    assert kept.code == 0, kept.err
    lineage = Registry(home).resolve("m@1").lineage
    assert lineage["metrics"]["answers"]["adapter"]["rows"] == 3
    assert lineage["required"] == ["answers.loss<1000"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("evaluations = 9", "evaluations = 0", ":13: tune.evaluations must be a whole number from 1, not 0"),
        ("evaluations = 9", "evalutions = 9", ":13: unknown key 'evalutions' in [tune]: did you mean 'evaluations'?"),
        ("evaluations = 9", 'metric = "accuracy"', ":13: tune.metric is 'accuracy': use loss or exact_match"),
        ("evaluations = 9", "low = 2", ":13: tune.low 2 is not below high 1.5"),
        ("weight = 0.25", "weight = 3", ":3: the search starts at weight 3, outside of tune.low 0 to high 1.5"),
        ('[tune.data]\nanswers = "valid.jsonl"', "", ":12: [tune] needs held-out chats"),
        ('"valid.jsonl"', "3", "tune.data must be a table of tasks and their files"),
        ('require = ["answers.loss<50"]', 'require = "answers.loss<50"', "evaluate.require must be a list of texts"),
        ('"valid.jsonl"', '"none.jsonl"', "there is no data file"),
        ('["answers.loss<50"]', '["answers.loss=50"]', "'answers.loss=50' is not a requirement"),
        ('["answers.loss<50"]', '["other.loss<50"]', "other.loss<50 cannot be checked without data"),
        ("[output]", "[tuned]", ":9: unknown table [tuned]: did you mean 'tune'?"),
        ('name = "tuned"', "", "does not say where the best merge goes"),
        (PLAN[PLAN.index("[tune]") : PLAN.index("[evaluate]")], "", "has no [tune]"),
    ],
)
def test_a_plan_that_cannot_be_tuned_is_refused(
    qhub: Qhub,  # noqa: F811
    tmp_path: Path,
    old: str,
    new: str,
    told: str,
) -> None:
    """Each mistake is reported before a base is loaded, with its line where it is one of the plan's text."""
    (tmp_path / "valid.jsonl").write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")
    assert PLAN.count(old) == 1
    (tmp_path / "plan.toml").write_text(PLAN.replace(old, new))
    done = qhub("tune-merge", tmp_path / "plan.toml")
    assert (done.code, told in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    "text", ["", "exact_match>0.8", "a.exact_match", "a.loss>x", "a.loss>=nan", "a.accuracy>1", "a.loss==1"]
)
def test_requirements_that_say_nothing_are_refused(text: str) -> None:
    """A task, a known metric, an order and a number, or an error that shows how to write one."""
    with pytest.raises(InputError, match=r"sentiment\.exact_match>=0\.8"):
        Requirement.parse(text)


def test_a_requirement_is_a_bound() -> None:
    """Each order means what it says, at the bound too; names of tasks may have dots; all that fail are reported."""
    for text, value, met in (
        *(("a.loss>=1", 1, True), ("a.loss>1", 1, False), ("a.loss<=1", 1, True), ("a.loss<1", 1, False)),
        *(("a.b.exact_match >= 0.8", 0.7, False), ("held-out.exact_match>.5", 0.6, True)),
    ):
        assert Requirement.parse(text).bound.holds(value) is met
    assert (Requirement.parse("a.b.loss<1").task, str(Requirement.parse("a.b.loss < 1e0"))) == ("a.b", "a.b.loss<1")
    scores = {"a": Score(10, 2.0, 0.5), "b": Score(4, 1.0, 1.0)}
    wanted = [Requirement.parse(text) for text in ("a.exact_match>=0.8", "b.exact_match>=0.8", "a.loss<1")]
    with pytest.raises(QhubError) as caught:
        check_scores(scores, wanted, Scored({"a": Path("x/a.jsonl"), "b": Path("b.jsonl")}))
    for part in ("a.exact_match is 0.5 on 10 examples of a.jsonl", "a.loss is 2"):
        assert part in str(caught.value)
    assert "b.exact_match" not in str(caught.value)
    assert caught.value.exit_code == 1


BOWLS: list[tuple[Callable[[Weights], float], Weights]] = [
    (lambda w: (w[0] - 0.7) ** 2 + (w[1] - 0.3) ** 2, (0.7, 0.3)),
    (lambda w: (w[0] + w[1] - 1) ** 2 * 20 + (w[0] - w[1] - 0.5) ** 2, (0.75, 0.25)),  # a narrow valley
    (lambda w: -w[0] + w[1], (1.5, 0.0)),  # the best is a corner of the box
    (lambda w: abs(w[0] - 1.2) + 3 * abs(w[1] - 0.9) + (w[2] - 0.1) ** 2, (1.2, 0.9, 0.1)),
]


@pytest.mark.parametrize(("bowl", "lowest"), BOWLS)
def test_the_search_finds_the_lowest_point(bowl: Callable[[Weights], float], lowest: Weights) -> None:
    """Within a few hundredths, in the box, never the same point twice, and the same every time."""
    asked: list[Weights] = []

    def ask(weights: Weights) -> float:
        asked.append(weights)
        return bowl(weights)

    found = search(ask, [1.0] * len(lowest), 0.0, 1.5)
    assert found == pytest.approx(lowest, abs=0.05)
    assert len(set(asked)) == len(asked)
    assert all(0 <= weight <= 1.5 for weights in asked for weight in weights)
    assert search(bowl, [1.0] * len(lowest), 0.0, 1.5) == found
    assert len(asked) <= 200
