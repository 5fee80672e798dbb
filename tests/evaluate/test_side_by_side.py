"""Merges side by side: each answers as it would once it is registered, and none is."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.api import evaluate_adapters, merge_adapters
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.errors import Incompatible, InputError
from adapterhub_local.evaluate.side_by_side import side_by_side
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.merge.rank_rule import RankRule
from adapterhub_local.merge.spelled import parse_formula
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import write_recipe

METHODS = ("weighted_sum", "weighted_sum rank=2", "ties density=0.3")


@pytest.fixture
def recipe(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> Path:
    """A recipe with held-out data, by which two versions were trained."""
    path = write_recipe(tmp_path)
    for seed in (0, 1):
        train(load_recipe(path, ["train.epochs=6", f"train.seed={seed}"]), home)
    return path


def tried(recipe: Path, *methods: str, limit: int = 5) -> dict[str, Any]:
    registry, formulas = Registry(), {text: parse_formula(text) for text in methods}
    name = load_recipe(recipe).output.name
    written = WrittenPlan((f"{name}@1", f"{name}@2"), (0.7, 0.3), (None, None), parse_formula("weighted_sum"))
    return side_by_side(written, formulas, load_recipe(recipe), registry, limit=limit)


def test_each_merge_scores_as_it_does_once_it_is_registered(recipe: Path, home: Home) -> None:
    """Loss and exact match are those that `qhub eval` has of the same merge; registry and disk are as before."""
    registry, loaded = Registry(home), load_recipe(recipe)
    name, data = loaded.output.name, loaded.data.test
    before = sorted(map(str, registry.versions()))
    found = tried(recipe, *METHODS)
    assert sorted(map(str, registry.versions())) == before
    assert not list(home.scratch.glob("*"))
    assert [column["name"] for column in found["columns"]] == ["tiny", *METHODS]
    assert found["rows"] == len(found["examples"]) == 5
    assert found["known_to"] == [f"{name}@1", f"{name}@2"]
    assert data is not None
    for column, text in zip(found["columns"][1:], METHODS, strict=True):
        formula = parse_formula(text)
        rank = int(formula.rule.value) if formula.rule.kind == "rank" else None
        made = merge_adapters(
            [f"{name}@1", f"{name}@2"], [0.7, 0.3], name="kept", method=formula.method, rank=rank, **formula.given
        )
        scored = evaluate_adapters(str(made.version), str(data[0]), limit=5).to_json()["scores"][str(made.version)]
        assert column["rank"] == made.report.rank
        assert column["relative_error"] == pytest.approx(made.report.relative_error, abs=1e-7)
        for metric in ("loss", "exact_match"):
            assert column["scores"][metric] == pytest.approx(scored[metric], abs=1e-5)


def test_an_answer_that_is_exact_is_what_was_wanted(recipe: Path) -> None:
    """The marks of the answers make up the score, and a marked answer begins with the wanted text, to the letter."""
    found = tried(recipe, "weighted_sum")
    for place, column in enumerate(found["columns"]):
        marks = [example["answers"][place]["is_exact"] for example in found["examples"]]
        assert sum(marks) / len(marks) == pytest.approx(column["scores"]["exact_match"])
        for example in found["examples"]:
            answer = example["answers"][place]
            assert answer["is_exact"] == (answer["text"] == example["wanted"])
    assert any(example["answers"][1]["is_exact"] for example in found["examples"]), "nothing was learned"


def code(words: list[str]) -> Any:
    """What the command line ends with."""
    with pytest.raises(SystemExit) as ended:
        run(words)
    return ended.value.code


def test_the_command_prints_every_answer(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a table and a list, or as JSON with the same."""
    name = load_recipe(recipe).output.name
    words = ["try-merges", f"{name}@1", f"{name}@2", "--weights", "0.7,0.3", "--recipe", str(recipe), "--limit", "2"]
    words += [word for method in METHODS[:2] for word in ("--method", method)]
    assert code([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert code(words) == 0
    printed = capsys.readouterr().out
    for example in found["examples"]:
        assert f"wanted: {example['wanted']}" in printed
    assert printed.count("weighted_sum rank=2: ") == 2
    assert code([*words, "--method", "weighted_sum  rank=2"]) == 2
    assert "two of the methods are the same" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_with_the_way_out(recipe: Path, home: Home, tmp_path: Path) -> None:
    """Too many methods, data that is judged, no held-out example, or a base that is not here."""
    with pytest.raises(InputError, match="compare 1 to 4 methods, not 5"):
        tried(recipe, *(f"weighted_sum rank={rank}" for rank in range(1, 6)))
    text = recipe.read_text(encoding="utf-8")
    (tmp_path / "bare.toml").write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith("test")).replace(
            "[data]", "[data]\ntest_share = 0"
        ),
        encoding="utf-8",
    )
    with pytest.raises(InputError, match="holds out no example"):
        tried(tmp_path / "bare.toml", "weighted_sum")
    (home.bases / "tiny").rename(home.root / "away")
    with pytest.raises(Incompatible, match="add it with `qhub base add`"):
        tried(recipe, "weighted_sum")


SPELLED = {
    "": "there is no merge method ''",
    "tie": "did you mean ties",
    "ties density": "is not a setting of a merge: write NAME=VALUE",
    "ties density=": "is not a setting",
    "ties name=x": "is not a setting",
    "ties density=0.1 density=0.2": "density stands twice",
    "ties density=much": "density is 'much': write a number",
    "ties rank=1.5": "rank is '1.5': write a whole number",
    "ties rank=3 energy=0.5": "rank and energy exclude each other",
}


@pytest.mark.parametrize("text", SPELLED)
def test_a_method_that_is_spelled_wrong_is_named(text: str) -> None:
    """What is no method, no setting or no number says what to write."""
    with pytest.raises(InputError, match=SPELLED[text]):
        parse_formula(text)


def test_a_method_is_spelled_with_its_settings() -> None:
    """In any order, with any blanks."""
    formula = parse_formula("  dare_ties  rank=4 seed=7\tdensity=0.25 ")
    assert (formula.method, formula.given) == ("dare_ties", {"seed": 7, "density": 0.25})
    assert formula.rule == RankRule("rank", 4)
